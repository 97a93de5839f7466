"""The `data` section of a config to the two splits of a run; both backends read their rows here."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from jaxtune.data.batches import Batch, batches, fit_length, fit_lengths, stream_batches
from jaxtune.data.examples import Example, Prompt
from jaxtune.data.load import Dataset, load_dataset, load_prompts, report, stream_examples
from jaxtune.data.seq2seq import EncoderDecoder, Lengths, sides
from jaxtune.data.virtual import NONE, Virtual, by_column
from jaxtune.errors import UserError
from jaxtune.tokenizer import Tokenizer

# What says what a row means, as `make_format` takes it.
TEMPLATES = ("format", "messages", "prompt", "completion", "text", "chat_template")
COLUMNS = (*TEMPLATES, "label_column", "label_names", "no_answer")


class Stream(NamedTuple):
    """Rows read as they come, in their own order.  open: one pass.  fingerprint: of the settings, not of the rows."""

    name: str
    open: Callable[[], Iterator[Example]]
    fingerprint: str


class Splits(NamedTuple):
    """train, held: the rows (held: None without `data.eval`).  length: the static length that fits both, or those of an
    encoder-decoder's two sides."""

    train: Dataset | Stream
    held: Dataset | None
    length: int | Lengths


def read_splits(
    c: Any,
    tokenizer: Tokenizer,
    say: Callable[[str], None],
    virtual: Virtual = NONE,
    start_id: int | None = None,
) -> Splits:
    """Reads, checks and tokenises everything, and says what became of the rows; a stream is read up to its first row.

    Args:
      c: `config.data`.  virtual: the method's tokens before each row.  start_id: what the decoder of an encoder-decoder
        reads first (`jaxtune.models.decoder_start`); None: a decoder alone.

    Raises:
      DataError, MissingInputError, NetworkError, UserError: as `load_dataset`, `by_column` and `seq2seq.sides`.
    """
    source = _source(c, virtual, start_id) | {"on_bad_row": c.on_bad_row}
    seq2seq: EncoderDecoder | None = source["seq2seq"]

    def fit(*datasets: Dataset | None) -> int | Lengths:
        read = [dataset for dataset in datasets if dataset is not None]
        if seq2seq is None:
            return fit_length(read, c.max_length, virtual=virtual.count)
        return fit_lengths(read, c.max_length, seq2seq, virtual)

    def read(name: str, split: str, max_rows: int | None) -> Dataset:
        rows = load_dataset(name, tokenizer, split=split, max_rows=max_rows, **source)
        say("\n  ".join([f"data: {name}", *report(rows.counts)]))
        return rows

    held = read(c.eval, c.eval_split, c.max_eval_rows) if c.eval else None
    if not c.streaming:
        train = read(c.train, c.train_split, c.max_train_rows)
        return Splits(train, held, fit(train, held))

    how = {"split": c.train_split, "max_rows": c.max_train_rows, **source}
    stream = Stream(
        c.train,
        lambda: stream_examples(c.train, tokenizer, **how),
        hashlib.sha256(json.dumps([c.train, how], sort_keys=True).encode()).hexdigest(),
    )
    next(stream.open())  # what is wrong with the first rows is said now
    say(f"data: {c.train}\n  streamed in its own order; to resume, the rows seen are read again and skipped")
    return Splits(stream, held, fit())


def fingerprint(rows: Dataset | Stream) -> str:
    """What a run's checkpoints know its rows by."""
    return rows.fingerprint if isinstance(rows, Stream) else f"{len(rows)} rows, sha256 {rows.fingerprint}"


def rows_to_train(c: Any, rows: Dataset | Stream) -> int:
    """Where the row cursor ends: `steps` whole batches, or `epochs` of the rows.

    Args:
      c: `config.train`.

    Raises:
      UserError: the length of a stream is asked for.
    """
    if c.steps is not None:
        return c.steps * c.global_batch_size
    if isinstance(rows, Stream):
        raise UserError("`data.streaming` is true, so that nobody knows how long an epoch is. Set `train.steps`.")
    return max(1, math.ceil(c.epochs * len(rows)))


def train_batches(rows: Dataset | Stream, *, seed: int, shuffle: bool, **where: Any) -> Iterator[tuple[Batch, int]]:
    """(batch, next row) of either kind; `where` as in `batches`."""
    if isinstance(rows, Stream):
        return stream_batches(rows.open, **where)
    return batches(rows, seed=seed, shuffle=shuffle, **where)


def read_prompts(
    c: Any, tokenizer: Tokenizer, count: int, virtual: Virtual = NONE, start_id: int | None = None
) -> list[Prompt]:
    """Questions for generation, from the rows held back or, without these, from the training rows."""
    name, split = (c.eval, c.eval_split) if c.eval else (c.train, c.train_split)
    return load_prompts(name, tokenizer, count=count, split=split, **_source(c, virtual, start_id)) if count else []


def _source(c: Any, virtual: Virtual, start_id: int | None) -> dict[str, Any]:
    keys = {key: c[key] for key in ("name", "revision", "max_length", "truncation", *COLUMNS)}
    seq2seq = sides(start_id, c.max_length, c.max_target_length)
    return keys | {"virtual": by_column(virtual, c.task_id), "seq2seq": seq2seq}
