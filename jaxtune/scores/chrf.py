"""chrF2 and chrF++ of a corpus by sacrebleu (Popović 2015, 2017): n-grams of characters, so of any script."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtune.scores import persian
from jaxtune.scores.rows import references_of, some

# {name: order of word n-grams}
ORDERS = {"chrf": 0, "chrf++": 2}


def score(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """{"chrf", "chrf++": in [0, 100], "chrf_signature", "chrf++_signature": what sacrebleu says that it computed}.

    Args:
      rows: {"prediction": text, "references": [text, …]}; of several references the best counts, row by row, and
        rows may have more or fewer.  Rows with Persian are normalised first.

    Raises:
      DataError: no rows.
    """
    from sacrebleu.metrics.chrf import CHRF

    texts = [persian.alike([row["prediction"], *references_of(row)]) for row in some(rows)]
    most = max(map(len, texts)) - 1
    # sacrebleu's nth list has every row's nth reference, None where a row has fewer.
    lists: Any = [[row[nth] if nth < len(row) else None for row in texts] for nth in range(1, most + 1)]
    result: dict[str, Any] = {}
    for name, order in ORDERS.items():
        metric = CHRF(word_order=order)
        result[name] = metric.corpus_score([row[0] for row in texts], lists).score
        result[f"{name}_signature"] = str(metric.get_signature())
    return result
