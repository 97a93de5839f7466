"""The optimiser of a config: a schedule, clipping, one of five rules, and where its state lies."""

import functools
import math
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jaxtune import adamw8bit, tree
from jaxtune import mesh as meshes
from jaxtune.errors import UserError, did_you_mean
from jaxtune.typing import Tree


def adamw(rate, c):
    return optax.adamw(rate, c.b1, c.b2, c.eps, weight_decay=c.weight_decay)


def adamw_8bit(rate, c):
    return adamw8bit.adamw8bit(rate, c.b1, c.b2, c.eps, c.weight_decay)


def adafactor(rate, c):
    return optax.adafactor(rate, weight_decay_rate=c.weight_decay or None)


def lion(rate, c):
    return optax.lion(rate, c.b1, c.b2, weight_decay=c.weight_decay)


def sgd(rate, c):
    return optax.chain(optax.add_decayed_weights(c.weight_decay), optax.sgd(rate, c.momentum or None))


OPTIMISERS = {"adamw": adamw, "adamw8bit": adamw_8bit, "adafactor": adafactor, "lion": lion, "sgd": sgd}
# What jax calls memory of the host that a device reads and writes by itself.
HOST = "pinned_host"


def relaxed(function: Any) -> Any:
    """optax multiplies integers with floats and scalars with arrays; our tests forbid both in our own code."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return function(*args, **kwargs)

    return call


def make_schedule(c: Any, total_steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up, then constant, linear or cosine to `end_fraction` at the last step."""
    steps = max(total_steps - c.warmup_steps, 1)
    rate = c.learning_rate
    after = {
        "constant": optax.constant_schedule(rate),
        "linear": optax.linear_schedule(rate, rate * c.end_fraction, steps),
        "cosine": optax.cosine_decay_schedule(rate, steps, c.end_fraction),
    }[c.schedule]
    if not c.warmup_steps:
        return relaxed(after)
    # As in transformers: step 0 has rate 0, and the full rate is reached at step `warmup_steps`.
    warmup = optax.linear_schedule(0.0, rate, c.warmup_steps)
    return relaxed(optax.join_schedules([warmup, after], [c.warmup_steps]))


def later(schedule: optax.Schedule, steps: int) -> optax.Schedule:
    """The schedule from a step on, for an optimiser that counts from there."""
    return (lambda count: schedule(count + steps)) if steps else schedule


def make_optimiser(c: Any, schedule: optax.Schedule) -> optax.GradientTransformation:
    """The `optim` section as an optax transformation.

    Raises:
      UserError: an optimiser that does not exist.
    """
    if c.name not in OPTIMISERS:
        raise UserError(
            f"`optim.name` is {c.name!r}. It can be: {', '.join(OPTIMISERS)}.{did_you_mean(c.name, OPTIMISERS)}"
        )
    clip = [optax.clip_by_global_norm(c.max_grad_norm)] if c.max_grad_norm else []
    chain = optax.chain(*clip, OPTIMISERS[c.name](schedule, c))
    return optax.GradientTransformation(relaxed(chain.init), relaxed(chain.update))


def check_offload(c: Any) -> None:
    """Refuses `optim.offload` where devices cannot reach the host's memory, or XLA cannot compile it.

    Raises:
      UserError: naming what holds less instead.
    """
    if not c.offload:
        return
    device = jax.local_devices()[0]
    kinds = sorted({memory.kind for memory in device.addressable_memories()})
    if HOST not in kinds:
        raise UserError(
            f"`optim.offload` is true, and {device.platform} devices have no {HOST} memory (theirs: "
            f"{', '.join(kinds)}). Set it to false; `optim.name` adamw8bit holds a quarter of adamw's state."
        )
    if c.name == "adamw8bit" and device.platform == "tpu":
        # libtpu 0.0.42: "Source and destination buffers in CopyDone arguments need to be the same shape".
        raise UserError(
            "`optim.offload` is true, and XLA for TPUs does not compile copies of bytes from the host, which adamw8bit "
            "would need. Set it to false, or `optim.name` to adamw."
        )


def offloaded(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner`, whose state comes from the host and goes back in each update.  Numbers alone, as counts, stay."""

    def to(state: Tree, where: Any) -> Tree:
        return jax.tree.map(lambda x: jax.device_put(x, where) if x.ndim else x, state)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = inner.update(updates, to(state, jax.memory.Space.Device), params)
        return updates, to(state, jax.memory.Space.Host)

    return optax.GradientTransformation(inner.init, update)


def state_shardings(
    mesh: meshes.AnyMesh, abstract_state: Tree, trainable: dict[str, Any], *, offload: bool = False
) -> Tree:
    """A sharding for every optimiser leaf: its weight's where it has its weight's path and shape; where it has as many
    axes (one number for each block of them), the weight's for those that it divides; else replicated.

    A leaf without one (Adam's count) would stay on one process's device, and a restored run would not start.

    Args:
      offload: in the host's memory, all but numbers alone.
    """

    def one(keys: Any, leaf: Any) -> Any:
        owner = next((w for path, w in trainable.items() if tree.path_of(keys).endswith(path)), None)
        where = meshes.replicated(mesh)
        if owner is not None and owner.ndim == leaf.ndim and isinstance(owner.sharding, NamedSharding):
            where = NamedSharding(mesh, _dividing(mesh, owner.sharding.spec, leaf.shape))
        return where.with_memory_kind(HOST) if offload and leaf.ndim else where

    return jax.tree_util.tree_map_with_path(one, abstract_state)


def _dividing(mesh: meshes.AnyMesh, spec: PartitionSpec, shape: tuple[int, ...]) -> PartitionSpec:
    """`spec`, without the axes that it does not split into equal parts."""
    ways = [math.prod(mesh.shape[n] for n in ((e,) if isinstance(e, str) else e or ())) for e in spec]
    return PartitionSpec(*(e if size % w == 0 else None for e, size, w in zip(spec, shape, ways, strict=False)))
