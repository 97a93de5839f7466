"""The steps in a directory of checkpoints: written whole or not at all, chosen where intact, deleted in time.

    100/record.json        step, rows, metrics, identity, and dtype and shape of every leaf
    100/manifest.sha256    a digest of each file beside it
    tmp/                   a save under way or a step being deleted; emptied at the next start
    quarantine/            steps that failed verification, kept to be looked at
    abandoned/             steps that a run which went back to an earlier one has left behind

No jax: `torch_gpu` keeps its checkpoints so too.
"""

import contextlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxtune.errors import CannotCreateError, MissingInputError, NoCheckpointError, StorageError, UserError
from jaxtune.rundir import check_manifest, sync_directory, write_json_atomic, write_manifest

RECORD = "record.json"
# Version of the layout above.
FORMAT = 1
# What a ValueError of Orbax (TensorStore's status in words) says when the disk and not the program is at fault.
DISK_TROUBLE = re.compile(
    "RESOURCE_EXHAUSTED|PERMISSION_DENIED|No space left|Disk quota|File too large|Read-only|Input/output error|Stale"
)


class Goal(NamedTuple):
    """What the best step is best by: a key of its record's metrics, and whether the least (min) or largest is best."""

    metric: str
    mode: str


EVAL_LOSS = Goal("eval_loss", "min")


def open_directory(directory: Path) -> Path:
    """Makes the directory and an empty `tmp/` in it, which is returned.

    Raises:
      CannotCreateError: it cannot be.
    """
    tmp = directory / "tmp"
    try:
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotCreateError(f"{directory} cannot be used for checkpoints: {error}.") from error
    return tmp


def commit(directory: Path, work: Path, record: dict[str, Any]) -> None:
    """Hashes what lies in `work` and makes it the step of its record."""
    final = directory / str(record["step"])
    write_json_atomic(work / RECORD, {"format": FORMAT, **record})
    write_manifest(work)
    if final.is_file():
        quarantine(directory, final.name)
    os.rename(work, final)
    sync_directory(directory)


@contextlib.contextmanager
def whole_or_not(directory: Path, step: int, work: Path | None) -> Iterator[None]:
    """Around a save: one that fails leaves nothing of `work`; a full or failing disk is a StorageError."""
    try:
        yield
    except BaseException as error:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)
        # Orbax reports the disk as a ValueError with the status in its text.
        if not (isinstance(error, OSError) or (isinstance(error, ValueError) and DISK_TROUBLE.search(str(error)))):
            raise
        free = shutil.disk_usage(directory).free
        raise StorageError(
            f"Checkpoint {step} could not be written to {directory}, which has {free / 1e6:,.1f} MB free: "
            f"{str(error).splitlines()[0][:300]}\n{kept(directory)} Free some space and run the same command again."
        ) from error


def kept(directory: Path) -> str:
    """What a message says of the steps that are there."""
    there = steps(directory)
    return f"Checkpoints kept: {', '.join(map(str, there))}." if there else "No earlier checkpoint exists."


def diverged(directory: Path, step: int, bad: list[str]) -> str:
    """What is said where what trains is no longer finite: `bad` names it."""
    more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
    return (
        f"The weights are no longer finite at step {step}: {', '.join(bad[:5])}{more}. They were not saved; "
        f"{kept(directory)}\nLower `optim.learning_rate` or set `optim.max_grad_norm`, in a new `--workdir`."
    )


def delete_old(
    directory: Path, keep_last_n: int, keep_best_n: int, say: Callable[[str], None], goal: Goal = EVAL_LOSS
) -> None:
    """Deletes what `expendable` names."""
    values: dict[int, float | None] = dict.fromkeys(steps(directory))
    if keep_best_n:
        values = {step: value_of(directory / str(step), goal.metric) for step in values}
    for step in expendable(values, keep_last_n, keep_best_n, goal.mode):
        # Renamed first: a kill while files are being deleted must not leave half a step in sight.
        try:
            os.rename(directory / str(step), directory / "tmp" / f"old-{step}")
            shutil.rmtree(directory / "tmp" / f"old-{step}")
        except OSError as error:
            say(f"WARNING: the old checkpoint {directory / str(step)} could not be deleted: {error}.")


def choose(directory: Path, say: Callable[[str], None]) -> int | None:
    """The newest step that verifies, or None where there is no step.  Damaged newer ones move to `quarantine/`.

    Raises:
      NoCheckpointError: there are steps and none verifies; they stay where they are.
    """
    damaged = []
    chosen = None
    for step in reversed(steps(directory)):
        reason = verify(directory / str(step))
        if reason is None:
            chosen = step
            break
        damaged.append((step, reason))
    if damaged and chosen is None:
        # Left in place: if they were moved, the same command would start from scratch the next time.
        listed = "\n".join(f"  {step}: {reason}" for step, reason in damaged)
        raise NoCheckpointError(
            f"None of the checkpoints in {directory} can be used:\n{listed}\n"
            f"Nothing was deleted. Bring back an intact copy, or start anew in another `--workdir`."
        )
    for step, reason in damaged:
        to = quarantine(directory, str(step))
        say(f"WARNING: checkpoint {step} is damaged: {reason}. Moved to {to}; going on from step {chosen}.")
    return chosen


def quarantine(directory: Path, name: str, to: str = "quarantine") -> Path:
    """Moves a step aside, into the folder `to`; returns where it is now."""
    folder = directory / to
    folder.mkdir(exist_ok=True)
    taken = len([p for p in folder.iterdir() if p.name.split(".")[0] == name])
    moved = folder / (f"{name}.{taken}" if taken else name)
    os.rename(directory / name, moved)
    return moved


def steps(directory: Path) -> list[int]:
    """The steps that lie in a checkpoint directory, ascending, verified or not; empty directories are none."""
    if not directory.is_dir():
        return []
    names = [p.name for p in directory.iterdir() if p.is_dir() and any(p.iterdir())]
    return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name))


def expendable(values: dict[int, float | None], keep_last_n: int, keep_best_n: int, mode: str = "min") -> list[int]:
    """Of {step: metric or None}, the steps that are neither among the newest nor among the best."""
    newest, best = sorted(values)[-keep_last_n:], best_first(values, mode)[:keep_best_n]
    return [step for step in sorted(values) if step not in newest and step not in best]


def best_first(values: dict[int, float | None], mode: str) -> list[int]:
    """The steps that have a value, the best first and of equals the newest."""
    sign = {"min": 1, "max": -1}[mode]
    scored = [(sign * value, -step) for step, value in values.items() if value is not None and math.isfinite(value)]
    return [-step for _, step in sorted(scored)]


def best_steps(directory: Path, goal: Goal) -> list[int]:
    """The steps in a directory whose evaluation has the metric, the best first."""
    return best_first({step: value_of(directory / str(step), goal.metric) for step in steps(directory)}, goal.mode)


def verify(step: Path) -> str | None:
    """None if every byte of a step is as it was saved, else what is wrong, naming the file."""
    try:
        damage = check_manifest(step)
        if damage:
            return damage
        record = json.loads((step / RECORD).read_bytes())
    except (OSError, ValueError) as error:
        return str(error)
    missing = [key for key in ("format", "step", "rows", "metrics", "identity", "leaves") if key not in record]
    if missing:
        return f"{RECORD} has no {', '.join(missing)}"
    if record["format"] != FORMAT:
        return f"{RECORD} has format {record['format']}; this jaxtune reads format {FORMAT}"
    if record["step"] != int(step.name):
        return f"{RECORD} is of step {record['step']}"
    return None


def value_of(step: Path, metric: str) -> float | None:
    """A number of the evaluation that a step was saved with; None where it has none."""
    try:
        return json.loads((step / RECORD).read_bytes())["metrics"].get(metric)
    except (OSError, ValueError, KeyError):
        return None


def pick(directory: Path, which: str, say: Callable[[str], None], goal: Goal = EVAL_LOSS) -> Path:
    """A step whose every byte is as it was saved.

    Args:
      which: newest | best (by `goal`) | a step's number.  say: is told of damaged ones that are passed over.

    Raises:
      MissingInputError: there are none.  UserError: not the one that is asked for.  NoCheckpointError: all are damaged.
    """
    there = steps(directory)
    listed = ", ".join(map(str, there))
    if not there:
        raise MissingInputError(f"{directory} has no checkpoints yet: there is nothing to export.")
    if which == "newest":
        order = there[::-1]
    elif which == "best":
        order = best_steps(directory, goal)
        if not order:
            raise UserError(f"No checkpoint in {directory} has an evaluation's {goal.metric}. There are: {listed}.")
    elif which in map(str, there):
        order = [int(which)]
    else:
        raise UserError(f"There is no checkpoint {which!r} in {directory}. It can be: newest, best, {listed}.")
    for step in order:
        reason = verify(directory / str(step))
        if reason is None:
            return directory / str(step)
        say(f"WARNING: checkpoint {step} is damaged and passed over: {reason}.")
    raise NoCheckpointError(
        f"No checkpoint in {directory} that was asked for ({which}) is intact. There are: {listed}."
    )


def read_record(step: Path) -> dict[str, Any]:
    """step, rows, metrics, identity and leaves of a checkpoint."""
    return json.loads((step / RECORD).read_bytes())
