"""ROUGE-1, -2, -L and -Lsum by the rouge-score package (Lin 2004), with words of every script.

rouge-score's own tokenizer keeps [a-z0-9] alone: two equal Persian texts score 0, two that share nothing but "2025"
score 1.  Here the words of other scripts are kept beside those.  On text in Latin script the words are rouge-score's,
and so are the scores, to the bit.
"""

import functools
import itertools
import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxtune.scores import persian
from jaxtune.scores.rows import references_of, some

TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
PARTS = ("precision", "recall", "fmeasure")


class Words:
    """What rouge-score calls a tokenizer: an object with `tokenize`."""

    def __init__(self, stemmer: bool = False):
        from rouge_score.tokenizers import DefaultTokenizer

        self.latin = DefaultTokenizer(stemmer)

    def tokenize(self, text: str) -> list[str]:
        if text.isascii():
            return self.latin.tokenize(text)
        words = []
        for alphabet, letters in itertools.groupby(persian.normalise(text).lower(), _alphabet):
            word = "".join(letters)
            if alphabet == "ascii":
                words += self.latin.tokenize(word)
            elif alphabet == "other" and not all(unicodedata.category(c)[0] == "M" for c in word):
                words.append(word)
        return words


@functools.cache
def _alphabet(letter: str) -> str:
    """`ascii` for rouge-score's letters and digits, `other` for those of other scripts with their vowel signs.

    Empty for what separates words: to rouge-score é is among that, and so are the symbols that look like letters.
    """
    if letter.isascii():
        return "ascii" if letter.isalnum() else ""
    is_letter = unicodedata.category(letter) in ("Lu", "Ll", "Lt", "Lm", "Lo", "Nd", "Mn", "Mc")
    latin = unicodedata.name(letter, "").startswith(("LATIN", "FULLWIDTH", "MODIFIER", "COMBINING", "MATHEMATICAL"))
    symbol = ord(letter) < 0x370 or 0x2000 <= ord(letter) < 0x2C00
    return "other" if is_letter and not latin and not symbol else ""


def score(rows: Sequence[Mapping[str, Any]], *, references: str = "max", stemmer: bool = False) -> dict[str, Any]:
    """Precision, recall and F of each type, in [0, 1], averaged over rows.

    Args:
      rows: {"prediction": text, "references": [text, …]}; for rougeLsum, sentences end at newlines.
      references: of several, `max` takes for each type the one with the best F (`RougeScorer.score_multi`); `mean`
        averages over them, and the result says so under "references".
      stemmer: Porter's, for English; words of other scripts stay as they are.

    Raises:
      DataError: no rows.
    """
    from rouge_score.rouge_scorer import RougeScorer  # More than a second: it imports all of nltk.

    scorer = RougeScorer(TYPES, tokenizer=Words(stemmer))
    of_rows = [[scorer.score(text, row["prediction"]) for text in references_of(row)] for row in some(rows)]

    def average(kind: str, part: str) -> float:
        values = []
        for found in of_rows:
            each = [scores[kind] for scores in found]
            chosen = each if references == "mean" else [max(each, key=lambda one: one.fmeasure)]
            values.append(_mean(getattr(one, part) for one in chosen))
        return _mean(values)

    result: dict[str, Any] = {kind: {part: average(kind, part) for part in PARTS} for kind in TYPES}
    return result if references == "max" else {**result, "references": references}


def _mean(values: Iterable[float]) -> float:
    """Exactly rounded, so that the order of rows changes nothing."""
    values = list(values)
    return math.fsum(values) / len(values)
