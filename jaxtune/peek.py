"""What trains, read out of a run's checkpoints without touching them: the run may be going on meanwhile."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxtune.checkpoint import spec_of
from jaxtune.errors import MissingInputError, NoCheckpointError, UserError
from jaxtune.identity import check_same
from jaxtune.kept import RECORD, eval_loss_of, steps, verify


def pick(directory: Path, which: str, say: Callable[[str], None]) -> Path:
    """A step whose every byte is as it was saved.

    Args:
      which: newest | best (by evaluation loss) | a step's number.  say: is told of damaged ones that are passed over.

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
        losses = {step: eval_loss_of(directory / str(step)) for step in there}
        scored = [(loss, -step) for step, loss in losses.items() if loss is not None and math.isfinite(loss)]
        order = [-step for _, step in sorted(scored)]
        if not order:
            raise UserError(f"No checkpoint in {directory} has an evaluation loss. There are: {listed}.")
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


def read_trainable(step: Path, like: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """What trained, by path, on the shardings of `like`; the optimiser's state is not read.

    Raises:
      UserError: the checkpoint holds other leaves.  NoCheckpointError: it went away while it was read.
    """
    wanted = {
        f"trainable/{path}": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for path, x in like.items()
    }
    stored = {path: spec for path, spec in read_record(step)["leaves"].items() if path.startswith("trainable/")}
    check_same(f"Checkpoint {step}", stored, spec_of(wanted))
    arguments = ocp.args.PyTreeRestore(
        wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
    )
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            found = checkpointer.restore(step / "arrays", args=arguments)
    except (OSError, ValueError) as error:
        if step.is_dir():
            raise
        raise NoCheckpointError(f"{step} went away while it was read: the run goes on. Try again.") from error
    return {path.removeprefix("trainable/"): leaf for path, leaf in found.items()}
