"""Rows into batches of one static shape, and a position that survives everything.

The position in the data counts rows, not batches: row p of the stream is row `row_order(n, seed, p // n)[p % n]` of the
dataset.  So the order is a pure function of seed and position, and a run that stops at row p goes on at row p with any
batch size and any number of processes, without losing or repeating a row.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import numpy as np
from jaxtyping import Bool, Int, Int64, Shaped

from jaxtune.data import seq2seq
from jaxtune.data.examples import Example
from jaxtune.data.load import Dataset
from jaxtune.data.seq2seq import EncoderDecoder, Lengths
from jaxtune.data.virtual import NONE, Virtual
from jaxtune.errors import DataError, UserError

# tokens, targets, positions, segment_ids: int32 [B, T]; weights: float32 [B, T].  Of an encoder-decoder these are the
# decoder's, and there are source_tokens, source_segment_ids: int32 [B, S].
Batch = dict[str, Shaped[np.ndarray, "B _"]]
# Static lengths are multiples of this.
MULTIPLE = 32
# (tokens, mask) of one row; rows differ in length.
Pair = tuple[Int[np.ndarray, "_"], Bool[np.ndarray, "_"]]


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
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[tuple[Batch, int]]:
    """(batch, next row) from stream row `start_row` to `stop_row` (None: without end), over epoch borders.

    `batch_size` is global; each process gets its contiguous part, batch_size / process_count rows.  A last batch
    that `stop_row` cuts is filled with empty rows.

    Raises:
      UserError: `batch_size` cannot be shared by the processes.
    """
    part = _part(batch_size, process_index, process_count)
    while stop_row is None or start_row < stop_row:
        end = start_row + batch_size if stop_row is None else min(start_row + batch_size, stop_row)
        # Only this process's rows are looked up.
        first, last = (min(start_row + edge, end) for edge in (part.start, part.stop))
        ids = row_ids(first, last, len(dataset), seed=seed, shuffle=shuffle)
        yield collate([dataset.example(int(i)) for i in ids], part.stop - part.start, length), end
        start_row = end


def stream_batches(
    open_examples: Callable[[], Iterator[Example]],
    *,
    batch_size: int,
    start_row: int,
    stop_row: int | None,
    length: int | Lengths,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[tuple[Batch, int]]:
    """`batches` over rows in the order they arrive.  `open_examples` is called once an epoch, and resuming at
    `start_row` reads and skips that many examples."""
    part = _part(batch_size, process_index, process_count)
    stream = islice(_epochs(open_examples), start_row, stop_row)
    while taken := list(islice(stream, batch_size)):
        start_row += len(taken)
        pairs = [(example.tokens, example.mask) for example in taken[part]]
        yield collate(pairs, part.stop - part.start, length), start_row


def eval_batches(
    dataset: Dataset, batch_size: int, length: int | Lengths, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
    """Every row once, in order; the last batch is filled with empty rows."""
    options = {"process_index": process_index, "process_count": process_count}
    for batch, _ in batches(
        dataset,
        batch_size=batch_size,
        seed=0,
        shuffle=False,
        start_row=0,
        stop_row=len(dataset),
        length=length,
        **options,
    ):
        yield batch


def collate(rows: Sequence[Pair], batch_size: int, length: int | Lengths) -> Batch:
    """Rows side by side in [batch_size, length], padding on the right and below; for `Lengths`, as `seq2seq.collate`.

    targets[t] is tokens[t + 1]; weights[t] is 1 where that target is learnt; segment_ids is 1 on real tokens.

    Raises:
      ValueError: a row is longer than `length`, or there are more rows than `batch_size`.
    """
    if isinstance(length, Lengths):
        return seq2seq.collate(rows, batch_size, length)
    names = ("tokens", "targets", "positions", "segment_ids")
    batch: Batch = {name: np.zeros((batch_size, length), np.int32) for name in names}
    batch["weights"] = np.zeros((batch_size, length), np.float32)
    if len(rows) > batch_size or any(len(tokens) > length for tokens, _ in rows):
        longest = max((len(tokens) for tokens, _ in rows), default=0)
        raise ValueError(f"{len(rows)} rows of up to {longest} tokens do not fit in [{batch_size}, {length}].")
    for i, (tokens, mask) in enumerate(rows):
        n = len(tokens)
        batch["tokens"][i, :n] = tokens
        batch["targets"][i, : n - 1] = tokens[1:]
        batch["weights"][i, : n - 1] = mask[1:]
        batch["positions"][i, :n] = np.arange(n)
        batch["segment_ids"][i, :n] = 1
    return batch


def real_tokens(batch: Batch) -> int:
    """What a batch holds beside padding, on both sides where it has two."""
    return sum(int(v.sum()) for name, v in batch.items() if name in ("segment_ids", "source_segment_ids"))


def _epochs(open_examples: Callable[[], Iterator[Example]]) -> Iterator[Example]:
    while True:
        example = None
        for example in open_examples():
            yield example
        if example is None:
            raise DataError("The stream has no rows. Each epoch must be opened anew.")


def _part(batch_size: int, process_index: int, process_count: int) -> slice:
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"The global batch of {batch_size} rows cannot be shared by {process_count} processes. "
            f"Take a multiple, e.g. {max(-(-batch_size // process_count), 1) * process_count}."
        )
    each = batch_size // process_count
    return slice(process_index * each, (process_index + 1) * each)
