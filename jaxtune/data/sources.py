"""Rows from a local file or from the Hugging Face Hub, each with its number.

A line that cannot be read is a row with a problem, so that `data.on_bad_row` decides about it like about any other.
"""

import csv
import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from jaxtune.errors import DataError, MissingInputError, NetworkError, UserError, did_you_mean

MAX_LINE_BYTES = 64 * 1024**2
MAX_JSON_BYTES = 1024**3
PACKED = (".gz", ".zip", ".bz2", ".xz", ".zst", ".tar", ".tgz", ".7z")


class Row(NamedTuple):
    # From 1: the line of a .jsonl file, the row of any other source.
    number: int
    fields: dict[str, Any]
    # Why the row cannot be read, then `fields` is empty.
    problem: str | None = None


def open_rows(
    source: str,
    *,
    split: str,
    name: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
    max_rows: int | None = None,
) -> Iterator[Row]:
    """The rows of a .jsonl, .json, .csv or .parquet file, or of a Hub dataset (`split`, `name`, `revision`).

    Raises, before the first row where it can:
      MissingInputError: no such file, dataset, configuration or split.
      NetworkError: the Hub did not answer.
      DataError: no rows, or a file that is not what its name says.
      UserError: a directory, a compressed file, or a kind of file that is not read.
    """
    path = Path(source).expanduser()
    if path.exists() or _looks_like_path(source):
        rows = _file_reader(path)(path)
    else:
        rows = _hub_rows(source, split=split, name=name, revision=revision, streaming=streaming)
    return _not_empty(islice(rows, max_rows), source)


def _not_empty(rows: Iterator[Row], source: str) -> Iterator[Row]:
    row = None
    for row in rows:
        yield row
    if row is None:
        raise DataError(f"{source} has no rows. Give a file with at least one.")


# --- files ---


def _looks_like_path(source: str) -> bool:
    suffix = Path(source).suffix.lower()
    return source.startswith((".", "/", "~")) or source.count("/") > 1 or suffix in READERS or suffix in PACKED


def _file_reader(path: Path) -> Callable[[Path], Iterator[Row]]:
    suffix = path.suffix.lower()
    kinds = ", ".join(READERS)
    if not path.exists():
        folder = path.parent
        if not folder.is_dir():
            raise MissingInputError(f"There is no file {path}: there is no folder {folder}.")
        names = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in READERS or p.is_dir())
        raise MissingInputError(
            f"There is no file {path}.{did_you_mean(path.name, names)} "
            f"{folder} has: {', '.join(names[:20]) or 'no data files'}."
        )
    if path.is_dir():
        names = sorted(p.name for p in path.iterdir() if p.suffix.lower() in READERS)
        raise UserError(f"{path} is a directory. Give one file ({kinds}). It has: {', '.join(names[:20]) or 'none'}.")
    if suffix in PACKED:
        raise UserError(f"{path} is compressed, and nothing is unpacked here. Unpack it first; files can be: {kinds}.")
    if suffix not in READERS:
        raise UserError(f"{path} is of no known kind. Files can be: {kinds}.{did_you_mean(suffix, READERS)}")
    with path.open("rb") as file:
        head = file.read(4)
    if head[:2] == b"\x1f\x8b" or head == b"PK\x03\x04":
        raise UserError(f"{path} is compressed in spite of its name. Unpack it first.")
    return READERS[suffix]


def _lines(path: Path) -> Iterator[tuple[int, bytes, int]]:
    """(number from 1, line, byte offset of its start), without a byte order mark."""
    offset = 0
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise DataError(f"{path}:{number} is longer than {MAX_LINE_BYTES} bytes. Put one row on each line.")
            mark = 3 if number == 1 and line.startswith(b"\xef\xbb\xbf") else 0
            yield number, line[mark:], offset + mark
            offset += len(line)


def _not_utf8(error: UnicodeDecodeError, offset: int) -> str:
    return f"not UTF-8 (byte 0x{error.object[error.start]:02x} at offset {offset + error.start} of the file)"


def _jsonl(path: Path) -> Iterator[Row]:
    for number, line, offset in _lines(path):
        if not line.strip():
            continue
        try:
            value = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            yield Row(number, {}, _not_utf8(error, offset))
        except (ValueError, RecursionError) as error:
            yield Row(number, {}, f"not JSON ({error})")
        else:
            yield _object(number, value)


def _object(number: int, value: Any) -> Row:
    if isinstance(value, dict):
        return Row(number, value)
    return Row(number, {}, f"a {type(value).__name__}, not an object with named fields")


def _json(path: Path) -> Iterator[Row]:
    """A list of objects; or, as many files named .json are, one object a line."""
    if path.stat().st_size > MAX_JSON_BYTES:
        raise DataError(f"{path} has {path.stat().st_size} bytes, too many to read at once. Write it as .jsonl.")
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if not data.lstrip().startswith(b"["):
        yield from _jsonl(path)
        return
    try:
        values = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is {_not_utf8(error, path.stat().st_size - len(data))}. Save it as UTF-8.") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}).") from None
    for number, value in enumerate(values, 1):
        yield _object(number, value)


def _csv(path: Path) -> Iterator[Row]:
    def text() -> Iterator[str]:
        for number, line, offset in _lines(path):
            try:
                yield line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{path}:{number} is {_not_utf8(error, offset)}. Save the file as UTF-8.") from None

    # The module's limit (131072 characters a field) is too small for long texts, and it has no other place to set it.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE_BYTES))
    reader = csv.reader(text(), strict=True)
    start = 1
    try:
        header = next(reader, [])
        if len(set(header)) != len(header):
            raise DataError(f"{path}: two columns have the same name. The header is: {', '.join(header)}.")
        start = reader.line_num + 1
        number = 0
        for values in reader:
            start = reader.line_num + 1
            if not values:
                continue
            number += 1
            if len(values) == len(header):
                yield Row(number, dict(zip(header, values, strict=True)))
            else:
                yield Row(number, {}, f"{len(values)} fields, but the header names {len(header)}")
    except csv.Error as error:
        raise DataError(f"{path}: the row that begins at line {start} is not CSV ({error}). Is a quote open?") from None


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(number, fields)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a parquet file that can be read ({_first_line(error)}).") from None


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}

# --- the Hub ---


def _hub_rows(source: str, *, split: str, name: str | None, revision: str | None, streaming: bool) -> Iterator[Row]:
    import datasets  # Slow to import, and local files do not need it.

    try:
        rows = datasets.load_dataset(source, name=name, split=split, revision=revision, streaming=streaming)
    except Exception as error:
        raise _hub_error(error, source) from None
    return _hub_iterator(rows, source)


def _hub_iterator(rows: Any, source: str) -> Iterator[Row]:
    iterator = iter(rows)
    number = 0
    while True:
        try:
            fields = next(iterator)
        except StopIteration:
            return
        except Exception as error:
            raise _hub_error(error, source) from None
        number += 1
        yield Row(number, dict(fields))


def _hub_error(error: Exception, source: str) -> UserError:
    """What a failure of `datasets` means to the user."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    said = _first_line(error)
    if "DatasetNotFoundError" in kinds or "HFValidationError" in kinds:
        near = sorted(p.name for p in Path.cwd().iterdir() if p.suffix.lower() in READERS or p.is_dir())
        return MissingInputError(
            f"There is no file and no Hub dataset `{source}`.{did_you_mean(source, near)} ({said}) "
            "Give a .jsonl, .json, .csv or .parquet file, or an id such as `user/name`; log in if it is private."
        )
    # requests and httpx both call their base HTTPError; the built-in ones are ConnectionError and TimeoutError.
    if kinds & {"ConnectionError", "HTTPError", "TimeoutError", "TransportError", "OfflineModeIsEnabled"}:
        return NetworkError(f"The Hub did not answer for dataset `{source}` ({said}). Try again, or give a local file.")
    if isinstance(error, (ValueError, FileNotFoundError)):
        # An unknown split or configuration: the library's message lists those that exist.
        return MissingInputError(f"Hub dataset `{source}`: {said} Set `data.train_split`, `data.name` to what exists.")
    return DataError(f"Hub dataset `{source}` cannot be read: {type(error).__name__}: {said}")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
