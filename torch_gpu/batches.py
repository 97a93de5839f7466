"""jaxtune's batches as transformers takes them: the same rows in the same order, masked in the same places.

B rows, T positions of jaxtune's batch, P virtual tokens that jaxtune puts before each row (peft puts its own).
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jaxtune.data.batches import Batch, real_tokens
from jaxtune.data.splits import train_batches
from jaxtune.data.virtual import Virtual
from torch_gpu.loss import IGNORED

# Columns that are padding in every row are left out, but for a multiple of this: tensor cores multiply in eights.
MULTIPLE = 8


def to_inputs(batch: Batch, virtual: Virtual) -> dict[str, Tensor]:
    """input_ids, attention_mask and labels [B, T'] of a batch, T' its longest row; `task_ids` where rows have tasks.

    Of an encoder-decoder the first two are [B, S'], of the encoder, and labels are what the decoder gives out.
    """
    two = "source_tokens" in batch
    first, segments = ("source_tokens", "source_segment_ids") if two else ("tokens", "segment_ids")
    tokens, mask = (trimmed(batch[name], batch[segments], virtual.count) for name in (first, segments))
    tokens, mask = tokens.astype(np.int64), mask > 0
    if two:
        before = virtual.count if virtual.decoder else 0
        learnt, targets = (trimmed(batch[name], batch["segment_ids"], before) for name in ("weights", "targets"))
        labels = np.where(learnt > 0, targets.astype(np.int64), IGNORED)
    else:
        # jaxtune's targets are of the next token, labels of the token itself.
        learnt = np.zeros_like(mask)
        learnt[:, 1:] = batch["weights"][:, virtual.count :][:, : tokens.shape[1] - 1] > 0
        labels = np.where(learnt, tokens, IGNORED)
    # A row that fills the batch up would have nothing to attend to.
    mask[~mask.any(axis=1), 0] = True
    inputs = {"input_ids": tokens, "attention_mask": mask.astype(np.int64), "labels": labels}
    if virtual.tasks:
        inputs["task_ids"] = virtual.task_of(batch[first][:, 0]).astype(np.int64)
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in inputs.items()}


def trimmed(values: np.ndarray, segments: np.ndarray, virtual: int) -> np.ndarray:
    """[B, T] without the virtual tokens on its left and what is padding in every row on its right."""
    own = segments[:, virtual:]
    longest = int(own.sum(axis=1).max())
    return values[:, virtual:][:, : min(max(-(-longest // MULTIPLE) * MULTIPLE, MULTIPLE), own.shape[1])]


def slots(batch: Batch, inputs: dict[str, Tensor], virtual: Virtual) -> int:
    """What the model computes of a batch: with padding, and with the virtual tokens that peft puts before."""
    two, rows = "source_tokens" in batch, len(inputs["input_ids"])
    before = rows * virtual.count * (2 if two and virtual.decoder else 1)
    return before + inputs["input_ids"].numel() + (inputs["labels"].numel() if two else 0)


class Micro:
    """What a Trainer iterates over: the run's micro-batches from a row on, `turns` to a step, for this process.

    cursor: the row after the step whose micro-batches were given out last.  tokens, slots: of that step, in this
    process, without padding and with it.
    """

    def __init__(self, rows: Any, *, virtual: Virtual, turns: int, steps: int, start_row: int, **how: Any):
        self._rows, self._virtual, self._turns, self._steps = rows, virtual, turns, steps
        self._how = {**how, "start_row": start_row}
        self.cursor, self.tokens, self.slots = start_row, 0, 0

    def __len__(self) -> int:
        """Of the whole run."""
        return self._steps * self._turns

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch, cursor in train_batches(self._rows, **self._how):
            parts = [{k: np.array_split(v, self._turns)[i] for k, v in batch.items()} for i in range(self._turns)]
            micro = [to_inputs(part, self._virtual) for part in parts]
            self.cursor, self.tokens = cursor, real_tokens(batch)
            self.slots = sum(slots(part, inputs, self._virtual) for part, inputs in zip(parts, micro, strict=True))
            yield from micro
