"""A frozen weight in fewer bits, as a box in the place of its array.

A layer reads its weight and multiplies (`jaxtune.layers.matmul`) or looks rows up; the box does that with what it
stands for, one layer at a time inside the scan.  What is kept for the backward pass is the box, not the weight, so that
no dequantised copy of the stack ever exists.

I in, O out, N rows of a flattened batch.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxtune import mesh as meshes
from jaxtune.errors import UserError


class Quantised:
    """What every format is: a pytree whose arrays have the weight's layer axis, where it has one, first.

    dtype: in which its numbers are exact.
    """

    dtype: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that it stands for."""
        raise NotImplementedError

    def astype(self, dtype: Any) -> Float[Array, "..."]:
        """The weight itself: for what needs its numbers."""
        raise NotImplementedError

    def rows(self, index: Int[Array, "..."]) -> Float[Array, "... D"]:
        """Rows of a table [V, D]."""
        raise NotImplementedError

    def matmul(self, x: Float[Array, "N I"]) -> Float[Array, "N O"]:
        """x @ w, multiplied in x's dtype and summed in float32; no gradient flows to the weight."""
        return frozen_matmul(x, self)


@jax.custom_vjp
def frozen_matmul(x: Any, box: Any) -> Any:
    """x @ box.astype(x.dtype) in float32, for a box or an array of integers."""
    return jnp.matmul(x, box.astype(x.dtype), preferred_element_type=jnp.float32)


def _forward(x: Any, box: Any) -> Any:
    return frozen_matmul(x, box), (box, jnp.zeros((), x.dtype))


def _backward(kept: Any, g: Any) -> Any:
    box, like = kept
    w = box.astype(like.dtype)
    dx = jax.lax.dot_general(g.astype(like.dtype), w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return dx.astype(like.dtype), None


frozen_matmul.defvjp(_forward, _backward)


def spec(
    mesh: Any, name: str, axes: Sequence[str | None], shape: Sequence[int], along: int, unit: int
) -> PartitionSpec:
    """Where a matrix goes whose blocks of `unit` lie along one of its axes, so that no device has a part of a block.

    Where the usual place (`jaxtune.mesh.spec`) would cut a block, the other axis is split in as many parts more: a
    frozen weight is gathered for its use either way.

    Raises:
      UserError: the other axis cannot be split so, naming what can.
    """
    usual = meshes.spec(mesh, axes, shape)
    if shape[along] % (unit * _ways(mesh, usual[along])) == 0:
        return usual
    names = (*_names(usual[1 - along]), *_names(usual[along]))
    if shape[1 - along] % _ways(mesh, names) == 0:
        return PartitionSpec(None, names) if along == 0 else PartitionSpec(names, None)
    blocks, other = shape[along] // unit, shape[1 - along]
    asked = " * ".join(f"{axis}={mesh.shape[axis]}" for axis in names)
    legal = [n for n in range(1, _ways(mesh, names) + 1) if blocks % n == 0 or other % n == 0]
    raise UserError(
        f"{name} is {shape[0]} x {shape[1]} in blocks of {unit}, and `mesh` splits it over {asked} devices, which "
        f"would cut blocks: neither its {blocks} blocks nor its other {other} can be split so. They can over: "
        f"{', '.join(map(str, legal))}."
    )


def _names(entry: Any) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def _ways(mesh: Any, entry: Any) -> int:
    ways = 1
    for name in _names(entry):
        ways *= mesh.shape[name]
    return ways
