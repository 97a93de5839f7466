"""The checkpoint that a run goes on from, as `checkpoint.resume` says: auto, last, best, never, or a path.

No jax: `torch_gpu` uses it too.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from jaxtune.errors import CannotCreateError, MissingInputError, NoCheckpointError, UserError
from jaxtune.identity import check_same
from jaxtune.kept import Goal, best_steps, choose, pick, quarantine, read_record, steps, verify
from jaxtune.rundir import check_manifest, read_json_or, sync_directory, write_json_atomic

# In `checkpoints/`: which run's step this run began from.
ORIGIN = "origin.json"


def check_path(resume: str) -> None:
    """Refuses a path that is no run and no checkpoint, before anything is read.

    Raises:
      MissingInputError: naming what is there.
    """
    if "/" not in resume:
        return
    path = Path(resume).expanduser()
    if not path.is_dir():
        near = path.parent
        there = sorted(p.name for p in near.iterdir())[:10] if near.is_dir() else []
        raise MissingInputError(
            f"`checkpoint.resume` is {resume!r}, and there is no such directory. {near} "
            + (f"holds: {', '.join(there)}." if there else "holds nothing, or is none.")
        )
    if not (path / "record.json").is_file() and not steps(path / "checkpoints"):
        there = sorted(p.name for p in path.iterdir())[:10]
        raise MissingInputError(
            f"`checkpoint.resume` is {resume!r}, which is neither a run with checkpoints nor one of its checkpoints. "
            f"It holds: {', '.join(there) or 'nothing'}. Give RUN, or RUN/checkpoints/STEP."
        )


def find_start(
    workdir: Path, resume: str, goal: Goal, identity: dict[str, str], say: Callable[[str], None]
) -> int | None:
    """The step in `workdir/checkpoints` to go on from, intact; None: from the beginning.

    What stands in its way is moved aside: damaged steps to `quarantine/`, and those after the best to `abandoned/`.

    Raises:
      CannotCreateError: `resume` does not allow for the steps that are there.
      NoCheckpointError: there is none, or none that is intact.
      UserError, DataError: that of a path is of a run with other settings, or other data.
    """
    directory = workdir / "checkpoints"
    there = steps(directory)
    if resume == "never" and there:
        raise CannotCreateError(f"{workdir} has checkpoints and `checkpoint.resume` is never. Give a new --workdir.")
    if resume in ("last", "best") and not there:
        raise NoCheckpointError(
            f"`checkpoint.resume` is {resume}, and there are no checkpoints in {directory}. Set it to auto to begin."
        )
    if resume == "best" and not _goes_on(workdir):
        return _go_back(directory, goal, say)
    if "/" in resume:
        _adopt(directory, Path(resume).expanduser().resolve(), identity, say)
    return choose(directory, say)


def inexact(start: int, fresh_at: int, say: Callable[[str], None], note: Callable[..., None]) -> None:
    """Says and notes that a run is no longer exact, where its optimiser once started fresh.

    Args:
      fresh_at: at this step; 0: it never has.
    """
    if fresh_at == start:
        say(
            f"WARNING: checkpoint {start} holds no optimiser state (`checkpoint.save_optim` was false): the optimiser "
            "starts fresh, and the run does not end in the bits of one that never stopped"
        )
    if fresh_at:
        note(exact=False)


def _goes_on(workdir: Path) -> bool:
    """Whether this start follows one that went back to the best and did not end: it goes on from where that came to."""
    run, config = (read_json_or(workdir / name, {}) for name in ("run.json", "config.json"))
    return run.get("status") != "finished" and config.get("checkpoint", {}).get("resume") == "best"


def _go_back(directory: Path, goal: Goal, say: Callable[[str], None]) -> int:
    order = best_steps(directory, goal)
    for step in order:
        reason = verify(directory / str(step))
        if reason is None:
            break
        say(f"WARNING: checkpoint {step} is damaged and passed over: {reason}.")
    else:
        raise NoCheckpointError(
            f"`checkpoint.resume` is best, and no intact checkpoint in {directory} has an evaluation's {goal.metric}. "
            f"There are: {', '.join(map(str, steps(directory)))}. Set it to last, or give the path of one of these."
        )
    for later in [other for other in steps(directory) if other > step]:
        to = quarantine(directory, str(later), to="abandoned")
        say(f"checkpoint {later} is of what came after the best: moved to {to}")
    say(f"going back to step {step}, the best by {goal.metric}")
    return step


def _adopt(directory: Path, source: Path, identity: dict[str, str], say: Callable[[str], None]) -> None:
    """Copies a step of another run into `directory`, which is empty or began so.  Whole or not at all."""
    began = read_json_or(directory / ORIGIN, {}).get("path")
    if steps(directory):
        if began == str(source):
            return
        raise CannotCreateError(
            f"`checkpoint.resume` is {source}, and {directory.parent} has checkpoints of its own already"
            f"{f' (it began from {began})' if began else ''}. Give a new --workdir, or set it to last."
        )
    step = source if (source / "record.json").is_file() else pick(source / "checkpoints", "newest", say)
    reason = verify(step) if step.name.isdecimal() else "its name is not its step's number"
    if reason is not None:
        raise NoCheckpointError(f"`checkpoint.resume` is {source}, and {step} cannot be used: {reason}.")
    advice = "take its adapter as `peft.init_from`"
    check_same(f"Checkpoint {step}", read_record(step)["identity"], identity, otherwise=advice)
    work = directory / "tmp" / step.name
    shutil.copytree(step, work)
    if check_manifest(work) is not None:
        raise UserError(f"{step} changed while it was copied. Run the same command again.")
    write_json_atomic(directory / ORIGIN, {"path": str(source), "checkpoint": str(step)})
    os.rename(work, directory / step.name)
    sync_directory(directory)
    say(f"begun from {step}")
