"""Several processes are one run: two with four devices each, over loopback, against one with eight."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_run
from safetensors.numpy import load_file

from jaxtune import hosts, optim, train
from jaxtune import mesh as meshes
from jaxtune.config import get_default
from jaxtune.errors import UserError
from jaxtune.state import make_state

# Two micro-batches of eight rows, dropout, a warm-up; some weights are split over both processes.
SETTINGS = ("mesh.data=2", "mesh.fsdp=4", "train.global_batch_size=16", "peft.target_modules=['q_proj','v_proj']")
STEPS = 14


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tiny_run.make(tmp_path_factory.mktemp("hosts"), STEPS)


def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(place, workdirs, *settings, own=(), count=2):
    """The command in `count` processes.  workdirs: one, or one for each.  own: settings of the last one alone."""
    address, started = f"127.0.0.1:{port()}", []
    for i in range(count):
        which = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(i)}
        workdir = workdirs[i] if isinstance(workdirs, list) else workdirs
        more = own if i == count - 1 else ()
        started.append(tiny_run.start(place, workdir, *settings, *more, devices=8 // count, **which))
    return started


def ended(processes, seconds=400):
    """Their exit codes; none of them outlives the test."""
    try:
        return [process.wait(seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()


def same_as(ours, other, tolerance=1e-6):
    """Two runs have the same losses, rows, answers and adapter."""
    for mine, theirs in zip(tiny_run.metrics(ours), tiny_run.metrics(other), strict=True):
        for key in ("step", "tokens", "target_tokens", "rows"):
            assert mine.get(key) == theirs.get(key)
        for key in {"loss", "eval_loss"} & theirs.keys():
            assert mine[key] == pytest.approx(theirs[key], rel=tolerance), mine["step"]
    if (other / "samples.jsonl").exists():
        assert (ours / "samples.jsonl").read_text() == (other / "samples.jsonl").read_text()
    mine, theirs = (load_file(next((run / "adapter").glob("*.safetensors"))) for run in (ours, other))
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_allclose(mine[name], value, rtol=1e-3, atol=100 * tolerance, err_msg=name)


def stop_one(place, workdir, *settings):
    """A run of two processes, of which the second gets SIGTERM in its first steps; the step at which both stopped."""
    processes = start(place, workdir, *settings)
    try:
        until = time.monotonic() + 400
        while sum("loss" in line for line in tiny_run.metrics(workdir)) < 2 and time.monotonic() < until:
            assert all(process.poll() is None for process in processes), screen(workdir)
            time.sleep(0.05)
        processes[1].send_signal(signal.SIGTERM)
    finally:
        codes = ended(processes)
    assert codes == [75, 75], screen(workdir)
    return max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


def screen(workdir):
    return Path(f"{workdir}.screen").read_text(encoding="utf-8")[-3000:]


@pytest.fixture(scope="module")
def stopped(place):
    """(the directory of a run of two processes, stopped by a signal to one of them; at which step)."""
    workdir = place.root / "two"
    step = stop_one(place, workdir, *SETTINGS)
    shutil.copytree(workdir, place.root / "copy")
    return workdir, step


@pytest.fixture(scope="module")
def alone(place):
    """The same run in one process with eight devices, never stopped."""
    assert train.main(tiny_run.arguments(place, place.root / "alone", *SETTINGS)) == 0
    return place.root / "alone"


def test_a_signal_to_one_stops_all_and_they_end_as_one(place, stopped, alone):
    workdir, step = stopped
    assert 2 <= step < STEPS
    assert [line["step"] for line in tiny_run.metrics(workdir) if "loss" in line] == list(range(1, step + 1))
    assert json.loads((workdir / "run.json").read_text())["status"] == "stopped"
    assert ended(start(place, workdir, *SETTINGS)) == [0, 0], screen(workdir)
    assert f"resumed at step {step} of {STEPS}" in screen(workdir)
    same_as(workdir, alone)
    assert json.loads((workdir / "eval.json").read_text()) == pytest.approx(
        json.loads((alone / "eval.json").read_text()), rel=1e-6
    )


@pytest.mark.slow
def test_another_number_of_hosts_goes_on(place, stopped, alone):
    """One process with four devices, from the checkpoint of two."""
    settings = (*SETTINGS, "mesh.data=1", "mesh.fsdp=4")
    assert ended([tiny_run.start(place, place.root / "copy", *settings, devices=4)]) == [0]
    assert f"resumed at step {stopped[1]}" in screen(place.root / "copy")
    same_as(place.root / "copy", alone, 1e-5)


MANY = {
    "slices and tensor": ("mesh.slice=2", "mesh.data=1", "mesh.fsdp=2", "mesh.tensor=2", "optim.name=adafactor"),
    "quantised, 8-bit state": ("model.quant=int8", "mesh.data=2", "mesh.fsdp=4", "optim.name=adamw8bit"),
    "full": ("peft.method=full", "mesh.fsdp=8"),
    "packed": ("data.packing=true", "mesh.fsdp=8"),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", MANY)
def test_two_processes_equal_one(place, tmp_path, what):
    settings = ("train.steps=3", "train.global_batch_size=16", "evaluate.samples=2", "evaluate.max_new_tokens=3")
    settings += MANY[what]
    assert train.main(tiny_run.arguments(place, tmp_path / "one", *settings)) == 0
    assert ended(start(place, tmp_path / "two", *settings)) == [0, 0], screen(tmp_path / "two")
    if what == "full":
        (tmp_path / "one" / "model").rename(tmp_path / "one" / "adapter")
        (tmp_path / "two" / "model").rename(tmp_path / "two" / "adapter")
    same_as(tmp_path / "two", tmp_path / "one", 1e-5)


@pytest.mark.slow
def test_an_adapter_is_continued_and_one_that_dies_leaves_nobody_waiting(place, alone, tmp_path):
    settings = (*SETTINGS, f"peft.init_from={alone / 'adapter'}")
    processes = start(place, tmp_path / "run", *settings)
    until = time.monotonic() + 400
    while not (tmp_path / "run" / "checkpoints" / "3").exists() and time.monotonic() < until:
        assert all(process.poll() is None for process in processes), screen(tmp_path / "run")
        time.sleep(0.05)
    processes[1].kill()
    since = time.monotonic()
    assert ended(processes)[0] != 0
    assert time.monotonic() - since < 150
    assert ended(start(place, tmp_path / "run", *settings)) == [0, 0]
    assert ended([tiny_run.start(place, tmp_path / "one", *settings, devices=8)]) == [0]
    same_as(tmp_path / "run", tmp_path / "one")


def test_hosts_that_would_do_something_else_are_refused(place, tmp_path):
    """Before a weight is loaded, by all of them, and nothing is left but the trace of a try."""
    processes = start(place, tmp_path / "run", *SETTINGS, own=["optim.learning_rate=3e-3"])
    assert ended(processes) == [64, 64]
    said = screen(tmp_path / "run")
    assert re.search(r"optim.learning_rate +0.005 +0.003\n", said) and "Give every host the same command" in said
    assert "Process 1 on" in said and "Traceback" not in said
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {"run.lock", "log.txt"}


def test_run_directories_of_their_own_are_refused(place, tmp_path):
    """Where each host has a disk of its own, no checkpoint would be whole."""
    processes = start(place, [tmp_path / "here", tmp_path / "there"], *SETTINGS)
    assert ended(processes) == [73, 73]
    assert "does not share with process 0" in screen(tmp_path / "there") and "NFS" in screen(tmp_path / "here")


def test_hosts_that_do_not_come(tmp_path):
    """jax would abort after minutes, with pages of C++."""
    program = "import sys; from jaxtune import cli, hosts; hosts.COMING = 2; cli.run(lambda argv: hosts.start())"
    where = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port()}", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}
    found = subprocess.run([sys.executable, "-c", program], env=os.environ | where, capture_output=True, text=True)
    assert found.returncode == 69
    assert "process 0 of 2" in found.stderr and "--worker=all" in found.stderr and "Traceback" not in found.stderr


@pytest.mark.parametrize("name", optim.OPTIMISERS)
def test_every_leaf_of_the_state_lies_on_all_devices(name):
    """One that stays on a process's own device (Adam's count) would stop a run of several after it was restored."""
    mesh = meshes.make_mesh(1, 4, 2)
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp", "tensor"))
    c = get_default().optim.copy_and_resolve_references()
    c.update({"name": name, "learning_rate": 1e-3, "momentum": 0.9})
    weights = {"a": jax.device_put(np.ones((256, 512), np.float32), where)}
    state = make_state(optim.make_optimiser(c, optim.make_schedule(c, 4)), weights, mesh)
    places = {jax.tree_util.keystr(path): x.sharding for path, x in jax.tree_util.tree_leaves_with_path(state)}
    assert len(places) > 2
    assert all(isinstance(place, jax.sharding.NamedSharding) and place.mesh == mesh for place in places.values())


ENVIRONMENTS = {
    "": {},
    "JAX_COORDINATOR_ADDRESS=h:1 JAX_NUM_PROCESSES=1 JAX_PROCESS_ID=0": {},
    "JAX_COORDINATOR_ADDRESS=h:1 JAX_NUM_PROCESSES=4 JAX_PROCESS_ID=3": {
        "coordinator_address": "h:1",
        "num_processes": 4,
        "process_id": 3,
    },
    # Within srun; an allocation alone, in which one process runs, is not asked.
    "SLURM_JOB_ID=7 SLURM_STEP_NODELIST=n[1-2] SLURM_NTASKS=2 SLURM_PROCID=1 SLURM_LOCALID=0": {
        "num_processes": 2,
        "process_id": 1,
    },
    "SLURM_JOB_ID=7 SLURM_NTASKS=2 SLURM_PROCID=0 SLURM_LOCALID=0": {},
    "SLURM_JOB_ID=7 SLURM_STEP_NODELIST=n1 SLURM_NTASKS=1 SLURM_PROCID=0 SLURM_LOCALID=0": {},
}


@pytest.mark.parametrize("given", ENVIRONMENTS)
def test_the_environment_says_how_many_there_are(monkeypatch, given):
    for name in [name for name in os.environ if name.startswith(("SLURM_", "JAX_PROCESS", "JAX_NUM", "JAX_COORD"))]:
        monkeypatch.delenv(name)
    for pair in given.split():
        monkeypatch.setenv(*pair.split("=", 1))
    assert hosts.asked() == ENVIRONMENTS[given]
    if ENVIRONMENTS[given]:
        with pytest.raises(UserError, match="runs in a single process"):
            hosts.alone("python -m jaxtune.evaluate")


@pytest.mark.parametrize(
    "given", ["JAX_NUM_PROCESSES=2", "JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=0", "JAX_COORDINATOR_ADDRESS=h:1"]
)
def test_half_an_environment_is_refused(monkeypatch, given):
    for pair in given.split():
        monkeypatch.setenv(*pair.split("=", 1))
    with pytest.raises(UserError, match="JAX_COORDINATOR_ADDRESS=HOST:PORT"):
        hosts.asked()
