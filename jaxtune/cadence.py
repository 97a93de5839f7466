"""After which steps a run evaluates and saves: a pure function of (rows, batch size, step), so that a run that resumes
does so after the same ones.

No jax: `torch_gpu` uses it too.
"""

import functools
from collections.abc import Callable
from typing import Any


def due(
    step: int, *, every: int, unit: str, batch: int, rows: int = 0, done: Callable[[int], int] | None = None
) -> bool:
    """Whether something that is done every so many steps or epochs is done after a step.

    Args:
      step: optimiser steps done.  every: 0 is never.  unit: step | epoch.
      batch, rows: in a global batch, and in an epoch.  An epoch that ends inside a batch counts at the step that
        completes it; where a batch holds several ends, they count once.
      done: how many epochs are complete after a step; None: as many rows as `batch` says are behind it.
    """
    if not every:
        return False
    if unit == "step":
        return step % every == 0
    done = done or (lambda step: step * batch // rows)
    return done(step) // every > done(step - 1) // every


def cadence(c: Any, what: str, data: Any, done: Callable[[int], int] | None = None) -> Callable[[int], bool]:
    """Whether `what` (eval | save) is due after a step.

    Args:
      c: `config.train`.  data: the rows; a stream's nobody counts (`config.check` refuses its epochs).
      done: as in `due`.
    """
    every, unit = c[f"{what}_every"], c[f"{what}_unit"]
    if every is None:
        every = 100 if unit == "step" else 1
    rows = len(data) if unit == "epoch" else 0
    return functools.partial(due, every=every, unit=unit, batch=c.global_batch_size, rows=rows, done=done)
