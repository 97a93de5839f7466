"""A checkpoint's weights to quantised ones on a mesh, one layer of one parameter after the other.

A layer is read, goes to its devices, is quantised there and put into its place in the stack: the host never holds more
than one tensor, and the devices one unquantised layer.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtune.errors import UserError
from jaxtune.hf import bnb
from jaxtune.hf.rows import Row
from jaxtune.hf.weights import Stored, read_part
from jaxtune.mesh import replicated
from jaxtune.quant import Quantised, Scheme


def axis_of(row: Row) -> int:
    """Along which axis of one layer's parameter a scale holds: the last of what Hugging Face stores."""
    return -2 if row.transposed else -1


def load_box(row: Row, stored: Mapping[str, Stored], mesh: Mesh, scheme: Scheme, dtype: Any) -> Quantised:
    """A parameter of a checkpoint as a box on the mesh, with its layer axis.

    Args:
      dtype: what it is cast to before it is quantised, as transformers does.

    Raises:
      UserError: sizes that cannot be quantised, or split over this mesh; layers stored in different ways.
    """
    axes, shape, axis = row.axes[row.stacked :], row.shape[row.stacked :], axis_of(row)
    where: Any = scheme.shardings(mesh, row.path, axes, shape, axis)
    packed = {stored[name].beside is not None for name in row.names}
    if len(packed) > 1:
        plain = next(name for name in row.names if stored[name].beside is None)
        raise UserError(f"{plain} is not quantised in the checkpoint, and other layers are. jaxtune stacks the layers.")

    quantise = _quantiser(scheme, axis, where, jax.ShapeDtypeStruct(shape, dtype))

    def one(layer: int) -> Quantised:
        if packed == {True}:
            box = bnb.box_of(row.names[layer], *read_packed(stored[row.names[layer]]))
            return jax.tree.map(jax.device_put, box, place(where, box))
        return quantise(read_layer(row, stored, layer, NamedSharding(mesh, where.codes.spec), dtype))

    if not row.stacked:
        return one(0)
    stack = None
    for layer in range(row.shape[0]):
        box = one(layer)
        if stack is None:
            stack = _empty(row.shape[0], box)
        # Awaited, so that no second layer is on its way meanwhile.
        stack = jax.block_until_ready(_insert(stack, box, jnp.int32(layer)))
    assert stack is not None
    return stack


def read_layer(row: Row, stored: Mapping[str, Stored], layer: int, where: NamedSharding, dtype: Any) -> jax.Array:
    """One layer of a parameter, without layer axis; each device's part is read by itself."""

    def part(index: Any) -> np.ndarray:
        read = read_part(row, stored, (slice(layer, layer + 1), *index) if row.stacked else index, dtype)
        return read[0] if row.stacked else read

    return jax.make_array_from_callback(row.shape[row.stacked :], where, part)


def lost_of(
    row: Row, stored: Mapping[str, Stored], mesh: Mesh, box: Quantised, rank: int, dtype: Any
) -> tuple[jax.Array, ...]:
    """(u [L, I, R], s [L, R], v [L, R, O]): the largest singular values of what each layer lost, read once more."""
    found = []
    for layer in range(row.shape[0]):
        w = read_layer(row, stored, layer, replicated(mesh), dtype)
        found.append(_lost(w, box, jnp.int32(layer), rank))
    return tuple(jnp.stack(part) for part in zip(*found, strict=True))


@functools.partial(jax.jit, static_argnames="rank")
def _lost(w: jax.Array, box: Quantised, layer: jax.Array, rank: int) -> tuple[jax.Array, ...]:
    one = jax.tree.map(lambda x: x[layer], box)
    u, s, v = jnp.linalg.svd(w.astype(jnp.float32) - one.astype(jnp.float32), full_matrices=False)
    return u[:, :rank], s[:rank], v[:rank]


def read_packed(tensor: Stored) -> tuple[np.ndarray, dict[str, Any]]:
    """(bytes, what lies beside them) of a weight that is stored quantised."""
    assert tensor.beside is not None
    return tensor.file.get_tensor(tensor.name), tensor.beside


def place(where: Any, box: Quantised) -> Quantised:
    """The shardings `where`, as a tree of the box's own structure."""
    return jax.tree.unflatten(jax.tree.structure(box), jax.tree.leaves(where))


def _quantiser(scheme: Scheme, axis: int, where: Any, weight: jax.ShapeDtypeStruct) -> Any:
    """The compiled function of one layer's weight to its box."""
    shardings = place(where, jax.eval_shape(functools.partial(scheme.quantise, axis=axis), weight))
    return _compiled(scheme, axis, tuple(jax.tree.leaves(shardings)), jax.tree.structure(shardings))


@functools.lru_cache
def _compiled(scheme: Scheme, axis: int, leaves: tuple[Any, ...], structure: Any) -> Any:
    """One function for all layers, and for all parameters that lie alike."""
    function = functools.partial(scheme.quantise, axis=axis)
    return jax.jit(function, out_shardings=jax.tree.unflatten(structure, leaves))


def _empty(layers: int, box: Quantised) -> Quantised:
    def zeros(x: jax.Array) -> jax.Array:
        return jnp.zeros((layers, *x.shape), x.dtype, device=stacked(x.sharding))

    return jax.tree.map(zeros, box)


def stacked(sharding: Any) -> NamedSharding:
    """One layer's sharding with the layer axis before it."""
    return NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))


@functools.partial(jax.jit, donate_argnums=0)
def _insert(stack: Quantised, box: Quantised, layer: jax.Array) -> Quantised:
    return jax.tree.map(lambda s, x: jax.lax.dynamic_update_index_in_dim(s, x, layer, 0), stack, box)
