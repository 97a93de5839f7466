"""The `data` section of a config to the two splits of a run; both backends read their rows here."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from jaxtune.data import buckets, packing
from jaxtune.data.batches import Batch, batches, eval_batches, fit_length, fit_lengths, row_ids, stream_batches
from jaxtune.data.examples import Example, Prompt
from jaxtune.data.load import Dataset, load_dataset, load_prompts, report, stream_examples
from jaxtune.data.packing import Packing
from jaxtune.data.seq2seq import EncoderDecoder, Lengths, sides
from jaxtune.data.virtual import NONE, Virtual, by_column
from jaxtune.errors import UserError
from jaxtune.tokenizer import Tokenizer

# What says what a row means, as `make_format` takes it.
TEMPLATES = ("format", "messages", "prompt", "completion", "text", "chat_template")
COLUMNS = (*TEMPLATES, "label_column", "label_names", "no_answer")


class Stream(NamedTuple):
    """Rows read as they come, in their own order.  open: one pass.  fingerprint: of the settings, not of the rows."""

    name: str
    open: Callable[[], Iterator[Example]]
    fingerprint: str


class Splits(NamedTuple):
    """train, held: the rows (held: None without `data.eval`).  length: the static length that fits both, or those of an
    encoder-decoder's two sides; with `data.packing` that of a pack."""

    train: Dataset | Stream
    held: Dataset | None
    length: int | Lengths


def read_splits(
    c: Any,
    tokenizer: Tokenizer,
    say: Callable[[str], None],
    virtual: Virtual = NONE,
    start_id: int | None = None,
) -> Splits:
    """Reads, checks and tokenises everything, and says what became of the rows; a stream is read up to its first row.

    Args:
      c: `config.data`.  virtual: the method's tokens before each row.  start_id: what the decoder of an encoder-decoder
        reads first (`jaxtune.models.decoder_start`); None: a decoder alone.

    Raises:
      DataError, MissingInputError, NetworkError, UserError: as `load_dataset`, `by_column`, `seq2seq.sides` and
        `packing.check`.
    """
    if c.packing:
        packing.check(start_id)
    source = _source(c, virtual, start_id) | {"on_bad_row": c.on_bad_row}
    seq2seq: EncoderDecoder | None = source["seq2seq"]

    def fit(*datasets: Dataset | None) -> int | Lengths:
        # A pack takes the longest row that there may be, whatever rows there are.
        read = [] if c.packing else [dataset for dataset in datasets if dataset is not None]
        if seq2seq is None:
            return fit_length(read, c.max_length, virtual=virtual.count)
        return fit_lengths(read, c.max_length, seq2seq, virtual)

    def read(name: str, split: str, max_rows: int | None) -> Dataset:
        rows = load_dataset(name, tokenizer, split=split, max_rows=max_rows, **source)
        say("\n  ".join([f"data: {name}", *report(rows.counts)]))
        return rows

    held = read(c.eval, c.eval_split, c.max_eval_rows) if c.eval else None
    if not c.streaming:
        train = read(c.train, c.train_split, c.max_train_rows)
        return Splits(train, held, fit(train, held))

    how = {"split": c.train_split, "max_rows": c.max_train_rows, **source}
    stream = Stream(
        c.train,
        lambda: stream_examples(c.train, tokenizer, **how),
        hashlib.sha256(json.dumps([c.train, how], sort_keys=True).encode()).hexdigest(),
    )
    next(stream.open())  # what is wrong with the first rows is said now
    say(f"data: {c.train}\n  streamed in its own order; to resume, the rows seen are read again and skipped")
    return Splits(stream, held, fit())


def fingerprint(rows: Dataset | Stream) -> str:
    """What a run's checkpoints know its rows by."""
    return rows.fingerprint if isinstance(rows, Stream) else f"{len(rows)} rows, sha256 {rows.fingerprint}"


def rows_to_train(c: Any, rows: Dataset | Stream) -> int:
    """Where the row cursor ends: `steps` whole batches, or `epochs` of the rows.

    Args:
      c: `config.train`.

    Raises:
      UserError: the length of a stream is asked for.
    """
    if c.steps is not None:
        return c.steps * c.global_batch_size
    if isinstance(rows, Stream):
        raise UserError("`data.streaming` is true, so that nobody knows how long an epoch is. Set `train.steps`.")
    return max(1, math.ceil(c.epochs * len(rows)))


class Course(NamedTuple):
    """A run's way through its rows.

    steps: optimiser steps in all.  stop_row: where the cursor ends; None: after `steps`, wherever that is.  widths: the
    static lengths of batches; none: `Splits.length` alone.  packing: of `data.packing` and rows that are all there.
    epochs_done: how many epochs are complete after a step; None: rows / batch size says it.
    """

    steps: int
    stop_row: int | None
    widths: tuple[int, ...] = ()
    packing: Packing | None = None
    epochs_done: Callable[[int], int] | None = None


def plan_course(data: Any, train: Any, splits: Splits, say: Callable[[str], None] = lambda line: None) -> Course:
    """The course of `config.data` and `config.train`.  It depends on the lengths of the rows, not on how many processes
    there are or where a run resumes.

    Args:
      say: takes how much of the slots the packs fill.

    Raises:
      UserError: as `rows_to_train`.
    """
    rows, size = splits.train, train.global_batch_size
    if not data.packing:
        stop = rows_to_train(train, rows)
        return Course(math.ceil(stop / size), stop, _widths(data, train, splits))
    if isinstance(rows, Stream):
        return Course(rows_to_train(train, rows) // size, None)  # refuses epochs
    assert isinstance(splits.length, int)
    packs = packing.packing_of(rows, splits.length, seed=train.seed, shuffle=data.shuffle)
    for line in packing.report(packs, size):
        say(line)
    if train.steps is not None:
        steps, stop = train.steps, None
    else:
        stop = rows_to_train(train, rows)
        steps = math.ceil(packing.packs_until(packs, stop) / size)
    return Course(steps, stop, (), packs, lambda step: packing.epochs_done(packs, step * size))


def _widths(data: Any, train: Any, splits: Splits) -> tuple[int, ...]:
    """Of `data.length_buckets`: chosen by the batches of the first epoch."""
    rows, most = splits.train, data.length_buckets
    if most == 1:
        return ()
    if isinstance(rows, Stream):
        return buckets.evenly(splits.length, most)
    order = row_ids(0, len(rows), len(rows), seed=train.seed, shuffle=data.shuffle)
    return buckets.choose(buckets.needs(rows, splits.length)[order], train.global_batch_size, most)


def lengths_ahead(
    splits: Splits, course: Course, *, batch_size: int, seed: int, shuffle: bool, start_row: int
) -> list[int | Lengths]:
    """The lengths that batches from a row on will have, where they have several: what to compile before the first."""
    rows, length = splits.train, splits.length
    widths = set(course.widths)
    if isinstance(rows, Dataset) and course.widths and course.stop_row is not None:
        order = row_ids(start_row, max(start_row, course.stop_row), len(rows), seed=seed, shuffle=shuffle)
        whole = buckets.of_batches(buckets.needs(rows, length)[order], batch_size)
        widths = {buckets.width_for(need, course.widths, length) for need in np.unique(whole).tolist()}
    return [buckets.with_width(length, width) for width in sorted(widths)] if len(widths) > 1 else []


def train_batches(
    rows: Dataset | Stream,
    *,
    seed: int,
    shuffle: bool,
    widths: tuple[int, ...] = (),
    packed: Packing | bool = False,
    **where: Any,
) -> Iterator[tuple[Batch, int]]:
    """(batch, next row) of either kind; `where` as in `batches`.

    Args:
      packed: `Course.packing`; of a stream, whether to pack.
    """
    if not packed:
        if isinstance(rows, Stream):
            return stream_batches(rows.open, widths=widths, **where)
        return batches(rows, seed=seed, shuffle=shuffle, widths=widths, **where)
    length = where.pop("length")
    if isinstance(packed, Packing):
        assert isinstance(rows, Dataset)
        return packing.packed_batches(rows, packed, **where)
    assert isinstance(rows, Stream) and where.pop("stop_row") is None
    return packing.packed_stream(rows.open, length, **where)


def held_batches(
    rows: Dataset, batch_size: int, length: int | Lengths, *, widths: tuple[int, ...], packed: bool, **share: int
) -> Iterator[Batch]:
    """Every row of an evaluation once, as `eval_batches`, or in packs: of the same sums, in fewer batches."""
    if not packed:
        yield from eval_batches(rows, batch_size, length, widths=widths, **share)
        return
    assert isinstance(length, int)
    how = {"batch_size": batch_size, "start_row": 0, "stop_row": len(rows), **share}
    for batch, _ in packing.packed_batches(rows, packing.packing_of(rows, length), **how):
        yield batch


def read_prompts(
    c: Any, tokenizer: Tokenizer, count: int, virtual: Virtual = NONE, start_id: int | None = None
) -> list[Prompt]:
    """Questions for generation, from the rows held back or, without these, from the training rows."""
    name, split = (c.eval, c.eval_split) if c.eval else (c.train, c.train_split)
    return load_prompts(name, tokenizer, count=count, split=split, **_source(c, virtual, start_id)) if count else []


def _source(c: Any, virtual: Virtual, start_id: int | None) -> dict[str, Any]:
    keys = {key: c[key] for key in ("name", "revision", "max_length", "truncation", *COLUMNS)}
    seq2seq = sides(start_id, c.max_length, c.max_target_length)
    return keys | {"virtual": by_column(virtual, c.task_id), "seq2seq": seq2seq}
