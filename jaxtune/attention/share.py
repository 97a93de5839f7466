"""Attention's kernels on several devices: each takes its own rows and heads.

B batch, T length, N query heads, K kv heads, H head dim.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxtune.mesh import spec


def shared(
    kernel: Callable[..., Array],
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    segments: Int[Array, "B T"],
) -> Float[Array, "B N T H"]:
    """`kernel` of these arguments, on every device of the mesh that is set with its own part of them.

    XLA does not look into kernels, and would give each device all of their arguments.  Keys and values that do not
    split over `tensor` are repeated until they do; where nothing helps, heads are whole on every device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return kernel(q, k, v, segments)
    k, v = (repeated(x, q.shape[1], mesh.shape["tensor"]) for x in (k, v))
    rows, heads = spec(mesh, ("batch", "heads"), q.shape[:2])
    if heads and spec(mesh, ("kv_heads",), k.shape[1:2])[0] is None:
        heads = None
    places = PartitionSpec(rows, heads), PartitionSpec(rows)
    ins = (places[0], places[0], places[0], places[1])
    return jax.shard_map(kernel, mesh=mesh, in_specs=ins, out_specs=places[0], check_vma=False)(q, k, v, segments)


def repeated(x: Float[Array, "B K T H"], heads: int, ways: int) -> Float[Array, "B R T H"]:
    """Each kv head as often, side by side, as it takes to split them `ways` ways; as they are where nothing helps."""
    K = x.shape[1]
    times = ways // math.gcd(K, ways)
    return jnp.repeat(x, times, axis=1) if heads % ways == 0 and (heads // K) % times == 0 else x
