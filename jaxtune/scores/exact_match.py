"""The share of answers that are a reference, surrounding white space aside and nothing else."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtune.scores.rows import references_of, some


def matches(answer: str, reference: str) -> bool:
    """Whether they are equal, surrounding white space aside."""
    return answer.strip() == reference.strip()


def score(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """{"exact_match": in [0, 1], "total": rows} of rows {"prediction": text, "references": [text, …]}.

    Raises:
      DataError: no rows.
    """
    right = sum(any(matches(row["prediction"], text) for text in references_of(row)) for row in some(rows))
    return {"exact_match": right / len(rows), "total": len(rows)}
