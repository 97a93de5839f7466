"""Scores of models on the screen: of one all of them, of several side by side."""

from typing import Any

import rich.box
import rich.table
from rich.text import Text

from jaxtune.console import Console, isolate, visible
from jaxtune.scores import flat
from jaxtune.scores.files import tables
from jaxtune.scoring import LOSSES


def show(results: dict[str, dict[str, Any]], console: Console) -> None:
    """Prints them.

    Args:
      results: {model: its scores, as `jaxtune.measure` writes them}.
    """
    first = next(iter(results.values()))
    if "questions" in first:
        same = f" ({first['asked']} rows with a prompt)" if first["asked"] != first["questions"] else ""
        console.say(f"{first['rows']} rows, {first['questions']} questions{same}")
    numbers = {name: single(result) for name, result in results.items()}
    shown = [side_by_side(numbers)]
    if len(results) == 1:
        parts = {name: value for name, value in first.items() if isinstance(value, dict)}
        single_scores = {name: value for name, value in first.items() if isinstance(value, float)}
        shown = tables("on held-back rows", single_scores)
        shown += [table for name, value in parts.items() for table in tables(name, value)]
    if console.rich is not None:
        with console.drawing():
            for table in shown:
                console.rich.print(table)


def single(result: dict[str, Any]) -> dict[str, float]:
    """One number for each score: {"eval_loss": ..., "rouge rougeL": ..., …}."""
    found = {name: value for name, value in result.items() if isinstance(value, float)}
    for metric, scores in result.items():
        if isinstance(scores, dict):
            found |= {name if name == metric else f"{metric} {name}": value for name, value in flat(scores).items()}
    return found


def side_by_side(numbers: dict[str, dict[str, float]]) -> rich.table.Table:
    """A row for each score and a column for each model: its value, how far from the first's, * at the best."""
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("")
    for name in numbers:
        table.add_column(Text(isolate(visible(name))), justify="right")
    first = next(iter(numbers.values()))
    for score in first:
        values = [row.get(score, float("nan")) for row in numbers.values()]
        best = (min if score in LOSSES else max)(values)
        cells = []
        for value in values:
            delta = f" ({value - values[0]:+.4f})" if value != values[0] else ""
            cells.append(f"{value:.4f}{delta}" + ("*" if value == best and len(set(values)) > 1 else " "))
        table.add_row(Text(score), *cells)
    return table
