"""Keys and values of what a model has read: its own tokens', and those made of an encoder's output.

L layers, B batch, K kv heads, S slots, T new ones, H head dim.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int


class Source(NamedTuple):
    """Keys and values that a decoder has made of an encoder's output, once for all of its own tokens."""

    k: Float[Array, "L B K S H"]
    v: Float[Array, "L B K S H"]
    segments: Int[Array, "B S"]


@struct.dataclass
class Cache:
    """Keys and values of the slots seen so far, and which segment each slot belongs to (0: not written, or padding).

    source: None without an encoder, and before it has run.  written: a cache without anything is not looked into.
    """

    k: Float[Array, "L B K S H"]
    v: Float[Array, "L B K S H"]
    segments: Int[Array, "B S"]
    length: Int[Array, ""]
    source: Source | None = None
    written: bool = struct.field(pytree_node=False, default=False)

    def beside(self, segments: Int[Array, "B T"]) -> tuple[Int[Array, "S"], Int[Array, "B S"]]:
        """(slots, segments) of the keys that T new tokens see: those kept, if any, and behind them their own."""
        slots = self.length + jnp.arange(segments.shape[1])
        if not self.written:
            return slots, segments
        before = jnp.arange(self.segments.shape[1])
        return jnp.concatenate([before, slots]), jnp.concatenate([self.segments, segments], axis=1)

    def grown(self, k: Float[Array, "L B K T H"], v: Float[Array, "L B K T H"], segments: Int[Array, "B T"]) -> "Cache":
        """With T new slots, whose keys and values the layer scan gives back: the cache itself only goes into the scan,
        which would copy what comes out of it, and no layer puts new slots between the old."""

        def put(old: Array, new: Array, axis: int) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), self.length, axis=axis)

        whole = {"k": put(self.k, k, 3), "v": put(self.v, v, 3), "segments": put(self.segments, segments, 1)}
        return dataclasses.replace(self, **whole, length=self.length + k.shape[3], written=True)

    @classmethod
    def empty(cls, layers: int, batch: int, slots: int, kv_heads: int, head_dim: int, dtype: jnp.dtype) -> "Cache":
        shape = (layers, batch, kv_heads, slots, head_dim)
        k, v = jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)
        return cls(k, v, jnp.zeros((batch, slots), jnp.int32), jnp.zeros((), jnp.int32))
