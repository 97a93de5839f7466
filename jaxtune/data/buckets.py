"""The few static widths that batches may have, so that a batch of short rows is not as wide as the longest row of all.

Each width is a program of its own, which takes as long to compile as any; so there are few, where they save most.  The
order of rows does not change: a batch takes the narrowest width that fits the longest of its rows.

An encoder-decoder's width is its encoder's; the decoder's side keeps its one length.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, Int64

from jaxtune.data.load import Dataset
from jaxtune.data.seq2seq import Lengths

# Static lengths are multiples of this.
MULTIPLE = 32
# What a further width has to save, as a share of the slots at one width.
WORTH = 0.03


def needed(row: tuple[Int[np.ndarray, "T"], Bool[np.ndarray, "T"]], length: int | Lengths) -> int:
    """How wide a batch must be for a row of (tokens, mask)."""
    return int((~row[1]).sum()) if isinstance(length, Lengths) else len(row[0])


def needs(rows: Dataset, length: int | Lengths) -> Int64[np.ndarray, "R"]:
    """`needed` of every row."""
    lengths = np.diff(rows.offsets)
    if isinstance(length, Lengths):
        lengths = lengths - np.add.reduceat(rows.mask, rows.offsets[:-1], dtype=np.int64)
    return lengths


def width_of(length: int | Lengths) -> int:
    """The width that fits every row."""
    return length.source if isinstance(length, Lengths) else length


def with_width(length: int | Lengths, width: int) -> Any:
    """`length` for batches of a width."""
    return length._replace(source=width) if isinstance(length, Lengths) else width


def width_for(need: int, widths: Sequence[int], length: int | Lengths) -> int:
    """The narrowest of `widths` (ascending) that holds `need` tokens; what fits every row, where none of them does."""
    return next((width for width in widths if need <= width), width_of(length))


def of_batches(need: Int64[np.ndarray, "R"], batch_size: int) -> Int64[np.ndarray, "S"]:
    """How wide each batch must be, of rows in the order they come in."""
    return np.pad(need, (0, -len(need) % batch_size)).reshape(-1, batch_size).max(axis=1)


def choose(need: Int64[np.ndarray, "R"], batch_size: int, most: int) -> tuple[int, ...]:
    """At most `most` widths, ascending, under which batches of `batch_size` rows, in this order, have the fewest slots;
    no more of them than save WORTH each.

    Args:
      need: `needed` of each row of an epoch, in the order of the epoch.
    """
    whole = of_batches(need, batch_size)
    sizes, counts = np.unique(-(-whole // MULTIPLE) * MULTIPLE, return_counts=True)
    before = np.concatenate([[0], np.cumsum(counts)])
    # Of the batches that need at most sizes[j - 1]: slots[j], the fewest they can have with k widths; starts[k - 1][j],
    # how many of the sizes are left to the narrower ones.
    slots = np.concatenate([[0], before[1:] * sizes]).astype(np.float64)
    totals, starts = [slots[-1]], [np.zeros(len(slots), np.int64)]
    earlier = np.arange(len(slots))[:, None] <= np.arange(len(sizes))[None]
    for _ in range(most - 1):
        # [i, j]: the first i sizes as they were, the others up to j at the width sizes[j].
        split = np.where(earlier, slots[:, None] + (before[None, 1:] - before[:, None]) * sizes[None], np.inf)
        starts.append(np.concatenate([[0], split.argmin(axis=0)]))
        slots = np.concatenate([[0.0], split.min(axis=0)])
        totals.append(slots[-1])
    count = int(np.argmin([total + k * WORTH * totals[0] for k, total in enumerate(totals)])) + 1
    widths, end = [], len(sizes)
    for start in reversed(starts[:count]):
        if end:
            widths.append(int(sizes[end - 1]))
            end = int(start[end])
    return tuple(reversed(widths))


def evenly(length: int | Lengths, most: int) -> tuple[int, ...]:
    """Widths where nobody knows the rows, as in a stream: `most` equal steps up to the one that fits them all."""
    longest = width_of(length)
    return tuple(sorted({min(-(-longest * k // (most * MULTIPLE)) * MULTIPLE, longest) for k in range(1, most + 1)}))
