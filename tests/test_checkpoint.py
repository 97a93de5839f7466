"""Checkpoints against kills, rot, full disks and changed runs.

Run as a script (`python tests/test_checkpoint.py DIRECTORY`) it is the victims: processes that save until they are
killed.
"""

import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtune import kept, rundir
from jaxtune.checkpoint import Checkpoints
from jaxtune.errors import CannotCreateError, DivergedError, NoCheckpointError, StorageError, UserError

IDENTITY = {"model": "abc", "train.seed": "0", "peft.r": "8"}


@flax.struct.dataclass
class Pair:
    a: jax.Array
    b: jax.Array
    nothing: None = None


def make_state(step, devices=1, width=16):
    """Every value is a function of the step; the shapes real states have: dataclasses, None, named tuples, scalars."""
    mesh = Mesh(np.array(jax.devices()[:devices]), ("fsdp",))
    base = jnp.arange(8 * width, dtype=jnp.float32).reshape(8, width) / 7 + step
    trainable = {"layers": {"attn.q": Pair(base, base.T.astype(jnp.bfloat16))}, "none": None}
    state = {"trainable": trainable, "opt_state": optax.adamw(1e-3).init(trainable)}

    def place(x):
        spec = PartitionSpec("fsdp") if x.ndim and x.shape[0] % devices == 0 else PartitionSpec()
        return jax.device_put(x, NamedSharding(mesh, spec))

    return jax.tree.map(place, state)


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == e.dtype
        assert a.sharding == e.sharding
        assert np.asarray(a).tobytes() == np.asarray(e).tobytes()


def opened(directory, identity=IDENTITY, keep_last_n=2, keep_best_n=0, say=print):
    return Checkpoints(directory, keep_last_n=keep_last_n, keep_best_n=keep_best_n, identity=identity, say=say)


def save_steps(directory, *numbers, **keep):
    with opened(directory, **keep) as checkpoints:
        for step in numbers:
            checkpoints.save(step, make_state(step), rows=8 * step)


def files_of(step):
    return sorted(p for p in step.rglob("*") if p.is_file())


def kill_at_call(where, name, number):
    """Replaces where.name by a function that kills the process when it is called for the number-th time."""
    calls, function = itertools.count(1), getattr(where, name)

    def run(*args):
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)

    setattr(where, name, run)


def half_delete(directory):
    files_of(directory)[0].unlink()
    os.kill(os.getpid(), signal.SIGKILL)


def victim(directory, point):
    """Saves 1, 2, … until killed: from outside, or by itself at the named point of step 3's save."""
    with opened(directory) as checkpoints:
        if point == "arrays":
            # Twice a save: by Orbax before it starts, by us while it writes.
            kill_at_call(checkpoints._orbax, "wait_until_finished", 6)
        if point == "record":
            kill_at_call(kept, "write_json_atomic", 3)
        if point == "manifest":
            kill_at_call(kept, "write_manifest", 3)
        if point == "commit":
            kill_at_call(kept, "sync_directory", 3)
        if point == "delete":
            kept.shutil.rmtree = half_delete
        for step in itertools.count(1):
            checkpoints.save(step, make_state(step), rows=8 * step)
            with open(f"{directory}.saved", "a") as file:
                file.write(f"{step}\n")


# The newest step that must be there after a kill at each point of step 3's save.
POINTS = {"arrays": 2, "record": 2, "manifest": 2, "commit": 3, "delete": 3}
RANDOM = ("random-0", "random-1", "random-2", "random-3")


def kill_victims(root):
    """One forked child a point (jax is imported once, and not yet awake), each dead when this returns."""
    for point in (*POINTS, *RANDOM):
        child = os.fork()
        if child == 0:
            try:
                victim(root / point, point)
            finally:
                os._exit(1)
        if point in RANDOM:
            while not Path(f"{root / point}.saved").exists():
                time.sleep(0.01)
            time.sleep(random.Random(point).uniform(0.02, 0.4))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, point


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A directory with one of checkpoints for every point, as the kill left it."""
    root = tmp_path_factory.mktemp("killed")
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONWARNINGS": "ignore"}
    subprocess.run([sys.executable, __file__, str(root)], env=environment, check=True, timeout=300)
    return root


def restored_step(directory):
    """0 where there is none; what is restored is bit for bit what was saved."""
    lines = []
    with opened(directory, say=lines.append) as checkpoints:
        assert list((directory / "tmp").iterdir()) == []
        restored = checkpoints.restore(abstract(make_state(0, devices=8)))
    # Every step in sight is whole, and a kill is not taken for damage.
    assert all(kept.verify(directory / str(step)) is None for step in kept.steps(directory))
    assert lines == [] and not (directory / "quarantine").exists()
    if restored is None:
        return 0
    assert_same(restored.state, make_state(restored.step, devices=8))
    assert restored.rows == 8 * restored.step
    return restored.step


@pytest.mark.parametrize("point", POINTS)
def test_kill_9_inside_a_save(killed, point):
    assert restored_step(killed / point) == POINTS[point]


@pytest.mark.parametrize("point", RANDOM)
def test_kill_9_at_a_random_moment(killed, point):
    """Nothing half-saved is restored, and nothing that was committed is lost."""
    last = int((killed / f"{point}.saved").read_text().split()[-1])
    # `save` of step n returns after step n - 1 is committed.
    assert restored_step(killed / point) in (last - 1, last, last + 1)


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_restore_is_bit_equal_on_any_mesh(tmp_path, devices):
    directory = tmp_path / "دفتر کار"
    state = make_state(5, devices=4)
    with opened(directory) as checkpoints:
        checkpoints.save(5, state, rows=40, metrics={"eval_loss": 0.1 + 0.2})
    with opened(directory) as checkpoints:
        restored = checkpoints.restore(abstract(make_state(0, devices=devices)))
    assert_same(restored.state, make_state(5, devices=devices))
    assert (restored.step, restored.rows, restored.metrics) == (5, 40, {"eval_loss": 0.1 + 0.2})


def test_nothing_saved_is_none(tmp_path):
    (tmp_path / "7").mkdir()
    (tmp_path / "12").write_text("stray file")
    (tmp_path / "notes").mkdir()
    with opened(tmp_path) as checkpoints:
        assert checkpoints.restore(abstract(make_state(0))) is None
        # An empty directory and a stray file of that name are no obstacles.
        checkpoints.save(7, make_state(7), rows=1)
        checkpoints.save(12, make_state(12), rows=1)
        checkpoints.wait()
        assert checkpoints.restore(abstract(make_state(0))).step == 12
    assert kept.steps(tmp_path) == [7, 12]


def test_the_saved_state_may_be_donated(tmp_path):
    increment = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state = increment({"trainable": {"w": jnp.zeros((512, 512))}, "opt_state": {"m": jnp.zeros((512, 512))}})
    shapes = abstract(state)
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, state, rows=1)
        for _ in range(20):
            state = increment(state)
        checkpoints.wait()
        restored = checkpoints.restore(shapes).state
    assert {float(x) for leaf in jax.tree.leaves(restored) for x in (leaf.min(), leaf.max())} == {1.0}


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def zero(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))


DAMAGE = {
    "first bit": lambda path: flip(path, 0),
    "last bit": lambda path: flip(path, 8 * path.stat().st_size - 1),
    "some bit": lambda path: flip(path, random.Random(path.name).randrange(8 * path.stat().st_size)),
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
    "emptied": lambda path: os.truncate(path, 0),
    "deleted": lambda path: path.unlink(),
    "zeroed": zero,
    "grown": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
}


def test_every_damage_to_every_file_is_detected(tmp_path):
    save_steps(tmp_path / "whole", 3)
    names = [p.relative_to(tmp_path / "whole/3") for p in files_of(tmp_path / "whole/3")]
    # Orbax's metadata, arrays and indices, our record and manifest: none is left out.
    assert {"record.json", "manifest.sha256", "_METADATA", "manifest.ocdbt"} <= {n.name for n in names}
    assert kept.verify(tmp_path / "whole/3") is None
    for name, (kind, damage) in itertools.product(names, DAMAGE.items()):
        copy = tmp_path / "copy" / "3"
        shutil.copytree(tmp_path / "whole/3", copy)
        damage(copy / name)
        reason = kept.verify(copy)
        assert reason, (name, kind)
        assert name.name in reason or name.name == "manifest.sha256", (name, kind, reason)
        shutil.rmtree(copy)


def test_swapped_and_renamed_steps_are_detected(tmp_path):
    save_steps(tmp_path, 3, 4)
    os.rename(tmp_path / "3", tmp_path / "5")
    assert kept.verify(tmp_path / "5") == "record.json is of step 3"
    shutil.copy(tmp_path / "4/record.json", tmp_path / "5/record.json")
    assert "record.json is not the file that was saved" in kept.verify(tmp_path / "5")
    (tmp_path / "4/.DS_Store").write_text("a file manager was here")
    assert kept.verify(tmp_path / "4") is None


def test_coreutils_agree_with_the_manifest(tmp_path):
    save_steps(tmp_path, 1)
    done = subprocess.run(["sha256sum", "--strict", "-c", "manifest.sha256"], cwd=tmp_path / "1", capture_output=True)
    assert done.returncode == 0


def test_a_damaged_newest_step_is_set_aside_and_the_one_before_used(tmp_path):
    for round_ in range(2):
        save_steps(tmp_path, 1, 2)
        data = next((tmp_path / "2/arrays/d").iterdir())
        flip(data, 100)
        lines = []
        with opened(tmp_path, say=lines.append) as checkpoints:
            restored = checkpoints.restore(abstract(make_state(0)))
        assert_same(restored.state, make_state(1))
        assert len(lines) == 1 and data.name in lines[0] and "SHA-256" in lines[0] and "from step 1" in lines[0]
        assert kept.steps(tmp_path) == [1]
        shutil.rmtree(tmp_path / "1")
        moved = tmp_path / "quarantine" / ("2" if round_ == 0 else "2.1")
        assert len(files_of(moved)) > 5


def test_when_none_is_usable_all_stay_and_are_listed(tmp_path):
    save_steps(tmp_path, 1, 2)
    (tmp_path / "1/record.json").unlink()
    (tmp_path / "2/manifest.sha256").unlink()
    before = files_of(tmp_path)
    for _ in range(2):
        with opened(tmp_path) as checkpoints, pytest.raises(NoCheckpointError) as caught:
            checkpoints.restore(abstract(make_state(0)))
        assert caught.value.exit_code == 81
        assert "2: " in str(caught.value) and "manifest.sha256" in str(caught.value)
        assert "1: record.json is missing" in str(caught.value)
    assert files_of(tmp_path) == before


def rewrite_record(step, **changes):
    record = json.loads((step / "record.json").read_text()) | changes
    (step / "record.json").write_text(json.dumps({k: v for k, v in record.items() if v is not None}))
    rundir.write_manifest(step)


def test_a_record_of_another_format_or_without_a_cursor_is_not_used(tmp_path):
    save_steps(tmp_path, 1, 2)
    rewrite_record(tmp_path / "1", rows=None)
    rewrite_record(tmp_path / "2", format=2)
    assert kept.verify(tmp_path / "1") == "record.json has no rows"
    assert "format 2" in kept.verify(tmp_path / "2")


def test_another_run_s_checkpoint_is_refused_with_what_changed(tmp_path):
    save_steps(tmp_path, 1)
    other = {"model": "abc", "train.seed": "1", "data": "x"}
    with opened(tmp_path, identity=other) as checkpoints, pytest.raises(UserError) as caught:
        checkpoints.restore(abstract(make_state(0)))
    assert caught.value.exit_code == 64
    text = str(caught.value)
    rows = [line.split() for line in text.splitlines()]
    assert ["train.seed", "0", "1"] in rows and ["peft.r", "8", "absent"] in rows and ["data", "absent", "x"] in rows
    assert "model" not in text and "--workdir" in text


def change(state, what):
    q = state["trainable"]["layers"]["attn.q"]
    if what == "dtype":
        q = q.replace(a=jax.ShapeDtypeStruct(q.a.shape, jnp.bfloat16, sharding=q.a.sharding))
    if what == "shape":
        q = q.replace(a=jax.ShapeDtypeStruct((8, 4), q.a.dtype, sharding=q.a.sharding))
    layers = {"attn.q": q} if what != "name" else {"attn.k": q}
    state = state | {"trainable": {"layers": layers, "none": None}}
    return {"trainable": state["trainable"]} if what == "optimiser" else state


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("dtype", ["trainable/layers/attn.q/a", "float32[8,16]", "bfloat16[8,16]"]),
        ("shape", ["trainable/layers/attn.q/a", "float32[8,16]", "float32[8,4]"]),
        ("name", ["trainable/layers/attn.k/a", "absent", "float32[8,16]"]),
        ("optimiser", ["opt_state/0/mu/layers/attn.q/a", "float32[8,16]", "absent"]),
    ],
)
def test_other_leaves_are_refused_by_name(tmp_path, what, named):
    save_steps(tmp_path, 1)
    with opened(tmp_path) as checkpoints, pytest.raises(UserError) as caught:
        checkpoints.restore(change(abstract(make_state(0)), what))
    assert named in [line.split() for line in str(caught.value).splitlines()]


def test_the_newest_and_the_best_are_kept(tmp_path):
    losses = {1: 3.0, 2: 0.5, 3: 2.0, 4: float("nan"), 5: 0.7, 6: 1.0, 7: None}
    with opened(tmp_path, keep_last_n=2, keep_best_n=2) as checkpoints:
        for step, loss in losses.items():
            metrics = None if loss is None else {"eval_loss": loss}
            checkpoints.save(step, make_state(step), rows=step, metrics=metrics)
            # The step before is committed now, and what it made expendable is gone.
            assert len(kept.steps(tmp_path)) <= 5
    assert kept.steps(tmp_path) == [2, 5, 6, 7]
    assert kept.expendable({1: None, 2: None, 3: None}, 1, 0) == [1, 2]
    assert kept.expendable({1: 0.5, 2: 0.5, 3: 0.9}, 1, 1) == [1]


def test_a_step_is_saved_once(tmp_path):
    save_steps(tmp_path, 1)
    written = (tmp_path / "1/record.json").stat().st_mtime_ns
    with opened(tmp_path) as checkpoints:
        checkpoints.restore(abstract(make_state(0)))
        checkpoints.save(1, make_state(1), rows=8)
        checkpoints.save(2, make_state(2), rows=16)
        checkpoints.save(2, make_state(2), rows=16)
    assert kept.steps(tmp_path) == [1, 2]
    assert (tmp_path / "1/record.json").stat().st_mtime_ns == written


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_never_saved(tmp_path, value):
    state = make_state(2)
    q = state["trainable"]["layers"]["attn.q"]
    state["trainable"]["layers"]["attn.q"] = q.replace(b=q.b.at[3, 3].set(value))
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1), rows=1)
        checkpoints.save(2, state, rows=2)
        with pytest.raises(DivergedError, match=r"attn\.q/b(?s:.)*Checkpoints kept: 1\."):
            checkpoints.wait()
    assert kept.steps(tmp_path) == [1]
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_full_disk_surfaces_at_the_next_save_and_harms_nothing(tmp_path, caplog):
    """No file may grow over 64 kB, as if the disk had no more: the save's arrays are 40 times that."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1), rows=8)
        checkpoints.wait()
        noise = jax.random.normal(jax.random.key(0), (800, 800))
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, hard))
            checkpoints.save(2, {"trainable": {"w": noise}, "opt_state": {}}, rows=16)
            with pytest.raises(StorageError) as caught:
                checkpoints.save(3, make_state(3), rows=24)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert caught.value.exit_code == 74
        assert "Checkpoint 2" in str(caught.value) and "Checkpoints kept: 1." in str(caught.value)
        assert [record for record in caplog.records if record.exc_info] == []
        assert list((tmp_path / "tmp").iterdir()) == []
        assert kept.steps(tmp_path) == [1]
        # The disk is free again.
        checkpoints.save(3, make_state(3), rows=24)
    with opened(tmp_path) as checkpoints:
        assert_same(checkpoints.restore(abstract(make_state(0))).state, make_state(3))


def test_a_bug_keeps_its_own_exception(tmp_path, monkeypatch):
    def broken(directory):
        raise ValueError("a bug of ours")

    monkeypatch.setattr(kept, "write_manifest", broken)
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1), rows=8)
        with pytest.raises(ValueError, match="a bug of ours"):
            checkpoints.wait()
    assert kept.steps(tmp_path) == []


def test_the_error_that_ends_a_run_is_not_hidden_by_a_failed_save(tmp_path, monkeypatch):
    def full(directory):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kept, "write_manifest", full)
    lines = []
    with pytest.raises(KeyError), opened(tmp_path, say=lines.append) as checkpoints:
        checkpoints.save(1, make_state(1), rows=8)
        raise KeyError("the run's own")
    assert len(lines) == 1 and "No space left" in lines[0]
    with pytest.raises(StorageError, match="No earlier checkpoint"), opened(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1), rows=8)


def test_a_directory_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotCreateError):
        opened(tmp_path / "file")


def test_two_runs_cannot_share_a_directory_and_a_dead_one_leaves_no_lock(tmp_path):
    script = (
        "import sys, time; from pathlib import Path; from jaxtune.rundir import run_lock\n"
        "with run_lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(CannotCreateError) as caught, rundir.run_lock(tmp_path):
            pass
        assert caught.value.exit_code == 73
        assert f'"pid": {other.pid}' in str(caught.value) and "started" in str(caught.value)
        other.kill()
    for _ in range(2):
        with rundir.run_lock(tmp_path):
            assert json.loads((tmp_path / rundir.LOCK).read_text())["pid"] == os.getpid()


def test_open_workdir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    new = rundir.open_workdir("runs/سلام دنیا")
    assert new == tmp_path / "runs/سلام دنیا" and new.is_dir()
    assert rundir.open_workdir("~/runs/x") == tmp_path / "runs/x"
    (new / "config.json").write_text("{}")
    with pytest.raises(CannotCreateError, match=r"not empty: it holds config\.json"):
        rundir.open_workdir(new)
    rundir.update_run(new, "running")
    assert rundir.open_workdir(new) == new
    (tmp_path / "file").write_text("")
    for bad in ("file", "file/below", "x" * 300):
        with pytest.raises(CannotCreateError):
            rundir.open_workdir(bad)


def test_run_json_tells_the_run_s_story(tmp_path):
    rundir.update_run(tmp_path, "running", resume_command="jaxtune train", step=0)
    started = json.loads((tmp_path / "run.json").read_text())
    assert started["status"] == "running" and started["exit_code"] is None and started["ended"] is None
    rundir.update_run(tmp_path, "stopped", exit_code=75, step=7)
    ended = json.loads((tmp_path / "run.json").read_text())
    assert ended["started"] == started["started"] <= ended["ended"]
    assert (ended["status"], ended["exit_code"], ended["step"]) == ("stopped", 75, 7)
    assert ended["resume_command"] == "jaxtune train"


def test_write_atomic_keeps_the_old_file_when_the_disk_is_full(tmp_path):
    path = tmp_path / "config.json"
    rundir.write_json_atomic(path, {"سلام": 0.1})
    assert json.loads(path.read_text()) == {"سلام": 0.1}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        with pytest.raises(StorageError) as caught:
            rundir.write_json_atomic(path, "x" * 9999)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.exit_code == 74
    assert json.loads(path.read_text()) == {"سلام": 0.1}
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


if __name__ == "__main__":
    kill_victims(Path(sys.argv[1]))
