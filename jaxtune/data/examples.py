"""From a row to token ids and the mask of those that are learnt.

A conversation is rendered once as a whole and tokenised once as a whole.  Where each assistant turn lies in the text is
found by rendering the conversation up to it; which tokens those characters became is read from the tokenizer's offsets.
Tokenising turns one by one would shift tokens at their borders.

Learnt are:
  messages           each assistant turn, from behind the generation prompt through its end-of-turn token: the first
                     stop token after the text (what follows it, such as Gemma's newline, is not).  Without a stop
                     token, through the last visible character of the turn.  An empty turn is not learnt.
  prompt_completion  the completion and EOS (with a chat template: as messages).
  text               everything but BOS, and EOS.
A token with characters of both sides of a border is learnt if any of them is the assistant's; such rows are counted,
because at generation the prompt's last token will differ.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from jaxtune.data.chat import Message, render, render_folded
from jaxtune.data.formats import Format, RowError, Text, parse_row, parse_task, references
from jaxtune.data.sources import Row
from jaxtune.data.virtual import NONE, Virtual
from jaxtune.errors import DataError, UserError
from jaxtune.tokenizer import Spans, Tokenizer

# Rows rendered and tokenised at a time.
CHUNK = 512


class Example(NamedTuple):
    row: int
    # Virtual tokens first, where the method has any.  For an encoder-decoder: what the encoder reads, then the labels.
    tokens: Int[np.ndarray, "T"]
    # True where the token itself is learnt (to be predicted from the one before).
    mask: Bool[np.ndarray, "T"]
    truncated: bool
    # A token straddles the border of a turn.
    shifted: bool
    # The last answer ends with a stop token.
    stopped: bool
    # Of an encoder-decoder, whose two sides are cut by themselves.
    target_truncated: bool = False


class Dropped(NamedTuple):
    row: int
    reason: str
    # For bad rows: `number:field` and what is wrong.
    where: str = ""
    why: str = ""


class Turn(NamedTuple):
    """Characters [start, end) of one answer with its end-of-turn mark; its text ends at `text_end`."""

    start: int
    text_end: int
    end: int


class Plan(NamedTuple):
    row: int
    text: str
    turns: tuple[Turn, ...]
    # Plain text gets its EOS as a token; a chat template has written its own.
    add_eos: bool
    # Virtual tokens that stand before the row's own.
    virtual: Int[np.ndarray, "P"]


def examples(
    rows: Iterable[Row],
    tokenizer: Tokenizer,
    form: Format,
    *,
    max_length: int,
    truncation: str,
    virtual: Virtual = NONE,
    chunk: int = CHUNK,
) -> Iterator[Example | Dropped]:
    """One example, or the reason there is none, for each row, in order.

    Raises:
      UserError: the chat template itself is at fault.
    """
    rows = iter(rows)
    while batch := list(islice(rows, chunk)):
        plans = [_plan(row, tokenizer, form, virtual) for row in batch]
        spans = iter(tokenizer.spans([plan.text for plan in plans if isinstance(plan, Plan)]))
        for plan in plans:
            yield plan if isinstance(plan, Dropped) else _example(plan, next(spans), tokenizer, max_length, truncation)


def _plan(row: Row, tokenizer: Tokenizer, form: Format, virtual: Virtual) -> Plan | Dropped:
    try:
        content = parse_row(row, form)
        prompt = virtual.ids(parse_task(row, virtual))
        if isinstance(content, Text):
            start, end = len(content.prompt), len(content.prompt) + len(content.completion)
            if not content.completion.strip():
                return Dropped(row.number, "no text to learn")
            return Plan(row.number, content.prompt + content.completion, (Turn(start, end, end),), True, prompt)
        if all(not m["content"].strip() for m in content if m["role"] == "assistant"):
            return Dropped(row.number, "no text to learn")
        assert form.chat_template is not None
        text, turns = find_turns(form.chat_template, content, tokenizer)
        return Plan(row.number, text, turns, False, prompt)
    except RowError as error:
        return Dropped(row.number, "bad row", error.where, error.why)
    except DataError as error:
        return Dropped(row.number, "bad row", f"{row.number}:{form.column or 'prompt'}", str(error))


def find_turns(template: str, messages: Sequence[Message], tokenizer: Tokenizer) -> tuple[str, tuple[Turn, ...]]:
    """The rendered conversation and where the assistant speaks in it.

    Raises:
      DataError: the template refuses the conversation, or renders its beginning differently once it goes on, so that
        answers cannot be found.
      UserError: the template itself is at fault.
    """
    tokens = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
    text, messages = render_folded(template, messages, add_generation_prompt=False, **tokens)
    turns = []
    for i, message in enumerate(messages):
        answer = message["content"].strip()
        if message["role"] != "assistant" or not answer:
            continue
        before = render(template, messages[:i], add_generation_prompt=True, **tokens)
        through = text
        if i + 1 < len(messages):
            through = render(template, messages[: i + 1], add_generation_prompt=False, **tokens)
        end = _shared(text, through)
        text_end = text.find(answer, len(before), end) + len(answer)
        if not text.startswith(before) or text_end < len(before) + len(answer):
            raise DataError(
                f"The chat template renders turn {i} differently inside the conversation than at its end, "
                "so the answer's tokens cannot be told apart. Set `data.chat_template` to one of ours: chatml, …"
            )
        turns.append(Turn(len(before), text_end, max(text_end, len(text[:end].rstrip()))))
    return text, tuple(turns)


def _shared(text: str, through: str) -> int:
    """How far a conversation and its rendering through one turn agree.

    ChatML closes a conversation with EOS, which is gone once it goes on; then they agree through the last whole line.
    """
    if text.startswith(through):
        return len(through)
    agree = next(
        (i for i, (a, b) in enumerate(zip(text, through, strict=False)) if a != b), min(len(text), len(through))
    )
    return text.rfind("\n", 0, agree) + 1


def _example(plan: Plan, spans: Spans, tokenizer: Tokenizer, max_length: int, truncation: str) -> Example | Dropped:
    ids, starts, ends = spans
    mask = np.zeros(len(ids), bool)
    shifted, stopped = False, plan.add_eos
    stops = np.isin(ids, tokenizer.stop_ids)
    for start, text_end, end in plan.turns:
        shifted |= bool(np.any((starts < start) & (start < ends)) or np.any((starts < end) & (end < ends)))
        after = np.flatnonzero(stops & (starts >= text_end) & (starts < end))
        if not plan.add_eos:
            stopped = after.size > 0
        limit = ends[after[0]] if after.size else end
        mask |= (ends > start) & (starts < limit)
    if plan.add_eos and ids[-1:].tolist() != [tokenizer.eos_id]:
        ids, mask = np.append(ids, np.int32(tokenizer.eos_id)), np.append(mask, True)
    bos = tokenizer.bos_id
    if bos is not None and ids[:1].tolist() != [bos]:
        ids, mask = np.insert(ids, 0, bos), np.insert(mask, 0, False)
    if not mask[1:].any():
        return Dropped(plan.row, "no text to learn")
    truncated = len(ids) > max_length
    if truncated and truncation == "drop":
        return Dropped(plan.row, "longer than data.max_length")
    if truncated and truncation == "right":
        ids, mask = ids[:max_length], mask[:max_length]
    elif truncated:
        keep = without_beginning(len(ids), max_length, bos is not None)
        ids, mask = ids[keep], mask[keep]
    # BOS, or whatever comes first, is predicted from nothing.
    mask[0] = False
    if not mask.any():
        return Dropped(plan.row, "the answer lies beyond data.max_length")
    # `max_length` is for the row's own tokens, as in PEFT.
    ids, mask = np.concatenate([plan.virtual, ids]), np.concatenate([np.zeros(len(plan.virtual), bool), mask])
    return Example(plan.row, ids.astype(np.int32), mask, truncated, shifted, stopped)


def without_beginning(length: int, max_length: int, bos: bool) -> Int[np.ndarray, "max_length"]:
    """Which tokens of a longer row are left by truncation on the left: the last ones, and BOS."""
    return np.r_[0 if bos else length - max_length, length - max_length + 1 : length]


# --- prompts for generation ---


class Prompt(NamedTuple):
    row: int
    # Virtual tokens first, where the method has any.
    ids: list[int]
    text: str
    # The last user turn, as the row has it (with a system turn folded in where the template wants it so).
    question: str
    # What the row answers: what training learns.
    reference: str
    # All answers that are right; none where the row's question has no answer (and `reference` is `data.no_answer`).
    references: list[str]
    # The row's column `id`, where it has one.
    row_id: str | None


def prompt_and_reference(row: Row, tokenizer: Tokenizer, form: Format, virtual: Virtual = NONE) -> Prompt:
    """Everything before a row's last answer, ready to generate from, and that answer.

    Raises:
      RowError, DataError: the row cannot be used.
      UserError: format text, which asks nothing.
    """
    check_asks(form)
    content = parse_row(row, form)
    if isinstance(content, Text):
        text, question, reference = content.prompt, content.prompt, content.completion
    else:
        assert form.chat_template is not None
        last = max(i for i, message in enumerate(content) if message["role"] == "assistant")
        reference = content[last]["content"]
        question = next((m["content"] for m in reversed(content[:last]) if m["role"] == "user"), "")
        tokens = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
        text, _ = render_folded(form.chat_template, content[:last], add_generation_prompt=True, **tokens)
    ids = tokenizer.encode(text)
    if tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
        ids = [tokenizer.bos_id, *ids]
    ids = virtual.ids(parse_task(row, virtual)).tolist() + ids
    answers = references(row, form) if form.kind == "prompt_completion" else [reference]
    return Prompt(row.number, ids, text, question, reference, answers, row_id(row))


def check_asks(form: Format) -> None:
    """Refuses rows that ask nothing.

    Raises:
      UserError: format text.
    """
    if form.kind == "text":
        raise UserError(
            "`data.format` is text, which has no answers to compare. Set `evaluate.samples` to 0, or use "
            "prompt_completion."
        )


def row_id(row: Row) -> str | None:
    """What a row calls itself: its column `id`, text or a number."""
    value = row.fields.get("id")
    return str(value) if isinstance(value, (str, int)) and not isinstance(value, bool) else None
