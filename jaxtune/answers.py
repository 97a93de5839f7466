"""samples.jsonl: the answers before and after training, and how many of them are right.

No jax: `torch_gpu` uses it too.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.data.examples import Prompt
from jaxtune.rundir import write_atomic
from jaxtune.scores.exact_match import matches


def mean_loss(score: Callable[[Any], tuple[Any, Any]], batches: Iterable[Any]) -> float:
    """Loss per target token over all batches; `score` gives (summed loss, target tokens) of one.

    Sums stay on the device until all batches are under way.
    """
    sums = np.array([(float(loss), float(tokens)) for loss, tokens in [score(batch) for batch in batches]])
    loss, tokens = sums.sum(axis=0)
    return float(loss / max(tokens, 1.0))


def read_answers(path: Path) -> list[dict[str, Any]]:
    """The rows of a samples.jsonl; none where there is no such file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def has_answers(path: Path, prompts: Sequence[Prompt]) -> bool:
    """Whether a samples.jsonl has answers from before training to just these questions."""
    rows = read_answers(path)
    return [row["prompt"] for row in rows] == [p.question for p in prompts] and all("before" in row for row in rows)


def write_answers(path: Path, prompts: Sequence[Prompt], **answers: Sequence[str]) -> list[dict[str, Any]]:
    """samples.jsonl: prompt, reference, and for each of `before`, `after` the answer and whether it matches."""
    rows = []
    for i, prompt in enumerate(prompts):
        right = prompt.references or [prompt.reference]
        row: dict[str, Any] = {"prompt": prompt.question, "reference": prompt.reference}
        for when, texts in answers.items():
            row |= {when: texts[i], f"match_{when}": any(matches(texts[i], text) for text in right)}
        rows.append(row)
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    return rows
