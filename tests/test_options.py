"""When a run saves, what it calls best, where it begins, and who else hears of it: each in real runs, which end in the
bits of one that nobody disturbed."""

import json
import os
import shutil
import signal
import sys
import time
import types
from fractions import Fraction
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_run
from test_resume import arrays_of, exact, steps_saved

from jaxtune import cadence, config, deterministic, identity, kept, optim, origin, scoring, wandb_log
from jaxtune.data.examples import Prompt
from jaxtune.errors import CannotCreateError, DataError, MissingInputError, NoCheckpointError, UserError

PATIENCE = 600
STEPS = 20
# 60 rows in batches of 8: epochs end in steps 8, 15 and 23.
EPOCHS = ["train.save_unit=epoch", "train.eval_unit=epoch", "train.eval_every=1", "train.save_every=none"]
EPOCHS += ["checkpoint.keep_last_n=9", "checkpoint.metric=perplexity", "checkpoint.mode=max"]

FAKE_WANDB = """
import json, os
TO = os.environ["FAKE_WANDB"]
def told(**what):
    with open(TO, "a") as file: file.write(json.dumps(what) + "\\n")
    if os.environ.get("FAKE_WANDB_FAULT") == what["call"]: raise RuntimeError("no route to host\\nand more")
class Run:
    def log(self, values, step): told(call="log", step=step, **values)
    def finish(self, exit_code=0): told(call="finish", exit_code=exit_code)
def init(**how):
    told(call="init", **how)
    return Run()
"""


# ---------------------------------------------------------------- Cadence


@pytest.mark.parametrize(("rows", "batch", "every"), [(60, 8, 1), (60, 8, 3), (7, 16, 1), (5, 5, 2), (33, 4, 2)])
def test_an_epoch_counts_at_the_step_that_completes_it(rows, batch, every):
    """Against epochs counted in fractions."""
    expected, ends = [], 0
    for step in range(1, 100):
        done = Fraction(step * batch, rows) // every
        if done > ends:
            expected.append(step)
        ends = done
    due = [n for n in range(1, 100) if cadence.due(n, every=every, unit="epoch", batch=batch, rows=rows)]
    assert due == expected and (rows != 60 or every != 1 or due[:3] == [8, 15, 23])


def test_cadence_reads_the_config():
    c = config.get_default().train
    assert [n for n in range(1, 400) if cadence.cadence(c, "save", range(60))(n)] == [100, 200, 300]
    assert not any(cadence.cadence(c, "eval", range(60))(n) for n in range(1, 400))
    c.save_unit = "epoch"
    assert [n for n in range(1, 20) if cadence.cadence(c, "save", range(60))(n)] == [8, 15]


# ---------------------------------------------------------------- What is best


def plain(**changes):
    c = config.get_default()
    c.model.id = c.data.train = "x"
    for path, value in changes.items():
        config.set_value(c, path.replace("__", "."), value)
    config.check(c)
    return config.to_json(c)


def test_goals():
    assert scoring.goal_of(plain()) == ("eval_loss", "min")
    scored = {"evaluate__metrics": ("rouge", "squad_v2"), "evaluate__samples": 4, "data__eval": "y"}
    for metric, mode in {"perplexity": "min", "rougeL": "max", "f1": "max", "exact_match": "max"}.items():
        assert scoring.goal_of(plain(checkpoint__metric=metric, **scored)) == (metric, mode)
    assert scoring.goal_of(plain(checkpoint__metric="rouge1", checkpoint__mode="min", **scored)).mode == "min"
    for wrong, said in {
        "rougel": "Did you mean `rougeL`",
        "chrf": "Scores come from `evaluate.metrics`: rouge, chrf",
    }.items():
        with pytest.raises(UserError, match=said):
            scoring.goal_of(plain(checkpoint__metric=wrong, **scored))
    with pytest.raises(UserError, match=r"`evaluate.samples` is 0: no answers are scored"):
        scoring.goal_of(plain(checkpoint__metric="exact_match", data__eval="y"))
    with pytest.raises(UserError, match=r"no evaluations without `data.eval`"):
        scoring.goal_of(plain(checkpoint__metric="rougeL", **scored | {"data__eval": None}))
    with pytest.raises(UserError, match=r"`evaluate.samples` is 0"):
        scoring.goal_of(plain(evaluate__metrics="rouge"))


def test_scores_of_answers():
    made = {"row": 1, "ids": [1], "text": "q", "question": "q", "row_id": None}
    asked = [("a b c", ["a b c", "a d"]), ("x", ["x"]), ("none", [])]
    prompts = [Prompt(reference=reference, references=right, **made) for reference, right in asked]
    found = scoring.score_answers(prompts, ["a b d", " x ", "none"], ("rouge", "squad_v2"), "none")
    assert found["exact_match"] == pytest.approx(2 / 3) and found["rouge1"] == pytest.approx((4 / 5 + 2) / 3)
    assert (found["HasAns_exact"], found["NoAns_exact"]) == (50.0, 100.0)
    assert scoring.losses(np.log(7.0)) == pytest.approx({"eval_loss": np.log(7.0), "perplexity": 7.0})
    assert np.isfinite(scoring.losses(1e9)["perplexity"])
    assert scoring.names_of("rouge, chrf") == scoring.names_of(("rouge", "chrf")) == ("rouge", "chrf")


def test_best_first():
    values = {1: 3.0, 2: 0.5, 3: None, 4: float("nan"), 5: 0.5, 6: 9.0}
    assert kept.best_first(values, "min") == [5, 2, 1, 6]
    assert kept.best_first(values, "max") == [6, 1, 5, 2]
    assert kept.expendable(values, 1, 2, "max") == [2, 3, 4, 5]


# ---------------------------------------------------------------- Where a run begins


def make_step(directory, step, identity=None, **metrics):
    work = kept.open_directory(directory) / str(step)
    work.mkdir()
    (work / "arrays").write_bytes(bytes([step]) * 99)
    kept.commit(
        directory, work, {"step": step, "rows": 8 * step, "metrics": metrics, "leaves": {}, "identity": identity or {}}
    )


LOSS = kept.Goal("eval_loss", "min")


def find(workdir, how, goal=LOSS, identity=None):
    lines = []
    return origin.find_start(workdir, how, goal, identity or {}, lines.append), "\n".join(lines)


def test_going_back_to_the_best_once(tmp_path):
    directory = tmp_path / "checkpoints"
    for step, loss in {4: 2.0, 8: 1.0, 12: 1.5}.items():
        make_step(directory, step, eval_loss=loss)
    make_step(directory, 13)
    kept.open_directory(directory)
    step, said = find(tmp_path, "best")
    assert step == 8 and "going back to step 8, the best by eval_loss" in said
    assert kept.steps(directory) == [4, 8]
    assert sorted(p.name for p in (directory / "abandoned").iterdir()) == ["12", "13"]
    # A start that follows it goes on; one after it has ended goes back again.
    (tmp_path / "config.json").write_text('{"checkpoint": {"resume": "best"}}')
    make_step(directory, 12, eval_loss=3.0)
    for status, expected in (("running", 12), ("stopped", 12), ("failed", 12), ("finished", 8)):
        (tmp_path / "run.json").write_text(json.dumps({"status": status}))
        assert find(tmp_path, "best")[0] == expected
    assert sorted(p.name for p in (directory / "abandoned").iterdir()) == ["12", "12.1", "13"]
    # The best is damaged.
    (directory / "8" / "arrays").write_bytes(b"rot")
    step, said = find(tmp_path, "best")
    assert step == 4 and "checkpoint 8 is damaged and passed over" in said
    with pytest.raises(NoCheckpointError, match=r"has an evaluation's rougeL. There are: 4"):
        find(tmp_path, "best", kept.Goal("rougeL", "max"))


def test_where_nothing_is_there_or_nothing_may_be(tmp_path):
    assert find(tmp_path, "auto")[0] is None and find(tmp_path, "never")[0] is None
    for how in ("last", "best"):
        with pytest.raises(NoCheckpointError, match=r"there are no checkpoints in .* Set it to auto"):
            find(tmp_path, how)
    make_step(tmp_path / "checkpoints", 3)
    assert find(tmp_path, "last")[0] == find(tmp_path, "auto")[0] == 3
    with pytest.raises(CannotCreateError, match=r"`checkpoint.resume` is never"):
        find(tmp_path, "never")


def test_beginning_from_a_path(tmp_path):
    same = {"peft.r": "4"}
    for step in (5, 6):
        make_step(tmp_path / "other" / "checkpoints", step, same)
    new = tmp_path / "new"
    kept.open_directory(new / "checkpoints")
    for text, said in {"./no/such": "no such directory", f"{tmp_path}/new": "neither a run with checkpoints"}.items():
        with pytest.raises(MissingInputError, match=said):
            origin.check_path(text)
    path = str(tmp_path / "other" / "checkpoints" / "5")
    origin.check_path(path)
    with pytest.raises(UserError, match=r"peft.r +4 +8(?s:.)*take its adapter as `peft.init_from`"):
        find(new, path, identity={"peft.r": "8"})
    assert kept.steps(new / "checkpoints") == []
    assert find(new, path, identity=same)[0] == 5
    assert kept.verify(new / "checkpoints" / "5") is None
    # The same command goes on from its own, another has to say which.
    make_step(new / "checkpoints", 9, same)
    assert find(new, path, identity=same)[0] == 9
    with pytest.raises(CannotCreateError, match=r"has checkpoints of its own already \(it began from"):
        find(new, str(tmp_path / "other"), identity=same)
    # A run's newest intact one; a damaged one named is refused.
    (tmp_path / "other" / "checkpoints" / "6" / "arrays").write_bytes(b"rot")
    kept.open_directory(tmp_path / "third" / "checkpoints")
    step, said = find(tmp_path / "third", str(tmp_path / "other"), identity=same)
    assert step == 5 and "checkpoint 6 is damaged" in said
    kept.open_directory(tmp_path / "fourth" / "checkpoints")
    with pytest.raises(NoCheckpointError, match="SHA-256"):
        find(tmp_path / "fourth", str(tmp_path / "other" / "checkpoints" / "6"), identity=same)


def test_what_may_change_between_two_starts():
    """Where numbers go and what is kept is harmless; what is computed is not."""
    before = identity.identity(plain(), 10)
    harmless = {"train__save_unit": "epoch", "train__save_every": 3, "train__deterministic": True}
    harmless |= {"wandb__project": "p", "wandb__every": 5, "storage__sync_to": "/x", "checkpoint__keep_best_n": 4}
    harmless |= {"checkpoint__metric": "perplexity", "data__eval": "y", "checkpoint__save_optim": False}
    assert identity.identity(plain(**harmless), 10) == before
    assert identity.identity(plain(train__seed=1), 10) != before


# ---------------------------------------------------------------- A fresh optimiser in the middle


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "lion"])
def test_a_fresh_optimiser_has_the_rate_of_its_step(name):
    """A first update of Adam (no decay) is the rate times the gradient's sign: that of step 5, not of step 0."""
    c = plain(optim__name=name, optim__warmup_steps=4, optim__learning_rate=0.5, optim__max_grad_norm=0.0)["optim"]
    c = types.SimpleNamespace(**c)
    schedule = optim.make_schedule(c, 20)
    rule = optim.make_optimiser(c, optim.later(schedule, 5))
    grads = {"w": jnp.asarray([3.0, -2.0])}
    params = {"w": jnp.ones(2)}
    updates, _ = rule.update(grads, rule.init(params), params)
    rate = float(schedule(5))
    assert 0.4 < rate < 0.5 and float(schedule(0)) == 0
    np.testing.assert_allclose(np.asarray(updates["w"]), [-rate, rate], rtol=1e-5)
    assert optim.later(schedule, 0) is schedule and isinstance(optax.constant_schedule(1.0)(0), float)


# ---------------------------------------------------------------- Deterministic


def test_the_flag_is_set_once_and_a_contradiction_refused(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1")
    deterministic.ask(False)
    assert os.environ["XLA_FLAGS"] == "--xla_a=1"
    for _ in range(2):
        deterministic.ask(True)
        assert os.environ["XLA_FLAGS"] == "--xla_a=1 --xla_gpu_deterministic_ops=true"
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=false")
    with pytest.raises(UserError, match="XLA_FLAGS has --xla_gpu_deterministic_ops=false"):
        deterministic.ask(True)


# ---------------------------------------------------------------- Weights & Biases


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A module that tells a file what it is called with; fake(fault) makes one of its calls fail."""
    module = types.ModuleType("wandb")
    monkeypatch.setenv("FAKE_WANDB", str(tmp_path / "calls"))
    exec(FAKE_WANDB, module.__dict__)
    monkeypatch.setitem(sys.modules, "wandb", module)

    def set_fault(fault=""):
        monkeypatch.setenv("FAKE_WANDB_FAULT", fault)
        (tmp_path / "calls").write_text("")
        return lambda: calls_of(tmp_path / "calls")

    return set_fault


def calls_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_is_sent(fake, tmp_path):
    calls, noted, said = fake(), [], []
    settings = plain(wandb__project="p", wandb__tags=("a", "b"), wandb__every=3)
    wandb_log.check(settings)
    how = (settings, tmp_path / "run7", {"project": "p", "id": "abc"}, lambda **facts: noted.append(facts), said.append)
    with wandb_log.opened(*how) as send:
        for step in range(1, 5):
            send(step, {"train/loss": 1.0 / step}, False)
        send(4, {"eval/loss": 2.0}, True)
    first, *logged, last = calls()
    assert {k: first[k] for k in ("project", "name", "tags", "id", "resume", "dir")} == {
        "project": "p",
        "name": "run7",
        "tags": ["a", "b"],
        "id": "abc",
        "resume": "allow",
        "dir": str(tmp_path / "run7"),
    }
    assert first["config"] == settings and first["settings"]["disable_code"] is True
    assert logged == [
        {"call": "log", "step": 3, "train/loss": 1 / 3},
        {"call": "log", "step": 4, "eval/loss": 2.0},
    ]
    assert last == {"call": "finish", "exit_code": 0}
    assert noted == [{"wandb": {"project": "p", "id": "abc"}}] and said == []
    # Another project is another run; an error of the run is told.
    fake()
    with (
        pytest.raises(KeyError),
        wandb_log.opened(settings | {"wandb": settings["wandb"] | {"project": "q"}}, *how[1:]),
    ):
        raise KeyError
    first, last = calls()
    assert first["id"] != "abc" and last == {"call": "finish", "exit_code": 1}
    with wandb_log.opened(*how, quiet=True) as send:
        assert send is None


@pytest.mark.parametrize("fault", ["init", "log", "finish"])
def test_an_outage_is_said_once_and_stops_nothing(fake, tmp_path, fault):
    calls, said = fake(fault), []
    with wandb_log.opened(plain(wandb__project="p"), tmp_path, {}, lambda **facts: None, said.append) as send:
        for step in range(1, 4):
            send(step, {"train/loss": 1.0}, False)
    assert said == ["WARNING: Weights & Biases: no route to host. The run goes on without it."]
    assert [call["call"] for call in calls()].count(fault) == 1


def test_a_missing_library_is_said_before_anything_is_read(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    wandb_log.check(plain())
    with pytest.raises(UserError, match="pip install wandb"):
        wandb_log.check(plain(wandb__project="p"))


# ---------------------------------------------------------------- Runs


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tiny_run.make(tmp_path_factory.mktemp("place"), steps=STEPS)
    (place.root / "modules").mkdir()
    (place.root / "modules" / "wandb.py").write_text(FAKE_WANDB)
    return place


def start(place, workdir, *settings, fault=""):
    path = os.pathsep.join(p for p in (str(place.root / "modules"), os.environ.get("PYTHONPATH", "")) if p)
    environment = {"PYTHONPATH": path, "FAKE_WANDB": f"{workdir}.calls", "FAKE_WANDB_FAULT": fault}
    return tiny_run.start(place, workdir, *settings, devices=1, **environment)


def done(place, workdir, *settings, **how):
    with start(place, workdir, *settings, **how) as process:
        assert process.wait(PATIENCE) == 0, Path(f"{workdir}.screen").read_text()
    return (workdir / "log.txt").read_text()


def run_json(workdir):
    return json.loads((workdir / "run.json").read_text())


def assert_same_end(workdir, whole):
    """The last step of both has the same bits, and so has the adapter."""
    ends = [arrays_of(where / "checkpoints" / str(STEPS)) for where in (workdir, whole)]
    assert any("/mu/" in path for path in ends[1])
    for path, value in ends[0].items():
        assert value.tobytes() == ends[1][path].tobytes(), path
    name = "adapter/adapter_model.safetensors"
    assert (workdir / name).read_bytes() == (whole / name).read_bytes()


def lines(workdir, after=0):
    return [exact(line) for line in tiny_run.metrics(workdir) if line["step"] > after]


@pytest.fixture(scope="module")
def whole(place):
    """Nobody interrupted it."""
    workdir = place.root / "whole"
    done(place, workdir, *EPOCHS, "wandb.project=p", "wandb.every=6")
    return workdir


def test_a_run_that_saves_by_epochs(whole):
    assert steps_saved(whole) == [8, 15, STEPS]
    evaluated = {line["step"]: line for line in tiny_run.metrics(whole) if "eval_loss" in line}
    assert list(evaluated) == [0, 8, 15, STEPS]
    for line in evaluated.values():
        assert line["perplexity"] == pytest.approx(np.exp(line["eval_loss"]))
    assert json.loads((whole / "eval.json").read_text())["perplexity"] == evaluated[STEPS]["perplexity"]
    first, *logged, last = calls_of(Path(f"{whole}.calls"))
    assert first["config"]["wandb"]["every"] == 6 and first["id"] == run_json(whole)["wandb"]["id"]
    found = [(call["step"], "eval/perplexity" in call) for call in logged]
    assert found == [(0, True), (6, False), (8, True), (12, False), (15, True), (18, False), (STEPS, True)]
    assert last["call"] == "finish" and "exact" not in run_json(whole)


def test_a_machine_that_is_lost_with_its_disk(place, whole):
    """Killed between two epochs, its directory gone: the copy comes back and ends in the same bits."""
    workdir, copy = place.root / "lost", place.root / "bucket" / "run"
    command = [*EPOCHS, f"storage.sync_to={copy}", "wandb.project=p"]
    deadline = time.monotonic() + PATIENCE
    with start(place, workdir, *command, fault="log") as process:
        while not (copy / "checkpoints" / "8" / "manifest.sha256").exists() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    said = Path(f"{workdir}.screen").read_text()
    assert said.count("WARNING: Weights & Biases: no route to host") == 1
    wandb_id = run_json(copy)["wandb"]["id"]
    shutil.rmtree(workdir)
    shutil.rmtree(copy / "checkpoints" / "15", ignore_errors=True)  # had it come further than the kill
    log = done(place, workdir, *command)
    assert f"brought back from {copy}: checkpoints 8" in log and f"resumed at step 8 of {STEPS}" in log
    assert_same_end(workdir, whole)
    assert lines(workdir) == lines(whole)
    calls = calls_of(Path(f"{workdir}.calls"))
    assert {call["id"] for call in calls if call["call"] == "init"} == {wandb_id} == {run_json(workdir)["wandb"]["id"]}
    # The copy is what is here, but for what is of this machine.
    ours, theirs = tiny_run.contents(workdir), tiny_run.contents(copy)
    assert theirs.pop("files.sha256")
    assert ours == theirs and "WARNING" not in log.split("resumed")[1]


def test_going_back_to_the_best(place, whole):
    """By perplexity and mode max the first is the best: what follows is done again, to the same bits."""
    workdir = place.root / "back"
    shutil.copytree(whole, workdir)
    # Whatever XLA leaves out on GPUs, on CPUs nothing changes.
    log = done(place, workdir, *EPOCHS, "checkpoint.resume=best", "train.deterministic=true")
    assert "going back to step 8, the best by perplexity" in log and f"resumed at step 8 of {STEPS}" in log
    assert sorted(p.name for p in (workdir / "checkpoints" / "abandoned").iterdir()) == ["15", str(STEPS)]
    assert_same_end(workdir, whole)
    assert lines(workdir) == lines(whole)


def test_beginning_from_another_run_and_saving_without_the_optimiser(place, whole):
    workdir = place.root / "branch"
    each = ["train.save_every=1", "checkpoint.keep_last_n=9", "checkpoint.save_optim=false"]
    command = [*each, f"checkpoint.resume={whole / 'checkpoints' / '15'}"]
    log = done(place, workdir, *command)
    assert f"begun from {whole / 'checkpoints' / '15'}" in log and "WARNING" not in log
    name = "adapter/adapter_model.safetensors"
    assert (workdir / name).read_bytes() == (whole / name).read_bytes()
    losses = [line for line in lines(whole, after=15) if "loss" in line]
    assert [line for line in lines(workdir) if "loss" in line] == losses
    record = kept.read_record(workdir / "checkpoints" / "17")
    assert record["leaves"] and not any(leaf.startswith("opt_state/") for leaf in record["leaves"])
    sizes = [sum(p.stat().st_size for p in (workdir / "checkpoints" / n).rglob("*")) for n in ("15", "17")]
    assert sizes[1] < 0.75 * sizes[0]
    # Going on from weights alone is said, and not the same.
    for step in ("18", "19", "20"):
        shutil.rmtree(workdir / "checkpoints" / step)
    log = done(place, workdir, *command)[len(log) :]
    assert log.count("WARNING: checkpoint 17 holds no optimiser state") == 1 and "resumed at step 17" in log
    assert run_json(workdir)["exact"] is False
    again = [line for line in lines(workdir, after=15) if "loss" in line]
    assert again[:3] == losses[:3] and again[3]["loss"] != losses[3]["loss"]  # the third is of the same weights
    assert [line["learning_rate"] for line in again] == [line["learning_rate"] for line in losses]
    assert kept.read_record(workdir / "checkpoints" / "20")["optimiser_from"] == 17
    assert (workdir / name).read_bytes() != (whole / name).read_bytes()
    with pytest.raises((UserError, DataError), match="other settings"):
        kept_identity = kept.read_record(whole / "checkpoints" / "15")["identity"]
        origin.find_start(place.root / "fresh", str(whole), LOSS, kept_identity | {"peft.r": "8"}, print)
