"""Devices to a mesh, and logical axes to mesh axes.

`data` repeats the model, `fsdp` splits weights over the same devices that split the batch, `tensor` splits heads, MLP
and vocabulary.  Each parameter says what its axes *are* (see `jaxtune.typing`); this table says where they go.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtune.errors import UserError
from jaxtune.typing import Tree

AXES = ("data", "fsdp", "tensor")

RULES: tuple[tuple[str, Any], ...] = (
    ("batch", ("data", "fsdp")),
    ("vocab", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("embed", "fsdp"),
    # Activations keep their width and length whole; adapters their rank; norms are tiny.
    ("activation", None),
    ("length", None),
    ("rank", None),
    ("norm", None),
    ("buckets", None),
    ("layers", None),
)


def make_mesh(data: int, fsdp: int, tensor: int, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all devices; one size may be -1 and takes what is left.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    known = 1
    for size in sizes:
        known *= size if size != -1 else 1
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    total = sizes[0] * sizes[1] * sizes[2]
    if total != len(devices):
        raise UserError(
            f"`mesh` is data={data} fsdp={fsdp} tensor={tensor}, which needs a multiple of {known} devices; "
            f"{len(devices)} are attached ({devices[0].platform}). Set one axis to -1 to take what is left."
        )
    kinds = (jax.sharding.AxisType.Auto,) * 3
    return jax.make_mesh(tuple(sizes), AXES, devices=devices, axis_types=kinds)


def batch_shards(mesh: Mesh) -> int:
    """Into how many pieces a batch is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch(mesh: Mesh, rows: int, what: str) -> None:
    """Refuses a batch that the mesh cannot split evenly, naming the nearest sizes that it can."""
    shards = batch_shards(mesh)
    if rows % shards:
        low, high = rows // shards * shards, -(-rows // shards) * shards
        legal = f"{low} or {high}" if low else f"{high}"
        raise UserError(
            f"{what} is {rows} rows, and the mesh splits a batch over data*fsdp = {mesh.shape['data']}*"
            f"{mesh.shape['fsdp']} = {shards} devices. Nearest legal sizes: {legal} rows; or change `mesh`."
        )


def spec(mesh: Any, axes: Sequence[str | None], shape: Sequence[int]) -> PartitionSpec:
    """Where an array with these logical axes goes.  A mesh axis is used once, and only where it divides."""
    rules, used, out = dict(RULES), set(), []
    for axis, size in zip(axes, shape, strict=True):
        target = rules[axis] if axis is not None else None
        names = (target,) if isinstance(target, str) else tuple(target or ())
        ways = 1
        for name in names:
            ways *= mesh.shape[name]
        if not names or used & set(names) or size % ways:
            out.append(None)
        else:
            used.update(names)
            out.append(target)
    return PartitionSpec(*out)


def shardings(mesh: Mesh, abstract: Tree) -> Tree:
    """A sharding for every leaf; `LogicallyPartitioned` boxes by their axes, everything else replicated."""

    def one(leaf: Any) -> NamedSharding:
        if isinstance(leaf, nn.LogicallyPartitioned):
            return NamedSharding(mesh, spec(mesh, leaf.names, leaf.value.shape))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree.map(one, abstract, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Of a batch [B, ...] (or [A, B, ...] with one leading axis): rows over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * leading, ("data", "fsdp")))
