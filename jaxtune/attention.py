"""Rotary positions, masks, the KV cache and the product itself.

B batch, T query length, S key length, P prefix length, N query heads, K kv heads, G = N/K, H head dim, L layers.

Rows are addressed by *slot* (index in the array) for causality and windows, by *position* for rotation: with packing
positions restart in every segment while slots do not, and inside a segment both differ by a constant.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

# A window no text outgrows: what a global layer has.
NO_WINDOW = 2**30


def rotate(
    x: Float[Array, "B T heads H"], positions: Int[Array, "B T"], inverse_frequency: Float[Array, "H2"]
) -> Float[Array, "B T heads H"]:
    """Rotary embedding over the halves of H, computed in float32 (transformers' `apply_rotary_pos_emb`)."""
    angle = positions[..., None].astype(jnp.float32) * inverse_frequency[None, None]
    cos, sin = jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def visible(
    query_slots: Int[Array, "T"],
    query_segments: Int[Array, "B T"],
    key_segments: Int[Array, "B S"],
    window: Int[Array, ""],
) -> Bool[Array, "B T S"]:
    """Which keys a query may see: real ones of its own segment, at or before its slot, less than `window` back.

    Segment 0 is padding.  A padding *query* sees every real key before it, which is what an attention mask over keys
    means in transformers; its output is never used.
    """
    distance = query_slots[:, None] - jnp.arange(key_segments.shape[1])[None]
    near = (distance >= 0) & (distance < window)
    return near[None] & together(query_segments, key_segments)


def together(query_segments: Int[Array, "B T"], key_segments: Int[Array, "B S"]) -> Bool[Array, "B T S"]:
    """The same without order: what an encoder's tokens see of each other, and a decoder's of them."""
    query, key = query_segments[:, :, None], key_segments[:, None, :]
    return (key > 0) & ((query == key) | (query == 0))


def heads_first(x: Float[Array, "B T K H"]) -> Float[Array, "B K T H"]:
    """Keys and values as they are multiplied and kept: a turn at each new token would cost more than the product."""
    return x.transpose(0, 2, 1, 3)


class Prefix(NamedTuple):
    """Keys and values before every text, the same for all rows, and which queries see them."""

    k: Float[Array, "P K H"]
    v: Float[Array, "P K H"]
    mask: Bool[Array, "B T P"]


def prefix_visible(positions: Int[Array, "B T"], length: int, window: Int[Array, ""]) -> Bool[Array, "B T {length}"]:
    """Which of a prefix's slots a query may see.  To a window they are ordinary past, at positions 0 to length - 1;
    `positions` go on from there.  Slots do not count here: padding on the left stands before the text, not between."""
    return positions[..., None] - jnp.arange(length)[None, None] < window


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    mask: Bool[Array, "B T S"],
    *,
    scale: float,
    softcap: float | None,
    prefix: Prefix | None = None,
    bias: Float[Array, "N T P_and_S"] | None = None,
    drop: Callable[[Array], Array] | None = None,
) -> Float[Array, "B T N H"]:
    """Softmax attention with grouped kv heads; scores and softmax in float32 (transformers' `eager_attention_forward`).

    The G query heads of a kv head are laid along the query axis, so that each kv head is one matrix product and no key
    is repeated.  A row that sees nothing comes out as the mean of all values, as in transformers.

    Args:
      bias: added to the scores of every row, a prefix's first.  drop: dropout of what the softmax gives.
    """
    B, T, N, H = q.shape
    K = k.shape[1]
    G = N // K
    q = q.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
    scores = jnp.einsum("BKQH,BKSH->BKQS", q, k, preferred_element_type=jnp.float32) * scale
    if prefix is not None:
        # Scores are put together, not keys, which would be copied with every token.
        before = jnp.einsum("BKQH,PKH->BKQP", q, prefix.k, preferred_element_type=jnp.float32) * scale
        scores, mask = jnp.concatenate([before, scores], axis=-1), jnp.concatenate([prefix.mask, mask], axis=-1)
    if softcap is not None:
        scores = jnp.tanh(scores / softcap) * softcap
    scores = scores.reshape(B, K, G, T, -1)
    if bias is not None:
        scores += bias.astype(jnp.float32).reshape(1, K, G, T, -1)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(B, K, G * T, -1)
    weights = weights if drop is None else drop(weights)
    first = 0 if prefix is None else prefix.k.shape[0]
    out = jnp.einsum("BKQS,BKSH->BKQH", weights[..., first:], v, preferred_element_type=jnp.float32)
    if prefix is not None:
        out += jnp.einsum("BKQP,PKH->BKQH", weights[..., :first], prefix.v, preferred_element_type=jnp.float32)
    out = out.astype(v.dtype)
    return out.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def with_slots(kept: tuple[Array, Array], new: tuple[Array, Array], at: Array) -> tuple[Array, Array]:
    """A layer's keys and values [B K S H], or all layers' [L B K S H], with those of new slots from slot `at` on."""
    k, v = (
        jax.lax.dynamic_update_slice_in_dim(old, x.astype(old.dtype), at, axis=old.ndim - 2)
        for old, x in zip(kept, new, strict=True)
    )
    return k, v


class Source(NamedTuple):
    """Keys and values that a decoder has made of an encoder's output, once for all of its own tokens."""

    k: Float[Array, "L B K S H"]
    v: Float[Array, "L B K S H"]
    segments: Int[Array, "B S"]


@struct.dataclass
class Cache:
    """Keys and values of the slots seen so far, and which segment each slot belongs to (0: not written, or padding).

    source: None without an encoder, and before it has run.
    """

    k: Float[Array, "L B K S H"]
    v: Float[Array, "L B K S H"]
    segments: Int[Array, "B S"]
    length: Int[Array, ""]
    source: Source | None = None

    def grown(self, k: Float[Array, "L B K T H"], v: Float[Array, "L B K T H"], segments: Array) -> "Cache":
        """With the keys and values of T new slots, which the layer scan gives back: the cache itself does not go
        through the scan, which would copy it.  segments: of all slots."""
        whole_k, whole_v = with_slots((self.k, self.v), (k, v), self.length)
        return dataclasses.replace(self, k=whole_k, v=whole_v, segments=segments, length=self.length + k.shape[3])

    @classmethod
    def empty(cls, layers: int, batch: int, slots: int, kv_heads: int, head_dim: int, dtype: jnp.dtype) -> "Cache":
        shape = (layers, batch, kv_heads, slots, head_dim)
        k, v = jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)
        return cls(k, v, jnp.zeros((batch, slots), jnp.int32), jnp.zeros((), jnp.int32))
