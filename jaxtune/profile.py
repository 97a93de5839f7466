"""A profiler's trace of some steps, for TensorBoard's profile plugin or xprof: `logging.profile`."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxtune.errors import UserError


def check(steps: Any, total: int) -> None:
    """Refuses what is no range of the run's steps.

    Raises:
      UserError: saying what it takes.
    """
    if steps is None:
        return
    fits = isinstance(steps, Sequence) and len(steps) == 2 and all(type(n) is int for n in steps)
    if not fits or not 1 <= steps[0] <= steps[1] <= total:
        raise UserError(
            f"`logging.profile` is {steps!r}. It takes the first and the last step to trace, of 1 to {total}, e.g. "
            f"({min(total, 10)}, {min(total, 12)}); the first step of a run is mostly the compiler's."
        )


@contextlib.contextmanager
def profiled(directory: Path, steps: Sequence[int] | None) -> Iterator[Callable[[int, Any], None]]:
    """Yields a function to call before step n with what is still being computed, and traces the steps between.

    A trace begins and ends when the devices are idle, so that it holds these steps and no others.
    """
    first, last = steps or (0, 0)
    tracing = False

    def before(n: int, pending: Any) -> None:
        nonlocal tracing
        if steps and not tracing and first <= n <= last:
            jax.block_until_ready(pending)
            jax.profiler.start_trace(directory)
            tracing = True
        elif tracing and n > last:
            jax.block_until_ready(pending)
            jax.profiler.stop_trace()
            tracing = False

    try:
        yield before
    finally:
        if tracing:
            jax.profiler.stop_trace()
