"""The numbers of a run exactly once, whatever kills it; and a screen that is tidy wherever it is."""

import contextlib
import io
import json
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
import rich.console
from rich.ansi import AnsiDecoder
from rich.cells import cell_len

from jaxtune import tensorboard
from jaxtune.console import Console, Progress, answers_table, answers_text, fit, isolate, visible
from jaxtune.metrics import MetricsLog, lines_until


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    """A function that makes a terminal of some width."""

    def make(width):
        monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setenv("LINES", "25")
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.delenv("NO_COLOR", raising=False)
        return Terminal()

    return make


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def train(log, *steps):
    for step in steps:
        log.write(step, {"loss": 1 / step, "learning_rate": 1e-4, "tokens": 64, "rows": 8 * step})


# --- metrics.jsonl


def test_floats_come_back_exactly_and_lines_are_told_apart(tmp_path):
    loss = float(np.float32(0.1) / np.float32(3))
    with MetricsLog(tmp_path, None, tensorboard=False) as log:
        log.write(1, {"loss": loss, "grad_norm": float("inf"), "tokens": 12})
        log.write(2, {"loss": None, "tokens": 0})
        log.write(2, {"eval_loss": 0.1 + 0.2})
        for values in ({"tokens": 1}, {"loss": 1.0, "eval_loss": 1.0}):
            with pytest.raises(ValueError, match="one of `loss` and `eval_loss`"):
                log.write(3, values)
    assert lines_of(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": loss, "grad_norm": None, "tokens": 12},
        {"step": 2, "loss": None, "tokens": 0},
        {"step": 2, "eval_loss": 0.1 + 0.2},
    ]


def test_resuming_removes_what_will_be_done_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(tmp_path, None, tensorboard=False) as log:
        train(log, 1, 2)
        log.write(2, {"eval_loss": 2.0})
        before = path.read_bytes()
        train(log, 3)
        log.write(3, {"eval_loss": 3.0})
    with open(path, "ab") as file:
        file.write(b'{"step": 1, "lo')
    with MetricsLog(tmp_path, 2, tensorboard=False) as log:
        assert path.read_bytes() == before
        train(log, 3)
    assert [(line["step"], "loss" in line) for line in lines_of(path)] == [(1, True), (2, True), (2, False), (3, True)]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("start", [None, 0])
def test_a_run_that_starts_anew_has_a_new_log(tmp_path, start):
    """The evaluation before the first step is done again, too."""
    for _ in range(2):
        with MetricsLog(tmp_path, start, tensorboard=False) as log:
            log.write(0, {"eval_loss": 3.0})
            train(log, 1)
    assert [line["step"] for line in lines_of(tmp_path / "metrics.jsonl")] == [0, 1]


def test_lines_until_leaves_out_what_is_no_line():
    good = b'{"step": 1}\n{"step": 2}\n'
    for torn in (b'{"step": 1', b'{"step": 1}', b"\xff\x00\n", b'{"loss": 1}\n', b"[1]\n", b'{"step": "x"}\n'):
        assert lines_until(good + torn, 5) == good, torn
    assert lines_until(b"\xff\n" + good, 1) == b'{"step": 1}\n'


def test_kill_9_loses_no_line_that_was_written(tmp_path):
    script = (
        "import sys, itertools; from pathlib import Path; from jaxtune.metrics import MetricsLog\n"
        "log = MetricsLog(Path(sys.argv[1]), None, tensorboard=True)\n"
        "for step in itertools.count(1): log.write(step, {'loss': 1 / step}); print(step, flush=True)"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        time.sleep(random.Random(0).uniform(0.01, 0.1))
        process.kill()
        last = int(process.stdout.read().split()[-1])
    assert process.returncode == -signal.SIGKILL
    with MetricsLog(tmp_path, last - 1, tensorboard=True) as log:
        train(log, last, last + 1)
    assert lines_of(tmp_path / "metrics.jsonl")[: last - 1] == [{"step": s, "loss": 1 / s} for s in range(1, last)]
    assert [line["step"] for line in lines_of(tmp_path / "metrics.jsonl")] == list(range(1, last + 2))


@contextlib.contextmanager
def full_disk(limit):
    """No file can grow over so many bytes.  pytest's own output may be such a file, so this ends inside the test."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_ends_the_log_and_not_the_run(tmp_path):
    screen = io.StringIO()
    with (
        Console(tmp_path / "log.txt", screen) as console,
        MetricsLog(tmp_path, None, True, console.say) as log,
        full_disk(2000),
    ):
        for step in range(1, 100):
            train(log, step)
            console.say("a line")
    assert screen.getvalue().count("a line\n") == 99
    warnings = [line for line in screen.getvalue().splitlines() if line.startswith("WARNING")]
    assert (
        len(warnings) == 2 and "metrics.jsonl" in warnings[0] + warnings[1] and "tfevents" in warnings[0] + warnings[1]
    )
    # What there was room for is whole, and a resumed run drops the torn rest.
    whole = lines_until((tmp_path / "metrics.jsonl").read_bytes(), 100)
    assert whole.count(b"\n") > 10


def test_a_log_that_cannot_be_opened_is_done_without(tmp_path):
    for name in ("metrics.jsonl", "log.txt"):
        (tmp_path / name).mkdir()
    (tmp_path / "tensorboard").write_text("in the way")
    screen = io.StringIO()
    with Console(tmp_path / "log.txt", screen) as console, MetricsLog(tmp_path, 3, True, console.say) as log:
        train(log, 4)
    warnings = screen.getvalue().splitlines()
    assert len(warnings) == 3 and all(line.startswith("WARNING") for line in warnings)


# --- TensorBoard


def test_crc32c_known_answer():
    assert tensorboard.crc32c(b"123456789") == 0xE3069283


def test_tensorboard_files_are_read_by_tensorboards_own_protobuf(tmp_path):
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    masked_crc32c = pytest.importorskip("tensorboardX.record_writer").masked_crc32c
    with MetricsLog(tmp_path, 199, tensorboard=True) as log:
        log.write(200, {"loss": 0.1, "grad_norm": None, "tokens": 10**9})
        log.write(200, {"eval_loss": -1e300})
    data = next((tmp_path / "tensorboard").iterdir()).read_bytes()
    found = []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        event = data[12 : 12 + length]
        checks = struct.unpack("<II", data[8:12] + data[12 + length : 16 + length])
        assert checks == (masked_crc32c(data[:8]), masked_crc32c(event))
        found.append(event_pb2.Event.FromString(event))
        assert abs(found[-1].wall_time - time.time()) < 60
        data = data[16 + length :]
    assert found[0].file_version == "brain.Event:2"
    assert (found[1].step, found[1].session_log.status) == (200, event_pb2.SessionLog.START)
    values = [(e.step, v.tag, v.simple_value) for e in found[2:] for v in e.summary.value]
    assert values == [
        (200, "train/loss", np.float32(0.1)),
        (200, "train/tokens", 1e9),
        (200, "eval/loss", np.float32(-3e38)),
    ]


def test_two_starts_make_two_files(tmp_path):
    for _ in range(2):
        with MetricsLog(tmp_path, 1, tensorboard=True):
            pass
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


# --- the screen


def run(console, total=6, start=0, log_every=2, stop=None, tokens=1000, first_seconds=100.0):
    with Progress(console, total=total, start=start, log_every=log_every) as progress:
        for step in range(start + 1, (stop or total) + 1):
            seconds = first_seconds if step == start + 1 else 0.5
            progress.step(step, loss=1 / step, learning_rate=1e-4, tokens=tokens, seconds=seconds)
            if step == 3:
                progress.evaluation(step, 0.25)
                console.say("[red]not markup[/red]")


def test_plain_lines_without_a_terminal(tmp_path):
    screen = io.StringIO()
    with Console(tmp_path / "log.txt", screen) as console:
        run(console, total=7, log_every=2)
    assert screen.getvalue().splitlines() == [
        "step 2/7  loss 0.5000  lr 1.0e-04  tok/s 2,000  eta 0:00:02",
        "step 3/7  eval_loss 0.2500",
        "[red]not markup[/red]",
        "step 4/7  loss 0.2500  lr 1.0e-04  tok/s 2,000  eta 0:00:02",
        "step 6/7  loss 0.1667  lr 1.0e-04  tok/s 2,000  eta 0:00:00",
        "step 7/7  loss 0.1429  lr 1.0e-04  tok/s 2,000  eta 0:00:00",
    ]
    assert (tmp_path / "log.txt").read_text() == screen.getvalue()


def test_the_step_that_compiles_counts_neither_for_speed_nor_for_eta():
    screen = io.StringIO()
    run(Console(stream=screen), start=10, total=100, log_every=1, stop=12)
    first, second = screen.getvalue().splitlines()
    assert first == "step 11/100  loss 0.0909  lr 1.0e-04"
    assert second.endswith("tok/s 2,000  eta 0:00:44")


def test_the_last_step_of_a_run_that_stops_early_has_its_line():
    screen = io.StringIO()
    run(Console(stream=screen), total=100, log_every=10, stop=13)
    assert [line.split()[1] for line in screen.getvalue().splitlines() if "loss" in line] == [
        "3/100",
        "10/100",
        "13/100",
    ]


def test_a_step_without_targets_and_a_step_without_time():
    screen = io.StringIO()
    with Progress(Console(stream=screen), total=2, log_every=1) as progress:
        for step in (1, 2):
            progress.step(step, loss=None, learning_rate=0.0, tokens=0, seconds=0.0)
    assert screen.getvalue().splitlines()[1] == "step 2/2  loss n/a  lr 0.0e+00"


@pytest.mark.parametrize("width", [40, 100])
def test_the_bar_fits_the_terminal(tmp_path, terminal, width):
    screen = terminal(width)
    with Console(tmp_path / "log.txt", screen) as console:
        assert console.width == width
        run(console, total=3000, stop=12, log_every=5)
    frames = [text.plain for text in AnsiDecoder().decode(screen.getvalue().replace("\r", "\n"))]
    assert max(cell_len(frame) for frame in frames) <= width
    assert any("12/3000" in frame and "loss 0.0833" in frame and "eta 0:24:54" in frame for frame in frames)
    # Lines above the bar, not broken by markup; the plain lines are in the log alone.
    assert any(frame.strip() == "[red]not markup[/red]" for frame in frames)
    assert "step 5/3000  loss" not in screen.getvalue()
    log = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.split()[1] for line in log if "loss" in line] == ["3/3000", "5/3000", "10/3000", "12/3000"]


def test_parts_go_by_how_much_they_are_wanted():
    parts = {"loss": "loss 1.0", "lr": "lr 1e-4", "eta": "eta 0:01:00"}
    assert fit(parts, 80) == "loss 1.0  eta 0:01:00  lr 1e-4"
    assert fit(parts, 21) == "loss 1.0  eta 0:01:00"
    assert fit(parts, 20) == "loss 1.0  lr 1e-4"
    assert fit(parts, 5) == ""


class Broken(Terminal):
    """A terminal whose other end has gone after some characters."""

    def __init__(self, error, room):
        super().__init__()
        self.error, self.room = error, room

    def write(self, text):
        self.room -= len(text)
        if self.room < 0:
            raise self.error
        return len(text)


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), OSError(5, "Input/output error")])
@pytest.mark.parametrize("room", [0, 60, 300])
@pytest.mark.parametrize("tty", [True, False])
def test_a_screen_that_goes_away_stops_nothing(tmp_path, monkeypatch, terminal, error, room, tty):
    terminal(100)
    screen = Broken(error, room)
    monkeypatch.setattr(Broken, "isatty", lambda self: tty)
    # rich gives its own standard output away on a broken pipe; the test's must stay.
    monkeypatch.setattr(rich.console.Console, "on_broken_pipe", lambda self: (_ for _ in ()).throw(SystemExit(1)))
    with Console(tmp_path / "log.txt", screen) as console:
        run(console, total=20, log_every=1)
    assert screen.room < 0
    assert (tmp_path / "log.txt").read_text().splitlines()[-1].startswith("step 20/20  loss 0.0500")


@pytest.mark.parametrize("how", ["{} >&- 2>&-", "{} </dev/null >/dev/full", "{} | head -1"])
def test_a_process_without_standard_output_finishes(tmp_path, how):
    script = (
        "import sys; from pathlib import Path; from jaxtune.console import Console, Progress\n"
        "with Console(Path(sys.argv[1])) as console, Progress(console, total=20000, log_every=1) as progress:\n"
        "  for step in range(1, 20001): progress.step(step, loss=1.0, learning_rate=1.0, tokens=1, seconds=1.0)\n"
        "Path(sys.argv[1] + '.done').touch()"
    )
    command = how.format(f"{sys.executable} -c \"$SCRIPT\" '{tmp_path}/log.txt'")
    environment = os.environ | {"SCRIPT": script, "PYTHONUNBUFFERED": ""}
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "log.txt.done").exists()
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 20000


def test_a_quiet_console_writes_nothing(tmp_path, capsys):
    with Console(tmp_path / "log.txt", quiet=True) as console:
        run(console)
        console.say_answers(ROWS)
    with MetricsLog(tmp_path, None, tensorboard=True, quiet=True) as log:
        train(log, 1)
    assert capsys.readouterr().out == "" and list(tmp_path.iterdir()) == []


def test_a_screen_that_knows_only_ascii():
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    Console(stream=screen).say("سلام")
    assert screen.buffer.getvalue() == b"\\u0633\\u0644\\u0627\\u0645\n"


# --- answers

ROWS = [
    {
        "prompt": "پایتخت ایران کجاست؟ " * 4,
        "reference": "تهران",
        "before": "I do not know",
        "after": "تهران",
        "match_before": False,
        "match_after": True,
    },
    {"prompt": "[bold]2+2\x1b[31m\u202e", "reference": "4", "before": "5\nor 6", "after": "4", "match_before": None},
]


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_keeps_its_columns_with_right_to_left_text(width):
    screen = io.StringIO()
    rich.console.Console(file=screen, width=width).print(answers_table(ROWS, width))
    lines = screen.getvalue().splitlines()
    assert {cell_len(line) for line in lines} <= {cell_len(lines[0])} and cell_len(lines[0]) <= width
    assert {line.count("│") + line.count("┃") for line in lines if "─" not in line and "━" not in line} == {5}
    # Each cell's isolates are closed within the cell, so that borders stay where they are.
    for cell in (cell for line in lines for cell in line.split("│")):
        assert cell.count("\u2068") == cell.count("\u2069") == any("\u0600" <= c <= "\u06ff" for c in cell)
    text = screen.getvalue()
    assert "[bold]2+2" in text and "\\u001b" in text and "\\u202e" in text and "\u202e" not in text
    assert text.count("✓") == 1 and text.count("✗") == 1


def test_answers_as_text():
    assert answers_text(ROWS[1:]) == "\n".join(
        [
            "[1]",
            "  prompt            [bold]2+2\\u001b[31m\\u202e",
            "  reference         4",
            "  before            5",
            "                    or 6",
            "  after             4",
        ]
    )
    assert "  after (right)     \u2068تهران\u2069" in answers_text(ROWS)


@pytest.mark.parametrize(("width", "table"), [(100, True), (60, False)])
def test_answers_go_where_there_is_room(tmp_path, terminal, width, table):
    screen = terminal(width)
    with Console(tmp_path / "log.txt", screen) as console:
        console.say_answers(ROWS)
    assert ("│" in screen.getvalue()) == table
    assert (tmp_path / "log.txt").read_text() == answers_text(ROWS) + "\n"


def test_visible_and_isolate():
    assert visible("a\tb\nc\r") == "a    b\nc\\u000d"
    assert visible("می\u200cرود") == "می\u200cرود"
    assert isolate("abc") == "abc"
