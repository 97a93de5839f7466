"""Command lines: `--config FILE --workdir DIR --config.section.key=value`; errors as one screen with an exit code."""

import argparse
import ast
import importlib
import json
import os
import re
import runpy
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from ml_collections import ConfigDict

from jaxtune.config import check, find_secret, flatten, get_default, set_value, shown
from jaxtune.errors import MissingInputError, UserError, did_you_mean

COMMANDS = ("train", "export", "compare", "evaluate", "plan")


class Arguments(NamedTuple):
    """config: checked.  workdir: absolute.  command: what to type to run this again."""

    config: ConfigDict
    workdir: Path
    command: str


class Parser(argparse.ArgumentParser):
    """argparse exits with 2 on its own; ours raises."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message[:1].upper()}{message[1:]}. Try --help.")


def parse(module: str, argv: Sequence[str], description: str, *, quiet: bool = False) -> Arguments:
    """Reads a command line.

    Raises:
      UserError: an unknown flag or key, or a value that cannot be meant.
      MissingInputError: no such config file.
    """
    for word in argv:
        find_secret("The command line", word)
    parser = Parser(
        prog=f"python -m {module}",
        description=description,
        epilog="Any setting of jaxtune/defaults.py: --config.section.key=value, e.g. --config.optim.learning_rate=1e-4",
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="a recipe (configs/*.py, or FILE.py:argument), or a run's config.json")
    parser.add_argument("--workdir", help="run directory; default runs/<name of the config file>")
    known, rest = parser.parse_known_args(list(argv))
    settings, other = settings_in(rest)
    if other:
        flags = ["--config", "--workdir", "--help", *(f"--config.{key}" for key in flatten(get_default()))]
        raise UserError(
            f"Unknown argument {shown(other[0])}.{did_you_mean(other[0].split('=')[0], flags)} "
            "Settings are written --config.section.key=value."
        )
    if not known.config:
        raise UserError("--config is missing. Give a recipe, e.g. --config configs/quickstart.py; or try --help.")
    config = load_config(known.config)
    if change_method(config, settings.get("peft.method")) and not quiet:
        print(f"{known.config} is for another method; its learning rate and `peft` section are not used")
    for path, value in settings.items():
        set_value(config, path, value)
    check(config)
    name = Path(known.config.split(":")[0]).stem
    workdir = Path(known.workdir or Path("runs") / name).expanduser().resolve()
    return Arguments(config, workdir, shlex.join(["python", "-m", module, *argv]))


def settings_in(words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """({'model.dtype': 'float32', …}, the other words) of words such as --config.model.dtype=float32.

    Raises:
      UserError: one without a value.
    """
    own = [word.removeprefix("--config.") for word in words if word.startswith("--config.")]
    if bad := next((word for word in own if "=" not in word), None):
        raise UserError(f"{shown('--config.' + bad)} has no value. Settings are written --config.section.key=value.")
    pairs = (word.split("=", 1) for word in own)
    return {path: literal(text) for path, text in pairs}, [w for w in words if not w.startswith("--config.")]


def change_method(config: Any, method: Any) -> bool:
    """A recipe's `peft` section and learning rate are meant for its own method: where the command line names another,
    they are that one's defaults, so that `--config.peft.method=ia3` alone is a sensible run.  Whether it does."""
    if method is None or method == config.peft.method:
        return False
    usual: Any = get_default()
    config.peft.update(dict(usual.peft.items()))
    config.optim.learning_rate = None
    return True


def literal(text: str) -> Any:
    """`1e-4`, `true`, `none`, `('a','b')` as Python values; everything else, and `a,b`, as text."""
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def load_config(source: str) -> ConfigDict:
    """A recipe's `get_config()`, or a stored config.json over the defaults.

    Raises:
      MissingInputError: no such file.  UserError: the recipe raised, or has no get_config; or no such key, no JSON.
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
        return _stored_config(path)
    if path.suffix != ".py":
        raise UserError(f"{path} is no config file. It takes a .py recipe (see configs/) or a run's config.json.")
    try:
        get_config = runpy.run_path(str(path)).get("get_config")
        config = get_config(*([argument] if argument else [])) if get_config else None
    except UserError:
        raise
    except Exception as error:
        raise UserError(_recipe_error(path, error)) from None
    if not isinstance(config, ConfigDict):
        raise UserError(f"{path} has no `get_config()` that returns a ConfigDict. See configs/quickstart.py.")
    return config


def _stored_config(path: Path) -> ConfigDict:
    config = get_default()
    try:
        sections = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(sections, dict) or not all(isinstance(values, dict) for values in sections.values()):
        raise UserError(f"{path} is no config: it takes {{section: {{key: value}}}}, as a run's config.json has it.")
    for section, values in sections.items():
        for key, value in values.items():
            try:
                set_value(config, f"{section}.{key}", tuple(value) if isinstance(value, list) else value)
            except UserError as error:
                raise UserError(f"{path}: {error}") from None
    return config


def _recipe_error(path: Path, error: Exception) -> str:
    """What a recipe raised, the innermost line of it, and that line."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    line = frames[-1].lineno if frames else getattr(error, "lineno", None)
    code = f"\n  {frames[-1].line}" if frames else ""
    inner: Any = error
    while isinstance(inner, BaseException) and len(inner.args) == 1:
        inner = inner.args[0]
    # In ConfigDict's words, without the whole section and in ours where a type is wrong.
    said = re.sub(r' Other fields present: ".*"(?=\n|$)', "", str(inner))
    wrong = r"Could not override field '(\w+)' \(reference\)\. ((?s:.*)) is of .* to type <class '([\w.]+)'>"
    said = re.sub(wrong, r"`\1` is \2. It takes a value of type \3.", said)
    return f"{path}{f', line {line}' if line else ''}: {type(error).__name__}: {said[:500]}{code}"


def run(main: Callable[[Sequence[str]], int | None]) -> None:
    """Runs a command and exits with its code; a user's mistake is one screen without a traceback."""
    try:
        code = main(sys.argv[1:])
    except UserError as error:
        code = last_words(f"error: {error}", error.exit_code)
    except KeyboardInterrupt:
        code = last_words("interrupted", 130)
    sys.exit(code or 0)


def last_words(text: str, code: int) -> int:
    """Says why a command ends, and returns its exit code: also where the screen is a file on the disk that is full,
    since Python would end with another code if it could not write at its exit."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    return code


def run_command() -> None:
    """The `jaxtune` script: `jaxtune train …` is `python -m jaxtune.train …`."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        known = ", ".join(COMMANDS)
        print(f"usage: jaxtune COMMAND …   Commands: {known}.{did_you_mean(name, COMMANDS)}", file=sys.stderr)
        sys.exit(0 if name in ("-h", "--help") else 64)
    sys.argv[0:2] = [f"jaxtune {name}"]
    run(importlib.import_module(f"jaxtune.{name}").main)
