"""The state of a run: what a step changes, made on its devices, and put into and taken out of checkpoints."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array

from jaxtune import mesh as meshes
from jaxtune import optim
from jaxtune.checkpoint import Checkpoints
from jaxtune.typing import Tree


@struct.dataclass
class State:
    """step: optimiser steps done, int32.  trainable: {path: array}.  opt_state: the optimiser's, by the same paths."""

    step: Any
    trainable: dict[str, Any]
    opt_state: Tree


def make_state(optimiser: optax.GradientTransformation, trainable: dict[str, Array], mesh: Mesh) -> State:
    """The state before the first step, every leaf with a sharding of its own."""
    abstract = jax.eval_shape(optimiser.init, trainable)
    where = optim.state_shardings(mesh, abstract, trainable)
    opt_state = jax.jit(optimiser.init, out_shardings=where)(trainable)
    return State(jax.device_put(jnp.int32(0), meshes.replicated(mesh)), trainable, opt_state)


def to_save(state: State) -> dict[str, Tree]:
    """What a checkpoint holds; the step is its name."""
    return {"trainable": state.trainable, "opt_state": state.opt_state}


def resume(checkpoints: Checkpoints, state: State) -> tuple[State, int]:
    """(state, row cursor) of the newest good checkpoint, on the shardings of `state`; or `state` and 0."""
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), to_save(state))
    restored = checkpoints.restore(abstract)
    if restored is None:
        return state, 0
    step = jax.device_put(jnp.int32(restored.step), state.step.sharding)
    return State(step, restored.state["trainable"], restored.state["opt_state"]), restored.rows


# What may change between two starts of one run: where things run, how they are shown, how long it goes on.
FREE = ("mesh", "logging", "checkpoint", "export", "evaluate")
FREE_KEYS = (
    "model.id",  # the weights' own hash stands for it
    "data.train",  # as the rows' does here
    "data.eval",
    "data.max_eval_rows",
    "data.eval_split",
    "train.steps",
    "train.epochs",
    "train.eval_every",
    "train.save_every",
    "train.log_every",
    "train.remat",
)


def identity(config: dict[str, dict[str, Any]], total_steps: int, **hashes: str) -> dict[str, str]:
    """What must be the same for a resumed run to end in the same bits, as text by config key.

    Args:
      config: as stored in config.json.  hashes: of the base model and of the tokenised rows.
    """
    named = {
        f"{section}.{key}": v for section, values in config.items() if section not in FREE for key, v in values.items()
    }
    kept = {key: json.dumps(value, sort_keys=True) for key, value in named.items() if key not in FREE_KEYS}
    if config["optim"]["schedule"] != "constant" or config["peft"]["method"] == "adalora":
        kept["train.steps"] = str(total_steps)  # the schedule's shape depends on it, or that of the ranks
    return kept | hashes
