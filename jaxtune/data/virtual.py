"""Virtual tokens: what a prompt method trains, as token ids below zero.

Token -(1 + task * stride + k) is virtual token k of a task (0 where the method has none).  They stand before a row's
own tokens and are slots like any others, so that padding, packing, positions, windows and the KV cache need no special
case; the embedding looks them up in the adapter (`jaxtune.layers.with_prompt`).  No virtual token is learnt.

`stride` is `count`, or twice that where a decoder behind an encoder has its own: k < count stand before the encoder's
tokens, the others before the decoder's start token.  That is the order of the rows in peft's `prompt_embeddings`.
"""

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Int32

from jaxtune.errors import UserError


class Virtual(NamedTuple):
    """count: virtual tokens before every row.  tasks: how many sets of them there are; 0: rows have no task.

    column: `data.task_id`, where rows say which task theirs is.  decoder: as many stand before the decoder's tokens
    (peft's multitask prompts on encoder-decoders; its other prompts leave the decoder alone).
    """

    count: int = 0
    tasks: int = 0
    column: str | None = None
    decoder: bool = False

    @property
    def stride(self) -> int:
        """Virtual tokens of one task."""
        return self.count * (2 if self.decoder else 1)

    def ids(self, task: int = 0) -> Int32[np.ndarray, "P"]:
        """Those before a row, or before an encoder's tokens."""
        return np.int32(-1 - task * self.stride) - np.arange(self.count, dtype=np.int32)

    def decoder_ids(self, task: int = 0) -> Int32[np.ndarray, "Q"]:
        """Those before a decoder's start token; Q is 0 without `decoder`."""
        return self.ids(task)[: self.count * self.decoder] - np.int32(self.count)

    def task_of(self, first: Any) -> Any:
        """The task of a row whose first token is `first` (any shape); 0 where that is no virtual token."""
        return np.maximum(-1 - np.asarray(first), 0) // max(self.stride, 1)


NONE = Virtual()


def by_column(virtual: Virtual, column: str | None) -> Virtual:
    """With the column that rows name their task in.

    Raises:
      UserError: the method has several tasks and there is no column, or it has none and there is one.
    """
    if virtual.tasks > 1 and column is None:
        raise UserError(
            f"`peft.num_tasks` is {virtual.tasks}, and `data.task_id` is not set. It is the column that holds each "
            f"row's task, an integer from 0 to {virtual.tasks - 1}."
        )
    if column is not None and not virtual.tasks:
        raise UserError(
            f"`data.task_id` is {column!r}, and the method has no tasks. It is for `peft.method` "
            "multitask_prompt_tuning; unset it."
        )
    return virtual._replace(column=column)


def tasks_of(virtual: Virtual, task_id: Any, rows: int) -> list[int]:
    """The task of each of `rows` rows from what a caller gave: one for all, or one each.

    Raises:
      UserError: none given where there are several tasks, or one where there are none; out of range; not one a row.
    """
    if not virtual.tasks:
        if task_id is not None:
            raise UserError("`task_id` is for adapters of multitask prompt tuning; this model has none.")
        return [0] * rows
    if task_id is None and virtual.tasks == 1:
        return [0] * rows
    if task_id is None:
        raise UserError(f"This adapter has {virtual.tasks} tasks: give `task_id`, one for all rows or a list.")
    try:
        tasks = [operator.index(task) for task in (np.atleast_1d(task_id).tolist())]
    except TypeError:
        raise UserError(f"`task_id` is {task_id!r}. It is an integer, or a list of one for each row.") from None
    tasks = tasks * rows if len(tasks) == 1 else tasks
    if len(tasks) != rows or any(not 0 <= task < virtual.tasks for task in tasks):
        raise UserError(
            f"`task_id` is {task_id!r}. It is one integer or {rows}, one for each row, from 0 to {virtual.tasks - 1}."
        )
    return tasks


def insert(
    tokens: Int[np.ndarray, "B T"], segments: Int[np.ndarray, "B T"], virtual: Virtual, tasks: Sequence[int]
) -> tuple[Int[np.ndarray, "B S"], Int[np.ndarray, "B S"], Int[np.ndarray, "B T"]]:
    """Padded rows with their virtual tokens right before the first real one, after any padding on the left.

    Returns:
      (tokens, segments, slots): slots[b, t] is where the given token t of row b has gone.
    """
    rows, length = tokens.shape
    first = np.argmax(segments > 0, axis=1)[:, None]
    given = np.arange(length)[None]
    slots = given + virtual.count * (given >= first)
    own = first + np.arange(virtual.count)[None]
    wider = np.zeros((2, rows, length + virtual.count), np.int32)
    ids = np.stack([virtual.ids(task) for task in tasks]) if rows else np.zeros_like(own)
    for out, theirs, ours in zip(wider, (tokens, segments), (ids, np.ones_like(own)), strict=True):
        np.put_along_axis(out, slots, theirs, axis=1)
        np.put_along_axis(out, own, ours.astype(np.int32), axis=1)
    return wider[0], wider[1], slots
