"""The state of a run: what a step changes, made on its devices, and put into and taken out of checkpoints."""

from collections.abc import Callable
from typing import Any, NamedTuple

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

__all__ = ["Resumed", "State", "identity", "make_state", "resume", "to_save"]


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


def to_save(state: State, optimiser: bool = True) -> dict[str, Tree]:
    """What a checkpoint holds; the step is its name.  optimiser: its state, too."""
    return {"trainable": state.trainable} | ({"opt_state": state.opt_state} if optimiser else {})


class Resumed(NamedTuple):
    """What a run goes on with.  rows: the row cursor.  optimiser_from: the step at which the optimiser last started
    fresh, and counts from; above 0 the run is not the one that never stopped."""

    state: State
    rows: int
    optimiser_from: int


def resume(checkpoints: Checkpoints, state: State, find: Callable[[], int | None] | None = None) -> Resumed:
    """That of the checkpoint that `find` gives (None: the newest good one), on the shardings of `state`; or `state`.

    A checkpoint without the optimiser's state leaves that of `state`.
    """
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), to_save(state))
    restored = checkpoints.restore(abstract, find)
    if restored is None:
        return Resumed(state, 0, 0)
    step = jax.device_put(jnp.int32(restored.step), state.step.sharding)
    opt_state = restored.state.get("opt_state", state.opt_state)
    return Resumed(State(step, restored.state["trainable"], opt_state), restored.rows, restored.optimiser_from)
