"""The same command, started again however it ended, ends in the same bits, with every step logged once.

The runs are real ones (`python -m jaxtune.train`).  Two chains of them are interrupted in one way after the other and
then left to finish: one by kill -9, one by signals and a full disk.  A third, never interrupted, says what both must
come to.
"""

import json
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny_run
from tiny_run import STEPS, Place, metrics

from jaxtune import rundir, train
from jaxtune.errors import CannotCreateError, DataError, StorageError, UserError
from jaxtune.signals import stop_requests

PATIENCE = 600  # seconds until a run that does not come to its point is given up
TOKEN = "hf_" + "cAnArY" * 6
RESUMED = re.compile("^resumed at step ([0-9]+) of", re.MULTILINE)


class Link(NamedTuple):
    """One start of the command: left alone, or `done` to when `when` of its directory and of what this start has said
    is so, after `delay` more seconds."""

    name: str
    when: Callable[[Path, str], bool] | None = None
    done: Callable[[subprocess.Popen], None] = subprocess.Popen.kill
    delay: float = 0.0
    settings: tuple[str, ...] = ()


class Ended(NamedTuple):
    """What a link left behind."""

    code: int
    run: dict[str, Any]
    checkpoints: list[int]
    logged: int  # the last step of metrics.jsonl
    said: str  # in log.txt since the link before


def steps_saved(workdir: Path) -> list[int]:
    return sorted(int(p.name) for p in (workdir / "checkpoints").glob("[0-9]*"))


def last_logged(workdir: Path) -> int:
    return max((line["step"] for line in metrics(workdir)), default=0)


def starting(workdir: Path, said: str) -> bool:
    return bool(said)


def logged(step: int) -> Callable[[Path, str], bool]:
    """This start has logged a step, and two of its own: until it trains, the lines are of an earlier one."""

    def when(workdir: Path, said: str) -> bool:
        resumed = RESUMED.search(said)
        first = int(resumed[1]) if resumed else 0
        return (bool(resumed) or "step 0/" in said) and last_logged(workdir) >= max(step, first + 2)

    return when


def committed(step: int) -> Callable[[Path, str], bool]:
    return lambda workdir, said: (workdir / "checkpoints" / str(step)).is_dir()


def send(*numbers: int) -> Callable[[subprocess.Popen], None]:
    def done(process: subprocess.Popen) -> None:
        for number in numbers:
            process.send_signal(number)

    return done


def fill_disk(process: subprocess.Popen) -> None:
    """No file of its may grow over 14 kB, as if the disk had no more; a checkpoint has larger ones."""
    _, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (14_000, hard))


def log_of(workdir: Path) -> str:
    path = workdir / "log.txt"
    return path.read_text(encoding="utf-8") if path.exists() else ""


def interrupt(place: Place, workdir: Path, link: Link) -> Ended:
    before = log_of(workdir)
    deadline = time.monotonic() + PATIENCE
    with tiny_run.start(place, workdir, *link.settings) as process:
        try:
            while link.when and process.poll() is None and time.monotonic() < deadline:
                if link.when(workdir, log_of(workdir)[len(before) :]):
                    time.sleep(link.delay)
                    link.done(process)
                    break
                time.sleep(0.001)
            code = process.wait(max(1.0, deadline - time.monotonic()))
        finally:
            process.kill()
    path = workdir / "run.json"
    run = json.loads(path.read_text()) if path.exists() else {}
    return Ended(code, run, steps_saved(workdir), last_logged(workdir), log_of(workdir)[len(before) :])


Between = dict[str, Callable[[Path], None]]


def follow(place: Place, workdir: Path, links: list[Link], between: Between) -> dict[str, Ended]:
    """Every link in turn in one directory; `between` has what is done to it before a link, by the link's name."""
    ended = {}
    for link in links:
        between.get(link.name, lambda workdir: None)(workdir)
        ended[link.name] = interrupt(place, workdir, link)
    return ended


def kill_links(seed: int) -> list[Link]:
    """Killed early, right after a commit, at random moments, and once more after its newest checkpoint has rotted."""
    moments = random.Random(seed)

    def at_random(first: int, last: int) -> Link:
        when = logged(moments.randint(first, last))
        return Link(f"random {first}", when, delay=moments.uniform(0.0, 0.02))

    return [
        at_random(1, 2),
        Link("commit 3", committed(3)),
        at_random(5, 8),
        Link("commit 12", committed(12)),
        Link("rotten", logged(13), delay=moments.uniform(0.0, 0.02)),
        at_random(15, 17),
        Link("finish"),
    ]


def rot(workdir: Path) -> None:
    """One bit in each file of the newest checkpoint's arrays: Orbax would read some of them without a word."""
    newest = workdir / "checkpoints" / str(steps_saved(workdir)[-1])
    for path in newest.glob("arrays/**/d/*"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data)


# How often it logs and saves may change from start to start; here almost nothing is saved but for the signals.
RARELY = ("train.log_every=7", "train.save_every=100")
STOPS = [
    Link("starting", starting, send(signal.SIGTERM)),
    Link("term", logged(2), send(signal.SIGTERM), settings=RARELY),
    Link("full", logged(3), fill_disk),
    Link("hup", logged(5), send(signal.SIGHUP), settings=RARELY),
    Link("int", logged(9), send(signal.SIGINT), settings=RARELY),
    Link("twice", starting, send(signal.SIGINT, signal.SIGTERM)),
    Link("finish"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    # A shell script's `&` has SIGINT ignored and nohup SIGHUP, and so would every process started here.
    defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in defaults.items()}
    yield tiny_run.make(tmp_path_factory.mktemp("place"))
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def reference(place):
    """A run that nobody interrupted."""
    workdir = place.root / "reference"
    with tiny_run.start(place, workdir, HF_TOKEN=TOKEN) as process:
        assert process.wait(PATIENCE) == 0, Path(f"{workdir}.screen").read_text()
    return workdir


@pytest.fixture(scope="module")
def chains(place, reference):
    """{'killed', 'stopped': (workdir, {link: how it ended})}; both chains run side by side."""
    halfway = {"twice": lambda workdir: shutil.copytree(workdir, place.root / "halfway")}
    plans = {"killed": (kill_links(0), {"rotten": rot}), "stopped": (STOPS, halfway)}
    with ThreadPoolExecutor() as pool:
        found = {n: pool.submit(follow, place, place.root / n, *plan) for n, plan in plans.items()}
        return {name: (place.root / name, future.result()) for name, future in found.items()}


def exact(line: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics.jsonl with its floats in hexadecimal, without the time it took."""
    return {k: v.hex() if isinstance(v, float) else v for k, v in line.items() if k not in tiny_run.TIMED}


def arrays_of(step: Path) -> dict[str, np.ndarray]:
    """Every array of a checkpoint, by the shapes and dtypes in its record."""
    leaves = json.loads((step / "record.json").read_text())["leaves"]
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def struct(text: str) -> jax.ShapeDtypeStruct:
        dtype, _, shape = text.rstrip("]").partition("[")
        return jax.ShapeDtypeStruct([int(n) for n in shape.split(",") if n], dtype, sharding=here)

    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
        wanted = {path: struct(text) for path, text in leaves.items()}
        found = reader.restore(step / "arrays", args=ocp.args.StandardRestore(wanted))
    return {path: np.asarray(array) for path, array in found.items()}


def assert_same_run(workdir: Path, reference: Path) -> None:
    """Adapter, optimiser state and row cursor, and the numbers of every step."""
    lines, expected = metrics(workdir), metrics(reference)
    assert [line["step"] for line in expected if "loss" in line] == list(range(1, STEPS + 1))
    assert [exact(line) for line in lines] == [exact(line) for line in expected]

    name = "adapter/adapter_model.safetensors"
    assert (workdir / name).read_bytes() == (reference / name).read_bytes()
    assert (workdir / "eval.json").read_bytes() == (reference / "eval.json").read_bytes()

    last = f"checkpoints/{STEPS}"
    assert (workdir / last / "record.json").read_bytes() == (reference / last / "record.json").read_bytes()
    arrays, wanted = arrays_of(workdir / last), arrays_of(reference / last)
    assert any("/mu/" in path for path in wanted) and any(path.endswith("count") for path in wanted)
    assert {k: v.tobytes() for k, v in arrays.items()} == {k: v.tobytes() for k, v in wanted.items()}

    run = json.loads((workdir / "run.json").read_text())
    assert (run["status"], run["exit_code"]) == ("finished", 0)


def test_the_reference_trains(reference):
    """What is compared is alive: the loss falls, dropout and shuffling leave no two steps alike."""
    lines = metrics(reference)
    evaluations = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    assert list(evaluations) == [0, *range(8, STEPS + 1, 8)]
    assert evaluations[STEPS] < evaluations[0] - 0.1
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(set(losses)) == STEPS
    assert lines[-2]["rows"] == 8 * STEPS and steps_saved(reference) == [STEPS - 1 - (STEPS - 1) % 3, STEPS]


def test_killed_at_any_moment_it_ends_in_the_same_bits(chains, reference):
    workdir, ended = chains["killed"]
    assert {name: end.code for name, end in ended.items()} == {
        name: -signal.SIGKILL if name != "finish" else 0 for name in ended
    }
    # A killed run has had no time to say so.
    assert ended["commit 3"].run["status"] == "running"
    newest = ended["commit 3"].checkpoints[-1]
    assert f"resumed at step {newest} of {STEPS}, row {8 * newest}" in ended["random 5"].said
    assert_same_run(workdir, reference)


def test_a_rotten_checkpoint_is_set_aside_and_the_one_before_it_used(chains, reference):
    workdir, ended = chains["killed"]
    said = ended["rotten"].said
    *_, older, newest = ended["commit 12"].checkpoints
    assert f"checkpoint {newest} is damaged" in said and "SHA-256" in said
    assert f"resumed at step {older} of {STEPS}" in said
    assert [p.name for p in (workdir / "checkpoints" / "quarantine").iterdir()] == [str(newest)]
    assert_same_run(workdir, reference)


def test_one_signal_saves_and_stops(chains, reference):
    workdir, ended = chains["stopped"]
    for name in ("term", "hup", "int"):
        code, run, checkpoints, last, said = ended[name]
        assert (code, run["status"], run["exit_code"]) == (75, "stopped", 75), name
        # No finished step is lost.
        assert checkpoints[-1] == last < STEPS, name
        assert said.rstrip().endswith(run["resume_command"])
    assert ended["term"].logged < ended["hup"].logged < ended["int"].logged
    # The resumed runs went on from the stops.
    assert f"resumed at step {ended['term'].logged} of {STEPS}" in ended["full"].said
    assert_same_run(workdir, reference)


def test_a_full_disk_ends_the_run_and_loses_nothing(chains):
    _, ended = chains["stopped"]
    code, run, checkpoints, _, said = ended["full"]
    assert (code, run["status"], run["exit_code"]) == (74, "failed", 74)
    assert "could not be written" in run["error"] and run["error"] in said and "run the same command again" in said
    assert checkpoints[-1] >= ended["term"].checkpoints[-1]
    # The next start found room, and no trace of the half save.
    assert f"resumed at step {checkpoints[-1]} of {STEPS}" in ended["hup"].said


def test_a_signal_before_the_first_step_stops_at_once(chains):
    _, ended = chains["stopped"]
    assert (ended["starting"].code, ended["starting"].logged, ended["starting"].checkpoints) == (75, 0, [])
    assert ended["starting"].run["status"] == "stopped"


def test_the_second_signal_ends_the_run_at_once(chains):
    _, ended = chains["stopped"]
    assert ended["twice"].code == 130
    # It had not gone on yet, and what was saved is still there.
    assert ended["twice"].checkpoints == ended["int"].checkpoints
    assert f"resumed at step {ended['int'].logged} of {STEPS}" in ended["finish"].said


def test_a_finished_run_started_again_changes_nothing(place, reference, tmp_path):
    workdir = tmp_path / "again"
    shutil.copytree(reference, workdir)
    before = tiny_run.contents(workdir)
    with tiny_run.start(place, workdir, "train.log_every=3") as process:
        assert process.wait(PATIENCE) == 0
    after = tiny_run.contents(workdir)
    new = {name for name in after if before.get(name) != after[name]}
    # The model card has the config in it.
    new -= {"adapter/README.md"}
    assert {name.split("/")[0] for name in new} <= {"run.json", "config.json", "tensorboard"}
    assert before.keys() <= after.keys()
    assert_same_run(workdir, reference)


def edit(place: Place, tmp_path: Path) -> str:
    rows = place.train.read_text(encoding="utf-8").splitlines()
    (tmp_path / "edited.jsonl").write_text("\n".join(rows[:-1]) + "\n", encoding="utf-8")
    return f"data.train={tmp_path / 'edited.jsonl'}"


# Settings; the error; and lines of its table: key, was, is.
CHANGES = {
    "settings": (
        ["optim.learning_rate=1e-3", "train.seed=1", "train.steps=60"],
        (UserError, 64),
        ["optim.learning_rate 0.005 0.001", "train.seed 0 1", f"train.steps {STEPS} 60"],
    ),
    "rank": (["peft.r=8"], (UserError, 64), ["peft.r 4 8"]),
    "rows": ([], (DataError, 65), ["rows 60 rows, "]),
    "never": (["checkpoint.resume=never"], (CannotCreateError, 73), []),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_meaning_is_refused_and_changes_nothing(change, place, reference, tmp_path):
    settings, (kind, code), rows = CHANGES[change]
    workdir = tmp_path / "run"
    shutil.copytree(reference, workdir)
    before = tiny_run.contents(workdir)
    if change == "rows":
        settings = [edit(place, tmp_path)]
    with pytest.raises(kind) as caught:
        train.main(tiny_run.arguments(place, workdir, "mesh.data=4", "mesh.tensor=2", *settings))
    assert (type(caught.value), caught.value.exit_code) == (kind, code)
    table = [" ".join(line.split()) for line in str(caught.value).splitlines()]
    assert all(any(line.startswith(row) for line in table) for row in rows)
    assert "--workdir" in str(caught.value) and len(str(caught.value).splitlines()) < 10
    assert tiny_run.contents(workdir) == before
    assert str(caught.value) in log_of(workdir)


def test_two_runs_cannot_share_a_directory(place, reference, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(reference, workdir)
    before = tiny_run.contents(workdir)
    with rundir.run_lock(workdir), pytest.raises(CannotCreateError, match="Another run is using") as caught:
        train.main(tiny_run.arguments(place, workdir))
    assert caught.value.exit_code == 73
    assert tiny_run.contents(workdir) == before


def test_another_mesh_goes_on_with_the_same_rows_and_losses(place, chains, reference):
    """Saved on 2 devices, gone on with 8 in three axes; and now asked for answers that the first start was not."""
    workdir, ended = place.root / "halfway", chains["stopped"][1]
    settings = ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "evaluate.samples=2", "evaluate.max_new_tokens=2"]
    assert train.main(tiny_run.arguments(place, workdir, *settings)) == 0
    start = ended["int"].logged
    lines, expected = metrics(workdir), metrics(reference)
    for line, wanted in zip(lines, expected, strict=True):
        same = exact if line["step"] <= start else lambda x: {k: x.get(k) for k in ("step", "rows", "tokens")}
        assert same(line) == same(wanted)
        value = "loss" if "loss" in wanted else "eval_loss"
        assert line[value] == pytest.approx(wanted[value], rel=1e-5, abs=0)
    # The other mesh really computed: sums in another order.
    assert [exact(line) for line in lines] != [exact(line) for line in expected]
    answers = [json.loads(line) for line in (workdir / "samples.jsonl").read_text().splitlines()]
    assert len(answers) == 2 and all({"prompt", "reference", "before", "after"} <= row.keys() for row in answers)


def test_no_secret_of_the_environment_is_written(reference):
    files = [*reference.rglob("*"), Path(f"{reference}.screen")]
    assert [path for path in files if path.is_file() and TOKEN.encode() in path.read_bytes()] == []


def test_signals_that_were_ignored_stay_ignored():
    """As under `nohup`, whose run must outlive the terminal; and off the main thread nothing can be caught at all."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_requests() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop == []
            signal.raise_signal(signal.SIGTERM)
            assert stop == [signal.SIGTERM]
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)
    with ThreadPoolExecutor() as pool:
        assert pool.submit(lambda: list(stop_requests().__enter__())).result() == []


def test_run_json_is_of_accepted_runs_and_of_the_first_process(tmp_path):
    quiet = rundir.RunRecord(tmp_path, "again", quiet=True)
    quiet.start({})
    quiet.end(0)
    record = rundir.RunRecord(tmp_path, "again")
    record.fail(UserError("refused before it was accepted"))
    assert list(tmp_path.iterdir()) == []
    for end, told in {
        lambda: record.end(0): ("finished", 0, None),
        lambda: record.end(75): ("stopped", 75, None),
        lambda: record.fail(DataError("bad")): ("failed", 65, "bad"),
        lambda: record.fail(KeyboardInterrupt()): ("failed", 130, "KeyboardInterrupt"),
        lambda: record.fail(ZeroDivisionError("x" * 9999)): ("failed", 1, "x" * 2000),
    }.items():
        record.start({"train": {"seed": 1}})
        assert json.loads((tmp_path / "run.json").read_text())["status"] == "running"
        end()
        run = json.loads((tmp_path / "run.json").read_text())
        assert (run["status"], run["exit_code"], run.get("error")) == told and run["resume_command"] == "again"
    assert json.loads((tmp_path / "config.json").read_text()) == {"train": {"seed": 1}}


def test_a_full_disk_does_not_hide_what_ended_the_run(tmp_path):
    record = rundir.RunRecord(tmp_path, "again")
    record.start({})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4, hard))
        record.fail(ValueError("the reason"))
        with pytest.raises(StorageError):
            record.end(0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "running"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 9))
def test_more_kills(place, reference, tmp_path, seed):
    ended = follow(place, tmp_path / "run", kill_links(seed), {"rotten": rot})
    assert ended["finish"].code == 0
    assert_same_run(tmp_path / "run", reference)
