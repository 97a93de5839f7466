"""jaxtune's batches as transformers takes them: the same rows in the same order, masked in the same places.

B rows, T positions of jaxtune's batch, P virtual tokens that jaxtune puts before each row (peft puts its own).
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jaxtune.data.batches import Batch
from jaxtune.data.splits import train_batches
from jaxtune.data.virtual import Virtual
from torch_gpu.loss import IGNORED

# Columns that are padding in every row are left out, but for a multiple of this: tensor cores multiply in eights.
MULTIPLE = 8


def to_inputs(batch: Batch, virtual: Virtual) -> dict[str, Tensor]:
    """input_ids, attention_mask and labels [B, T'] of a batch, T' its longest row; `task_ids` where rows have tasks."""
    tasks = (-1 - batch["tokens"][:, 0]) // max(virtual.count, 1)
    own = {name: value[:, virtual.count :] for name, value in batch.items()}
    longest = int(own["segment_ids"].sum(axis=1).max())
    width = min(max(-(-longest // MULTIPLE) * MULTIPLE, MULTIPLE), own["tokens"].shape[1])
    tokens, mask = own["tokens"][:, :width].astype(np.int64), own["segment_ids"][:, :width] > 0
    # jaxtune's targets are of the next token, labels of the token itself.
    learnt = np.zeros_like(mask)
    learnt[:, 1:] = own["weights"][:, : width - 1] > 0
    # A row that fills the batch up would have nothing to attend to.
    mask[~mask.any(axis=1), 0] = True
    inputs = {"input_ids": tokens, "attention_mask": mask.astype(np.int64), "labels": np.where(learnt, tokens, IGNORED)}
    if virtual.tasks:
        inputs["task_ids"] = np.maximum(tasks, 0).astype(np.int64)
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in inputs.items()}


class Micro:
    """What a Trainer iterates over: the run's micro-batches from a row on, `turns` to a step, for this process.

    cursor: the row after the step whose micro-batches were given out last.  tokens: of that step, in this process.
    """

    def __init__(self, rows: Any, *, virtual: Virtual, turns: int, steps: int, start_row: int, **how: Any):
        self._rows, self._virtual, self._turns, self._steps = rows, virtual, turns, steps
        self._how = {**how, "start_row": start_row}
        self.cursor, self.tokens = start_row, 0

    def __len__(self) -> int:
        """Of the whole run."""
        return self._steps * self._turns

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch, cursor in train_batches(self._rows, **self._how):
            self.cursor, self.tokens = cursor, int(batch["segment_ids"].sum())
            for part in range(self._turns):
                yield to_inputs({k: np.array_split(v, self._turns)[part] for k, v in batch.items()}, self._virtual)
