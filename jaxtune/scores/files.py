"""Scores of answers in a file: `python -m jaxtune.evaluate --predictions FILE --metric rouge`."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import rich.box
import rich.console
import rich.table
from rich.text import Text

from jaxtune.console import isolate, visible
from jaxtune.data.sources import open_rows
from jaxtune.errors import DataError, UserError
from jaxtune.scores import METRICS, metrics_of
from jaxtune.scores.rows import fault

# Which metric takes which flag, beside its rows.
OPTIONS = {"references": "rouge", "stemmer": "rouge", "labels": "accuracy"}
SHAPES = {"squad_v2": '{"id": "…", "prediction": "…", "answers": {"text": ["…", …]}}'}
SHAPE = '{"prediction": "…", "references": ["…", …]}'
SHOWN = 5  # faults


def run(path: str, metrics: str, *, as_json: bool = False, **options: Any) -> int:
    """Prints a table of the scores; as_json: to stderr, and one JSON object to stdout: a metric's own, or of several
    {metric: its own}.

    Raises:
      UserError: an unknown metric, or an option that none of them takes.
      MissingInputError: no such file.
      DataError: rows that cannot be read or scored, with their numbers and what is wrong.
    """
    names = metrics_of(metrics)
    how = options_of(names, options)
    rows = read(path, names)
    scores = {name: METRICS[name].score(rows, **how[name]) for name in names}
    screen = rich.console.Console(stderr=as_json)
    for name, result in scores.items():
        for table in tables(name, result):
            screen.print(table)
    if as_json:
        one = scores if len(names) > 1 else scores[names[0]]
        print(json.dumps(one, ensure_ascii=False, allow_nan=False), flush=True)
    return 0


def options_of(names: Sequence[str], options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{metric: the options given for it}.

    Raises:
      UserError: an option is for a metric that was not named.
    """
    given = {option: value for option, value in options.items() if value}
    for option in given:
        if OPTIONS[option] not in names:
            raise UserError(f"--{option} is for {OPTIONS[option]}; --metric names {', '.join(names)}.")
    return {name: {o: value for o, value in given.items() if OPTIONS[o] == name} for name in names}


def read(path: str, names: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a file, which every one of the metrics can score.

    Raises:
      MissingInputError, UserError, DataError: as `run`.
    """
    rows, faults, seen = [], [], {}
    kind = "line" if path.endswith(".jsonl") else "row"
    for row in open_rows(os.path.abspath(os.path.expanduser(path)), split=""):
        wrong = row.problem and f"is {row.problem}."
        wrong = wrong or next((why for name in names if (why := fault(row.fields, name))), None)
        if not wrong and "squad_v2" in names:
            first = seen.setdefault(str(row.fields["id"]), row.number)
            if first != row.number:
                wrong = f"`id` is that of {kind} {first}; every question has one row."
        if wrong:
            faults.append(f"  {kind} {row.number}: {visible(wrong)}")
        rows.append(row.fields)
    if faults:
        more = f"\n  … and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        shapes = " and ".join(dict.fromkeys(SHAPES.get(name, SHAPE) for name in names))
        said = "\n".join(faults[:SHOWN])
        raise DataError(
            f"{path}: {len(faults)} of {len(rows)} rows cannot be scored.\n{said}{more}\n"
            f"{', '.join(names)} takes rows such as {shapes}. Correct or remove these."
        )
    return rows


def tables(name: str, scores: Mapping[str, Any]) -> list[rich.table.Table]:
    """A metric's scores for the screen: its numbers; then, a line each, what has parts (types of ROUGE, labels)."""
    single = {key: [value] for key, value in scores.items() if not isinstance(value, Mapping)}
    parts = scores.get("labels") or {key: value for key, value in scores.items() if isinstance(value, Mapping)}
    made = [_table((name, ""), single)] if single else []
    if parts:
        columns = list(next(iter(parts.values())))
        made.append(_table((name, *columns), {key: list(part.values()) for key, part in parts.items()}))
    return made


def _table(head: Sequence[str], lines: Mapping[str, Sequence[Any]]) -> rich.table.Table:
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for number, column in enumerate(head):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    for key, values in lines.items():
        shown = [f"{value:.4f}" if isinstance(value, float) else str(value) for value in values]
        table.add_row(Text(isolate(visible(key))), *shown)
    return table
