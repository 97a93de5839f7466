"""What fits: one setting on one slice, the smallest slice, the largest batch, and the best of many settings."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from jaxtune.config import to_json
from jaxtune.errors import UserError
from jaxtune.hf.base import Base
from jaxtune.mesh import batch_shards
from jaxtune.plan import memory, roofline
from jaxtune.plan.abstract import Laid, abstract_mesh, lay_out, open_config
from jaxtune.plan.chips import Chip
from jaxtune.plan.flops import Flops, flops

# What compilers reserve differs from what is predicted by so much: what would fill more does not count as fitting.
MARGIN = 0.05


class Plan(NamedTuple):
    """A config on a slice."""

    config: Any
    chip: Chip
    chips: int
    laid: Laid
    memory: memory.Memory
    flops: Flops
    bound: roofline.Bound

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.chip.hbm * (1 - MARGIN)


def plan(c: Any, base: Base, chip: Chip, chips: int, length: Any = None) -> Plan:
    """Predicts one setting.

    Args:
      length: of a batch; None: what the config allows.

    Raises:
      UserError: a mesh that is not of so many chips, a batch that it does not split, sizes without whole blocks.
    """
    return priced(c, base, chip, chips, lay_out(c, base, abstract_mesh(c, chips), length))


def priced(c: Any, base: Base, chip: Chip, chips: int, laid: Laid) -> Plan:
    """`plan` of a run that is laid out already; of the config only what changes no argument of the step may be other
    than then: remat, and into how many micro-batches the batch is cut."""
    has, turns = memory.held(laid), c.train.gradient_accumulation_steps
    work = memory.Work(
        base,
        laid.mesh,
        rows=c.train.global_batch_size // turns // batch_shards(laid.mesh),
        length=laid.length,
        remat=c.train.remat,
        dtype=c.model.dtype,
        platform=chip.platform,
        turns=turns,
        trainable=laid.state.trainable,
    )
    one_row = flops(base, laid.state.trainable, laid.length, c.train.remat, blocks=chip.platform == "tpu")
    bound = roofline.bound(chip, chips, one_row, has, work, offload=c.optim.offload)
    return Plan(c, chip, chips, laid, memory.predict(has, work), one_row, bound)


def attempt(c: Any, base: Base, chip: Chip, chips: int, length: Any = None) -> Plan | None:
    """`plan`, or None where that setting is refused."""
    try:
        return plan(c, base, chip, chips, length)
    except UserError:
        return None


def changed(c: Any, **values: Any) -> Any:
    """A copy of a config with other values, by `section__key`."""
    copy = c.copy_and_resolve_references()
    for name, value in values.items():
        section, _, key = name.partition("__")
        copy[section][key] = value
    return copy


def smallest_slice(c: Any, base: Base, chip: Chip) -> Plan | None:
    """The config on the fewest chips on which it fits, its mesh stretched by fsdp; None where it fits on none."""
    for chips in chip.counts():
        shards = min(chips, c.train.global_batch_size // c.train.gradient_accumulation_steps)
        for mesh in ({"data": 1, "fsdp": chips, "tensor": 1}, {"data": 1, "fsdp": shards, "tensor": chips // shards}):
            found = attempt(changed(c, **{f"mesh__{k}": v for k, v in mesh.items()}, mesh__slice=1), base, chip, chips)
            if found is not None and found.fits:
                return found
    return None


def largest_batch(c: Any, base: Base, chip: Chip, chips: int, length: Any = None) -> Plan | None:
    """The most rows at a time that fit, in one micro-batch; None where not even one a chip does."""
    ways = batch_shards(abstract_mesh(c, chips))

    def rows(n: int) -> Plan | None:
        batch = {"train__global_batch_size": n * ways, "train__gradient_accumulation_steps": 1}
        return attempt(changed(c, **batch), base, chip, chips, length)

    def fitting(n: int) -> bool:
        found = rows(n)
        return found is not None and found.fits

    if not fitting(1):
        return None
    high = 2
    while high < 4096 and fitting(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fitting(middle) else (low, middle)
    return rows(low)


def settings(c: Any, base: Base, chips: int) -> Iterator[Any]:
    """The config on other meshes, remat policies, rows at a time and quantised bases, the global batch as it is."""
    size = c.train.global_batch_size
    quants = [c.model.quant] if c.model.quant or to_json(c)["peft"]["method"] in ("full", "partial") else [None, "nf4"]
    heads = base.model.config.kv_heads
    for tensor in (n for n in (1, 2, 4, 8) if chips % n == 0 and heads % n == 0):
        ways = chips // tensor
        for fsdp in {ways, 1}:
            mesh = {"mesh__data": ways // fsdp, "mesh__fsdp": fsdp, "mesh__tensor": tensor, "mesh__slice": 1}
            for turns in (n for n in (1, 2, 4, 8, 16) if size % (n * ways) == 0):
                for remat in REMAT:
                    for quant in quants:
                        more = {"train__gradient_accumulation_steps": turns, "train__remat": remat}
                        yield changed(c, **mesh, **more, model__quant=quant)


# `offload` is for what fits in no other way.
REMAT = ("none", "dots", "attn_out", "full")


def best(c: Any, base: Base, chip: Chip, chips: int, length: Any = None, most: int = 8) -> list[Plan]:
    """The settings that fit, the fastest bound first, of equal ones the one that needs less memory."""
    found, bases, laid = [], {c.model.quant: base}, {}
    for other in settings(c, base, chips):
        quant = other.model.quant
        if quant not in bases:
            bases[quant] = open_config(other)
        key = (quant, *other.mesh.values())
        try:
            if key not in laid:
                laid[key] = lay_out(other, bases[quant], abstract_mesh(other, chips), length)
        except UserError:
            continue
        one = priced(other, bases[quant], chip, chips, laid[key])
        if one.fits:
            found.append(one)
    # Of bounds that are equal, first where the other resources have less to do.
    return sorted(found, key=lambda p: (round(p.bound.step, 3), sum(p.bound.seconds.values()), p.memory.total))[:most]


def nearest(c: Any, base: Base, chip: Chip, chips: int, length: Any = None) -> tuple[dict[str, Any], Plan] | None:
    """({key: value} to change, the plan) of the least change with which it fits: what costs nothing but time first,
    then what changes the result a little.  None where nothing here helps."""
    size, ways = c.train.global_batch_size, batch_shards(abstract_mesh(c, chips))
    full = to_json(c)["peft"]["method"] in ("full", "partial")
    steps: list[dict[str, Any]] = []
    if c.mesh.data > 1:
        steps.append({"mesh.data": 1, "mesh.fsdp": -1})
    if c.train.remat != "full":
        steps.append({"train.remat": "full"})
    now = c.train.gradient_accumulation_steps
    steps += [
        {"train.gradient_accumulation_steps": n} for n in range(now + 1, size // ways + 1) if size % (n * ways) == 0
    ]
    if c.model.quant is None and not full:
        steps.append({"model.quant": "nf4"})
    if full and c.optim.name == "adamw":
        steps.append({"optim.name": "adamw8bit"})
    together: dict[str, Any] = {}
    for step in steps:
        # Alone, then with those before it.
        for values in (step, together | step):
            other = changed(c, **{key.replace(".", "__"): value for key, value in values.items()})
            over = open_config(other) if "model.quant" in values else base
            found = attempt(other, over, chip, chips, length)
            if found is not None and found.fits:
                return values, found
        together |= step
    return None
