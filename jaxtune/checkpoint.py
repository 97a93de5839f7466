"""Checkpoints that are whole or not there, and that notice when they rot.

    checkpoints/100/arrays/            what trains and the optimiser's state, written by Orbax
    checkpoints/100/record.json        step, rows, metrics, identity, and dtype and shape of every leaf
    checkpoints/100/manifest.sha256    a digest of each file above
    checkpoints/tmp/                   a save under way or a step being deleted; emptied at the next start
    checkpoints/quarantine/            steps that failed verification, kept to be looked at

Orbax never shows half a save, but it restores flipped bits silently, casts dtypes silently and has no way back from a
damaged newest step.  So it writes into `tmp/`, a thread hashes what lies on disk, and renaming the directory is the
commit: whatever is visible under a step's number was complete and hashed, at whichever instant the process is killed.

The frozen base is not saved but named, by hash, in `identity`.  Random keys are a function of (seed, step); the seed
belongs to `identity` too.
"""

import contextlib
import dataclasses
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from jaxtune.errors import CannotCreateError, DataError, DivergedError, NoCheckpointError, StorageError, UserError
from jaxtune.rundir import check_manifest, sync_directory, write_json_atomic, write_manifest
from jaxtune.tree import flatten, unflatten
from jaxtune.typing import Tree

RECORD = "record.json"
# Version of the layout above.
FORMAT = 1
# What a ValueError of Orbax (TensorStore's status in words) says when the disk and not the program is at fault.
DISK_TROUBLE = re.compile(
    "RESOURCE_EXHAUSTED|PERMISSION_DENIED|No space left|Disk quota|File too large|Read-only|Input/output error|Stale"
)
# Orbax logs pages of traceback for a failure that it raises as well; the user gets one message of ours.
logging.getLogger("absl").addFilter(lambda r: r.levelno < logging.ERROR or "orbax" not in r.pathname)


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint read back: `rows` is the row cursor, `metrics` what was given to `save`."""

    state: Tree
    step: int
    rows: int
    metrics: dict[str, float]


class Checkpoints:
    """The steps of one run, in `workdir/checkpoints`.  Hold the run's lock before opening it.

    With several processes each calls every method at the same step, and `directory` is on a file system they share.

    Args:
      directory: created if needed.
      keep_last_n: how many of the newest steps stay; at least 1.
      keep_best_n: how many stay besides these for their `eval_loss`.
      identity: what must be the same for a resumed run to be the same run: {'model': its hash, 'rows': the data's,
        'train.seed': '0', …}.
      say: takes a line for the user.

    Raises:
      CannotCreateError: the directory cannot be created.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep_last_n: int,
        keep_best_n: int,
        identity: dict[str, str],
        say: Callable[[str], None] = print,
    ):
        self.directory = directory.absolute()
        self._tmp = self.directory / "tmp"
        self._keep = keep_last_n, keep_best_n
        self._identity = identity
        self._say = say
        self._primary = jax.process_index() == 0
        if self._primary:
            try:
                shutil.rmtree(self._tmp, ignore_errors=True)
                self._tmp.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise CannotCreateError(f"{directory} cannot be used for checkpoints: {error}.") from error
        self._orbax = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[int] | None = None
        self._last_saved = -1

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        try:
            self.close()
        except UserError as late:
            # What ended the run matters more than a save that failed in its wake.
            if error is None:
                raise
            self._say(f"WARNING: {late}")

    def save(self, step: int, state: dict[str, Tree], *, rows: int, metrics: dict[str, float] | None = None) -> None:
        """Starts a save and returns once the arrays are copied off the devices; a step already saved is left alone.

        Args:
          step: optimiser steps done.
          state: {'trainable': tree, 'opt_state': tree} of jax arrays; free to be donated afterwards.
          rows: rows consumed, the cursor from which data goes on.
          metrics: numbers to keep beside it; `eval_loss` decides which steps are best.

        Raises:
          StorageError, DivergedError: of the save before this one; see `wait`.
        """
        self.wait()
        if step == self._last_saved:
            return
        leaves = flatten(state)
        record = {
            "format": FORMAT,
            "step": step,
            "rows": rows,
            "metrics": metrics or {},
            "identity": self._identity,
            "leaves": spec_of(leaves),
        }
        # Only started here; the thread reads the answers, so that the training loop never waits for them.
        finite = _finite({path: leaf for path, leaf in leaves.items() if path.startswith("trainable/")})
        with self._whole_or_not(step):
            self._orbax.save(self._tmp / str(step) / "arrays", args=ocp.args.StandardSave(leaves))
        self._pending = self._thread.submit(self._commit, step, record, finite)

    def wait(self) -> None:
        """Returns when the save under way is committed.

        Raises:
          StorageError: it could not be written; the steps before it are intact.
          DivergedError: what trains is not finite, so it was not kept.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._last_saved = pending.result()

    def close(self) -> None:
        """Waits and lets go of the threads; raises as `wait`."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._orbax.close()
            # Threads of Orbax may have gone on writing a save that had failed.
            for left in self._tmp.glob("*") if self._primary else ():
                shutil.rmtree(left, ignore_errors=True)

    def restore(self, abstract_state: dict[str, Tree]) -> Restored | None:
        """The newest step that verifies, or None where there is no step.  Damaged newer ones move to `quarantine/`.

        Args:
          abstract_state: the state with `jax.ShapeDtypeStruct` leaves, whose shardings say where values go; the mesh
            need not be the one that saved.

        Raises:
          NoCheckpointError: there are steps and none verifies; they stay where they are.
          UserError: the step belongs to another configuration, or its leaves are not those asked for.
          DataError: it belongs to other data, all else being equal.
        """
        step = self._choose_together()
        if step is None:
            return None
        path = self.directory / str(step)
        record = json.loads((path / RECORD).read_bytes())
        wanted = flatten(abstract_state)
        check_same(f"Checkpoint {path}", record["identity"], self._identity)
        check_same(f"Checkpoint {path}", record["leaves"], spec_of(wanted))
        values = self._orbax.restore(path / "arrays", args=ocp.args.StandardRestore(wanted))
        self._last_saved = step
        metrics = {name: float(value) for name, value in record["metrics"].items()}
        return Restored(unflatten(abstract_state, values), step, record["rows"], metrics)

    def _commit(self, step: int, record: dict[str, Any], finite: dict[str, jax.Array]) -> int:
        """In the thread: waits for Orbax, hashes, renames into place, and only then deletes older steps."""
        work, final = self._tmp / str(step), self.directory / str(step)
        with self._whole_or_not(step):
            self._orbax.wait_until_finished()
            self._check_finite(step, finite)
            if not self._primary:
                return step
            write_json_atomic(work / RECORD, record)
            write_manifest(work)
            if final.is_file():
                self._quarantine(final.name)
            os.rename(work, final)
            sync_directory(self.directory)
        self._delete_old()
        return step

    def _check_finite(self, step: int, finite: dict[str, jax.Array]) -> None:
        bad = [path for path, good in finite.items() if not bool(good)]
        if bad:
            more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
            raise DivergedError(
                f"The weights are no longer finite at step {step}: {', '.join(bad[:5])}{more}. They were not saved; "
                f"{self._kept()}\nLower `optim.learning_rate` or set `optim.max_grad_norm`, in a new `--workdir`."
            )

    @contextlib.contextmanager
    def _whole_or_not(self, step: int) -> Iterator[None]:
        """A save that fails leaves nothing; a full or failing disk is a StorageError."""
        try:
            yield
        except BaseException as error:
            if self._primary:
                shutil.rmtree(self._tmp / str(step), ignore_errors=True)
            # Orbax reports the disk as a ValueError with the status in its text.
            if not (isinstance(error, OSError) or (isinstance(error, ValueError) and DISK_TROUBLE.search(str(error)))):
                raise
            free = shutil.disk_usage(self.directory).free
            raise StorageError(
                f"Checkpoint {step} could not be written to {self.directory}, which has {free / 1e6:,.1f} MB free: "
                f"{str(error).splitlines()[0][:300]}\n{self._kept()} Free some space and run the same command again."
            ) from error

    def _kept(self) -> str:
        kept = steps(self.directory)
        return f"Checkpoints kept: {', '.join(map(str, kept))}." if kept else "No earlier checkpoint exists."

    def _delete_old(self) -> None:
        losses: dict[int, float | None] = dict.fromkeys(steps(self.directory))
        if self._keep[1]:
            losses = {step: eval_loss_of(self.directory / str(step)) for step in losses}
        for step in expendable(losses, *self._keep):
            # Renamed first: a kill while files are being deleted must not leave half a step in sight.
            try:
                os.rename(self.directory / str(step), self._tmp / f"old-{step}")
                shutil.rmtree(self._tmp / f"old-{step}")
            except OSError as error:
                self._say(f"WARNING: the old checkpoint {self.directory / str(step)} could not be deleted: {error}.")

    def _choose(self) -> int | None:
        damaged = []
        chosen = None
        for step in reversed(steps(self.directory)):
            reason = verify(self.directory / str(step))
            if reason is None:
                chosen = step
                break
            damaged.append((step, reason))
        if damaged and chosen is None:
            # Left in place: if they were moved, the same command would start from scratch the next time.
            listed = "\n".join(f"  {step}: {reason}" for step, reason in damaged)
            raise NoCheckpointError(
                f"None of the checkpoints in {self.directory} can be used:\n{listed}\n"
                f"Nothing was deleted. Bring back an intact copy, or start anew in another `--workdir`."
            )
        for step, reason in damaged:
            to = self._quarantine(str(step))
            self._say(f"WARNING: checkpoint {step} is damaged: {reason}. Moved to {to}; going on from step {chosen}.")
        return chosen

    def _choose_together(self) -> int | None:
        """One process looks and moves, all hear of its choice: -1 none, -2 nothing usable."""
        choice, error = -1, None
        if self._primary:
            try:
                step = self._choose()
                choice = -1 if step is None else step
            except NoCheckpointError as nothing:
                choice, error = -2, nothing
        choice = int(multihost_utils.broadcast_one_to_all(np.int32(choice)))
        if choice == -2:
            raise error or NoCheckpointError(f"None of the checkpoints in {self.directory} can be used.")
        return None if choice == -1 else choice

    def _quarantine(self, name: str) -> Path:
        folder = self.directory / "quarantine"
        folder.mkdir(exist_ok=True)
        taken = len([p for p in folder.iterdir() if p.name.split(".")[0] == name])
        to = folder / (f"{name}.{taken}" if taken else name)
        os.rename(self.directory / name, to)
        return to


def steps(directory: Path) -> list[int]:
    """The steps that lie in a checkpoint directory, ascending, verified or not; empty directories are none."""
    if not directory.is_dir():
        return []
    names = [p.name for p in directory.iterdir() if p.is_dir() and any(p.iterdir())]
    return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name))


def expendable(losses: dict[int, float | None], keep_last_n: int, keep_best_n: int) -> list[int]:
    """Of {step: evaluation loss or None}, the steps that are neither among the newest nor among the best."""
    newest = sorted(losses)[-keep_last_n:]
    scored = [(loss, -step) for step, loss in losses.items() if loss is not None and math.isfinite(loss)]
    best = [-step for _, step in sorted(scored)[:keep_best_n]]
    return [step for step in sorted(losses) if step not in newest and step not in best]


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


def eval_loss_of(step: Path) -> float | None:
    try:
        return json.loads((step / RECORD).read_bytes())["metrics"].get("eval_loss")
    except (OSError, ValueError, KeyError):
        return None


@jax.jit
def _finite(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {path: jnp.isfinite(x).all() for path, x in leaves.items() if jnp.issubdtype(x.dtype, jnp.inexact)}


def spec_of(leaves: dict[str, Any]) -> dict[str, str]:
    """{'trainable/layers/attn/q/kernel/a': 'float32[2,64,8]', ...}."""
    return {path: f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]" for path, leaf in leaves.items()}


def check_same(what: str, was: dict[str, str], now: dict[str, str]) -> None:
    keys = sorted(key for key in was.keys() | now.keys() if was.get(key) != now.get(key))
    if not keys:
        return
    rows = [("", "was", "is"), *((key, was.get(key, "absent"), now.get(key, "absent")) for key in keys[:10])]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = ["  ".join(f"{v:{w}}" for v, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    if len(keys) > 10:
        lines.append(f"… and {len(keys) - 10} more")
    table = "\n  ".join(lines)
    # Where the config counts epochs, the number of steps follows from the rows.
    data = "rows" in keys and set(keys) <= {"rows", "train.steps"}
    raise (DataError if data else UserError)(
        f"{what} was saved by a run with other {'data' if data else 'settings'}:\n  {table}\n"
        f"Set these back to go on with that run, or give a new `--workdir` to start another."
    )
