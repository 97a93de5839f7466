"""Rotary positions, masks and the product itself, with all scores of a row at one time.

B batch, T query length, S key length, P prefix length, N query heads, K kv heads, G = N/K, H head dim.

Rows are addressed by *slot* (index in the array) for causality and windows, by *position* for rotation: with packing
positions restart in every segment while slots do not, and inside a segment both differ by a constant.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# The name of what a layer's attention gives, for policies of `jax.checkpoint`.
NAME = "attn_out"
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
    key_slots: Int[Array, "S"],
    key_segments: Int[Array, "B S"],
    window: Int[Array, ""],
) -> Bool[Array, "B T S"]:
    """Which keys a query may see: real ones of its own segment, at or before its slot, less than `window` back.

    Segment 0 is padding.  A padding *query* sees every real key before it, which is what an attention mask over keys
    means in transformers; its output is never used.
    """
    distance = query_slots[:, None] - key_slots[None]
    near = (distance >= 0) & (distance < window)
    return near[None] & together(query_segments, key_segments)


def window_of(windows: Sequence[int | None], kind: Int[Array, ""]) -> Int[Array, ""]:
    """The one of `windows` that a layer has, as `visible` takes it."""
    return jnp.asarray([NO_WINDOW if w is None else w for w in windows], jnp.int32)[kind]


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
    mask: Bool[Array, "B T R_and_S"],
    *,
    scale: float,
    softcap: float | None,
    kept: tuple[Float[Array, "B K R H"], Float[Array, "B K R H"]] | None = None,
    prefix: Prefix | None = None,
    bias: Float[Array, "N T P_R_and_S"] | None = None,
    drop: Callable[[Array], Array] | None = None,
) -> Float[Array, "B T N H"]:
    """Softmax attention with grouped kv heads; scores and softmax in float32 (transformers' `eager_attention_forward`).

    The G query heads of a kv head are laid along the query axis, so that each kv head is one matrix product and no key
    is repeated.  A row that sees nothing comes out as the mean of all values, as in transformers.

    Args:
      kept: keys and values of R slots of a cache, before those of k and v.  mask: of both.
      bias: added to the scores of every row, a prefix's first.  drop: dropout of what the softmax gives.
    """
    B, T, N, H = q.shape
    K = k.shape[1]
    G = N // K
    q = q.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
    # Scores are put together, not keys and values, which would be copied with every token.
    parts = [("BKSH", k, v)]
    if kept is not None:
        parts.insert(0, ("BKSH", *kept))
    if prefix is not None:
        parts.insert(0, ("SKH", prefix.k, prefix.v))
        mask = jnp.concatenate([prefix.mask, mask], axis=-1)
    products = [jnp.einsum(f"BKQH,{axes}->BKQS", q, k, preferred_element_type=jnp.float32) for axes, k, _ in parts]
    scores = jnp.concatenate(products, axis=-1) * scale
    if softcap is not None:
        scores = jnp.tanh(scores / softcap) * softcap
    scores = scores.reshape(B, K, G, T, -1)
    if bias is not None:
        scores += bias.astype(jnp.float32).reshape(1, K, G, T, -1)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(B, K, G * T, -1)
    weights = weights if drop is None else drop(weights)
    ends = list(itertools.accumulate(v.shape[axes.index("S")] for axes, _, v in parts))
    shares = jnp.split(weights, ends[:-1], axis=-1)
    out = sum(
        jnp.einsum(f"BKQS,{axes}->BKQH", share, v, preferred_element_type=jnp.float32)
        for share, (axes, _, v) in zip(shares, parts, strict=True)
    )
    assert isinstance(out, jax.Array)
    out = out.astype(v.dtype)
    return out.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
