"""What a row says: a conversation, or a prompt and its completion.

Three formats: `messages` (a column of turns), `prompt_completion` and `text` (templates over named columns).

Two kinds of columns are read as data sets of tasks have them.  An integer class stands for its name, where
`data.label_names` gives names.  Answers as SQuAD has them, {"text": [...], "answer_start": [...]}, stand for the first
one, all of them being right; without any, for `data.no_answer`.
"""

import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxtune.data.chat import TEMPLATES, Message
from jaxtune.data.sources import Row
from jaxtune.data.virtual import Virtual
from jaxtune.errors import DataError, UserError, did_you_mean
from jaxtune.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")


class RowError(DataError):
    """One row that cannot be used.  `where` is its number and field, `why` what is wrong."""

    def __init__(self, number: int, field: str, why: str):
        super().__init__(f"{number}:{field}: {why}")
        self.where, self.why = f"{number}:{field}", why


class Text(NamedTuple):
    """Plain text; the loss is on the completion."""

    prompt: str
    completion: str


# (literal text, column or None) pairs, in order.
ColumnTemplate = tuple[tuple[str, str | None], ...]


@dataclass(frozen=True)
class Format:
    """How rows are read; `make_format` builds it from the config's `data` section."""

    kind: str
    # messages: the column of turns.
    column: str
    prompt: ColumnTemplate
    completion: ColumnTemplate
    # The chat template's source; None: plain text.
    chat_template: str | None
    # The column of integer classes, and what they are called; without names the column is as any other.
    label_column: str = "label"
    label_names: tuple[str, ...] = ()
    # What stands for answers where there are none.
    no_answer: str | None = None


def make_format(
    tokenizer: Tokenizer,
    *,
    format: str = "messages",
    messages: str = "messages",
    prompt: str = "{prompt}",
    completion: str = "{completion}",
    text: str = "{text}",
    chat_template: str | None = None,
    label_column: str = "label",
    label_names: Any = None,
    no_answer: str | None = None,
) -> Format:
    """Checks the settings of `config.data` that say what a row means; the keywords and defaults are its keys.

    Raises:
      UserError: an unknown format or chat template, a checkpoint without one, a template over columns that is not
        plain text and `{column}`, or names of classes that are no names or that no template would show.
    """
    template = None
    if format == "messages" or (format == "prompt_completion" and chat_template is not None):
        template = find_template(chat_template, tokenizer)
    elif chat_template is not None and format == "text":
        raise UserError(
            "`data.chat_template` is set, but `data.format` is text, which has no turns. Unset one of them."
        )
    pieces: tuple[ColumnTemplate, ColumnTemplate] = ((), ())
    if format == "prompt_completion":
        pieces = parse_template(prompt, "data.prompt"), parse_template(completion, "data.completion")
    elif format == "text":
        pieces = (), parse_template(text, "data.text")
    elif format != "messages":
        known = ("messages", "prompt_completion", "text")
        raise UserError(f"`data.format` is {format!r}. It can be: {', '.join(known)}.{did_you_mean(format, known)}")
    names = check_labels(label_column, label_names, *pieces)
    return Format(format, messages if format == "messages" else "", *pieces, template, label_column, names, no_answer)


def find_template(name: str | None, tokenizer: Tokenizer) -> str:
    """A named chat template, or the checkpoint's own for None and "tokenizer"."""
    if name is None or name == "tokenizer":
        if tokenizer.chat_template is None:
            raise UserError(
                f"The checkpoint has no chat template. Set `data.chat_template` to one of: {', '.join(TEMPLATES)}."
            )
        return tokenizer.chat_template
    if name not in TEMPLATES:
        known = (*TEMPLATES, "tokenizer")
        raise UserError(f"`data.chat_template` is {name!r}. It can be: {', '.join(known)}.{did_you_mean(name, known)}")
    return TEMPLATES[name]


def parse_template(template: str, key: str) -> ColumnTemplate:
    """Cuts "Q: {question}" into literal text and columns.

    Only `{column}` is taken, and `{{` for a brace: attributes, indices and format specs reach into values, which
    `str.format` would allow.

    Raises:
      UserError: anything else in braces, or no column at all.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"`{key}` is {template!r}: {error}. Write columns as {{name}}, a brace as {{{{.") from None
    for _, column, spec, conversion in parts:
        if column is not None and (not column or set(column) & set(".[]{}") or spec or conversion):
            raise UserError(f"`{key}` is {template!r}. Between braces it takes a column's name and nothing else.")
    if all(column is None for _, column, _, _ in parts):
        raise UserError(f"`{key}` is {template!r}, which names no column. Write one as {{name}}.")
    return tuple((literal, column) for literal, column, _, _ in parts)


def check_labels(column: str, names: Any, *templates: ColumnTemplate) -> tuple[str, ...]:
    """`data.label_names` as a tuple, () where there are none.

    Raises:
      UserError: not a list of different texts, or no template has the column.
    """
    if names is None:
        return ()
    listed = not isinstance(names, str) and isinstance(names, Sequence)
    if not listed or not names or not all(isinstance(n, str) and n for n in names) or len(set(names)) < len(names):
        raise UserError(
            f"`data.label_names` is {names!r}. It is a list of different names, in the order of the classes' numbers: "
            "('negative', 'positive')."
        )
    if all(name != column for template in templates for _, name in template):
        raise UserError(
            f"`data.label_names` is set, and no template names its column {{{column}}}. Write it there, or set "
            "`data.label_column` to the column that holds the classes."
        )
    return tuple(names)


def parse_row(row: Row, form: Format) -> list[Message] | Text:
    """The turns of a row, or its plain text.

    Raises:
      RowError: with the row's number, the field and what is wrong.
    """
    if row.problem is not None:
        raise RowError(row.number, "line", row.problem)
    if form.kind == "messages":
        return _messages(row, form.column)
    prompt, completion = _fill(row, form.prompt, form), _fill(row, form.completion, form)
    if form.chat_template is None:
        return Text(prompt, completion)
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]


def references(row: Row, form: Format) -> list[str]:
    """Every completion that is right, the one that is learnt first; none where the row has no answer.

    Raises:
      RowError: the row cannot be used.
    """
    found = [len(_texts(row, column, form)) for _, column in form.completion if column is not None]
    return [] if 0 in found else [_fill(row, form.completion, form, nth) for nth in range(max(found))]


def parse_task(row: Row, virtual: Virtual) -> int:
    """The task of a row, 0 where rows have none.

    Raises:
      RowError: no such column, or no task of the method's.
    """
    if virtual.column is None:
        return 0
    value = _integer(_column(row, virtual.column))
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < virtual.tasks:
        shown = value if isinstance(value, int) else _kind(value)
        why = f"it is {shown}; the task is an integer from 0 to {virtual.tasks - 1} (`peft.num_tasks`)."
        raise RowError(row.number, virtual.column, why)
    return value


def _column(row: Row, column: str) -> Any:
    if column not in row.fields:
        exist = ", ".join(map(str, row.fields)) or "none"
        raise RowError(
            row.number, column, f"there is no such column.{did_you_mean(column, row.fields)} Columns: {exist}."
        )
    return row.fields[column]


def _integer(value: Any) -> Any:
    """CSV knows nothing but text."""
    return int(value) if isinstance(value, str) and value.strip().isdecimal() else value


def _fill(row: Row, template: ColumnTemplate, form: Format, nth: int = 0) -> str:
    """A template's text; of a column with several answers, the nth (or the last)."""
    text = []
    for literal, column in template:
        text.append(literal)
        if column is not None:
            texts = _texts(row, column, form) or [form.no_answer]
            if texts[0] is None:
                why = "it has no answer. Set `data.no_answer` to what is to be learnt for such rows, e.g. unanswerable."
                raise RowError(row.number, column, why)
            text.append(texts[min(nth, len(texts) - 1)])
    return "".join(text)


def _texts(row: Row, column: str, form: Format) -> list[str]:
    """What a column may stand for, none for answers of which there are none."""
    value = _column(row, column)
    if form.label_names and column == form.label_column:
        value = _label(row, column, _integer(value), form.label_names)
    if isinstance(value, Mapping) and isinstance(value.get("text"), list):
        for i, answer in enumerate(value["text"]):
            if not isinstance(answer, str):
                raise RowError(row.number, f"{column}.text[{i}]", f"it is {_kind(answer)}; it must be text.")
        return [_text(row, column, answer) for answer in value["text"]]
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise RowError(row.number, column, f"it is {_kind(value)}; it must be text or a number.")
    if isinstance(value, float) and not math.isfinite(value):
        raise RowError(row.number, column, f"it is {value}; it must be text or a finite number.")
    return [_text(row, column, str(value))]


def _label(row: Row, column: str, value: Any, names: Sequence[str]) -> str:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(names):
        shown = value if isinstance(value, int) else _kind(value)
        why = f"it is {shown}; a class is an integer from 0 to {len(names) - 1} (`data.label_names`)."
        raise RowError(row.number, column, why + " Rows of a test set often have none (-1)." * (value == -1))
    return names[value]


def _messages(row: Row, column: str) -> list[Message]:
    turns = _column(row, column)
    if not isinstance(turns, list):
        raise RowError(row.number, column, f"it is {_kind(turns)}; it must be a list of {{role, content}}.")
    if not turns:
        raise RowError(row.number, column, "the list is empty.")
    messages = []
    for i, turn in enumerate(turns):
        field = f"{column}[{i}]"
        if not isinstance(turn, Mapping):
            raise RowError(row.number, field, f"it is {_kind(turn)}; it must be {{role, content}}.")
        for key in ("role", "content"):
            if key not in turn:
                raise RowError(
                    row.number, f"{field}.{key}", f"it is missing. The turn has: {', '.join(map(str, turn))}."
                )
            if not isinstance(turn[key], str):
                raise RowError(row.number, f"{field}.{key}", f"it is {_kind(turn[key])}; it must be text.")
        role = turn["role"]
        if role not in ROLES:
            why = f"it is {role[:40]!r}; it can be: {', '.join(ROLES)}.{did_you_mean(role[:40], ROLES)}"
            raise RowError(row.number, f"{field}.role", why)
        if role == "system" and i:
            raise RowError(row.number, f"{field}.role", "a system turn can only come first.")
        messages.append({"role": role, "content": _text(row, f"{field}.content", turn["content"])})
    if all(message["role"] != "assistant" for message in messages):
        raise RowError(row.number, column, "no turn is the assistant's, so there is nothing to learn.")
    return messages


def _text(row: Row, field: str, value: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        why = f"character {error.start} is half a surrogate pair (\\u{ord(value[error.start]):04x}), which is no text."
        raise RowError(row.number, field, why) from None
    return value


def _kind(value: Any) -> str:
    return "null" if value is None else f"of type {type(value).__name__}"
