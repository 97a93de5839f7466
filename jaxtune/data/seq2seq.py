"""Rows for an encoder-decoder: the prompt goes to the encoder, the completion to the decoder.

Each side is tokenised by itself and ends with EOS, as in transformers' sequence-to-sequence examples.  A row is stored
as any other, one behind the other with a mask,

    [virtual tokens] [prompt, EOS] [completion, EOS]        learnt: completion, EOS

so that data sets, streams, fingerprints and the row cursor know of no difference; a batch cuts it in two.  The decoder
reads its labels shifted right, behind the start token.

B rows, S positions of the encoder, T of the decoder, Q virtual tokens before the decoder's.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Shaped

from jaxtune.data.examples import CHUNK, Dropped, Example, Prompt, row_id
from jaxtune.data.formats import Format, RowError, Text, parse_row, parse_task, references
from jaxtune.data.sources import Row
from jaxtune.data.virtual import NONE, Virtual
from jaxtune.errors import UserError
from jaxtune.tokenizer import Tokenizer


class EncoderDecoder(NamedTuple):
    """start_id: what the decoder reads first (config.json's `decoder_start_token_id`).  max_target_length: labels a row
    may have, EOS included."""

    start_id: int
    max_target_length: int


class Lengths(NamedTuple):
    """What a batch of an encoder-decoder is made to: static lengths of its two sides, in tokens, virtual ones included.

    start_id: as in `EncoderDecoder`.  virtual: Q, of the decoder.
    """

    source: int
    target: int
    start_id: int
    virtual: int = 0


def sides(start_id: int | None, max_length: int, max_target_length: int | None) -> EncoderDecoder | None:
    """The settings of an encoder-decoder; None for a decoder alone, whose `start_id` is None.

    Raises:
      UserError: `max_target_length` is of no use, or too small.
    """
    if start_id is None:
        if max_target_length is not None:
            raise UserError(
                f"`data.max_target_length` is {max_target_length}, and this model has no encoder: prompt and answer "
                "are one text, of `data.max_length` tokens. Unset it."
            )
        return None
    if max_target_length is not None and max_target_length < 2:
        raise UserError(f"`data.max_target_length` is {max_target_length}. The least it can be is 2.")
    return EncoderDecoder(start_id, max_length if max_target_length is None else max_target_length)


def check_format(format: str, chat_template: str | None) -> None:
    """Refuses what an encoder-decoder cannot learn from.

    Raises:
      UserError: saying what to set.
    """
    if format == "prompt_completion" and chat_template is None:
        return
    what = f"`data.format` is {format}" if chat_template is None else f"`data.chat_template` is {chat_template!r}"
    raise UserError(
        f"{what}, and this model has an encoder, which reads a prompt, and a decoder, which writes the answer; it "
        "knows no turns. Set `data.format` to prompt_completion and `data.chat_template` to None, and write both sides "
        'as templates over the columns: `data.prompt`, e.g. "Summarize:\\n{dialogue}", and `data.completion`, e.g. '
        '"{summary}".'
    )


def examples(
    rows: Iterable[Row],
    tokenizer: Tokenizer,
    form: Format,
    two: EncoderDecoder,
    *,
    max_length: int,
    truncation: str,
    virtual: Virtual = NONE,
    chunk: int = CHUNK,
) -> Iterator[Example | Dropped]:
    """One example, or the reason there is none, for each row, in order; `max_length` is the encoder's."""
    rows = iter(rows)
    while batch := list(islice(rows, chunk)):
        read = [_read(row, form, virtual) for row in batch]
        texts = [text for found in read if not isinstance(found, Dropped) for text in found[0]]
        ids = iter(tokenizer.encode_batch(texts))
        for row, found in zip(batch, read, strict=True):
            if isinstance(found, Dropped):
                yield found
                continue
            whole = ended(next(ids), tokenizer)
            source = cut(whole, max_length, truncation)
            answer = ended(next(ids), tokenizer)
            labels = cut(answer, two.max_target_length, "right")
            if source is None or labels is None:
                yield Dropped(row.number, "longer than data.max_length")
                continue
            tokens = np.concatenate([found[1], source, labels]).astype(np.int32)
            mask = np.arange(len(tokens)) >= len(tokens) - len(labels)
            shorter = len(source) < len(whole), len(labels) < len(answer)
            yield Example(row.number, tokens, mask, shorter[0], False, True, shorter[1])


def prompt(
    row: Row,
    tokenizer: Tokenizer,
    form: Format,
    *,
    max_length: int,
    truncation: str,
    virtual: Virtual = NONE,
) -> Prompt | None:
    """What the encoder reads of a row, as in training, and its answers; None where training drops the row for its
    length.

    Raises:
      RowError: the row cannot be used.
    """
    content = parse_row(row, form)
    assert isinstance(content, Text)
    ids = cut(ended(tokenizer.encode(content.prompt), tokenizer), max_length, truncation)
    if ids is None:
        return None
    ids = virtual.ids(parse_task(row, virtual)).tolist() + ids
    asked, learnt = content
    return Prompt(row.number, ids, asked, asked, learnt, references(row, form), row_id(row))


def cut(ids: list[int], limit: int, truncation: str) -> list[int] | None:
    """At most `limit` ids, the last of them (EOS) kept; None where they are to be dropped instead."""
    if len(ids) <= limit:
        return ids
    return {"right": [*ids[: limit - 1], ids[-1]], "left": ids[-limit:], "drop": None}[truncation]


def ended(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """Ids with EOS behind them, as encoders and decoders have read them."""
    return ids if ids[-1:] == [tokenizer.eos_id] else [*ids, tokenizer.eos_id]


def _read(row: Row, form: Format, virtual: Virtual) -> tuple[Text, Int[np.ndarray, "P"]] | Dropped:
    try:
        content = parse_row(row, form)
        assert isinstance(content, Text)
        if not content.completion.strip():
            return Dropped(row.number, "no text to learn")
        return content, virtual.ids(parse_task(row, virtual))
    except RowError as error:
        return Dropped(row.number, "bad row", error.where, error.why)


def collate(
    rows: Sequence[tuple[Int[np.ndarray, "_"], Bool[np.ndarray, "_"]]], batch_size: int, lengths: Lengths
) -> dict[str, Shaped[np.ndarray, "B _"]]:
    """Rows side by side, padding on the right and below.

    source_tokens, source_segment_ids [B, S]: what the encoder reads, virtual tokens first; 1 on real tokens.
    tokens [B, T]: the decoder's virtual tokens, the start token, the labels but the last.  targets: the labels, each
    where it is predicted.  weights: 1 there.  positions; segment_ids: 1 on real tokens.

    Raises:
      ValueError: a row is longer than `lengths`, or there are more rows than `batch_size`.
    """
    names = ("tokens", "targets", "positions", "segment_ids")
    batch: dict[str, np.ndarray] = {name: np.zeros((batch_size, lengths.target), np.int32) for name in names}
    batch |= {
        name: np.zeros((batch_size, lengths.source), np.int32) for name in ("source_tokens", "source_segment_ids")
    }
    batch["weights"] = np.zeros((batch_size, lengths.target), np.float32)
    halves = [(tokens[~mask], tokens[mask]) for tokens, mask in rows]
    longest = [max((len(half[side]) for half in halves), default=0) for side in (0, 1)]
    if len(rows) > batch_size or longest[0] > lengths.source or longest[1] + lengths.virtual > lengths.target:
        raise ValueError(
            f"{len(rows)} rows of up to {longest[0]} and {longest[1]} tokens do not fit in [{batch_size}, "
            f"{lengths.source} and {lengths.target}]."
        )
    for i, (source, labels) in enumerate(halves):
        # The decoder's virtual tokens have the ids behind the encoder's (`data.virtual`).
        virtual = source[: lengths.virtual] - lengths.virtual
        read = np.concatenate([virtual, [lengths.start_id], labels[:-1]])
        first, end = len(virtual), len(read)
        batch["source_tokens"][i, : len(source)] = source
        batch["source_segment_ids"][i, : len(source)] = 1
        batch["tokens"][i, :end] = read
        batch["targets"][i, first:end] = labels
        batch["weights"][i, first:end] = 1
        batch["positions"][i, :end] = np.arange(end)
        batch["segment_ids"][i, :end] = 1
    return batch
