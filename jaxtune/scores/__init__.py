"""Scores of answers against references.  Each metric is a module with `score(rows) -> {…}`, plain JSON.

No jax and no numpy: `torch_gpu` has it too.  Rows are described in `rows.py`, what equals what in docs/evaluation.md.
"""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from jaxtune.errors import UserError, did_you_mean
from jaxtune.scores import chrf, exact_match, labels, rouge, squad_v2

METRICS: dict[str, ModuleType] = {
    "rouge": rouge,
    "chrf": chrf,
    "squad_v2": squad_v2,
    "accuracy": labels,
    "exact_match": exact_match,
}


def metrics_of(text: str) -> list[str]:
    """The metrics that `a,b` names, each once.

    Raises:
      UserError: none, or one that does not exist.
    """
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        if name not in METRICS:
            raise UserError(
                f"There is no metric {name!r}. There are: {', '.join(METRICS)}.{did_you_mean(name, METRICS)}"
            )
    if not names:
        raise UserError(f"--metric names none. There are: {', '.join(METRICS)}.")
    return names


def flat(scores: Mapping[str, Any]) -> dict[str, float]:
    """One number a key, for tables, metrics.jsonl and the choice of the best: of ROUGE the F-measures.

    Counts (integers), signatures and the scores of single labels are left out.
    """
    found = {}
    for key, value in scores.items():
        value = value.get("fmeasure") if isinstance(value, Mapping) else value
        if isinstance(value, float):
            found[key] = value
    return found
