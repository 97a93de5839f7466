"""A run of a config as shapes: parameters, adapters, optimiser, batch, each with its place on a mesh; no array is made.

What train.py makes with weights is made here under `jax.eval_shape`, by the same functions, so that a model of any size
is laid out in seconds on devices that need not be there.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxtune import adapt, optim, tree
from jaxtune import mesh as meshes
from jaxtune.config import to_json
from jaxtune.data.batches import collate, fit_length, fit_lengths
from jaxtune.data.seq2seq import Lengths, sides
from jaxtune.hf.adapters import PeftAdapter
from jaxtune.hf.base import Base, open_base
from jaxtune.hf.boxes import axis_of, place, stacked
from jaxtune.hf.rows import Row
from jaxtune.models import decoder_start
from jaxtune.peft.method import to_variables
from jaxtune.quant import Quantised, scheme_of
from jaxtune.state import State
from jaxtune.step import train_step
from jaxtune.typing import Tree

# Steps of a run whose rows are not known: schedules need a number, and no size follows from it.
STEPS = 1000


class Laid(NamedTuple):
    """The arguments of a training step as shapes with shardings, and what the step is made of.

    state: `jaxtune.state.State`.  frozen: {path: shape}.  batch: {name: shape [A, B, T]}.  length: T, or both sides'.
    """

    base: Base
    mesh: Any
    adapted: adapt.Adapted
    state: State
    frozen: dict[str, Any]
    batch: dict[str, Any]
    length: int | Lengths
    step: Any


def open_config(c: Any) -> Base:
    """The base of a config, of which config.json alone is read (and asked of the Hub).

    Raises:
      MissingInputError, UserError: as `open_base`, and settings that contradict each other.
    """
    quant = scheme_of(c.model.quant, c.model.double_quant, c.model.quant_embedding)
    how = {"dtype": c.model.dtype, "remat": c.train.remat, "unroll": c.train.unroll_layers, "quant": quant}
    base = open_base(c.model.id, revision=c.model.revision, weights=False, **how)
    adapt.check_targets(to_json(c)["peft"], base)
    return base


def longest(c: Any, base: Base) -> int | Lengths:
    """The static length of a batch whose longest row is as long as the config allows."""
    virtual = adapt.virtual_tokens(to_json(c)["peft"], base)
    two = sides(decoder_start(base.hf_config), c.data.max_length, c.data.max_target_length)
    if two is not None:
        return fit_lengths([], c.data.max_length, two, virtual)
    return fit_length([], c.data.max_length, virtual=virtual.count)


def lay_out(c: Any, base: Base, mesh: Any, length: int | Lengths | None = None) -> Laid:
    """All arguments of the config's training step on a mesh: real (its devices may be described ones), or abstract.

    Args:
      length: of a batch; None: what the config allows.

    Raises:
      UserError: as training does before it loads a weight: a batch that the mesh does not split, sizes without blocks.
    """
    length = longest(c, base) if length is None else length
    adapted = lay_adapters(to_json(c)["peft"], base, mesh, dtype=c.model.dtype)
    schedule = optim.make_schedule(with_rate(c), STEPS)
    # AdaLoRA's optimiser looks at which ranks there are: here all.
    masks = {p: np.ones(x.shape, x.dtype) for p, x in adapted.frozen.items() if p.endswith("/live/fixed")}
    ruled = adapted._replace(frozen=adapted.frozen | masks)
    rule = ruled.optimiser(optim.make_optimiser(c.optim, schedule))
    rule = optim.offloaded(rule) if c.optim.offload else rule
    abstract = jax.eval_shape(rule.init, adapted.trainable)
    where = optim.state_shardings(mesh, abstract, adapted.trainable, offload=c.optim.offload)
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=meshes.replicated(mesh))
    state = State(count, adapted.trainable, jax.tree.map(placed, abstract, where))
    turns = c.train.gradient_accumulation_steps
    rows = c.train.global_batch_size // turns
    meshes.check_batch(mesh, rows, "`train.global_batch_size` / `train.gradient_accumulation_steps`")
    split = meshes.batch_sharding(mesh, leading=1)
    batch = {
        name: jax.ShapeDtypeStruct((turns, rows, *x.shape[1:]), x.dtype, sharding=split)
        for name, x in collate([], 1, length).items()
    }
    parts: dict[str, Any] = {"model": base.model, "structure": adapted.structure, "penalty": adapted.penalty()}
    parts |= {"optimiser": rule, "schedule": schedule, "seed": c.train.seed, "z_loss": c.train.z_loss}
    step = functools.partial(train_step, **parts)
    return Laid(base, mesh, adapted, state, adapted.frozen, batch, length, step)


def with_rate(c: Any) -> Any:
    """`optim` with the method's own learning rate where none is named."""
    if c.optim.learning_rate is not None:
        return c.optim
    own = c.optim.copy_and_resolve_references()
    own.learning_rate = adapt.learning_rate(to_json(c)["peft"])
    return own


def lay_adapters(section: dict[str, Any], base: Base, mesh: Any, *, dtype: str) -> adapt.Adapted:
    """`adapt.adapt` as shapes."""
    method, settings = adapt.read_method(section)
    layers = adapt.partial.plan(base.layout, settings) if method is None else {}
    params = lay_params(base, mesh, lambda path: jnp.dtype(jnp.float32 if path in layers else dtype), layers)
    variables, peft = {"params": params}, None
    if section["init_from"]:
        peft = adapt.load_first(section, base)
        peft = peft._replace(config=adapt.with_steps(peft.config, STEPS))
        made = to_variables(peft.adapters)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), nn.unbox(made))
        variables |= jax.tree.map(placed, shapes, meshes.shardings(mesh, made))
    elif method is not None:
        settings = adapt.with_steps(settings, STEPS)
        peft = PeftAdapter(method, settings, {}, None)
        made = lay_fresh(method, settings, base, params)
        variables |= jax.tree.map(placed, nn.unbox(made), meshes.shardings(mesh, made))
    return adapt.divided(variables, peft, layers)


def lay_fresh(method: Any, settings: Any, base: Base, params: Tree) -> Tree:
    """The method's first adapters, boxed, of parameters that are shapes.  A text counts as one token."""
    flat = tree.flatten(params, is_leaf=lambda x: isinstance(x, Quantised))
    ranks = adapt.wanted_of_rounding(method, settings, base)
    lost = {path: _lost(flat[path].shape, rank) for path, rank in ranks.items()}
    init = adapt.initial(method, settings, base, lambda text: [0])
    return jax.eval_shape(init, jax.random.key(0), flat, lost)


def _lost(shape: Sequence[int], rank: int) -> tuple[Any, ...]:
    """What `hf.base.lost_by_rounding` gives of a weight [L, I, O]."""
    L, I, O = shape
    return tuple(jax.ShapeDtypeStruct(s, jnp.float32) for s in ((L, I, rank), (L, rank), (L, rank, O)))


def lay_params(base: Base, mesh: Any, dtype: Any, trained: Any = ()) -> Tree:
    """`hf.base.load_base` as shapes: the same parameters, quantised where it quantises."""
    leaves = {}
    for row in base.rows:
        if base.quantises(row.path) and row.path not in trained:
            leaves[row.path] = lay_box(base, row, mesh, dtype(row.path))
        else:
            where = NamedSharding(mesh, meshes.spec(mesh, row.axes, row.shape))
            leaves[row.path] = jax.ShapeDtypeStruct(row.shape, dtype(row.path), sharding=where)
    return tree.nest(leaves)


def lay_box(base: Base, row: Row, mesh: Any, dtype: Any) -> Quantised:
    """`hf.boxes.load_box` as shapes."""
    assert base.quant is not None
    axes, shape, axis = row.axes[row.stacked :], row.shape[row.stacked :], axis_of(row)
    quantise = functools.partial(base.quant.quantise, axis=axis)
    box = jax.eval_shape(quantise, jax.ShapeDtypeStruct(shape, dtype))
    where = place(base.quant.shardings(mesh, row.path, axes, shape, axis), box)
    if not row.stacked:
        return jax.tree.map(placed, box, where)
    L = row.shape[0]
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct((L, *x.shape), x.dtype, sharding=stacked(s)), box, where)


def placed(x: Any, where: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


def bytes_on_chip(leaves: Tree) -> int:
    """Bytes of laid out leaves that one chip holds; those in the host's memory are not counted."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape), dtype=np.int64)) * x.dtype.itemsize
        for x in jax.tree.leaves(leaves)
        if x.sharding.memory_kind != optim.HOST
    )


def abstract_mesh(c: Any, chips: int) -> Any:
    """The config's mesh over so many chips, of sizes alone.

    Raises:
      UserError: the sizes do not multiply to the number of chips.
    """
    sizes = meshes.sizes_of(c.mesh.data, c.mesh.fsdp, c.mesh.tensor, chips, "planned for", slices=c.mesh.slice)
    return jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))
