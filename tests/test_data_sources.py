"""Rows come out as they were written, and what is no row is named with its place."""

import csv
import json

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from jaxtune.data import sources
from jaxtune.data.sources import open_rows
from jaxtune.errors import DataError, MissingInputError, NetworkError, UserError

ROWS = [{"a": "سلام می‌روم\u200f", "n": 1}, {"a": 'x "quoted",\n\ttwo lines 😀', "n": 2}, {"a": "", "n": 3}]


def read(path, **options):
    return list(open_rows(str(path), split="train", **options))


def put(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    paths = [
        put(tmp_path, "a.jsonl", lines),
        put(tmp_path, "crlf.JSONL", lines.replace("\n", "\r\n") + "\r\n"),
        put(tmp_path, "bom.jsonl", "\ufeff" + lines),
        put(tmp_path, "a.json", json.dumps(ROWS)),
        put(tmp_path, "bom.json", "\ufeff" + json.dumps(ROWS)),
        put(tmp_path, "lines.json", lines),
        tmp_path / "a.parquet",
    ]
    pa.parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    for path in paths:
        assert [(row.number, row.fields) for row in read(path)] == list(enumerate(ROWS, 1)), path
    assert read(paths[0], max_rows=2)[-1].number == 2
    with (tmp_path / "a.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, ["a", "n"])
        writer.writeheader()
        writer.writerows(ROWS)
    texts = [{"a": row["a"], "n": str(row["n"])} for row in ROWS]
    assert [row.fields for row in read(tmp_path / "a.csv")] == texts


def test_json_lines_with_problems_keep_their_line(tmp_path):
    content = b'\xef\xbb\xbf{"a": 1}\n\n[1]\n{"a": "\xff"}\n{"a": \n' + b"[" * 100_000 + b'\n{"a": 2}'
    good, array, utf8, cut, deep, last = read(put(tmp_path, "a.jsonl", content))
    assert (good.number, good.fields, good.problem) == (1, {"a": 1}, None)
    assert (array.number, array.fields) == (3, {}) and "a list, not an object" in array.problem
    assert utf8.number == 4 and utf8.problem == f"not UTF-8 (byte 0xff at offset {content.index(0xFF)} of the file)"
    assert cut.number == 5 and "not JSON" in cut.problem
    assert deep.number == 6 and "not JSON" in deep.problem
    assert (last.number, last.fields) == (7, {"a": 2})


def test_text_is_never_normalised(tmp_path):
    text = "ي ى ک ك ﷺ e\u0301 \u200c\u200f\u202b \x00 \r \u2028 😀"
    path = put(tmp_path, "a.jsonl", json.dumps({"a": text}, ensure_ascii=False) + "\n")
    assert read(path)[0].fields == {"a": text}


def test_csv_with_problems(tmp_path):
    rows = read(put(tmp_path, "a.csv", "a,b\n1,2\n3\n4,5,6\n\n7,8"))
    assert [row.number for row in rows] == [1, 2, 3, 4] and rows[3].fields == {"a": "7", "b": "8"}
    assert rows[1].problem == "1 fields, but the header names 2" and "3 fields" in rows[2].problem
    with pytest.raises(DataError, match="begins at line 3 is not CSV"):
        read(put(tmp_path, "open.csv", 'a,b\n1,2\n"never closed,2\n3,4\n'))
    with pytest.raises(DataError, match="same name"):
        read(put(tmp_path, "same.csv", "a,a\n1,2\n"))
    with pytest.raises(DataError, match=r"bytes\.csv:2 is not UTF-8 \(byte 0xfe at offset 4"):
        read(put(tmp_path, "bytes.csv", b"a,b\n\xfe,2\n"))
    long = "x" * 200_000
    assert read(put(tmp_path, "long.csv", f"a\n{long}\n"))[0].fields == {"a": long}


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", ""), ("a.jsonl", "\n \n"), ("a.json", "[]"), ("a.json", ""), ("a.csv", ""), ("a.csv", "a,b\n")],
)
def test_no_rows(tmp_path, name, content):
    with pytest.raises(DataError, match="has no rows"):
        read(put(tmp_path, name, content))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.json", '[{"a": 1},', "not JSON"),
        ("a.json", b'[{"a": "\xff"}]', "offset 8"),
        ("a.json", "[" * 100_000, "not JSON"),
        ("a.parquet", "not parquet", "not a parquet file"),
        ("a.parquet", b"PAR1\x00\x00\xff\xffPAR1", "not a parquet file"),
        ("a.jsonl.gz", b"\x1f\x8b", "compressed"),
        ("a.zip", b"PK", "compressed"),
        ("a.jsonl", b"\x1f\x8b\x08", "compressed in spite"),
        ("a.txt", "x", "no known kind"),
    ],
)
def test_files_that_are_refused(tmp_path, name, content, says):
    with pytest.raises(UserError, match=says):
        read(put(tmp_path, name, content))


def test_a_line_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_LINE_BYTES", 1000)
    path = put(tmp_path, "a.jsonl", '{"a": 1}\n{"a": "' + "x" * 5000)
    with pytest.raises(DataError, match=r"a\.jsonl:2 is longer than 1000 bytes"):
        read(path)


def test_missing_files_name_what_exists(tmp_path):
    put(tmp_path, "train.jsonl", "{}")
    put(tmp_path, "notes.txt", "")
    with pytest.raises(MissingInputError, match=r"Did you mean `train\.jsonl`\? .* has: train\.jsonl\.$"):
        open_rows(str(tmp_path / "tran.jsonl"), split="train")
    with pytest.raises(MissingInputError, match="there is no folder"):
        open_rows(str(tmp_path / "no" / "train.jsonl"), split="train")
    with pytest.raises(MissingInputError, match="There is no file"):
        open_rows("no_such.parquet", split="train")
    with pytest.raises(UserError, match=r"is a directory.*It has: train\.jsonl"):
        open_rows(str(tmp_path), split="train")


# --- the Hub, with `datasets.load_dataset` pointed at a local folder ---


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """`user/name` is a folder of data files, read by the real `datasets` library."""
    folder = tmp_path / "repo"
    folder.mkdir()
    for split, rows in (("train", ROWS), ("validation", ROWS[:1])):
        put(folder, f"{split}.jsonl", "\n".join(map(json.dumps, rows)))
    load, calls = datasets.load_dataset, []

    def local(path, **options):
        calls.append((path, options))
        assert "trust_remote_code" not in options
        return load(str(folder), cache_dir=str(tmp_path / "cache"), **options)

    monkeypatch.setattr(datasets, "load_dataset", local)
    datasets.disable_progress_bars()
    return calls


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_rows(hub, streaming):
    rows = list(open_rows("user/name", split="train", streaming=streaming))
    assert [(row.number, row.fields) for row in rows] == list(enumerate(ROWS, 1))
    assert len(list(open_rows("user/name", split="validation", streaming=streaming))) == 1
    assert len(list(open_rows("user/name", split="train", streaming=streaming, max_rows=2))) == 2
    assert hub[0] == ("user/name", {"name": None, "split": "train", "revision": None, "streaming": streaming})


def test_hub_unknown_split_and_configuration(hub):
    with pytest.raises(MissingInputError, match=r"user/name.*test"):
        open_rows("user/name", split="test")
    with pytest.raises(MissingInputError, match="nosuch"):
        open_rows("user/name", split="train", name="nosuch")


def test_hub_offline():
    """The test session is offline: the real library says so."""
    with pytest.raises((NetworkError, MissingInputError), match="nobody/nothing"):
        open_rows("nobody/nothing", split="train")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ConnectionError("no route"), NetworkError),
        (TimeoutError("slow"), NetworkError),
        (datasets.exceptions.DatasetNotFoundError("Dataset 'user/nam' doesn't exist on the Hub"), MissingInputError),
        (RuntimeError("Dataset scripts are no longer supported"), DataError),
    ],
)
@pytest.mark.parametrize("when", ["open", "read"])
def test_hub_failures(monkeypatch, tmp_path, error, kind, when):
    def broken():
        yield {"a": 1}
        raise error

    def load_dataset(*_, **__):
        if when == "open":
            raise error
        return broken()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    put(tmp_path, "user_name.jsonl", "{}")
    with pytest.raises(kind, match="user/name") as caught:
        list(open_rows("user/name", split="train"))
    assert type(caught.value) is kind
    if kind is MissingInputError:
        assert "Did you mean `user_name.jsonl`?" in str(caught.value)
