"""Command lines: `--config FILE --workdir DIR --config.section.key=value`, and errors as one screen with an exit code."""

import argparse
import ast
import importlib
import json
import runpy
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from jaxtune.config import check, get_default, set_value
from jaxtune.errors import MissingInputError, UserError, did_you_mean

COMMANDS = ("train",)


class Arguments(NamedTuple):
    """config: checked.  workdir: absolute.  command: what to type to run this again."""

    config: ConfigDict
    workdir: Path
    command: str


def parse(module: str, argv: Sequence[str], description: str) -> Arguments:
    """Reads a command line.

    Raises:
      UserError: an unknown flag or key, or a value that cannot be meant.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=description,
        epilog="Any setting of jaxtune/config.py: --config.section.key=value, e.g. --config.optim.learning_rate=1e-4",
        exit_on_error=False,
    )
    parser.add_argument("--config", required=True, help="a recipe (configs/*.py, or FILE.py:argument), or a run's config.json")
    parser.add_argument("--workdir", help="run directory; default runs/<name of the config file>")
    try:
        known, rest = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise UserError(f"{error}. Try --help.") from None
    config = load_config(known.config)
    for word in rest:
        if not word.startswith("--config.") or "=" not in word:
            raise UserError(
                f"Unknown argument {word!r}.{did_you_mean(word.split('=')[0], ['--config', '--workdir', '--help'])} "
                "Settings are written --config.section.key=value."
            )
        path, text = word.removeprefix("--config.").split("=", 1)
        set_value(config, path, literal(text))
    check(config)
    name = Path(known.config.split(":")[0]).stem
    workdir = Path(known.workdir or Path("runs") / name).expanduser().resolve()
    words = [f"--config={known.config}", f"--workdir={known.workdir}" if known.workdir else "", *rest]
    return Arguments(config, workdir, " ".join([f"python -m {module}", *filter(None, words)]))


def literal(text: str) -> Any:
    """`1e-4`, `true`, `none`, `('a','b')` as Python values; everything else, and `a,b`, as text."""
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def load_config(source: str) -> ConfigDict:
    """A recipe's `get_config()`, or a stored config.json over the defaults.

    Raises:
      MissingInputError: no such file.  UserError: the recipe raised, or has no get_config.
    """
    name, _, argument = source.partition(":")
    path = Path(name).expanduser()
    if not path.is_file():
        there = sorted(str(p) for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
        raise MissingInputError(
            f"There is no config file {name!r}.{did_you_mean(name, there)} "
            f"{path.parent}/ has: {', '.join(there) or 'no .py files'}."
        )
    if path.suffix == ".json":
        config = get_default()
        for section, values in json.loads(path.read_text()).items():
            for key, value in values.items():
                set_value(config, f"{section}.{key}", tuple(value) if isinstance(value, list) else value)
        return config
    try:
        get_config = runpy.run_path(str(path)).get("get_config")
        config = get_config(*([argument] if argument else [])) if get_config else None
    except UserError:
        raise
    except Exception as error:
        line = next((f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)), None)
        raise UserError(f"{path}{f', line {line}' if line else ''}: {type(error).__name__}: {error}") from None
    if not isinstance(config, ConfigDict):
        raise UserError(f"{path} has no `get_config()` that returns a ConfigDict. See configs/quickstart.py.")
    return config


def run(main: Callable[[Sequence[str]], int | None]) -> None:
    """Runs a command and exits with its code; a user's mistake is one screen without a traceback."""
    try:
        code = main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code or 0)


def run_command() -> None:
    """The `jaxtune` script: `jaxtune train …` is `python -m jaxtune.train …`."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        print(f"usage: jaxtune COMMAND …   Commands: {', '.join(COMMANDS)}.{did_you_mean(name, COMMANDS)}", file=sys.stderr)
        sys.exit(0 if name in ("-h", "--help") else 64)
    sys.argv[0:2] = [f"jaxtune {name}"]
    run(importlib.import_module(f"jaxtune.{name}").main)
