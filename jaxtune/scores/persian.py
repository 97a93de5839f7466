"""Persian text as scores compare it: one code point for one letter, one digit for one value, no invisible marks.

For scoring alone; data that is trained on is left as it is.  Text without a character of the Arabic script (or a mark
of its direction) comes back untouched, so that scores of English, French or Chinese are those of the original scripts.

    می‌رود ۱۲ كيلو   ->   می رود 12 کیلو
"""

import re
import unicodedata
from collections.abc import Sequence

ARABIC = r"\u0600-\u06ff\u0750-\u077f\u0870-\u08ff\ufb50-\ufdff\ufe70-\ufefc"
DIRECTIONS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
OCCURS = re.compile(f"[{ARABIC}{DIRECTIONS}\u200c]")
# ﻻ and its like, which old software wrote.  NFKC gives their letters; of ي and ی it would make nothing.
FORMS = re.compile(r"[\ufb50-\ufdff\ufe70-\ufefc]+")

_SAME = {
    "ی": "يىئېۍے",
    "ک": "كڪ",
    "ه": "ةۀەۂہھۃ",  # خانۀ, خانهٔ, خانه
    "و": "ؤ",
    "ا": "أإٱ",  # and not آ, which is another letter
    # Punctuation, also that of quotations in Latin script.
    '"': "«»“”„",
    "'": "‘’‚‹›",
    ",": "،٬",
    ";": "؛",
    "?": "؟",
    "%": "٪",
    ".": "٫۔",
    "...": "…",
    "-": "–—−",
    "(": "﴾",
    ")": "﴿",
    "*": "٭",
    # The half-space (ZWNJ); ¬, as which some encodings hold it; the no-break space.
    " ": "\u200c\u00ac\u00a0",
    # Tatweel, the joiner, the marks of direction, the byte order mark.
    "": f"ـ\u200d\ufeff{DIRECTIONS}",
} | {str(digit): chr(0x06F0 + digit) + chr(0x0660 + digit) for digit in range(10)}
_MARKS = [chr(c) for c in (*range(0x0600, 0x0700), *range(0x0870, 0x0900)) if unicodedata.category(chr(c)) == "Mn"]
# Marks of the Arabic script alone: the accents of é and ü stay, also where they are characters of their own.
FOLD = str.maketrans({old: new for new, olds in _SAME.items() for old in olds} | dict.fromkeys(_MARKS, ""))


def normalise(text: str) -> str:
    """Text as it is compared; unchanged where nothing of the Arabic script occurs.  normalise(normalise(x)) is
    normalise(x)."""
    return alike([text])[0]


def alike(texts: Sequence[str]) -> list[str]:
    """Texts that are compared with each other: if Persian occurs in one, the punctuation of all is folded.  Without,
    «12» would not be «۱۲»."""
    return [_fold(text) for text in texts] if any(map(OCCURS.search, texts)) else list(texts)


def _fold(text: str) -> str:
    text = FORMS.sub(lambda found: unicodedata.normalize("NFKC", found[0]), text)
    # آ written as two characters, before the second is dropped as a mark.
    text = text.replace("\u0627\u0653", "آ").translate(FOLD)
    return re.sub(" +", " ", text)
