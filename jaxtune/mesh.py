"""Devices to a mesh, and logical axes to mesh axes.

`slice` repeats the model over TPU slices, between which the network is slow; `data` repeats it within one, `fsdp`
splits weights over the same devices that split the batch, `tensor` splits heads, MLP and vocabulary.  Each parameter
says what its axes *are* (see `jaxtune.typing`); this table says where they go.
"""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.experimental.mesh_utils import create_hybrid_device_mesh
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxtune.errors import UserError
from jaxtune.typing import Tree

# Of devices, or of sizes alone (`jaxtune.plan`).
AnyMesh = Mesh | AbstractMesh

AXES = ("slice", "data", "fsdp", "tensor")
# Those over which the rows of a batch are split, and its sums go.
BATCH = ("slice", "data", "fsdp")

RULES: tuple[tuple[str, Any], ...] = (
    ("batch", BATCH),
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


def make_mesh(data: int, fsdp: int, tensor: int, devices: Sequence[Any] | None = None, *, slices: int = 1) -> Mesh:
    """A mesh over all devices of all hosts; one size may be -1 and takes what is left.

    Args:
      slices: the size of `slice`: TPU slices, each of which holds data*fsdp*tensor devices.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or `slices` are not those that there are.
    """
    devices = jax.devices() if devices is None else devices
    sizes = sizes_of(data, fsdp, tensor, len(devices), f"attached ({devices[0].platform})", slices=slices)
    kinds, shape = (AxisType.Auto,) * len(AXES), tuple(sizes.values())
    # Elsewhere the number means something else (GPUs: the host), or there is none.
    there = {getattr(device, "slice_index", 0) for device in devices} if devices[0].platform == "tpu" else {0}
    if len(there) == 1:
        return jax.make_mesh(shape, AXES, devices=devices, axis_types=kinds)
    if len(there) != shape[0]:
        raise UserError(
            f"`mesh.slice` is {shape[0]}, and the {len(devices)} devices are of {len(there)} TPU slices. "
            f"Set it to {len(there)}: what `fsdp` and `tensor` exchange in every layer is too much between slices."
        )
    inner, outer = (1, *shape[1:]), (shape[0], *(1,) * (len(AXES) - 1))
    return Mesh(create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True), AXES, kinds)


def sizes_of(data: int, fsdp: int, tensor: int, count: int, which: str, *, slices: int = 1) -> dict[str, int]:
    """{axis: size} over `count` devices; one size may be -1 and takes what is left.

    Args:
      which: those devices are, for the message.

    Raises:
      UserError: the sizes do not multiply to that many.
    """
    sizes: dict[str, int] = dict(zip(AXES, (slices, data, fsdp, tensor), strict=True))
    known = math.prod(size for size in sizes.values() if size != -1)
    if count % known == 0:
        sizes |= {axis: count // known for axis, size in sizes.items() if size == -1}
    if math.prod(sizes.values()) != count:
        asked = " ".join(f"{axis}={size}" for axis, size in sizes.items() if (axis, size) != ("slice", 1))
        raise UserError(
            f"`mesh` is {asked}, which needs a multiple of {known} devices; {count} are {which}. "
            "Set one axis to -1 to take what is left."
        )
    return sizes


def batch_shards(mesh: AnyMesh) -> int:
    """Into how many pieces a batch is split."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def check_batch(mesh: AnyMesh, rows: int, what: str) -> None:
    """Refuses a batch that the mesh cannot split evenly, naming the nearest sizes that it can."""
    shards = batch_shards(mesh)
    if rows % shards:
        low, high = rows // shards * shards, -(-rows // shards) * shards
        legal = f"{low} or {high}" if low else f"{high}"
        axes = [axis for axis in BATCH if axis != "slice" or mesh.shape[axis] > 1]
        ways = "*".join(str(mesh.shape[axis]) for axis in axes)
        raise UserError(
            f"{what} is {rows} rows, and the mesh splits a batch over {'*'.join(axes)} = {ways} = {shards} devices. "
            f"Nearest legal sizes: {legal} rows; or change `mesh`."
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


def shardings(mesh: AnyMesh, abstract: Tree) -> Tree:
    """A sharding for every leaf; `LogicallyPartitioned` boxes by their axes, everything else replicated."""

    def one(leaf: Any) -> NamedSharding:
        if isinstance(leaf, nn.LogicallyPartitioned):
            return NamedSharding(mesh, spec(mesh, leaf.names, leaf.value.shape))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree.map(one, abstract, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


def platform() -> str:
    """Of the devices that a program is traced for: cpu | gpu | tpu.

    The mesh of `jax.set_mesh` knows.  The default backend would be wrong where a program is compiled for a TPU that is
    not there.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def alone_on_cpu() -> bool:
    """Whether a program is traced for one CPU, which needs fresh memory spared and has nothing to share out."""
    mesh = jax.sharding.get_abstract_mesh()
    return platform() == "cpu" and (mesh.empty or mesh.size == 1)


def replicated(mesh: AnyMesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: AnyMesh, leading: int = 0) -> NamedSharding:
    """Of a batch [B, ...] (or [A, B, ...] with one leading axis): rows over slice, data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * leading, BATCH))
