"""One line per split: a source, a tokenizer and the `data` settings in; arrays out.

`load_dataset` reads everything before training starts, so that bad data is refused before a model is loaded.
`stream_examples` reads as it goes.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, Int32, Int64

from jaxtune.data import seq2seq as two_sides
from jaxtune.data.examples import (
    Dropped,
    Example,
    Prompt,
    check_asks,
    examples,
    prompt_and_reference,
    without_beginning,
)
from jaxtune.data.formats import Format, make_format
from jaxtune.data.seq2seq import EncoderDecoder
from jaxtune.data.sources import open_rows
from jaxtune.data.virtual import NONE, Virtual
from jaxtune.errors import DataError, UserError, did_you_mean
from jaxtune.tokenizer import Tokenizer

# Above this share of dropped rows the report warns.
MANY = 0.05
# Bad rows listed before giving up.
LISTED = 5
# Rows after which a stream that gave nothing is given up.
PATIENCE = 1000
TRUNCATIONS = ("right", "left", "drop")
ON_BAD_ROW = ("error", "skip")


@dataclass(frozen=True)
class Counts:
    rows: int
    kept: int
    truncated: int
    # Rows in which a token straddles the border of a turn.
    shifted: int
    # Rows whose last answer does not end with a stop token.
    unstopped: int
    tokens: int
    target_tokens: int
    # The longest kept row, in tokens; of an encoder-decoder, what the encoder reads.  Virtual tokens count neither here
    # nor above.
    longest: int
    # Reason -> rows.
    dropped: dict[str, int]
    # Of an encoder-decoder: the most labels of a row, and rows whose labels were cut.  0: a decoder alone.
    longest_target: int = 0
    target_truncated: int = 0


@dataclass(frozen=True)
class Dataset:
    """Rows of different lengths behind each other: row i has tokens[offsets[i]:offsets[i + 1]]."""

    name: str
    # Each row's number in the source, from 1.
    rows: Int64[np.ndarray, "R"]
    offsets: Int64[np.ndarray, "R+1"]
    tokens: Int32[np.ndarray, "N"]
    # True where the token itself is learnt.
    mask: Bool[np.ndarray, "N"]
    counts: Counts
    # sha256 over tokens, mask and offsets: the same data or not.
    fingerprint: str

    def __len__(self) -> int:
        return len(self.rows)

    def example(self, i: int) -> tuple[Int[np.ndarray, "T"], Bool[np.ndarray, "T"]]:
        """Tokens and mask of row i."""
        cut = slice(self.offsets[i], self.offsets[i + 1])
        return self.tokens[cut], self.mask[cut]


def load_dataset(
    source: str,
    tokenizer: Tokenizer,
    *,
    split: str = "train",
    name: str | None = None,
    revision: str | None = None,
    max_length: int = 1024,
    truncation: str = "right",
    on_bad_row: str = "error",
    max_rows: int | None = None,
    virtual: Virtual = NONE,
    seq2seq: EncoderDecoder | None = None,
    **columns: Any,
) -> Dataset:
    """Every row of a split, tokenised, behind the method's virtual tokens.  The keywords are the keys of `config.data`;
    `columns` are those that say what a row means: format, messages, prompt, completion, text, chat_template, … (see
    `make_format`).  `seq2seq`: the model has an encoder.

    Raises:
      DataError: bad rows (the first ones as file:row:field) unless they are skipped; or no row is left to learn from.
      MissingInputError, NetworkError, UserError: as `open_rows` and `make_format`.
    """
    form = _format(tokenizer, seq2seq, columns)
    _check_policies(max_length, truncation, on_bad_row)
    rows = open_rows(source, split=split, name=name, revision=revision, max_rows=max_rows)
    kept: list[Example] = []
    dropped: list[Dropped] = []
    bad: list[Dropped] = []
    how = {"max_length": max_length, "truncation": truncation, "virtual": virtual}
    for example in _examples(rows, tokenizer, form, seq2seq, **how):
        if isinstance(example, Example):
            kept.append(example)
            continue
        (bad if example.reason == "bad row" else dropped).append(example)
        if on_bad_row == "error" and len(bad) == LISTED:
            break
    if on_bad_row == "error" and bad:
        raise _bad_rows(source, bad)
    dropped += bad
    if not kept:
        raise _nothing_left(source, dropped)
    return _dataset(source, kept, dropped, virtual.count, seq2seq is not None)


def stream_examples(
    source: str,
    tokenizer: Tokenizer,
    *,
    split: str = "train",
    name: str | None = None,
    revision: str | None = None,
    max_length: int = 1024,
    truncation: str = "right",
    on_bad_row: str = "error",
    max_rows: int | None = None,
    virtual: Virtual = NONE,
    seq2seq: EncoderDecoder | None = None,
    **columns: Any,
) -> Iterator[Example]:
    """One pass over a split, tokenised as it is read; the same rules and errors as `load_dataset`.

    The settings are checked now, rows when they come.  A stream whose first 1000 rows give nothing is refused.
    """
    form = _format(tokenizer, seq2seq, columns)
    _check_policies(max_length, truncation, on_bad_row)
    rows = open_rows(source, split=split, name=name, revision=revision, streaming=True, max_rows=max_rows)

    def one_pass() -> Iterator[Example]:
        dropped: list[Dropped] = []
        empty = True
        how = {"max_length": max_length, "truncation": truncation, "virtual": virtual}
        for example in _examples(rows, tokenizer, form, seq2seq, **how, chunk=64):
            if isinstance(example, Example):
                empty = False
                yield example
            elif on_bad_row == "error" and example.reason == "bad row":
                raise _bad_rows(source, [example])
            elif empty:
                dropped.append(example)
                if len(dropped) == PATIENCE:
                    raise _nothing_left(source, dropped)
        if empty:
            raise _nothing_left(source, dropped)

    return one_pass()


def load_prompts(
    source: str,
    tokenizer: Tokenizer,
    *,
    count: int,
    split: str = "validation",
    name: str | None = None,
    revision: str | None = None,
    max_length: int = 1024,
    truncation: str = "right",
    virtual: Virtual = NONE,
    seq2seq: EncoderDecoder | None = None,
    **columns: Any,
) -> list[Prompt]:
    """The first `count` rows as questions with their answers.  Rows that cannot be used are passed over; the
    training data's own load has reported them.  So are those whose prompt has more than `max_length` tokens, unless
    rows are cut on the left, or an encoder reads it: then it is cut as in training (`truncation`)."""
    form = _format(tokenizer, seq2seq, columns)
    check_asks(form)
    found: list[Prompt] = []
    for row in open_rows(source, split=split, name=name, revision=revision):
        if len(found) == count:
            break
        try:
            if seq2seq is None:
                asked = prompt_and_reference(row, tokenizer, form, virtual)
                if truncation == "left" and len(asked.ids) > virtual.count + max_length:
                    own = asked.ids[virtual.count :]
                    left = without_beginning(len(own), max_length, tokenizer.bos_id is not None)
                    asked = asked._replace(ids=asked.ids[: virtual.count] + [own[i] for i in left])
            else:
                how = {"max_length": max_length, "truncation": truncation, "virtual": virtual}
                asked = two_sides.prompt(row, tokenizer, form, **how)
        except DataError:
            continue
        if asked is not None and len(asked.ids) <= virtual.count + max_length:
            found.append(asked)
    return found


def report(counts: Counts) -> list[str]:
    """What became of the rows, one line each; lines that begin with "warning:" deserve a look."""
    two = counts.longest_target > 0
    longest = f"prompt {counts.longest}, longest answer {counts.longest_target}" if two else f"row {counts.longest}"
    lines = [
        f"{counts.kept} of {counts.rows} rows, {counts.tokens} tokens, {counts.target_tokens} of them learnt, "
        f"longest {longest}"
    ]
    if counts.truncated:
        lines.append(f"{counts.truncated} {'prompts' if two else 'rows'} cut at data.max_length")
    if counts.target_truncated:
        lines.append(f"{counts.target_truncated} answers cut at data.max_target_length")
    dropped = counts.rows - counts.kept
    reasons = ", ".join(f"{reason}: {n}" for reason, n in sorted(counts.dropped.items()))
    if dropped:
        many = "warning: " if dropped > MANY * counts.rows else ""
        lines.append(f"{many}{dropped} of {counts.rows} rows dropped ({reasons})")
    if counts.shifted:
        lines.append(f"warning: in {counts.shifted} rows a token straddles the border between prompt and answer")
    if counts.unstopped:
        lines.append(
            f"warning: {counts.unstopped} answers end without a stop token, so generation will not learn to stop"
        )
    return lines


def _format(tokenizer: Tokenizer, seq2seq: EncoderDecoder | None, columns: dict[str, Any]) -> Format:
    """Raises UserError as `make_format` and `seq2seq.check_format`: the latter first, for a default may be at fault."""
    if seq2seq is not None:
        two_sides.check_format(columns.get("format", "messages"), columns.get("chat_template"))
    return make_format(tokenizer, **columns)


def _examples(
    rows: Any, tokenizer: Tokenizer, form: Format, seq2seq: EncoderDecoder | None, **how: Any
) -> Iterator[Example | Dropped]:
    if seq2seq is None:
        return examples(rows, tokenizer, form, **how)
    return two_sides.examples(rows, tokenizer, form, seq2seq, **how)


def _dataset(source: str, kept: list[Example], dropped: list[Dropped], virtual: int, seq2seq: bool) -> Dataset:
    offsets = np.zeros(len(kept) + 1, np.int64)
    np.cumsum([len(example.tokens) for example in kept], out=offsets[1:])
    tokens = np.concatenate([example.tokens for example in kept])
    mask = np.concatenate([example.mask for example in kept])
    digest = hashlib.sha256()
    # Little-endian, so that the fingerprint is the same on every machine.
    for array in (tokens.astype("<i4"), mask.astype("u1"), offsets.astype("<i8")):
        digest.update(array.tobytes())
    lengths = np.diff(offsets) - virtual
    targets = np.add.reduceat(mask, offsets[:-1], dtype=np.int64) if seq2seq else np.zeros_like(lengths)
    counts = Counts(
        rows=len(kept) + len(dropped),
        kept=len(kept),
        truncated=sum(example.truncated for example in kept),
        shifted=sum(example.shifted for example in kept),
        unstopped=sum(not example.stopped for example in kept),
        tokens=len(tokens) - virtual * len(kept),
        target_tokens=int(mask.sum()),
        longest=int((lengths - targets).max()),
        dropped=dict(Counter(row.reason for row in dropped)),
        longest_target=int(targets.max()),
        target_truncated=sum(example.target_truncated for example in kept),
    )
    rows = np.array([example.row for example in kept], np.int64)
    return Dataset(source, rows, offsets, tokens, mask, counts, digest.hexdigest())


def _check_policies(max_length: int, truncation: str, on_bad_row: str) -> None:
    if max_length < 2:
        raise UserError(f"`data.max_length` is {max_length}. The least it can be is 2.")
    for key, value, known in (("truncation", truncation, TRUNCATIONS), ("on_bad_row", on_bad_row, ON_BAD_ROW)):
        if value not in known:
            raise UserError(f"`data.{key}` is {value!r}. It can be: {', '.join(known)}.{did_you_mean(value, known)}")


def _bad_rows(source: str, bad: list[Dropped]) -> DataError:
    lines = "\n".join(f"  {source}:{row.where}: {row.why}" for row in bad)
    return DataError(
        f"{source} has rows that cannot be used. The first of them:\n{lines}\n"
        f"Correct them, or set `data.on_bad_row` to skip. {ADVICE['bad row']}"
    )


ADVICE = {
    "bad row": "Is `data.format` right, and the columns' names?",
    "no text to learn": "Are the answers empty, or in another column?",
    "longer than data.max_length": "Raise `data.max_length`, or set `data.truncation` to right.",
    "the answer lies beyond data.max_length": "Raise `data.max_length`, or set `data.truncation` to left.",
}


def _nothing_left(source: str, dropped: list[Any]) -> DataError:
    reasons = Counter(row.reason for row in dropped).most_common()
    lines = "\n".join(f"  {n} rows: {reason}. {ADVICE[reason]}" for reason, n in reasons)
    first = next((row for row in dropped if row.why), None)
    example = f"\n  The first: {source}:{first.where}: {first.why}" if first else ""
    return DataError(f"No row of {source} can be learnt from; {len(dropped)} were read:\n{lines}{example}")
