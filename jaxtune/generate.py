"""Text from a model: one prefill, then one token at a time from a KV cache, compiled as a whole.

B batch, P prompt slots, S = P + new slots, V vocabulary.  Prompts of different lengths are padded on the left, so that
every row writes its next token to the same slot.  Behind an encoder, which reads the prompts once, the decoder begins
with Q tokens of its own, and what it makes of the encoder's output is in the cache.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32

from jaxtune.attention import Cache
from jaxtune.errors import UserError
from jaxtune.hosts import whole
from jaxtune.layers import output_logits
from jaxtune.peft.method import folded
from jaxtune.typing import Tree

# Prompt slots and new tokens are rounded up to these, so that few shapes are compiled.
PROMPT_MULTIPLE = 32


class Sampling(NamedTuple):
    """temperature 0: the likeliest token.  Otherwise temperature, then top_k, then top_p, in transformers' order."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None


def check_sampling(sampling: Sampling) -> None:
    """Refuses what is no way to choose.

    Raises:
      UserError: naming the value and its range.
    """
    temperature, top_k, top_p = sampling
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature is {temperature!r}. It is 0 (the likeliest token) or a number above it.")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k is {top_k!r}. It is 1 or more, or None.")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p!r}. It is above 0 and at most 1, or None.")


def choose(logits: Float[Array, "B V"], sampling: Sampling, key: Array) -> Int[Array, "B"]:
    """The next token of each row."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.top_p is not None and sampling.top_p < 1:
        # Keep the smallest set of likeliest tokens whose probabilities reach top_p; the likeliest always stays.
        order = jnp.sort(logits, axis=-1, descending=True)
        before = jnp.cumsum(jax.nn.softmax(order, axis=-1), axis=-1) - jax.nn.softmax(order, axis=-1)
        least = jnp.min(jnp.where(before < sampling.top_p, order, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


def prefill(
    model: Any,
    variables: Tree,
    tokens: Int[Array, "B P"],
    segments: Int[Array, "B P"],
    starts: Int[Array, "B Q"] | None,
    *,
    new: int,
) -> tuple[Float[Array, "B T D"], Cache, Int[Array, "B"]]:
    """(hidden states of what was read, a cache of it with room for `new` slots more, each row's last position).

    Args:
      tokens, segments: the prompts.  starts: where an encoder reads those, what the decoder reads first.
    """
    c, source = model.config, {}
    if starts is not None:
        source = {"source_tokens": tokens, "source_segments": segments}
        tokens, segments = starts, jnp.ones_like(starts)
    positions = jnp.maximum(jnp.cumsum(segments, axis=1) - 1, 0)
    cache = Cache.empty(c.layers, tokens.shape[0], tokens.shape[1] + new, c.kv_heads, c.head_dim, model.dtype)
    hidden, cache = model.apply(variables, tokens, positions, segments, cache, **source)
    return hidden, cache, positions[:, -1]


@functools.partial(jax.jit, static_argnames=("model", "new", "stop_ids", "sampling"))
def decode(
    model: Any,
    variables: Tree,
    tokens: Int[Array, "B P"],
    segments: Int[Array, "B P"],
    key: Array,
    *,
    new: int,
    stop_ids: tuple[int, ...],
    sampling: Sampling,
    starts: Int[Array, "B Q"] | None = None,
) -> tuple[Int[Array, "B new"], Int[Array, "B"]]:
    """(tokens, how many of them) for each row; a row ends with its stop token, which is counted.

    Args:
      tokens, segments: the prompts.  starts: where an encoder reads those, what the decoder reads first.
    """
    c, B = model.config, tokens.shape[0]
    variables = folded(variables)
    table = model.apply(variables, method="head")
    stops = jnp.asarray(stop_ids, jnp.int32)

    def logits_of(hidden):
        return output_logits(hidden[:, -1], table, c.final_softcap)

    hidden, cache, last = prefill(model, variables, tokens, segments, starts, new=new)
    logits = logits_of(hidden)
    # Virtual tokens stand before a text only; their keys and values are in the cache by now.
    adapters = {name: part for name, part in variables.get("adapters", {}).items() if name != "prompt"}
    later = variables | {"adapters": adapters}

    def unfinished(carry):
        step, _, _, done, *_ = carry
        return (step < new) & ~jnp.all(done)

    def one(carry):
        step, out, count, done, logits, cache, position = carry
        token = choose(logits, sampling, jax.random.fold_in(key, step))
        out = jax.lax.dynamic_update_slice_in_dim(out, token[:, None], step, axis=1)
        count = jnp.where(done, count, count + 1)
        done = done | jnp.any(token[:, None] == stops[None], axis=1)
        position = position + 1
        hidden, cache = model.apply(later, token[:, None], position[:, None], jnp.ones((B, 1), jnp.int32), cache)
        return step + 1, out, count, done, logits_of(hidden), cache, position

    start = (0, jnp.zeros((B, new), jnp.int32), jnp.zeros((B,), jnp.int32), jnp.zeros((B,), bool))
    _, out, count, *_ = jax.lax.while_loop(unfinished, one, (*start, logits, cache, last))
    return out, count


def starts_of(model: Any, variables: Tree, prompts: Sequence[Sequence[int]]) -> Int32[np.ndarray, "B Q"] | None:
    """What the decoder of an encoder-decoder reads first: virtual tokens of the row's task, where it has any of its own
    (their ids are behind those before the prompt: `data.virtual`), and the start token.  None for a decoder alone."""
    start = getattr(model.config, "start_id", None)
    if start is None:
        return None
    own = getattr(variables.get("adapters", {}).get("prompt"), "decoder_tokens", 0)
    return np.array([[*(prompt[0] - own - k for k in range(own)), start] for prompt in prompts], np.int32)


def generate(
    model: Any,
    variables: Tree,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    sampling: Sampling | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    slots: int | None = None,
) -> list[list[int]]:
    """New token ids of each prompt, its stop token left out.  Greedy tokens equal transformers' `generate`.

    Args:
      prompts: token ids, behind those of the virtual tokens where the adapter has any.
      batch_size: prompts to a batch; None: all at once.  The last batch is filled up with copies of its first prompt.
      slots: what prompts are padded to; None: the longest of them, rounded up.
    """
    sampling = sampling or Sampling()
    check_sampling(sampling)
    if not prompts:
        return []
    if any(len(p) == 0 for p in prompts):
        raise UserError(
            f"Prompt {next(i for i, p in enumerate(prompts) if not len(p))} is empty; a model needs one token."
        )
    size = batch_size or len(prompts)
    length = slots or -(-max(map(len, prompts)) // PROMPT_MULTIPLE) * PROMPT_MULTIPLE
    answers: list[list[int]] = []
    for start in range(0, len(prompts), size):
        rows = list(prompts[start : start + size])
        rows += [rows[0]] * (size - len(rows))
        tokens, segments = np.zeros((2, size, length), np.int32)
        for i, row in enumerate(rows):
            tokens[i, length - len(row) :] = row
            segments[i, length - len(row) :] = 1
        key = jax.random.fold_in(jax.random.key(seed), start)
        how = {"new": max_new_tokens, "stop_ids": tuple(stop_ids), "sampling": sampling}
        out, count = decode(model, variables, tokens, segments, key, **how, starts=starts_of(model, variables, rows))
        out, count = whole(out), whole(count)
        for row, n in zip(out[: len(prompts) - start], count, strict=False):
            ids = row[:n].tolist()
            answers.append(ids[:-1] if ids and ids[-1] in stop_ids else ids)
    return answers
