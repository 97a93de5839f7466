"""The state of a run: what a step changes, made on its devices, and put into and taken out of checkpoints."""

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
from jaxtune.identity import identity
from jaxtune.typing import Tree

__all__ = ["State", "identity", "make_state", "resume", "to_save"]


@struct.dataclass
class State:
    """step: optimiser steps done, int32.  trainable: {path: array}.  opt_state: the optimiser's, by the same paths."""

    step: Any
    trainable: dict[str, Any]
    opt_state: Tree


def make_state(
    optimiser: optax.GradientTransformation, trainable: dict[str, Array], mesh: Mesh, *, offload: bool = False
) -> State:
    """The state before the first step, every leaf with a sharding of its own.

    Args:
      offload: the optimiser's lies in the host's memory; `optimiser` is then `optim.offloaded`.
    """
    abstract = jax.eval_shape(optimiser.init, trainable)
    where = optim.state_shardings(mesh, abstract, trainable, offload=offload)
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
