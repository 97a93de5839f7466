"""How likely a model finds given texts: a row's targets, or several continuations of one prompt.

A prompt is read once, into a KV cache that its continuations share.  Logits are formed at the continuations' positions
alone, and in the chunks of the loss.

B prompts of a batch, P prompt slots, N continuations of each, M tokens of one, T positions, D width, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxtune.attention import Cache
from jaxtune.data.batches import Batch, eval_batches
from jaxtune.data.buckets import width_of
from jaxtune.data.examples import Prompt
from jaxtune.data.load import Dataset
from jaxtune.data.seq2seq import Lengths
from jaxtune.errors import UserError
from jaxtune.generate import prefill, starts_of
from jaxtune.loss import batch_loss, token_scores
from jaxtune.tokenizer import Tokenizer
from jaxtune.typing import Tree

# Static lengths double in two steps, so that few are compiled and less than half of one is padding.
STEPS = (2, 3)


class Score(NamedTuple):
    """logprob: sum of the tokens' log-probabilities (natural).  greedy: each of them was the likeliest."""

    logprob: float
    tokens: int
    greedy: bool


def bucket(length: int, unit: int = 32) -> int:
    """The static length for `length` tokens: 32, 64, 96, 128, 192, 256, 384, …"""
    size, step = unit, 0
    while size < length:
        size = unit * STEPS[step % 2] * 2 ** (step // 2)
        step += 1
    return size


@functools.partial(jax.jit, static_argnames="model")
def score(
    model: Any,
    variables: Tree,
    tokens: Int[Array, "B P"],
    segments: Int[Array, "B P"],
    targets: Int[Array, "B N M"],
    weights: Float[Array, "B N M"],
    starts: Int[Array, "B Q"] | None = None,
) -> tuple[Float[Array, "B N"], Bool[Array, "B N"]]:
    """(sum of log-probabilities, all greedy) of each continuation; prompts are padded on the left.

    Args:
      starts: where an encoder reads the prompts, what the decoder reads first.
    """
    B, N, M = targets.shape
    hidden, cache, last = prefill(model, variables, tokens, segments, starts, new=M - 1)
    hidden = jnp.repeat(hidden[:, -1:], N, axis=0)  # predicts the first token of each
    flat, weight = targets.reshape(B * N, M), weights.reshape(B * N, M)
    if M > 1:
        after = jnp.repeat(last[:, None], N, axis=0) + 1 + jnp.arange(M - 1)[None]
        real = (weight[:, 1:] > 0).astype(jnp.int32)
        later, _ = model.apply(variables, flat[:, :-1], after, real, repeated(cache, N))
        hidden = jnp.concatenate([hidden, later], axis=1)
    table = model.apply(variables, method="head")
    logprobs, best = token_scores(hidden, table, flat, weight, model.config.final_softcap)
    total, greedy = jnp.sum(logprobs * weight, axis=1), jnp.all(best | (weight == 0), axis=1)
    return total.reshape(B, N), greedy.reshape(B, N)


def repeated(cache: Cache, n: int) -> Cache:
    """Each row n times, side by side."""

    def rows(part: Any) -> Any:
        k, v = (jnp.repeat(x, n, axis=1) for x in (part.k, part.v))
        return {"k": k, "v": v, "segments": jnp.repeat(part.segments, n, axis=0)}

    source = None if cache.source is None else cache.source._replace(**rows(cache.source))
    return dataclasses.replace(cache, **rows(cache), source=source)


def continuations(
    model: Any,
    variables: Tree,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[Sequence[int]]],
    *,
    batch_size: int,
    shards: int = 1,
    advance: Callable[[int], None] = lambda done: None,
) -> list[list[Score]]:
    """Scores of each prompt's continuations, in order.

    Batches hold prompts of similar length, so that work follows the tokens there are.

    Args:
      prompts: token ids, behind the virtual ones where the adapter has any; at least one each.
      answers: for each prompt, one or more continuations of at least one token.
      batch_size: continuations of a batch; filled up to a multiple of `shards` prompts.  advance: told of prompts done.

    Raises:
      UserError: a prompt or a continuation is empty.
    """
    for i, (prompt, texts) in enumerate(zip(prompts, answers, strict=True)):
        if not len(prompt) or not all(len(text) for text in texts):
            raise UserError(f"Prompt {i} or one of its continuations has no token: there is nothing to score.")
    found: list[list[Score]] = [[] for _ in prompts]
    width = max(map(len, answers), default=1)
    size = -(-max(1, min(batch_size // width, len(prompts))) // shards) * shards
    order = sorted(range(len(prompts)), key=lambda i: (-bucket(len(prompts[i])), -max(map(len, answers[i]))))
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        slots = bucket(max(len(prompts[i]) for i in rows))
        longest = max(len(text) for i in rows for text in answers[i])
        longest = longest if longest == 1 else bucket(longest, unit=4)
        tokens, segments = np.zeros((2, size, slots), np.int32)
        targets, weights = np.zeros((size, width, longest), np.int32), np.zeros((size, width, longest), np.float32)
        segments[:, -1] = 1  # a row of padding alone would see nothing
        for row, i in enumerate(rows):
            tokens[row, slots - len(prompts[i]) :], segments[row, slots - len(prompts[i]) :] = prompts[i], 1
            for column, text in enumerate(answers[i]):
                targets[row, column, : len(text)], weights[row, column, : len(text)] = text, 1
        starts = starts_of(model, variables, [prompts[i] for i in rows] + [prompts[rows[0]]] * (size - len(rows)))
        total, greedy = map(np.asarray, score(model, variables, tokens, segments, targets, weights, starts))
        for row, i in enumerate(rows):
            for column, text in enumerate(answers[i]):
                found[i].append(Score(float(total[row, column]), len(text), bool(greedy[row, column])))
        advance(len(rows))
    return found


def label_ids(
    tokenizer: Tokenizer, prompt: Prompt, names: Sequence[str], apart: bool
) -> tuple[list[int], list[list[int]]]:
    """(the prompt, each label behind it) as tokens, with the white space that the row's own answer begins with.

    A token that would reach over the border belongs to the labels.

    Args:
      apart: an encoder reads the prompt, and labels are texts of their own.
    """
    lead = prompt.reference[: len(prompt.reference) - len(prompt.reference.lstrip())]
    if apart:
        return prompt.ids, tokenizer.encode_batch([lead + name for name in names])
    alone = tokenizer.encode(prompt.text)
    wholes = [tokenizer.encode(prompt.text + lead + name) for name in names]
    shared = min(
        next((i for i, (a, b) in enumerate(zip(alone, w, strict=False)) if a != b), len(alone)) for w in wholes
    )
    cut = len(alone) - shared
    return prompt.ids[: len(prompt.ids) - cut], [whole[shared:] for whole in wholes]


@functools.partial(jax.jit, static_argnames="model")
def loss_and_tokens(model: Any, variables: Tree, batch: dict[str, Array]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(summed loss, target tokens) of a batch, without dropout."""
    return batch_loss(model, variables, batch), jnp.sum(batch["weights"])


def loss_batches(rows: Dataset, size: int, length: int | Lengths) -> Iterator[Batch]:
    """Every row once, rows of similar length side by side; a batch is as wide as its longest row needs.

    Args:
      length: the static length that fits all rows, or those of an encoder-decoder's two sides.
    """
    widest = width_of(length)
    widths = sorted({min(bucket(n), widest) for n in range(1, widest + 1)})
    return eval_batches(rows, size, length, widths=widths)
