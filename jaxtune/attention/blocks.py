"""Causal attention in blocks of queries, in XLA's own operations: no [T, S] array is kept, on any platform.

B batch, T length, N query heads, K kv heads, H head dim.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxtune.attention.plain import Prefix, attend, visible

# Queries of a block, if there are no more than so many blocks: each is compiled for itself.
BLOCK = 512
MOST_BLOCKS = 16


def by_blocks(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    segments: Int[Array, "B T"],
    *,
    window: int | None,
    scale: float,
    softcap: float | None,
    prefix: Prefix | None = None,
    block: int | None = None,
) -> Float[Array, "B T N H"]:
    """`attend` of each block of queries to the keys it may see: those behind its last query are not multiplied, nor
    those before the window of its first.  The backward pass computes a block's scores again.

    Args:
      window: how many keys back a query sees, itself included; None: all.  block: queries at a time; None: by T.
    """
    T = q.shape[1]
    block = block or max(BLOCK, -(-T // (MOST_BLOCKS * 32)) * 32)
    one = jax.checkpoint(functools.partial(attend, scale=scale, softcap=softcap), prevent_cse=False)
    distance = jnp.int32(T if window is None else window)
    out = []
    for first in range(0, T, block):
        last = min(first + block, T)
        low = 0 if window is None else max(0, first - window + 1)
        slots = jnp.arange(low, last)
        mask = visible(slots[first - low :], segments[:, first:last], slots, segments[:, low:last], distance)
        part = None if prefix is None else prefix._replace(mask=prefix.mask[:, first:last])
        out.append(one(q[:, first:last], k[:, :, low:last], v[:, :, low:last], mask, prefix=part))
    return jnp.concatenate(out, axis=1)
