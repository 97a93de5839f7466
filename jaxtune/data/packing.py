"""Several short rows in one row of slots: packs.

A pack is a row of `capacity` slots that rows of data share, behind each other: segment ids 1, 2, 3, …, positions from 0
in each, and no target reaches into the next.  Rows do not see each other, so that loss and gradients are those of the
rows by themselves.

An epoch's rows, in the order they would come in, are taken in windows of WINDOW rows, and each window is packed by
best-fit decreasing.  The packs of a window come in the order of their first rows.  That is a second permutation behind
the shuffle's, and as much a pure function of (seed, epoch): the stream is the rows in the order of their packs, the
cursor counts rows of it, and a run that stops between two packs goes on with the next.

R rows of an epoch, P its packs.
"""

import bisect
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int64

from jaxtune.data.batches import Batch, Pair, collate_packs, part_of, row_order
from jaxtune.data.buckets import MULTIPLE
from jaxtune.data.examples import Example
from jaxtune.data.load import Dataset
from jaxtune.errors import DataError, UserError

# Rows packed together.  Of real instructions, 1024 fill 97 to 99 % of the slots where a pack holds four rows or more;
# 256 fill 1 to 4 % less, 4096 at most 0.5 % more, and a stream would have to read as many ahead (docs/data.md).
WINDOW = 1024


class Packs(NamedTuple):
    """An epoch in packs: pack p has the dataset's rows `rows[starts[p] : starts[p + 1]]`."""

    rows: Int64[np.ndarray, "R"]
    starts: Int64[np.ndarray, "P+1"]


@dataclass(frozen=True, eq=False)
class Packing:
    """What the packs of a dataset are a function of.  lengths: of its rows, virtual tokens included; at most
    `capacity`."""

    lengths: Int[np.ndarray, "R"]
    capacity: int
    seed: int
    shuffle: bool


def packing_of(rows: Dataset, capacity: int, *, seed: int = 0, shuffle: bool = False) -> Packing:
    """That of a dataset."""
    return Packing(np.diff(rows.offsets), capacity, seed, shuffle)


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `lengths` in packs of at most `capacity`: from the longest down, each goes where it leaves the least
    (best-fit decreasing).  Each pack's indices ascend; packs are in the order of their first ones.

    Raises:
      ValueError: one is longer than `capacity`.
    """
    if len(lengths) and max(lengths) > capacity:
        raise ValueError(f"A row of {max(lengths)} tokens does not fit in a pack of {capacity}.")
    packs: list[list[int]] = []
    room: list[int] = []  # what is left in each pack, ascending
    whose: list[int] = []  # and of which pack that is
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect.bisect_left(room, lengths[i])
        if at == len(room):
            owner, left = len(packs), capacity - lengths[i]
            packs.append([i])
        else:
            owner, left = whose.pop(at), room.pop(at) - lengths[i]
            packs[owner].append(i)
        at = bisect.bisect_left(room, left)
        room.insert(at, left)
        whose.insert(at, owner)
    return sorted(sorted(indices) for indices in packs)


def windows(lengths: Int[np.ndarray, "R"], capacity: int) -> Iterator[list[int]]:
    """The packs of rows in the order they come in, window by window, as indices into `lengths`."""
    for start in range(0, len(lengths), WINDOW):
        for indices in pack(lengths[start : start + WINDOW].tolist(), capacity):
            yield [start + i for i in indices]


def packs_of(packing: Packing, epoch: int) -> Packs:
    """The packs of an epoch (half a second for a million rows)."""
    return _packs_of(packing, epoch if packing.shuffle else 0)


@functools.lru_cache(maxsize=4)
def _packs_of(packing: Packing, epoch: int) -> Packs:
    n = len(packing.lengths)
    order = row_order(n, packing.seed, epoch) if packing.shuffle else np.arange(n, dtype=np.int64)
    found = list(windows(packing.lengths[order], packing.capacity))
    return Packs(order[np.concatenate(found)], np.cumsum([0, *map(len, found)], dtype=np.int64))


@functools.lru_cache(maxsize=4096)
def pack_count(packing: Packing, epoch: int) -> int:
    """How many packs an epoch has."""
    return len(packs_of(packing, epoch).starts) - 1


def packs_until(packing: Packing, row: int) -> int:
    """The packs that hold the stream's first `row` rows, the last perhaps with others too."""
    epochs, rest = divmod(row, len(packing.lengths))
    whole = sum(pack_count(packing, epoch) for epoch in range(epochs))
    return whole + (int(np.searchsorted(packs_of(packing, epochs).starts, rest, side="left")) if rest else 0)


def epochs_done(packing: Packing, packs: int) -> int:
    """How many epochs the stream's first `packs` packs complete."""
    epoch = 0
    while packs >= (count := pack_count(packing, epoch)):
        packs, epoch = packs - count, epoch + 1
    return epoch


def report(packing: Packing, batch_size: int) -> list[str]:
    """What packing makes of the first epoch; lines that begin with "warning:" deserve a look."""
    rows, packs = len(packing.lengths), pack_count(packing, 0)
    filled = float(packing.lengths.sum() / (packs * packing.capacity))
    lines = [f"packed: {rows} rows in {packs} rows of {packing.capacity} slots, {filled:.0%} of them filled"]
    longest = int(-(-packing.lengths.max() // MULTIPLE) * MULTIPLE)
    if packs * packing.capacity >= rows * longest:
        lines.append(
            f"warning: padded to the longest row they would have {rows} rows of {longest} slots. Raise "
            "`data.max_length`, so that several rows fit, or set `data.packing` to false"
        )
    if packs < batch_size:
        lines.append(
            f"warning: a step takes {batch_size} of them (`train.global_batch_size`), which is more than an epoch has"
        )
    return lines


def packed_batches(
    dataset: Dataset,
    packing: Packing,
    *,
    batch_size: int,
    start_row: int,
    stop_row: int | None,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[tuple[Batch, int]]:
    """(batch, next row), as `batches.batches`; `batch_size` counts packs, rows are counted in the order of their packs.

    A start or stop inside a pack takes the rows of it that are left, or that come before.

    Raises:
      UserError: `batch_size` cannot be shared by the processes.
    """
    part = part_of(batch_size, process_index, process_count)
    stream = _stream(packing, start_row, stop_row)
    while taken := list(islice(stream, batch_size)):
        packs = [[dataset.example(int(i)) for i in rows] for rows, _ in taken[part]]
        yield collate_packs(packs, part.stop - part.start, packing.capacity), taken[-1][1]


def _stream(packing: Packing, start: int, stop: int | None) -> Iterator[tuple[Int64[np.ndarray, "_"], int]]:
    """(rows of a pack, the position behind it) from a position on."""
    n = len(packing.lengths)
    while stop is None or start < stop:
        rows, starts = packs_of(packing, start // n)
        before, inside = start - start % n, start % n
        end = int(starts[np.searchsorted(starts, inside, side="right")])
        end = end if stop is None else min(end, stop - before)
        yield rows[inside:end], before + end
        start = before + end


def packed_stream(
    open_examples: Callable[[], Iterator[Example]],
    capacity: int,
    *,
    batch_size: int,
    start_row: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[tuple[Batch, int]]:
    """`packed_batches` over rows as they arrive, without end; WINDOW of them are read ahead.  `open_examples` is called
    once an epoch; to resume at `start_row`, the rows before are read again."""
    part = part_of(batch_size, process_index, process_count)
    stream = _from_row(_arriving(open_examples, capacity), start_row)
    while True:
        taken = list(islice(stream, batch_size))
        start_row += sum(map(len, taken))
        yield collate_packs(taken[part], part.stop - part.start, capacity), start_row


def _arriving(open_examples: Callable[[], Iterator[Example]], capacity: int) -> Iterator[list[Pair]]:
    while True:
        examples, empty = iter(open_examples()), True
        while window := [(example.tokens, example.mask) for example in islice(examples, WINDOW)]:
            empty = False
            for indices in pack([len(tokens) for tokens, _ in window], capacity):
                yield [window[i] for i in indices]
        if empty:
            raise DataError("The stream has no rows. Each epoch must be opened anew.")


def _from_row(packs: Iterator[list[Pair]], skip: int) -> Iterator[list[Pair]]:
    """The packs behind the first `skip` rows; where that is inside a pack, what is left of it first."""
    for rows in packs:
        if skip < len(rows):
            yield rows[skip:]
        skip = max(skip - len(rows), 0)


def check(start_id: int | None) -> None:
    """Refuses to pack for a model with an encoder (`start_id`: as in `splits.read_splits`).

    Raises:
      UserError: with what to do instead.
    """
    if start_id is not None:
        raise UserError(
            "`data.packing` is true, and this model has an encoder: its rows have two sides, and are not packed. Set "
            "it to false; `data.length_buckets` leaves out much of the padding."
        )
