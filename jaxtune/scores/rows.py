"""The rows that are scored: what they hold, and what may be wrong with them.

{"prediction": "…", "references": ["…", …]}
{"id": "…", "prediction": "…", "answers": {"text": ["…", …]}}     SQuAD v2: no text where there is no answer
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtune.errors import DataError, did_you_mean


def some(rows: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """The rows.

    Raises:
      DataError: there are none, and so no average.
    """
    if not rows:
        raise DataError("There are no rows to score.")
    return rows


def references_of(row: Mapping[str, Any]) -> list[str]:
    """The right answers of a row; text that is no list (as CSV has it) is the only one."""
    value = row["references"]
    return [value] if isinstance(value, str) else list(value)


def answers_of(row: Mapping[str, Any]) -> list[str]:
    """The right answers of a SQuAD row, none where it has no answer; as the Hub has them, {"text": […]}, or as SQuAD's
    own file, [{"text": …}, …], or under `references`.  An empty text is no answer."""
    value = row["answers"] if "answers" in row else references_of(row)
    texts = value["text"] if isinstance(value, Mapping) else [a["text"] if isinstance(a, Mapping) else a for a in value]
    return [text for text in texts if text]


def fault(row: Mapping[str, Any], metric: str) -> str | None:
    """Why a row cannot be scored: which field, and what it takes; None where it can."""
    if metric == "squad_v2":
        faults = (_id(row), _text(row, "prediction", null=True), _answers(row), _probability(row))
    else:
        faults = (_text(row, "prediction"), _references(row))
    return next((found for found in faults if found), None)


def _missing(row: Mapping[str, Any], field: str) -> str:
    return f"`{field}` is missing.{did_you_mean(field, row)} The row has: {', '.join(map(str, row)) or 'nothing'}."


def _kind(value: Any) -> str:
    kinds = {str: "text", bool: "true or false", dict: "an object", list: "a list", type(None): "null"}
    return kinds.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def _bad_text(value: Any) -> str | None:
    """What is wrong with one text."""
    if not isinstance(value, str):
        return f"is {_kind(value)}; it takes text."
    if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        return "has half a character (a lone surrogate)."
    return None


def _text(row: Mapping[str, Any], field: str, null: bool = False) -> str | None:
    if field not in row:
        return _missing(row, field)
    wrong = None if null and row[field] is None else _bad_text(row[field])
    return wrong and f"`{field}` {wrong}"


def _texts(values: Sequence[Any], field: str) -> str | None:
    wrong = next((f"item {i} {wrong}" for i, v in enumerate(values, 1) if (wrong := _bad_text(v))), None)
    return wrong and f"`{field}`: {wrong}"


def _references(row: Mapping[str, Any]) -> str | None:
    if "references" not in row:
        return _missing(row, "references")
    value = row["references"]
    if not isinstance(value, str | list | tuple):
        return f'`references` is {_kind(value)}; it takes a list of texts: ["…", …].'
    if isinstance(value, str):
        value = [value]
    return _texts(value, "references") if value else "`references` is empty."


def _id(row: Mapping[str, Any]) -> str | None:
    if "id" not in row:
        return _missing(row, "id")
    value = row["id"]
    return None if isinstance(value, str | int) and value != "" else f"`id` is {_kind(value)}; it takes text."


def _answers(row: Mapping[str, Any]) -> str | None:
    if "answers" not in row:
        value = row.get("references")
        if not isinstance(value, list | tuple):
            return _missing(row, "answers")
        return _texts(value, "references")
    value = row["answers"]
    if isinstance(value, Mapping) and "text" not in value:
        return '`answers` has no "text"; it takes {"text": ["…", …]}, an empty list where there is no answer.'
    texts = value["text"] if isinstance(value, Mapping) else value
    if not isinstance(texts, list | tuple):
        return f'`answers` is {_kind(texts)}; it takes {{"text": ["…", …]}}, an empty list where there is no answer.'
    return _texts([a.get("text") if isinstance(a, Mapping) else a for a in texts], "answers")


def _probability(row: Mapping[str, Any]) -> str | None:
    value = row.get("no_answer_probability", 0.0)
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return None if number else "`no_answer_probability` takes a finite number."
