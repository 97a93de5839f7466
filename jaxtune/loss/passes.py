"""The loops over blocks of words and chunks of tokens, as one device runs them.

Tokens with a target come first, and chunks behind the last of them are never reached: completion-only data pays the
head for what is learnt.  Shapes are static, the number of turns is not.

N tokens of this device, C of a chunk, D width, W words of a block.  What depends on the vocabulary's split is summed
over `how.vocab`, what depends on the tokens' over `how.rows`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxtune.loss.how import How
from jaxtune.quant.box import Quantised

LOWEST = float(jnp.finfo(jnp.float32).min)


class Tokens(NamedTuple):
    """The tokens of a device, those with a target first, filled up to whole chunks.

    turns: chunks with a target in them.  back: where each token has gone, [N] without what was filled up.
    """

    hidden: Float[Array, "n D"]
    targets: Int[Array, " n"]
    weights: Float[Array, " n"]
    turns: Int[Array, ""]
    back: Int[Array, " N"]


class Seen(NamedTuple):
    """Of each token, over the words seen so far: the largest logit and the target's, both before the soft-cap, and the
    sum of exp(logit - largest), both behind it."""

    top: Float[Array, " n"]
    total: Float[Array, " n"]
    target: Float[Array, " n"]


class Found(NamedTuple):
    """Of each token, over all words: log of the sum of exp(logit), the target's logit, and whether none is larger."""

    log_total: Float[Array, " n"]
    target: Float[Array, " n"]
    best: Bool[Array, " n"]


def packed(how: How, hidden: Array, targets: Array, weights: Array) -> Tokens:
    has = weights != 0
    order = jnp.argsort(~has, stable=True)
    fill = -len(order) % how.chunk
    h, t, w = (jnp.pad(x[order], ((0, fill),) + ((0, 0),) * (x.ndim - 1)) for x in (hidden, targets, weights))
    return Tokens(h, t, w, -(-jnp.sum(has, dtype=jnp.int32) // how.chunk), jnp.argsort(order))


def psum(x: Any, axes: tuple[str, ...]) -> Any:
    return jax.lax.psum(x, axes) if axes else x


def capped(how: How, z: Array) -> Array:
    return z if how.softcap is None else jnp.tanh(z / how.softcap) * how.softcap


def product(h: Float[Array, "C D"], block: Float[Array, "W D"]) -> Float[Array, "C W"]:
    return jax.lax.dot_general(h, block, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def take(x: Array, i: Any, how: How) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, i * how.chunk, how.chunk)


def put(x: Array, i: Any, how: How, value: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, value.astype(x.dtype), i * how.chunk, axis=0)


class Block(NamedTuple):
    """rows: the table's, whole in width.  start: the place of the first among this device's words.  first: its id.
    new: which are no block's before (the last block reaches back, where blocks do not divide the words); None: all."""

    rows: Float[Array, "W D"]
    start: Any
    first: Any
    new: Any


def block_of(how: How, table: Any, b: Any, dtype: Any) -> Block:
    """The b-th block of the table, gathered over `how.width`."""
    start = jnp.minimum(b * how.block, how.words - how.block)
    first = start + jax.lax.axis_index(how.vocab) * how.words if how.vocab else start
    if isinstance(table, Quantised):
        rows = table.rows(first + jnp.arange(how.block)).astype(dtype)
    else:
        rows = jax.lax.dynamic_slice_in_dim(table, start, how.block).astype(dtype)
        if how.width:
            rows = jax.lax.all_gather(rows, how.width, axis=1, tiled=True)
    new = None if how.words % how.block == 0 else start + jnp.arange(how.block) >= b * how.block
    return Block(rows, start, first, new)


def each_block(how: How, body: Callable[[Any, Any], Any], carry: Any) -> Any:
    return body(0, carry) if how.blocks == 1 else jax.lax.fori_loop(0, how.blocks, body, carry)


def hits(block: Block, targets: Int[Array, " C"]) -> Bool[Array, "C W"]:
    ids = block.first + jnp.arange(len(block.rows))
    hit = ids[None] == targets[:, None]
    return hit if block.new is None else hit & block.new[None]


def of_targets(how: How, raw: Float[Array, "C W"], block: Block, targets: Int[Array, " C"]) -> Float[Array, " C"]:
    """A target's logit; zero where it is in another block."""
    if how.blocks > 1:  # most targets are: a sum in the pass that is made anyway
        return jnp.sum(jnp.where(hits(block, targets), raw, 0.0), axis=1)
    place = targets - block.first
    own = (place >= 0) & (place < how.block)
    return jnp.where(own, jnp.take_along_axis(raw, jnp.where(own, place, 0)[:, None], axis=1)[:, 0], 0.0)


def seen(
    how: How, raw: Float[Array, "C W"], block: Block, targets: Int[Array, " C"], before: Seen
) -> tuple[Seen, Float[Array, "C W"]]:
    """With one block more, and that block's summands."""
    target = before.target + of_targets(how, raw, block, targets)
    if block.new is not None:
        raw = jnp.where(block.new[None], raw, LOWEST)
    top = jnp.maximum(before.top, jnp.max(raw, axis=1))
    summands = jnp.exp(capped(how, raw) - capped(how, top)[:, None])
    if block.new is not None:  # a soft-cap makes a number like others of the lowest
        summands = jnp.where(block.new[None], summands, 0.0)
    total = before.total * jnp.exp(capped(how, before.top) - capped(how, top)) + jnp.sum(summands, axis=1)
    return Seen(top, total, target), summands


def nothing(n: int) -> Seen:
    return Seen(jnp.full(n, LOWEST, jnp.float32), jnp.zeros(n, jnp.float32), jnp.zeros(n, jnp.float32))


def found(how: How, part: Seen) -> Found:
    top, total, target = part
    if how.vocab:
        top = jax.lax.pmax(part.top, how.vocab)
        total = psum(part.total * jnp.exp(capped(how, part.top) - capped(how, top)), how.vocab)
        target = psum(part.target, how.vocab)
    # Tokens that no turn has reached have summed nothing.
    log_total = capped(how, top) + jnp.log(jnp.where(total > 0, total, 1.0))
    return Found(log_total, capped(how, target), target >= top)


def losses(how: How, weights: Array, tokens: Found) -> Float[Array, " 2"]:
    """[what is trained on, the cross-entropy alone] of tokens, summed.  Those without a target count nothing."""
    entropy = jnp.sum(weights * (tokens.log_total - tokens.target), where=weights != 0)
    extra = how.z_loss * jnp.sum(weights * jnp.square(tokens.log_total), where=weights != 0) if how.z_loss else 0.0
    return jnp.stack([entropy + extra, entropy])


def look(how: How, tokens: Tokens, table: Any) -> Found:
    """One pass without gradient."""

    def block_turn(b: Any, carry: Seen) -> Seen:
        block = block_of(how, table, b, tokens.hidden.dtype)

        def turn(i: Any, carry: Seen) -> Seen:
            raw = product(take(tokens.hidden, i, how), block.rows)
            before = Seen(*(take(x, i, how) for x in carry))
            after, _ = seen(how, raw, block, take(tokens.targets, i, how), before)
            return Seen(*(put(x, i, how, new) for x, new in zip(carry, after, strict=True)))

        return jax.lax.fori_loop(0, tokens.turns, turn, carry)

    return found(how, each_block(how, block_turn, nothing(len(tokens.weights))))


def totals(how: How, hidden: Array, table: Any, targets: Array, weights: Array) -> tuple[Array, Array]:
    """(losses [2], log_total of the packed tokens), without gradient."""
    tokens = packed(how, hidden, targets, weights)
    all_words = look(how, tokens, table)
    return psum(losses(how, tokens.weights, all_words), how.rows), all_words.log_total


def scores(how: How, hidden: Array, table: Any, targets: Array, weights: Array) -> tuple[Array, Array]:
    """(log p(target) [N], whether no word is likelier [N]) in the tokens' order; zeros where there is no target."""
    tokens = packed(how, hidden, targets, weights)
    all_words = look(how, tokens, table)
    logprobs = jnp.where(tokens.weights != 0, all_words.target - all_words.log_total, 0.0)
    return logprobs[tokens.back], (all_words.best & (tokens.weights != 0))[tokens.back]


def slopes(
    wanted: tuple[bool, ...],
    how: How,
    hidden: Array,
    table: Any,
    targets: Array,
    weights: Array,
    log_total: Array | None = None,
) -> tuple[Array, Array | None, Array | None]:
    """(losses [2], d_hidden, d_table), of which `wanted` says whether the last two are made at all.

    Args:
      log_total: `totals`'.  None, of one block only: the loss is computed here too; else it is zero.
    """
    tokens = packed(how, hidden, targets, weights)
    turns, dtype = tokens.turns, hidden.dtype
    if log_total is None and how.vocab:  # devices meet in every turn
        turns = jax.lax.pmax(turns, (*how.rows, *how.vocab))

    def block_turn(b: Any, carry: Any) -> Any:
        loss, d_hidden, d_table = carry
        block = block_of(how, table, b, dtype)

        def turn(i: Any, carry: Any) -> Any:
            loss, d_hidden, d_rows = carry
            h, weight = take(tokens.hidden, i, how), take(tokens.weights, i, how)
            raw = product(h, block.rows)
            target = take(tokens.targets, i, how)
            if log_total is None:
                part, summands = seen(how, raw, block, target, nothing(how.chunk))
                chunk = found(how, part)
                loss, logs = loss + losses(how, weight, chunk), chunk.log_total
                p = summands * jnp.exp(capped(how, part.top) - logs)[:, None]
            else:
                logs = take(log_total, i, how)
                p = jnp.exp(capped(how, raw) - logs[:, None])
            g = slope(how, p, raw, hits(block, target), block, logs, weight).astype(dtype)
            if d_hidden is not None:
                new = jnp.matmul(g, block.rows, preferred_element_type=jnp.float32)
                d_hidden = put(d_hidden, i, how, new if how.blocks == 1 else take(d_hidden, i, how) + new)
            if d_rows is not None:
                d_rows += jax.lax.dot_general(g, h, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
            return loss, d_hidden, d_rows

        d_rows = jnp.zeros(block.rows.shape, jnp.float32) if wanted[1] else None
        loss, d_hidden, d_rows = jax.lax.fori_loop(0, turns, turn, (loss, d_hidden, d_rows))
        if d_rows is not None:
            before = jax.lax.dynamic_slice_in_dim(d_table, block.start, how.block)
            d_table = jax.lax.dynamic_update_slice_in_dim(d_table, before + share(how, d_rows), block.start, axis=0)
        return loss, d_hidden, d_table

    # Sums over blocks or devices are float32; what is complete after one product has the activations' dtype.
    kind = dtype if how.blocks == 1 and not how.vocab else jnp.float32
    d_hidden = jnp.zeros(tokens.hidden.shape, kind) if wanted[0] else None
    d_table = jnp.zeros(table.shape, jnp.float32) if wanted[1] else None
    loss, d_hidden, d_table = each_block(how, block_turn, (jnp.zeros(2, jnp.float32), d_hidden, d_table))
    if d_hidden is not None:
        d_hidden = psum(d_hidden, how.vocab).astype(dtype)[tokens.back]
    return psum(loss, how.rows), d_hidden, d_table


def slope(
    how: How, p: Array, raw: Array, hit: Array, block: Block, log_total: Array, weight: Array
) -> Float[Array, "C W"]:
    """dloss/draw, the logits before the soft-cap.  p: exp(logit - log_total)."""
    g = p * (1 + 2 * how.z_loss * log_total[:, None]) if how.z_loss else p
    g = (g - hit.astype(jnp.float32)) * weight[:, None]
    if how.softcap is not None:
        g = g * (1 - jnp.square(jnp.tanh(raw / how.softcap)))
    return g if block.new is None else jnp.where(block.new[None], g, 0.0)


def share(how: How, d_rows: Float[Array, "W D"]) -> Float[Array, "W d"]:
    """This device's columns of a block's gradient, summed over the devices that have other tokens."""
    d_rows = psum(d_rows, tuple(axis for axis in how.rows if axis not in how.width))
    if how.width:
        d_rows = jax.lax.psum_scatter(d_rows, how.width, scatter_dimension=1, tiled=True)
    return d_rows
