"""Checkpoints that are whole or not there, and that notice when they rot.

    checkpoints/100/arrays/            what trains and the optimiser's state, written by Orbax
    checkpoints/100/record.json        step, rows, metrics, identity, and dtype and shape of every leaf
    checkpoints/100/manifest.sha256    a digest of each file above
    checkpoints/tmp/                   a save under way or a step being deleted; emptied at the next start
    checkpoints/quarantine/            steps that failed verification, kept to be looked at
    checkpoints/abandoned/             steps that a run which went back to an earlier one has left behind

Orbax never shows half a save, but it restores flipped bits silently, casts dtypes silently and has no way back from a
damaged newest step.  So it writes into `tmp/`, a thread hashes what lies on disk, and renaming the directory is the
commit: whatever is visible under a step's number was complete and hashed, at whichever instant the process is killed.

The frozen base is not saved but named, by hash, in `identity`.  Random keys are a function of (seed, step); the seed
belongs to `identity` too.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from jaxtune import hosts
from jaxtune.errors import DivergedError, UserError
from jaxtune.identity import check_same
from jaxtune.kept import (
    EVAL_LOSS,
    RECORD,
    Goal,
    choose,
    commit,
    delete_old,
    diverged,
    open_directory,
    whole_or_not,
)
from jaxtune.tree import flatten, unflatten
from jaxtune.typing import Tree

# Orbax logs pages of traceback for a failure that it raises as well; the user gets one message of ours.
logging.getLogger("absl").addFilter(lambda r: r.levelno < logging.ERROR or "orbax" not in r.pathname)


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint read back: `rows` is the row cursor, `metrics` what was given to `save`.

    optimiser_from: the step at which the optimiser last started fresh; where it is this one, `state` is without its
    'opt_state'.
    """

    state: Tree
    step: int
    rows: int
    metrics: dict[str, float]
    optimiser_from: int


class Checkpoints:
    """The steps of one run, in `workdir/checkpoints`.  Hold the run's lock before opening it.

    With several processes each calls every method at the same step, and `directory` is on a file system they share.

    Args:
      directory: created if needed.
      keep_last_n: how many of the newest steps stay; at least 1.
      keep_best_n: how many stay besides these as the best.
      goal: what these are best by.
      identity: what must be the same for a resumed run to be the same run: {'model': its hash, 'rows': the data's,
        'train.seed': '0', …}.
      say: takes a line for the user.
      saved: called, in a thread, when a step is committed.

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
        goal: Goal = EVAL_LOSS,
        say: Callable[[str], None] = print,
        saved: Callable[[], None] = lambda: None,
    ):
        self.directory = directory.absolute()
        self._tmp = self.directory / "tmp"
        self._keep = keep_last_n, keep_best_n
        self._identity = identity
        self._goal, self._say, self._saved = goal, say, saved
        self._optimiser_from = 0
        self._primary = hosts.first()
        if self._primary:
            open_directory(self.directory)
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
          state: {'trainable': tree, 'opt_state': tree} of jax arrays, the second optional; free to be donated then.
          rows: rows consumed, the cursor from which data goes on.
          metrics: numbers to keep beside it; one of them decides which steps are best.

        Raises:
          StorageError, DivergedError: of the save before this one; see `wait`.
        """
        self.wait()
        if step == self._last_saved:
            return
        leaves = flatten(state)
        record = {
            "step": step,
            "rows": rows,
            "metrics": metrics or {},
            "identity": self._identity,
            "leaves": spec_of(leaves),
        }
        if self._optimiser_from:
            record["optimiser_from"] = self._optimiser_from
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

    def restore(self, abstract_state: dict[str, Tree], find: Callable[[], int | None] | None = None) -> Restored | None:
        """The newest step that verifies, or None where there is no step.  Damaged newer ones move to `quarantine/`.

        A step without the optimiser's state comes back without it, and what is saved from now on says so.

        Args:
          abstract_state: the state with `jax.ShapeDtypeStruct` leaves, whose shardings say where values go; the mesh
            need not be the one that saved.
          find: finds another step than the newest; called in the first process alone.

        Raises:
          NoCheckpointError: there are steps and none verifies; they stay where they are.
          UserError: the step belongs to another configuration, or its leaves are not those asked for.
          DataError: it belongs to other data, all else being equal.
        """
        find = find or functools.partial(choose, self.directory, self._say)
        step = hosts.said_by_first(find() if self._primary else None)  # who alone moves the damaged ones
        if step is None:
            return None
        path = self.directory / str(step)
        record = json.loads((path / RECORD).read_bytes())
        check_same(f"Checkpoint {path}", record["identity"], self._identity)
        self._optimiser_from = record.get("optimiser_from", 0)
        wanted = flatten(abstract_state)
        if _has_optimiser(wanted) and not _has_optimiser(record["leaves"]):
            abstract_state = {"trainable": abstract_state["trainable"]}
            wanted, self._optimiser_from = flatten(abstract_state), step
        check_same(f"Checkpoint {path}", record["leaves"], spec_of(wanted))
        values = self._orbax.restore(path / "arrays", args=ocp.args.StandardRestore(wanted))
        self._last_saved = step
        metrics = {name: float(value) for name, value in record["metrics"].items()}
        state = unflatten(abstract_state, values)
        return Restored(state, step, record["rows"], metrics, self._optimiser_from)

    def _commit(self, step: int, record: dict[str, Any], finite: dict[str, jax.Array]) -> int:
        """In the thread: waits for Orbax, hashes, renames into place, and only then deletes older steps."""
        with self._whole_or_not(step):
            self._orbax.wait_until_finished()
            self._check_finite(step, finite)
            if not self._primary:
                return step
            commit(self.directory, self._tmp / str(step), record)
        delete_old(self.directory, *self._keep, self._say, self._goal)
        self._saved()
        return step

    def _check_finite(self, step: int, finite: dict[str, jax.Array]) -> None:
        bad = [path for path, good in finite.items() if not bool(good)]
        if bad:
            raise DivergedError(diverged(self.directory, step, bad))

    def _whole_or_not(self, step: int) -> contextlib.AbstractContextManager[None]:
        return whole_or_not(self.directory, step, self._tmp / str(step) if self._primary else None)


@jax.jit
def _finite(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {path: jnp.isfinite(x).all() for path, x in leaves.items() if jnp.issubdtype(x.dtype, jnp.inexact)}


def _has_optimiser(leaves: dict[str, Any]) -> bool:
    return any(path.startswith("opt_state/") for path in leaves)


def spec_of(leaves: dict[str, Any]) -> dict[str, str]:
    """{'trainable/layers/attn/q/kernel/a': 'float32[2,64,8]', ...}."""
    return {path: f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]" for path, leaf in leaves.items()}
