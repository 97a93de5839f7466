"""The numbers of a run at Weights & Biases, when `wandb.project` names where.

Nothing here stops a run: the first thing that fails is said once, and nothing more is sent.

No jax: `torch_gpu` uses it too.
"""

import contextlib
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxtune.errors import UserError
from jaxtune.rundir import read_json_or

# wandb's own habits: the terminal's output, source code and git are no part of a run's numbers.
SETTINGS = {"console": "off", "disable_git": True, "disable_code": True, "silent": True}

# (step, {'train/loss': ...}, whether it is sent whatever `wandb.every` is)
Send = Callable[[int, Mapping[str, float], bool], None]


def check(config: dict[str, Any]) -> None:
    """Refuses to log where the library is not installed.

    Raises:
      UserError: saying how to install it.
    """
    if config["wandb"]["project"] is None:
        return
    try:
        import wandb  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            f"`wandb.project` is {config['wandb']['project']!r}, and the library is not installed: pip install wandb. "
            "Or leave it out: metrics.jsonl and TensorBoard have the same numbers."
        ) from None


def earlier(workdir: Path) -> dict[str, str]:
    """run.json's `wandb` of the start before, or {}."""
    return read_json_or(workdir / "run.json", {}).get("wandb", {})


@contextlib.contextmanager
def opened(
    config: dict[str, Any],
    workdir: Path,
    before: Mapping[str, Any],
    note: Callable[..., None],
    say: Callable[[str], None],
    quiet: bool = False,
) -> Iterator[Send | None]:
    """A function that sends a step's numbers, or None where nothing is to be sent.

    Args:
      config: as in config.json; all of it is sent, and `config.check` has found no secret in it.
      before: what `earlier` gave before this start was accepted: that run at W&B goes on; {}: a new one.
      note: puts `wandb` into run.json.
      say: takes a warning.
    """
    section = config["wandb"]
    if section["project"] is None or quiet:
        yield None
        return
    on = [True]

    def attempt(what: Callable[[], Any]) -> Any:
        """Does it, or gives up for good."""
        if on[0]:
            try:
                return what()
            except Exception as error:
                on[0] = False
                said = (str(error) or type(error).__name__).splitlines()[0][:300]
                say(f"WARNING: Weights & Biases: {said}. The run goes on without it.")

    same = before.get("project") == section["project"]
    run_id = before["id"] if same else secrets.token_hex(4)
    note(wandb={"project": section["project"], "id": run_id})
    tags = section["tags"]

    def start() -> Any:
        import wandb  # pyright: ignore[reportMissingImports]

        return wandb.init(
            project=section["project"],
            name=section["run_name"] or workdir.name,
            tags=[tags] if isinstance(tags, str) else list(tags or ()),
            id=run_id,
            resume="allow",
            config=config,
            dir=str(workdir),
            settings=SETTINGS,
        )

    run = attempt(start)

    def send(step: int, values: Mapping[str, float], always: bool) -> None:
        if always or step % section["every"] == 0:
            attempt(lambda: run.log(dict(values), step=step))

    try:
        yield send
    except BaseException:
        attempt(lambda: run.finish(exit_code=1))
        raise
    attempt(lambda: run.finish())
