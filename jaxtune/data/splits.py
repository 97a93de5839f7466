"""The `data` section of a config to the two splits of a run; both backends read their rows here."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtune.data.batches import fit_length
from jaxtune.data.examples import Prompt
from jaxtune.data.load import Dataset, load_dataset, load_prompts, report
from jaxtune.tokenizer import Tokenizer

COLUMNS = ("format", "messages", "prompt", "completion", "text", "chat_template")


class Splits(NamedTuple):
    """train, held: tokenised rows (held: None without `data.eval`).  length: the static length that fits both."""

    train: Dataset
    held: Dataset | None
    length: int


def read_splits(c: Any, tokenizer: Tokenizer, say: Callable[[str], None]) -> Splits:
    """Reads, checks and tokenises everything, and says what became of the rows.

    Args:
      c: `config.data`.

    Raises:
      DataError, MissingInputError, NetworkError, UserError: as `load_dataset`.
    """

    def read(name: str, split: str, max_rows: int | None) -> Dataset:
        policy = {"truncation": c.truncation, "on_bad_row": c.on_bad_row, "max_rows": max_rows}
        rows = load_dataset(name, tokenizer, split=split, **_source(c), **policy)
        say("\n  ".join([f"data: {name}", *report(rows.counts)]))
        return rows

    train = read(c.train, c.train_split, c.max_train_rows)
    held = read(c.eval, c.eval_split, c.max_eval_rows) if c.eval else None
    return Splits(train, held, fit_length([train, held] if held else [train], c.max_length))


def read_prompts(c: Any, tokenizer: Tokenizer, count: int) -> list[Prompt]:
    """Questions for generation, from the rows held back or, without these, from the training rows."""
    name, split = (c.eval, c.eval_split) if c.eval else (c.train, c.train_split)
    return load_prompts(name, tokenizer, count=count, split=split, **_source(c)) if count else []


def _source(c: Any) -> dict[str, Any]:
    return {key: c[key] for key in ("name", "revision", "max_length", *COLUMNS)}
