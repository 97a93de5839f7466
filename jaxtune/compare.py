"""Runs side by side: `python -m jaxtune.compare runs/lora runs/ia3`; or every method, trained first where it is not:

    python -m jaxtune.compare --config configs/quickstart.py --methods all --workdir runs/compare

Prints method, trainable parameters, time, peak memory and scores before and after; writes the same as compare.json, and
the loss curves as compare.png.
"""

import argparse
import io
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rich.box
import rich.console
import rich.table

from jaxtune import adapt, cli, config, hosts
from jaxtune.console import Console
from jaxtune.errors import MissingInputError, UserError, did_you_mean
from jaxtune.peft import METHODS
from jaxtune.rundir import write_atomic, write_json_atomic

# `all` leaves out `partial`, which has to be told what.
BASE_METHODS = ("full", "partial")
COLUMNS = ("run", "method", "trains", "of base", "rate", "steps", "step time", "memory", "held-out loss", "exact match")


def main(argv: Sequence[str]) -> int:
    parser = cli.Parser(prog="python -m jaxtune.compare", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("runs", nargs="*", help="run directories")
    parser.add_argument("--config", help="a recipe to train with every method that --methods names")
    parser.add_argument("--methods", default="all", help="names with commas between; default: all but partial")
    parser.add_argument("--workdir", default="runs/compare", help="of its runs and results; default: runs/compare")
    known, settings = parser.parse_known_args(list(argv))
    wrong = [word for word in settings if not (known.config and word.startswith("--config."))]
    if wrong:
        raise UserError(
            f"Unknown argument {wrong[0]}. Settings (--config.section.key=value) need --config. Try --help."
        )
    workdir = Path(known.workdir).expanduser().resolve()
    runs = [Path(run).expanduser() for run in known.runs]
    if known.config:
        hosts.alone("python -m jaxtune.compare")
        runs += train_all(known.config, methods_of(known.methods), workdir, settings)
    if not runs:
        raise UserError("Name run directories, or a recipe with --config. Try --help.")
    rows = [read_run(run) for run in runs]
    with Console(None) as console:
        console.say(table(rows, console.width))
        workdir.mkdir(parents=True, exist_ok=True)
        write_json_atomic(workdir / "compare.json", [{k: v for k, v in row.items() if k != "losses"} for row in rows])
        write_atomic(workdir / "compare.png", picture(rows))
        console.say(f"written: {workdir / 'compare.json'}, {workdir / 'compare.png'}")
    return 0


def methods_of(text: str) -> list[str]:
    """The methods that `--methods` names.

    Raises:
      UserError: one that does not exist.
    """
    known = [*METHODS, *BASE_METHODS]
    asked = known[:-1] if text == "all" else [name for name in text.split(",") if name]
    for name in asked:
        if name not in known:
            raise UserError(f"--methods names {name!r}. There are: all, {', '.join(known)}.{did_you_mean(name, known)}")
    return asked


def train_all(recipe: str, methods: Sequence[str], workdir: Path, settings: Sequence[str]) -> list[Path]:
    """One run a method, each a process of its own, so that its peak memory is its own; a finished one is only read.

    Raises:
      UserError: a setting that cannot be meant, or a finished run with other settings, before anything is trained; or a
        run failed: the others stay, and the same command goes on.
    """
    words = {method: words_of(method, methods, settings) for method in methods}
    for method in methods:
        check_run(workdir / method, ["--config", recipe, *words[method]])
    for method in methods:
        run = workdir / method
        if status(run) == "finished":
            continue
        command = [sys.executable, "-m", "jaxtune.train", "--config", recipe, "--workdir", str(run), *words[method]]
        code = subprocess.run(command, check=False).returncode
        if code:
            raise UserError(
                f"The run of {method} ended with exit code {code}: see {run}. Finished runs stay, and the same "
                "command goes on."
            )
    return [workdir / method for method in methods]


def words_of(method: str, methods: Sequence[str], settings: Sequence[str]) -> list[str]:
    """The settings of one method's run: a key of `peft` goes to the methods that have it.

    Raises:
      UserError: none of them has it.
    """
    words = [f"--config.peft.method={method}"]
    for word in settings:
        key = word.removeprefix("--config.peft.").split("=")[0]
        if word.startswith("--config.peft."):
            having = [name for name in methods if key in adapt.settings_of(name)]
            if not having:
                raise UserError(f"{word}: none of {', '.join(methods)} has the key {key!r}.")
            if method not in having:
                continue
        words.append(word)
    return words


def check_run(run: Path, words: Sequence[str]) -> None:
    """Refuses settings that cannot be meant, or that are not those of a run that is finished.

    Raises:
      UserError: naming the keys.
    """
    asked = config.to_json(cli.parse("jaxtune.train", words, "", quiet=True).config)
    rate = adapt.learning_rate(asked["peft"])
    if status(run) != "finished":
        return
    asked["optim"]["learning_rate"] = (
        rate if asked["optim"]["learning_rate"] is None else asked["optim"]["learning_rate"]
    )
    stored = json.loads((run / "config.json").read_text())
    differ = [
        f"{section}.{key}: {stored.get(section, {}).get(key)!r}, now {value!r}"
        for section, values in asked.items()
        for key, value in values.items()
        if stored.get(section, {}).get(key) != value
    ]
    if differ:
        raise UserError(f"{run} is finished, with other settings ({'; '.join(differ[:3])}). Give another --workdir.")


def status(run: Path) -> str | None:
    path = run / "run.json"
    return json.loads(path.read_text())["status"] if path.is_file() else None


def read_run(run: Path) -> dict[str, Any]:
    """One run's row: settings, numbers and losses by step.

    Raises:
      MissingInputError: no run directory.
    """
    missing = [name for name in ("config.json", "run.json", "metrics.jsonl") if not (run / name).is_file()]
    if missing:
        raise MissingInputError(f"{run} is no run directory: it has no {', '.join(missing)}.")
    settings, record = (json.loads((run / name).read_text()) for name in ("config.json", "run.json"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    steps = [line for line in lines if "loss" in line]
    held = [line["eval_loss"] for line in lines if "eval_loss" in line]
    scores = json.loads((run / "eval.json").read_text()) if (run / "eval.json").is_file() else {}
    return {
        "run": run.name,
        "method": settings["peft"]["method"],
        "status": record["status"],
        "learning_rate": settings["optim"]["learning_rate"],
        "trainable_parameters": record.get("trainable_parameters"),
        "base_parameters": record.get("base_parameters"),
        "steps": len(steps),
        "seconds": sum(line["seconds"] for line in steps),
        "peak_memory_bytes": record.get("peak_memory_bytes"),
        "eval_loss_before": held[0] if held else None,
        "eval_loss_after": scores.get("eval_loss"),
        "exact_match_before": scores.get("exact_match_before"),
        "exact_match_after": scores.get("exact_match_after"),
        "losses": [(line["step"], line["loss"]) for line in steps if line["loss"] is not None],
    }


def shown(row: dict[str, Any]) -> list[str]:
    """A row's cells in the order of COLUMNS; "-" where the run has no such number."""

    def cell(key: str, form: str) -> str:
        return "-" if row[key] is None else form.format(row[key])

    def change(name: str, form: str) -> str:
        before, after = cell(f"{name}_before", form), cell(f"{name}_after", form)
        return "-" if before == after == "-" else f"{before} → {after}"

    trains, base = row["trainable_parameters"], row["base_parameters"]
    minutes, seconds = divmod(round(row["seconds"]), 60)
    memory = row["peak_memory_bytes"]
    return [
        row["run"] + ("" if row["status"] == "finished" else f" ({row['status']})"),
        row["method"],
        cell("trainable_parameters", "{:,}"),
        f"{trains / base:.2%}" if trains and base else "-",
        cell("learning_rate", "{:g}"),
        cell("steps", "{:,}"),
        f"{minutes}:{seconds:02}",
        f"{memory / 2**20:,.0f} MiB" if memory else "-",
        change("eval_loss", "{:.3f}"),
        change("exact_match", "{:.1%}"),
    ]


def table(rows: Sequence[dict[str, Any]], width: int) -> str:
    """The rows as a table; on a terminal (`width` columns, 0: a file) too narrow for it, a paragraph each."""
    made = rich.table.Table(box=rich.box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in COLUMNS:
        made.add_column(name, justify="left" if name in ("run", "method") else "right", no_wrap=True)
    for row in rows:
        made.add_row(*shown(row))
    screen = rich.console.Console(file=io.StringIO(), width=1000, color_system=None)
    screen.print(made)
    lines = [line.rstrip() for line in screen.file.getvalue().splitlines()]  # pyright: ignore[reportAttributeAccessIssue]
    if width and max(map(len, lines)) > width:
        return "\n".join("\n  ".join(f"{n}: {c}" for n, c in zip(COLUMNS, shown(row), strict=True)) for row in rows)
    return "\n".join(lines)


def smooth(losses: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    """An exponential average over a twentieth of the run, without the pull of its first value."""
    keep, total, weight = 1 - 1 / max(1.0, len(losses) / 20), 0.0, 0.0
    steps, values = [], []
    for step, loss in losses:
        total, weight = keep * total + (1 - keep) * loss, keep * weight + (1 - keep)
        steps.append(step)
        values.append(total / weight)
    return steps, values


def picture(rows: Sequence[dict[str, Any]]) -> bytes:
    """The runs' smoothed losses by step, as a PNG."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 6), dpi=120)
    colours, styles = pyplot.get_cmap("tab10"), ("-", "--", ":")
    ends = []
    for number, row in enumerate(rows):
        steps, values = smooth(row["losses"])
        axes.plot(steps, values, color=colours(number % 10), linestyle=styles[number // 10 % 3], label=row["run"])
        ends += values[-1:]
    axes.set(title="Training loss, averaged over a twentieth of the run", xlabel="step", ylabel="loss")
    if ends and max(ends) > 4 * min(ends) > 0:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.tight_layout()
    data = io.BytesIO()
    figure.savefig(data, format="png")
    pyplot.close(figure)
    return data.getvalue()


if __name__ == "__main__":
    cli.run(main)
