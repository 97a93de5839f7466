"""Which run a checkpoint belongs to: what must be the same for a resumed run to end in the same bits.

No jax: `torch_gpu` uses it too.
"""

import json
from typing import Any

from jaxtune.errors import DataError, UserError

# What may change between two starts of one run: where things run, how they are shown, how long it goes on.
FREE = ("mesh", "logging", "wandb", "storage", "checkpoint", "export", "evaluate")
FREE_KEYS = (
    "model.id",  # the weights' own hash stands for it
    "data.train",  # as the rows' does here
    "data.eval",
    "data.max_eval_rows",
    "data.eval_split",
    "train.steps",
    "train.epochs",
    "train.eval_every",
    "train.save_every",
    "train.eval_unit",
    "train.save_unit",
    "train.log_every",
    "train.remat",
    "train.unroll_layers",
    "train.deterministic",
    "optim.offload",  # the same bits
)


def identity(config: dict[str, dict[str, Any]], total_steps: int, **hashes: str) -> dict[str, str]:
    """What must be the same for a resumed run to end in the same bits, as text by config key.

    Args:
      config: as stored in config.json.  hashes: of the base model and of the tokenised rows.
    """
    named = {
        f"{section}.{key}": v for section, values in config.items() if section not in FREE for key, v in values.items()
    }
    kept = {key: json.dumps(value, sort_keys=True) for key, value in named.items() if key not in FREE_KEYS}
    if config["optim"]["schedule"] != "constant" or config["peft"]["method"] == "adalora":
        kept["train.steps"] = str(total_steps)  # the schedule's shape depends on it, or that of the ranks
    return kept | hashes


def check_same(
    what: str,
    was: dict[str, str],
    now: dict[str, str],
    otherwise: str = "give a new `--workdir` to start another",
) -> None:
    """Refuses to go on with a run from a checkpoint of another.

    Args:
      otherwise: what to do instead of setting the differences back.

    Raises:
      UserError, DataError: a table of what differs.
    """
    keys = sorted(key for key in was.keys() | now.keys() if was.get(key) != now.get(key))
    if not keys:
        return
    if "backend" in keys:
        other, own = (names.get("backend", "jaxtune") for names in (was, now))
        raise UserError(
            f"{what} is of a run of {other}, and this is {own}. Go on with it by python -m {other}.train; or give a "
            "new `--workdir`, and its `adapter` as `peft.init_from`, to continue it here."
        )
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
        f"Set these back to go on with that run, or {otherwise}."
    )
