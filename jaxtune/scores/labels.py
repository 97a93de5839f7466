"""Accuracy and F1 of answers that are labels, as scikit-learn's `accuracy_score`, `f1_score` and
`precision_recall_fscore_support` compute them with `zero_division=0`."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtune.errors import DataError
from jaxtune.scores import persian
from jaxtune.scores.rows import references_of, some


def plain(label: str) -> str:
    """A label as it is compared: no case, no surrounding or double white space, Persian normalised."""
    return " ".join(persian.normalise(label).casefold().split())


def score(rows: Sequence[Mapping[str, Any]], *, labels: Sequence[str] | None = None) -> dict[str, Any]:
    """{"accuracy", "macro_f1", "weighted_f1": in [0, 1], "total": rows, "other": predictions that are no label,
    "labels": {label: {"precision", "recall", "f1", "support"}}}, labels as `plain` gives them.

    Args:
      rows: {"prediction": text, "references": [label, …]}.  Of several references the one that was predicted counts,
        else the first.
      labels: all there are; default: those that the references name.  A prediction that is none of them is wrong, and
        no false positive of another.

    Raises:
      DataError: no rows, or a reference that is none of `labels`.
    """
    pairs = []
    for row in some(rows):
        prediction, golds = plain(row["prediction"]), [plain(text) for text in references_of(row)]
        pairs.append((prediction if prediction in golds else golds[0], prediction))
    named = {gold for gold, _ in pairs}
    known = sorted(named if labels is None else {plain(label) for label in labels})
    if unknown := sorted(named - {*known}):
        raise DataError(f"The label {unknown[0]!r} of a reference is none of: {', '.join(known)}. Name all labels.")
    of_labels = {label: _of_label(pairs, label) for label in known}
    supports = [row["support"] for row in of_labels.values()]
    f1s = [row["f1"] for row in of_labels.values()]
    return {
        "accuracy": sum(gold == prediction for gold, prediction in pairs) / len(pairs),
        "macro_f1": math.fsum(f1s) / len(f1s),
        "weighted_f1": math.fsum(f * n for f, n in zip(f1s, supports, strict=True)) / len(pairs),
        "total": len(pairs),
        "other": sum(prediction not in of_labels for _, prediction in pairs),
        "labels": of_labels,
    }


def _of_label(pairs: Sequence[tuple[str, str]], label: str) -> dict[str, Any]:
    right = sum(gold == prediction == label for gold, prediction in pairs)
    support = sum(gold == label for gold, _ in pairs)
    predicted = sum(prediction == label for _, prediction in pairs)
    return {
        "precision": right / max(predicted, 1),
        "recall": right / max(support, 1),
        "f1": 2 * right / max(predicted + support, 1),
        "support": support,
    }
