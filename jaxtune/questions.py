"""What an evaluation asks, and its answers as the rows that metrics score (`jaxtune.scores.rows`).

Rows with the same prompt are one question with several right answers: it is answered once.

No jax: `torch_gpu` can use it too.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxtune.data.examples import Prompt
from jaxtune.scores.exact_match import matches


class Question(NamedTuple):
    """prompt: of its first row.  references: right answers of all its rows; none where there is no answer."""

    prompt: Prompt
    references: list[str]


def questions(prompts: Sequence[Prompt], *, apart: bool = False) -> list[Question]:
    """Each question once, in the order of its first row.

    Args:
      apart: every row is a question of its own, as where each has an id.
    """
    if apart:
        return [Question(prompt, list(prompt.references)) for prompt in prompts]
    found: dict[tuple[int, ...], Question] = {}
    for prompt in prompts:
        right = found.setdefault(tuple(prompt.ids), Question(prompt, [])).references
        right += [text for text in prompt.references if text not in right]
    return list(found.values())


def scored(question: Question, answer: str, *, squad: bool = False, no_answer: str | None = None) -> dict[str, Any]:
    """A row for metrics, and for `--predictions`.

    Args:
      squad: with `id` and `answers`, and "" for no answer.  no_answer: what a model is trained to say where there is
        none (`data.no_answer`).
    """
    prompt, right = question
    if not squad:
        return {"prompt": prompt.question, "prediction": answer, "references": right or [prompt.reference]}
    nothing = no_answer is not None and matches(answer, no_answer)
    row = {"prompt": prompt.question, "prediction": "" if nothing else answer, "references": right or [""]}
    return {"id": prompt.row_id, **row, "answers": {"text": right}}
