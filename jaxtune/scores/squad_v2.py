"""SQuAD 2.0: exact match and F1 with questions that have no answer, as the official evaluate-v2.0.py computes them.

Rows with Persian are normalised first, so that the script's steps (lower case, no ASCII punctuation, no a, an, the,
single spaces) see ASCII punctuation and one form of each letter.  Without Persian the numbers are the script's, to the
bit.
"""

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtune.errors import DataError
from jaxtune.scores import persian
from jaxtune.scores.rows import answers_of

NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
# `--na-prob-thresh` of the script.
THRESHOLD = 1.0


def normalise(text: str) -> str:
    """The script's `normalize_answer`."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(NO_PUNCTUATION)).split())


def exact(gold: str, prediction: str) -> float:
    return float(normalise(gold) == normalise(prediction))


def f1(gold: str, prediction: str) -> float:
    """F1 of the words; where either text has none, whether both have none."""
    golds, predictions = normalise(gold).split(), normalise(prediction).split()
    same = sum((Counter(golds) & Counter(predictions)).values())
    if not golds or not predictions:
        return float(golds == predictions)
    if not same:
        return 0.0
    precision, recall = same / len(predictions), same / len(golds)
    return (2 * precision * recall) / (precision + recall)


def score(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the script prints: exact and f1 in percent, total; the same of rows with (HasAns_) and without (NoAns_) an
    answer; with probabilities best_exact and best_f1, and the thresholds (best_exact_thresh, …) that give them.

    Args:
      rows: {"id", "prediction": text, "" for no answer, "answers": {"text": [text, …]}} (see `rows.answers_of`), all or
        none of them with "no_answer_probability".  Rows whose prediction is None are left out, as the script leaves out
        questions that the predictions do not name; "missing" is how many.

    Raises:
      DataError: no row with a prediction, or a probability in some rows only.
    """
    asked = [row for row in rows if row["prediction"] is not None]
    if not asked:
        raise DataError("There are no rows to score, or none of them has a prediction.")
    having = sum("no_answer_probability" in row for row in asked)
    if having not in (0, len(asked)):
        raise DataError(
            f"{having} of {len(asked)} rows have `no_answer_probability`. Give it in all of them or in none."
        )
    answered = [bool(answers_of(row)) for row in asked]
    unsure = [float(row.get("no_answer_probability", 0.0)) for row in asked]
    raw = {name: [_best(row, metric) for row in asked] for name, metric in (("exact", exact), ("f1", f1))}
    sure = {
        name: [float(not has) if p > THRESHOLD else s for s, has, p in zip(scores, answered, unsure, strict=True)]
        for name, scores in raw.items()
    }
    result: dict[str, Any] = {}
    for prefix, of in (("", (True, False)), ("HasAns_", (True,)), ("NoAns_", (False,))):
        chosen = [n for n, has in enumerate(answered) if has in of]
        if chosen:
            for name, scores in sure.items():
                result[prefix + name] = 100.0 * sum(scores[n] for n in chosen) / len(chosen)
            result[prefix + "total"] = len(chosen)
    if having:
        silent = [not row["prediction"] for row in asked]
        for name, scores in raw.items():
            best, threshold = _best_threshold(scores, answered, silent, unsure)
            result |= {f"best_{name}": best, f"best_{name}_thresh": threshold}
    missing = len(rows) - len(asked)
    return {**result, "missing": missing} if missing else result


def _best(row: Mapping[str, Any], metric: Any) -> float:
    """The best over the answers; of a question without any, against the empty text."""
    prediction, *golds = persian.alike([row["prediction"], *answers_of(row)])
    return max(metric(gold, prediction) for gold in [g for g in golds if normalise(g)] or [""])


def _best_threshold(
    scores: Sequence[float], answered: Sequence[bool], silent: Sequence[bool], unsure: Sequence[float]
) -> tuple[float, float]:
    """(best score in percent, probability) if questions above that probability are left without an answer."""
    current = best = float(answered.count(False))
    threshold = 0.0
    for n in sorted(range(len(scores)), key=lambda n: unsure[n]):
        current += scores[n] if answered[n] else (0 if silent[n] else -1)
        if current > best:
            best, threshold = current, unsure[n]
    return 100.0 * best / len(scores), threshold
