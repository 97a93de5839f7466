"""What trains, read out of a run's checkpoints without touching them: the run may be going on meanwhile."""

from collections.abc import Mapping
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from jaxtune.checkpoint import spec_of
from jaxtune.errors import NoCheckpointError
from jaxtune.identity import check_same
from jaxtune.kept import read_record


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
