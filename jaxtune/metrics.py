"""`metrics.jsonl`, one line a step, and the same numbers for TensorBoard (and for who else wants them).

Nothing here stops a run: a file that cannot be written is given up with one warning.  No jax: `torch_gpu` uses it too.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxtune import tensorboard as events
from jaxtune.console import Progress
from jaxtune.errors import DivergedError, StorageError
from jaxtune.rundir import Appender, write_atomic


class MetricsLog:
    """`metrics.jsonl`: one JSON object a line, and the same numbers for TensorBoard.

    A line with `loss` is of a training step, one with `eval_loss` of an evaluation.  Floats come back exactly; those
    that are not finite are null, for JSON has no word for them.

    Args:
      workdir: holds `metrics.jsonl` and `tensorboard/`.
      resume_step: later lines are removed, for these steps are about to be done again; None or 0: all are.
      tensorboard: whether to write `tensorboard/` too.
      say: takes a warning.
      quiet: write nothing (every process of a run but the first).
      also: takes what TensorBoard does: step, {'train/loss': ...}, and whether it is of an evaluation.
    """

    def __init__(
        self,
        workdir: Path,
        resume_step: int | None,
        tensorboard: bool,
        say: Callable[[str], None] = print,
        quiet: bool = False,
        also: Callable[[int, Mapping[str, float], bool], None] | None = None,
    ):
        self._also = also
        path = workdir / "metrics.jsonl"
        self._lines: Appender | None = None
        self._board: Appender | None = None
        if quiet:
            return
        try:
            old = path.read_bytes() if path.exists() else b""
            kept = lines_until(old, resume_step) if resume_step else b""
            if kept != old:
                write_atomic(path, kept)
            self._lines = Appender(path, say)
        except (OSError, StorageError) as error:
            say(f"WARNING: {path} cannot be written: {error}. The run goes on without it.")
        if tensorboard:
            name = f"events.out.tfevents.{time.time_ns() // 1000}.{os.getpid()}"
            self._board = Appender(workdir / "tensorboard" / name, say)
            self._board.write(events.file_header() + events.restart(resume_step + 1 if resume_step else 0))

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: Any) -> None:
        for file in (self._lines, self._board):
            if file:
                file.close()

    def write(self, step: int, values: Mapping[str, float | int | None]) -> None:
        """Adds a line; it is in the file when this returns.  Write a step before saving its checkpoint.

        Args:
          step: optimiser steps done.
          values: Python numbers; `loss` of a training step or `eval_loss` of an evaluation is among them.

        Raises:
          ValueError: neither is, or both.
        """
        if ("loss" in values) == ("eval_loss" in values):
            raise ValueError(f"one of `loss` and `eval_loss` is needed, not {sorted(values)}")
        finite = {key: value for key, value in values.items() if value is not None and math.isfinite(value)}
        line = {"step": step} | {key: finite.get(key) for key in values}
        if self._lines:
            self._lines.write((json.dumps(line, allow_nan=False) + "\n").encode())
        group = "train" if "loss" in values else "eval"
        tags = {f"{group}/{key.removeprefix('eval_')}": float(value) for key, value in finite.items()}
        if self._board:
            self._board.write(events.scalars(step, tags))
        if self._also:
            self._also(step, tags, group == "eval")


def lines_until(data: bytes, step: int) -> bytes:
    """The lines of a metrics file up to and with a step; torn ones are left out, the others stay as they are."""
    kept = []
    for line in data.splitlines(keepends=True):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if line.endswith(b"\n") and json.loads(line)["step"] <= step:
                kept.append(line)
    return b"".join(kept)


class StepLog:
    """Takes each step's metrics while they are still being computed; logs them when the next step has been started.

    Args:
      chips: that share the work.  peak: FLOP/s of all of them; None: not known, and so no MFU.
    """

    def __init__(self, log: MetricsLog, progress: Progress, chips: int = 1, peak: float | None = None):
        self._log, self._progress = log, progress
        self._chips, self._peak = chips, peak
        self._waiting: tuple[int, Mapping[str, int], Mapping[str, Any]] | None = None
        self._clock = time.monotonic()

    def add(self, step: int, metrics: Mapping[str, Any], **counts: int) -> None:
        """metrics: device scalars of step `step`.  counts: numbers known on the host: `tokens` that are no padding,
        `rows`, and where known `slots`, the tokens with the padding, and `flop`, what the step is worth."""
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
        counts, tokens = dict(counts), counts["tokens"]
        slots, flop = counts.pop("slots", None), counts.pop("flop", None)
        filled = tokens / slots if slots else None
        speed: dict[str, float | None] = {
            "seconds": seconds,
            "tokens_per_second": tokens / seconds if seconds else None,
        }
        speed["tokens_per_second_per_chip"] = tokens / seconds / self._chips if seconds else None
        mfu = flop / seconds / self._peak if flop and seconds and self._peak else None
        speed |= {} if mfu is None else {"mfu": mfu}
        self._log.write(step, {**values, **counts, **({"fill": filled} if slots else {}), **speed})
        if not math.isfinite(values["loss"]):
            raise DivergedError(
                f"The loss of step {step} is {values['loss']}. Earlier checkpoints are intact. "
                "Lower `optim.learning_rate`, or set `optim.max_grad_norm`."
            )
        rate = values["learning_rate"]
        self._progress.step(
            step, loss=values["loss"], learning_rate=rate, tokens=tokens, seconds=seconds, filled=filled, mfu=mfu
        )

    def evaluation(self, step: int, scores: Mapping[str, float]) -> None:
        """Logs an evaluation: `eval_loss`, and what else there is."""
        self._log.write(step, scores)
        more = {name: value for name, value in scores.items() if name not in ("eval_loss", "perplexity")}
        self._progress.evaluation(step, scores["eval_loss"], more)

    def restart_clock(self) -> None:
        """What happened since the last step (an evaluation, a save) is not part of the next one."""
        self._clock = time.monotonic()
