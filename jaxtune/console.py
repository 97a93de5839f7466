"""What a run says on the screen and in `log.txt`: lines, the progress bar, answers before and after training.

A screen that has gone stops no run.  No jax: `torch_gpu` uses it too.
"""

import collections
import contextlib
import datetime
import os
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import rich.console
import rich.progress
import rich.table
from rich.text import Text

from jaxtune.rundir import Appender

# Steps over which speed and remaining time are averaged.
WINDOW = 50
# Seconds between redraws of the bar.
REDRAW = 0.2


class Console:
    """The screen and `log.txt`: `say` writes a line to both.

    Args:
      log: the file to append to; None: the screen alone.
      stream: the screen; None: standard output, if there is one.
      quiet: neither screen nor file (every process of a run but the first).
    """

    def __init__(self, log: Path | None = None, stream: Any = None, quiet: bool = False):
        self._stream = None if quiet else (stream or sys.stdout)
        self.rich = None if self._stream is None else rich.console.Console(file=self._stream, highlight=False)
        # A bar is on the screen: lines go through rich, which puts them above it.
        self.live = False
        self._log = None if quiet or log is None else Appender(log, self.show)

    def __enter__(self) -> "Console":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._log:
            self._log.close()

    @property
    def width(self) -> int:
        """Columns of a terminal; 0 where there is none."""
        terminal = self.rich is not None and self.rich.is_terminal and not self.rich.is_dumb_terminal
        return self.rich.width if self.rich and terminal else 0

    def say(self, text: str) -> None:
        """A line, or several, on the screen and in `log.txt`."""
        self.show(text)
        self.record(text)

    def record(self, text: str) -> None:
        """In `log.txt` alone."""
        if self._log:
            self._log.write((text + "\n").encode("utf-8", "backslashreplace"))

    def show(self, text: str) -> None:
        """On the screen alone."""
        with self.drawing():
            if self.rich and self.live:
                self.rich.print(Text(text), soft_wrap=True)
            elif self._stream:
                encoding = getattr(self._stream, "encoding", None) or "utf-8"
                print(text.encode(encoding, "backslashreplace").decode(encoding), file=self._stream, flush=True)

    def say_answers(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Answers before and after training, side by side on a wide terminal; see `answers_table`."""
        if self.rich and self.width >= 80:
            with self.drawing():
                self.rich.print(answers_table(rows, self.width))
            self.record(answers_text(rows))
        else:
            self.say(answers_text(rows))

    @contextlib.contextmanager
    def drawing(self) -> Iterator[None]:
        """Around what writes to the screen: a screen that has gone (`| head`, ssh dropped) is not written to again."""
        try:
            yield
        except (OSError, ValueError, SystemExit) as error:
            # rich turns a broken pipe into SystemExit; a closed stream is a ValueError, as are bugs.
            if isinstance(error, ValueError) and not getattr(self._stream, "closed", True):
                raise
            # Python flushes once more at exit, and must not fail there.
            gone, self._stream, self.rich = self._stream, None, None
            if gone is not None:
                with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
                    os.dup2(nowhere.fileno(), gone.fileno())


class Progress:
    """A bar in a terminal; elsewhere a line every `log_every` steps and at the last.  `log.txt` has the lines always.

    Args:
      console: where to draw.
      total: the run's optimiser steps.
      start: those done already.
      log_every: steps between lines.
    """

    def __init__(self, console: Console, *, total: int, start: int = 0, log_every: int = 10):
        self._console, self._total, self._start, self._every = console, total, start, log_every
        self._recent: collections.deque[tuple[int, float]] = collections.deque(maxlen=WINDOW)
        self._first = True
        self._unsaid = ""
        self._eval_loss: float | None = None
        self._bar: rich.progress.Progress | None = None
        self._drawn = 0.0

    def __enter__(self) -> "Progress":
        if self._console.width:
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("{task.completed}/{task.total}", markup=False),
                rich.progress.BarColumn(bar_width=None),
                rich.progress.TextColumn("{task.fields[info]}", markup=False),
                console=self._console.rich,
                # Drawn by `step`, not by a thread: its errors could be caught by nobody.
                auto_refresh=False,
                expand=True,
            )
            self._bar.add_task("", total=self._total, completed=self._start, info="")
            self._draw(self._bar.start)
            self._console.live = True
        return self

    def __exit__(self, *_: Any) -> None:
        self._say_line(self._unsaid)
        if self._bar:
            self._draw(self._bar.refresh)
            self._draw(self._bar.stop)
        self._bar, self._console.live = None, False

    def step(
        self,
        step: int,
        *,
        loss: float | None,
        learning_rate: float,
        tokens: int,
        seconds: float,
        filled: float | None = None,
        mfu: float | None = None,
    ) -> None:
        """After each optimiser step.

        Args:
          step: optimiser steps done.
          loss: None where the step had no target.
          learning_rate: for the line.
          tokens: real tokens processed, padding left out.
          seconds: the step took.  The first since the start, which compiles, counts neither for speed nor for eta.
          filled: the share of the batch that real tokens are, where it is known.
          mfu: the share of the chips' peak that went into the model, where that is known.
        """
        if not self._first:
            self._recent.append((tokens, seconds))
        self._first = False
        parts = {"loss": f"loss {'n/a' if loss is None else f'{loss:.4f}'}", "lr": f"lr {learning_rate:.1e}"}
        took = sum(seconds for _, seconds in self._recent)
        if took > 0:
            parts["speed"] = f"tok/s {sum(tokens for tokens, _ in self._recent) / took:,.0f}"
            left = (self._total - step) * took / len(self._recent)
            parts["eta"] = f"eta {datetime.timedelta(seconds=round(left))}"
        if filled is not None:
            parts["fill"] = f"fill {filled:.0%}"
        if mfu is not None and took > 0:
            parts["mfu"] = f"mfu {mfu:.1%}"
        self._unsaid = f"step {step}/{self._total}  " + "  ".join(parts.values())
        if step % self._every == 0 or step == self._total:
            self._say_line(self._unsaid)
        if self._bar:
            if self._eval_loss is not None:
                parts["eval"] = f"eval {self._eval_loss:.4f}"
            # Beside '300/300' and the shortest bar.
            room = self._console.width - 2 * len(str(self._total)) - 7
            self._bar.update(self._bar.task_ids[0], completed=step, info=fit(parts, room))
            if time.monotonic() - self._drawn > REDRAW:
                self._drawn = time.monotonic()
                self._draw(self._bar.refresh)

    def evaluation(self, step: int, eval_loss: float, more: Mapping[str, float] | None = None) -> None:
        """After an evaluation: a line of its own, everywhere."""
        self._eval_loss = eval_loss
        parts = [f"{name} {value:.4f}" for name, value in {"eval_loss": eval_loss, **(more or {})}.items()]
        self._console.say("  ".join([f"step {step}/{self._total}", *parts]))

    def _say_line(self, line: str) -> None:
        self._unsaid = ""
        if line and self._bar:
            self._console.record(line)
        elif line:
            self._console.say(line)

    def _draw(self, how: Callable[[], None]) -> None:
        with self._console.drawing():
            how()


def fit(parts: Mapping[str, str], room: int) -> str:
    """As many of a line's parts as there is room for, the most wanted first."""
    chosen = []
    for name in ("loss", "eta", "speed", "eval", "lr", "mfu", "fill"):
        if name in parts and sum(len(p) + 2 for p in chosen) + len(parts[name]) <= room:
            chosen.append(parts[name])
    return "  ".join(chosen)


# Marks that would turn the text around them; `isolate` sets its own.
OVERRIDES = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def visible(text: str) -> str:
    """Text from data, safe to print: control characters and direction overrides are spelled out."""

    def spell(c: str) -> str:
        odd = (unicodedata.category(c) in ("Cc", "Cs") and c != "\n") or c in OVERRIDES
        return f"\\u{ord(c):04x}" if odd else c

    return "".join(map(spell, text.replace("\t", "    ")))


def isolate(line: str) -> str:
    """A line with right-to-left letters between FSI and PDI, so that what stands around it keeps its place."""
    if any(unicodedata.bidirectional(c) in ("R", "AL", "AN") for c in line):
        return f"\u2068{line}\u2069"
    return line


COLUMNS = ("prompt", "reference", "before", "after")


def answers_table(rows: Sequence[Mapping[str, Any]], width: int) -> rich.table.Table:
    """Answers side by side, `width` columns wide.

    Args:
      rows: of {prompt, reference, before, after: str; match_before, match_after: bool or None}.
      width: of the terminal.
    """
    column = max(1, (width - 3 * len(COLUMNS) - 1) // len(COLUMNS))
    screen = rich.console.Console(width=width)
    table = rich.table.Table(*COLUMNS, show_lines=True)
    for row in rows:
        cells = []
        for name in COLUMNS:
            mark = {True: " ✓", False: " ✗", None: ""}[row.get(f"match_{name}")]
            text = visible(row[name]) + mark
            # Broken here, not by rich: each line needs isolates of its own.
            lines = [isolate(line.plain.rstrip()) for line in Text(text).wrap(screen, column)]
            cells.append(Text("\n".join(lines), no_wrap=True))
        table.add_row(*cells)
    return table


def answers_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """The same as lines, for files and narrow screens."""
    lines = []
    for number, row in enumerate(rows, 1):
        lines.append(f"[{number}]")
        for name in COLUMNS:
            mark = {True: " (right)", False: " (wrong)", None: ""}[row.get(f"match_{name}")]
            first, *more = visible(row[name]).split("\n")
            lines.append(f"  {name + mark:<16}  {isolate(first)}")
            lines += [f"  {'':<16}  {isolate(line)}" for line in more]
    return "\n".join(lines)


@contextlib.contextmanager
def counting(console: Console, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A function that is told of more of `total` done: a bar in a terminal; elsewhere a line at each quarter."""
    done = 0
    bar: rich.progress.Progress | None = None
    if console.width and console.rich:
        columns = (rich.progress.BarColumn(), rich.progress.MofNCompleteColumn(), rich.progress.TimeRemainingColumn())
        text = rich.progress.TextColumn("{task.description}", markup=False)
        bar = rich.progress.Progress(text, *columns, console=console.rich, auto_refresh=False, transient=True)
        bar.add_task(what, total=total)
        console.live = True

    def advance(more: int) -> None:
        nonlocal done
        quarters = 4 * done // max(total, 1)
        done += more
        if bar is not None:
            with console.drawing():
                bar.update(bar.task_ids[0], completed=done)
                bar.refresh()
        elif 4 * done // max(total, 1) > quarters:
            console.say(f"{what}: {done} of {total}")

    try:
        if bar is not None:
            with console.drawing():
                bar.start()
        yield advance
    finally:
        if bar is not None:
            with console.drawing():
                bar.stop()
        console.live = False
