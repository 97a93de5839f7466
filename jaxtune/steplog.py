"""The numbers of each step, read one step late, so that the device never waits for the host."""

import math
import resource
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax

from jaxtune.console import Progress
from jaxtune.errors import DivergedError
from jaxtune.metrics import MetricsLog


class StepLog:
    """Takes each step's metrics while they are still being computed; logs them when the next step has been started."""

    def __init__(self, log: MetricsLog, progress: Progress):
        self._log, self._progress = log, progress
        self._waiting: tuple[int, Mapping[str, int], Mapping[str, Any]] | None = None
        self._clock = time.monotonic()

    def add(self, step: int, metrics: Mapping[str, Any], **counts: int) -> None:
        """metrics: device scalars of step `step`.  counts: numbers known on the host (`tokens`, `rows`)."""
        self.flush()
        self._waiting = (step, counts, metrics)

    def flush(self) -> None:
        """Logs the step that waits, when its numbers are there.

        Raises:
          DivergedError: its loss is not finite.
        """
        if self._waiting is None:
            return
        (step, counts, metrics), self._waiting = self._waiting, None
        values = {name: float(value) for name, value in metrics.items()}
        now = time.monotonic()
        seconds, self._clock = now - self._clock, now
        self._log.write(step, {**values, **counts, "seconds": seconds})
        if not math.isfinite(values["loss"]):
            raise DivergedError(
                f"The loss of step {step} is {values['loss']}. Earlier checkpoints are intact. "
                "Lower `optim.learning_rate`, or set `optim.max_grad_norm`."
            )
        rate, tokens = values["learning_rate"], counts["tokens"]
        self._progress.step(step, loss=values["loss"], learning_rate=rate, tokens=tokens, seconds=seconds)

    def evaluation(self, step: int, eval_loss: float) -> None:
        """Logs an evaluation; its time is not the next step's."""
        self._log.write(step, {"eval_loss": eval_loss})
        self._progress.evaluation(step, eval_loss)

    def restart_clock(self) -> None:
        """What happened since the last step (an evaluation, a save) is not part of the next one."""
        self._clock = time.monotonic()


def peak_memory() -> int:
    """The most bytes that one device of this process held; on CPUs, which do not count them, the process."""
    counts = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
    if any(counts):
        return max(counts)
    # Kilobytes on Linux, bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
