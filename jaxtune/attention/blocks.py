"""Causal attention in blocks of queries, in XLA's own operations: no [T, S] array is kept, on any platform.

B batch, T length, Q queries of a block, S keys that it is multiplied with, P prefix length, N query heads, K kv heads,
G = N/K, H head dim.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from jaxtune.attention.plain import NAME, Prefix, heads_first, visible
from jaxtune.mesh import alone_on_cpu, platform

# Queries of a block, if there are no more than so many blocks: each is compiled for itself.
BLOCK, BLOCK_ON_CPU = 512, 128
MOST_BLOCKS = 16


class How(NamedTuple):
    """window: how many keys back a query sees at most, itself included; None: all.  block: queries at a time."""

    window: int | None
    scale: float
    softcap: float | None
    block: int


class Given(NamedTuple):
    """What a row, or all of them, is computed from.  window: hides keys that `How.window` leaves.  first_k, first_v,
    first_mask: a prefix's keys and values, the same for all rows, and which queries see them; None where none is."""

    q: Float[Array, "*B T N H"]
    k: Float[Array, "*B K T H"]
    v: Float[Array, "*B K T H"]
    segments: Int[Array, "*B T"]
    window: Int[Array, ""]
    first_k: Float[Array, "K P H"] | None = None
    first_v: Float[Array, "K P H"] | None = None
    first_mask: Bool[Array, "*B T P"] | None = None


def by_blocks(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    segments: Int[Array, "B T"],
    *,
    window: Int[Array, ""] | int | None,
    scale: float,
    softcap: float | None,
    prefix: Prefix | None = None,
    block: int | None = None,
) -> Float[Array, "B T N H"]:
    """`attend` of each block of queries to the keys it may see: those behind its last query are not multiplied, nor
    those before the window of its first.  The backward pass computes a block's scores again from one number a query
    (FlashAttention, arXiv 2205.14135).

    Args:
      window: how many keys back a query sees, itself included; None: all.  As an array it hides keys, which are
        multiplied all the same.
      block: queries at a time; None: by T.
    """
    T = q.shape[1]
    most = BLOCK_ON_CPU if platform() == "cpu" else BLOCK
    how = How(window if isinstance(window, int) else None, scale, softcap, block or max(most, multiple(T)))
    distance = jnp.asarray(T if window is None else window, jnp.int32)
    given = Given(q, k, v, segments, distance)
    if prefix is not None:
        first_k, first_v = heads_first(jnp.stack([prefix.k, prefix.v]))
        given = given._replace(first_k=first_k, first_v=first_v, first_mask=prefix.mask)
    return _attention(how, given)


def multiple(length: int) -> int:
    """The least block, of whole registers, with which there are no more than `MOST_BLOCKS`."""
    return -(-length // (MOST_BLOCKS * 32)) * 32


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(how: How, given: Given) -> Float[Array, "B T N H"]:
    return _forward(how, given)[0]


def _forward(how: How, given: Given):
    out, log_sum = each_row(functools.partial(_row_forward, how), given)
    out, log_sum = checkpoint_name(out, NAME), checkpoint_name(log_sum, NAME)
    return out, (given, out, log_sum)


def _backward(how: How, residuals: Any, g: Float[Array, "B T N H"]):
    given, *rest = residuals
    d_q, d_k, d_v, *d_first = each_row(functools.partial(_row_backward, how), given, *rest, g)
    d_first_k, d_first_v = jax.tree.map(lambda d: jnp.sum(d, axis=0).astype(g.dtype), d_first)
    d_floats = {"q": d_q, "k": d_k, "v": d_v, "first_k": d_first_k, "first_v": d_first_v}
    return (given._replace(**dict.fromkeys(Given._fields) | d_floats),)


_attention.defvjp(_forward, _backward)


def each_row(function: Callable[..., Any], given: Given, *rest: Array) -> Any:
    """`function(given of a row, rest of it)` of each of the B rows, stacked."""
    shared = {"window": given.window, "first_k": given.first_k, "first_v": given.first_v}
    rows = given._replace(**dict.fromkeys(shared)), rest

    def row(given: Given, rest: tuple[Array, ...]) -> Any:
        return function(given._replace(**shared), *rest)

    # Scores of one row stay in a core's cache, those of a batch do not.
    return one_by_one(row, rows) if alone_on_cpu() else jax.vmap(row)(*rows)


def one_by_one(function: Callable[..., Any], rows: Any) -> Any:
    """`jax.lax.map`, each row taken a turn ahead: XLA's CPU compiler would take a row's segments out of those of all
    rows for each score, in one loop with its exp, which then goes number by number."""

    def row(i: Array) -> Any:
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), rows)

    turns = jnp.arange(len(jax.tree.leaves(rows)[0]))
    return jax.lax.scan(lambda now, i: (row(i + 1), function(*now)), row(turns[0]), turns)[1]


class Block(NamedTuple):
    """A block of a row.  queries, keys: where they are; a prefix's keys are before these among the S.

    On CPUs q, k and v are float32: what bfloat16 spares in products of so few columns, its rounding costs.
    """

    queries: slice
    keys: slice
    q: Float[Array, "K GQ H"]
    k: Float[Array, "K S H"]
    v: Float[Array, "K S H"]
    mask: Bool[Array, "Q S"]


def blocks_of(how: How, row: Given) -> Iterator[Block]:
    T, q = len(row.q), by_heads(row.q, len(row.k))
    segments = row.segments[None]
    kind = jnp.float32 if platform() == "cpu" else q.dtype
    for start in range(0, T, how.block):
        end = min(start + how.block, T)
        low = 0 if how.window is None else max(0, start - how.window + 1)
        slots = jnp.arange(low, end)
        mask = visible(slots[start - low :], segments[:, start:end], slots, segments[:, low:end], row.window)[0]
        k, v = row.k[:, low:end], row.v[:, low:end]
        if row.first_k is not None and row.first_v is not None and row.first_mask is not None:
            k = jnp.concatenate([row.first_k, k], axis=1)
            v = jnp.concatenate([row.first_v, v], axis=1)
            mask = jnp.concatenate([row.first_mask[start:end], mask], axis=1)
        part, k, v = (x.astype(kind) for x in (folded(q[:, :, start:end]), k, v))
        yield Block(slice(start, end), slice(low, end), part, k, v, mask)


def by_heads(x: Float[Array, "T N H"], kv_heads: int) -> Float[Array, "K G T H"]:
    return x.reshape(len(x), kv_heads, -1, x.shape[2]).transpose(1, 2, 0, 3)


def folded(x: Float[Array, "K G Q *H"]) -> Float[Array, "K GQ *H"]:
    """The query heads of a kv head, one under the other: one matrix product."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def unfolded(parts: list[Array], like: Float[Array, "T N H"]) -> Float[Array, "T N H"]:
    whole = jnp.concatenate([part.reshape(like.shape[1], -1, like.shape[2]) for part in parts], axis=1)
    return whole.transpose(1, 0, 2).astype(like.dtype)


def product(spec: str, a: Array, b: Array) -> Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def scores_of(how: How, block: Block) -> tuple[Float[Array, "K GQ S"], Float[Array, "K GQ S"] | None]:
    """The scores, and the tanh of the soft-cap, which its derivative takes."""
    scores, tanh = product("KQH,KSH->KQS", block.q, block.k) * how.scale, None
    if how.softcap is not None:
        tanh = jnp.tanh(scores / how.softcap)
        scores = tanh * how.softcap
    seen = jnp.tile(block.mask, (block.q.shape[1] // len(block.mask), 1))
    return jnp.where(seen[None], scores, jnp.finfo(jnp.float32).min), tanh


def _row_forward(how: How, row: Given) -> tuple[Float[Array, "T N H"], Float[Array, "K G T"]]:
    """What the row gives, and of each query the log of the sum of exp(score)."""
    outs, log_sums = [], []
    for block in blocks_of(how, row):
        scores, _ = scores_of(how, block)
        top = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        outs.append(product("KQS,KSH->KQH", weights.astype(block.v.dtype), block.v) / total)
        log_sums.append((top + jnp.log(total)).reshape(len(row.k), -1, len(block.mask)))
    return unfolded(outs, row.q), jnp.concatenate(log_sums, axis=2)


def _row_backward(how: How, row: Given, out: Array, log_sum: Array, g: Array) -> tuple[Array | None, ...]:
    """Gradients of q, k and v, and of a prefix's k and v [K, P, H], or None."""
    mean = jnp.sum(g.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    mean, g = by_heads(mean, len(row.k)), by_heads(g, len(row.k))
    P = 0 if row.first_k is None else row.first_k.shape[1]
    # Turned over, which is the faster way to multiply them.
    d_q, d_k, d_v = [], *(jnp.zeros((len(x), x.shape[2], P + x.shape[1]), jnp.float32) for x in (row.k, row.v))
    for block in blocks_of(how, row):
        part = folded(g[:, :, block.queries]).astype(block.v.dtype)
        scores, tanh = scores_of(how, block)
        weights = jnp.exp(scores - folded(log_sum[:, :, block.queries])[..., None])
        d_scores = weights * (product("KQH,KSH->KQS", part, block.v) - folded(mean[:, :, block.queries])) * how.scale
        if tanh is not None:
            d_scores *= 1 - tanh * tanh
        d_scores, weights = d_scores.astype(block.q.dtype), weights.astype(block.v.dtype)
        d_q.append(product("KQS,KSH->KQH", d_scores, block.k))
        d_k = added(d_k, block, product("KQH,KQS->KHS", block.q, d_scores))
        d_v = added(d_v, block, product("KQH,KQS->KHS", part, weights))
    d_k, d_v = d_k.swapaxes(1, 2).astype(row.k.dtype), d_v.swapaxes(1, 2).astype(row.v.dtype)
    d_first = (d_k[:, :P], d_v[:, :P]) if P else (None, None)
    return unfolded(d_q, row.q), d_k[:, P:], d_v[:, P:], *d_first


def added(total: Float[Array, "K H PT"], block: Block, new: Float[Array, "K H S"]) -> Float[Array, "K H PT"]:
    P = new.shape[2] - (block.keys.stop - block.keys.start)
    total = total.at[:, :, P + block.keys.start : P + block.keys.stop].add(new[:, :, P:])
    return total.at[:, :, :P].add(new[:, :, :P]) if P else total
