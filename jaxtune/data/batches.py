"""Rows into batches of few static shapes, and a position that survives everything.

The position in the data counts rows, not batches: row p of the stream is row `row_order(n, seed, p // n)[p % n]` of the
dataset.  So the order is a pure function of seed and position, and a run that stops at row p goes on at row p with any
batch size and any number of processes, without losing or repeating a row.  (With `data.packing` the rows of an epoch
are permuted once more: `data.packing`.)

A batch is as wide as its rows need, of the `widths` that there are (`data.buckets`): those of the whole batch, so that
all processes take the same.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import numpy as np
from jaxtyping import Bool, Int, Int64, Shaped

from jaxtune.data import seq2seq
from jaxtune.data.buckets import MULTIPLE, needed, needs, width_for, with_width
from jaxtune.data.examples import Example
from jaxtune.data.load import Dataset
from jaxtune.data.seq2seq import EncoderDecoder, Lengths
from jaxtune.data.virtual import NONE, Virtual
from jaxtune.errors import DataError, UserError

# tokens, targets, positions, segment_ids: int32 [B, T]; weights: float32 [B, T].  Of an encoder-decoder these are the
# decoder's, and there are source_tokens, source_segment_ids: int32 [B, S].
Batch = dict[str, Shaped[np.ndarray, "B _"]]
# (tokens, mask) of one row; rows differ in length.
Pair = tuple[Int[np.ndarray, "_"], Bool[np.ndarray, "_"]]
# Above 0 in slots that hold a token.
SEGMENTS = ("segment_ids", "source_segment_ids")


@functools.lru_cache(maxsize=4)
def row_order(n: int, seed: int, epoch: int) -> Int64[np.ndarray, "n"]:
    """The permutation of n rows for an epoch, read-only.

    Sorted random words rather than `Generator.permutation`: numpy promises the words of a bit generator for all its
    versions, and its shuffles only for one.
    """
    words = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(n)
    order = np.argsort(words, kind="stable").astype(np.int64)
    order.flags.writeable = False
    return order


def row_ids(start: int, stop: int, n: int, *, seed: int, shuffle: bool) -> Int64[np.ndarray, "R"]:
    """The dataset rows at stream positions [start, stop)."""
    positions = np.arange(start, stop, dtype=np.int64)
    if not shuffle:
        return positions % n
    ids = np.empty(len(positions), np.int64)
    for epoch in range(start // n, -(-stop // n)):
        here = positions // n == epoch
        ids[here] = row_order(n, seed, epoch)[positions[here] % n]
    return ids


def fit_length(datasets: Sequence[Dataset], max_length: int, multiple: int = MULTIPLE, virtual: int = 0) -> int:
    """The smallest static length for all of these: the longest row and its virtual tokens, rounded up to a `multiple`.
    Without datasets (a stream), `max_length` stands for the longest row."""
    longest = min(max((d.counts.longest for d in datasets), default=max_length), max_length) + virtual
    return -(-longest // multiple) * multiple


def fit_lengths(datasets: Sequence[Dataset], max_length: int, two: EncoderDecoder, virtual: Virtual = NONE) -> Lengths:
    """`fit_length` of both sides of an encoder-decoder."""
    before = virtual.count if virtual.decoder else 0
    longest = max((d.counts.longest_target for d in datasets), default=two.max_target_length) + before
    source = fit_length(datasets, max_length, virtual=virtual.count)
    return Lengths(source, -(-longest // MULTIPLE) * MULTIPLE, two.start_id, before)


def batches(
    dataset: Dataset,
    *,
    batch_size: int,
    seed: int,
    shuffle: bool,
    start_row: int,
    stop_row: int | None,
    length: int | Lengths,
    widths: Sequence[int] = (),
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[tuple[Batch, int]]:
    """(batch, next row) from stream row `start_row` to `stop_row` (None: without end), over epoch borders.

    `batch_size` is global; each process gets its contiguous part, batch_size / process_count rows.  A last batch
    that `stop_row` cuts is filled with empty rows.

    Args:
      length: the static length that fits every row.  widths: shorter ones that a batch may have instead.

    Raises:
      UserError: `batch_size` cannot be shared by the processes.
    """
    part = part_of(batch_size, process_index, process_count)
    while stop_row is None or start_row < stop_row:
        end = start_row + batch_size if stop_row is None else min(start_row + batch_size, stop_row)
        ids = row_ids(start_row, end, len(dataset), seed=seed, shuffle=shuffle)
        yield _batch([dataset.example(int(i)) for i in ids], part, length, widths), end
        start_row = end


def stream_batches(
    open_examples: Callable[[], Iterator[Example]],
    *,
    batch_size: int,
    start_row: int,
    stop_row: int | None,
    length: int | Lengths,
    widths: Sequence[int] = (),
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[tuple[Batch, int]]:
    """`batches` over rows in the order they arrive.  `open_examples` is called once an epoch, and resuming at
    `start_row` reads and skips that many examples."""
    part = part_of(batch_size, process_index, process_count)
    stream = islice(_epochs(open_examples), start_row, stop_row)
    while taken := list(islice(stream, batch_size)):
        start_row += len(taken)
        yield _batch([(example.tokens, example.mask) for example in taken], part, length, widths), start_row


def eval_batches(
    dataset: Dataset,
    batch_size: int,
    length: int | Lengths,
    process_index: int = 0,
    process_count: int = 1,
    widths: Sequence[int] = (),
) -> Iterator[Batch]:
    """Every row once, in order, or the longest first where there are `widths`; the last batch is filled with empty
    rows."""
    part, n = part_of(batch_size, process_index, process_count), len(dataset)
    order = np.argsort(-needs(dataset, length), kind="stable") if widths else np.arange(n)
    for start in range(0, n, batch_size):
        yield _batch([dataset.example(int(i)) for i in order[start : start + batch_size]], part, length, widths)


def _batch(rows: Sequence[Pair], part: slice, length: int | Lengths, widths: Sequence[int]) -> Batch:
    """A process's part of a global batch."""
    if widths:
        length = with_width(length, width_for(max(needed(row, length) for row in rows), widths, length))
    return collate(rows[part], part.stop - part.start, length)


def collate(rows: Sequence[Pair], batch_size: int, length: int | Lengths) -> Batch:
    """Rows side by side in [batch_size, length], padding on the right and below; for `Lengths`, as `seq2seq.collate`.

    targets[t] is tokens[t + 1]; weights[t] is 1 where that target is learnt; segment_ids is 1 on real tokens.

    Raises:
      ValueError: a row is longer than `length`, or there are more rows than `batch_size`.
    """
    if isinstance(length, Lengths):
        return seq2seq.collate(rows, batch_size, length)
    return collate_packs([[row] for row in rows], batch_size, length)


def collate_packs(packs: Sequence[Sequence[Pair]], batch_size: int, length: int) -> Batch:
    """`collate` for packs: the rows of one lie behind each other, with segment ids 1, 2, 3, … and positions from 0 in
    each; no target reaches into the next.

    Raises:
      ValueError: as `collate`.
    """
    names = ("tokens", "targets", "positions", "segment_ids")
    batch: Batch = {name: np.zeros((batch_size, length), np.int32) for name in names}
    batch["weights"] = np.zeros((batch_size, length), np.float32)
    longest = max((sum(len(tokens) for tokens, _ in rows) for rows in packs), default=0)
    if len(packs) > batch_size or longest > length:
        raise ValueError(f"{len(packs)} rows of up to {longest} tokens do not fit in [{batch_size}, {length}].")
    for i, rows in enumerate(packs):
        end = 0
        for segment, (tokens, mask) in enumerate(rows, 1):
            start, end = end, end + len(tokens)
            batch["tokens"][i, start:end] = tokens
            batch["targets"][i, start : end - 1] = tokens[1:]
            batch["weights"][i, start : end - 1] = mask[1:]
            batch["positions"][i, start:end] = np.arange(len(tokens))
            batch["segment_ids"][i, start:end] = segment
    return batch


def empty(batch_size: int, length: int | Lengths) -> Batch:
    """A batch of padding."""
    return collate([], batch_size, length)


def real_tokens(batch: Batch) -> int:
    """What a batch holds beside padding, on both sides where it has two."""
    return sum(int(np.count_nonzero(batch[name])) for name in SEGMENTS if name in batch)


def slots(batch: Batch) -> int:
    """The same with the padding."""
    return sum(batch[name].size for name in SEGMENTS if name in batch)


def _epochs(open_examples: Callable[[], Iterator[Example]]) -> Iterator[Example]:
    while True:
        example = None
        for example in open_examples():
            yield example
        if example is None:
            raise DataError("The stream has no rows. Each epoch must be opened anew.")


def part_of(batch_size: int, process_index: int, process_count: int) -> slice:
    """A process's rows of a global batch.

    Raises:
      UserError: the processes cannot share it.
    """
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"The global batch of {batch_size} rows cannot be shared by {process_count} processes. "
            f"Take a multiple, e.g. {max(-(-batch_size // process_count), 1) * process_count}."
        )
    each = batch_size // process_count
    return slice(process_index * each, (process_index + 1) * each)
