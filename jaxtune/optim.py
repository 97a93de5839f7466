"""The optimiser of a config: a schedule, clipping, and one of optax's four."""

import functools
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from jaxtune import mesh as meshes
from jaxtune import tree
from jaxtune.errors import UserError, did_you_mean
from jaxtune.typing import Tree


def adamw(rate, c):
    return optax.adamw(rate, c.b1, c.b2, c.eps, weight_decay=c.weight_decay)


def adafactor(rate, c):
    return optax.adafactor(rate, weight_decay_rate=c.weight_decay or None)


def lion(rate, c):
    return optax.lion(rate, c.b1, c.b2, weight_decay=c.weight_decay)


def sgd(rate, c):
    return optax.chain(optax.add_decayed_weights(c.weight_decay), optax.sgd(rate, c.momentum or None))


OPTIMISERS = {"adamw": adamw, "adafactor": adafactor, "lion": lion, "sgd": sgd}


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


def state_shardings(mesh: Mesh, abstract_state: Tree, trainable: dict[str, jax.Array]) -> Tree:
    """A sharding for every optimiser leaf: its weight's where it has its weight's path and shape, else replicated.

    A leaf without one (Adam's count) would stay on one process's device, and a restored run would not start.
    """

    def one(keys: Any, leaf: Any) -> Any:
        owner = next((w for path, w in trainable.items() if tree.path_of(keys).endswith(path)), None)
        if owner is not None and owner.shape == leaf.shape:
            return owner.sharding
        return meshes.replicated(mesh)

    return jax.tree_util.tree_map_with_path(one, abstract_state)
