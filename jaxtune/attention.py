"""Rotary positions, masks, the KV cache and the product itself.

B batch, T query length, S key length, P prefix length, N query heads, K kv heads, G = N/K, H head dim, L layers.

Rows are addressed by *slot* (index in the array) for causality and windows, by *position* for rotation: with packing
positions restart in every segment while slots do not, and inside a segment both differ by a constant.
"""

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
    query, key = query_segments[:, :, None], key_segments[:, None, :]
    return near[None] & (key > 0) & ((query == key) | (query == 0))


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
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "B T S"],
    *,
    scale: float,
    softcap: float | None,
    prefix: Prefix | None = None,
) -> Float[Array, "B T N H"]:
    """Softmax attention with grouped kv heads; scores and softmax in float32 (transformers' `eager_attention_forward`).

    The G query heads of a kv head are laid along the query axis, so that each kv head is one matrix product and no key
    is repeated.  A row that sees nothing comes out as the mean of all values, as in transformers.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    G = N // K
    q = q.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    scores = jnp.einsum("BKQH,BKSH->BKQS", q, k, preferred_element_type=jnp.float32) * scale
    if prefix is not None:
        # Scores are put together, not keys, which would be copied with every token.
        before = jnp.einsum("BKQH,PKH->BKQP", q, prefix.k, preferred_element_type=jnp.float32) * scale
        scores, mask = jnp.concatenate([before, scores], axis=-1), jnp.concatenate([prefix.mask, mask], axis=-1)
    if softcap is not None:
        scores = jnp.tanh(scores / softcap) * softcap
    scores = scores.reshape(B, K, G, T, -1)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(B, K, G * T, -1)
    first = 0 if prefix is None else prefix.k.shape[0]
    out = jnp.einsum("BKQS,BKSH->BKQH", weights[..., first:], v, preferred_element_type=jnp.float32)
    if prefix is not None:
        out += jnp.einsum("BKQP,PKH->BKQH", weights[..., :first], prefix.v, preferred_element_type=jnp.float32)
    out = out.astype(v.dtype)
    return out.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


@struct.dataclass
class Cache:
    """Keys and values of the slots seen so far, and which segment each slot belongs to (0: not written, or padding)."""

    k: Float[Array, "L B S K H"]
    v: Float[Array, "L B S K H"]
    segments: Int[Array, "B S"]
    length: Int[Array, ""]

    @classmethod
    def empty(cls, layers: int, batch: int, slots: int, kv_heads: int, head_dim: int, dtype: jnp.dtype) -> "Cache":
        shape = (layers, batch, slots, kv_heads, head_dim)
        k, v = jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)
        return cls(k, v, jnp.zeros((batch, slots), jnp.int32), jnp.zeros((), jnp.int32))
