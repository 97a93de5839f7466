"""A run directory's copy elsewhere, against outages, rot and half copies; fsspec's memory stands for a bucket."""

import hashlib
import json
import os
import shutil
import threading
from typing import ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from test_options import make_step

from jaxtune import kept, rundir, storage
from jaxtune.errors import CannotCreateError, NetworkError, UserError


class Flaky(MemoryFileSystem):
    """Memory whose methods fail when `fault(name, path)` says so."""

    protocol = "flaky"
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]
    fault = staticmethod(lambda name, path: False)
    done: ClassVar[list] = []

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).replace("flaky://", "memory://"))

    def _meet(self, name, path):
        Flaky.done.append((name, str(path)))
        if Flaky.fault(name, str(path)):
            raise OSError(f"no route to host ({name})\nand more")

    def find(self, path, *args, **kwargs):
        self._meet("find", path)
        return super().find(path, *args, **kwargs)

    def pipe_file(self, path, value, **kwargs):
        self._meet("put", path)
        return super().pipe_file(path, value, **kwargs)

    def put_file(self, local, path, *args, **kwargs):
        self._meet("put", path)
        return super().put_file(local, path, *args, **kwargs)

    def rm_file(self, path):
        self._meet("rm", path)
        return super().rm_file(path)

    def cat_file(self, path, *args, **kwargs):
        self._meet("get", path)
        return super().cat_file(path, *args, **kwargs)


fsspec.register_implementation("flaky", Flaky, clobber=True)
URL = "flaky://bucket/run"


@pytest.fixture(autouse=True)
def memory():
    Flaky.fault, Flaky.done = staticmethod(lambda name, path: False), []
    Flaky.store.clear()
    Flaky.pseudo_dirs[:] = [""]


def fail(*names):
    Flaky.fault = staticmethod(lambda name, path: name in names)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def make_run(workdir, *steps):
    for step in steps:
        make_step(workdir / "checkpoints", step)
    for name in ("run.json", "config.json", "tensorboard/events", "adapter/adapter_model.safetensors"):
        write(workdir / name, json.dumps(name))
    write(workdir / "metrics.jsonl", "".join(json.dumps({"step": n}) + "\n" for n in range(9)))
    for name in ("run.lock", "wandb/x", ".hidden/x", "checkpoints/tmp/7/x", "checkpoints/quarantine/3/x"):
        write(workdir / name, "of this machine")


def files(workdir):
    local = ("run.lock", "wandb", ".hidden", "checkpoints/tmp", "checkpoints/quarantine", "log.txt")
    names = [p.relative_to(workdir).as_posix() for p in workdir.rglob("*") if p.is_file()]
    return {n: (workdir / n).read_bytes() for n in names if not n.startswith(local)}


def there():
    prefix = "/bucket/run/"
    found = {path.removeprefix(prefix): bytes(f.getvalue()) for path, f in Flaky.store.items()}
    found.pop("files.sha256", None)
    return found


def copy(workdir, url=URL):
    """One start of a run that copies at its end; what it said."""
    workdir.mkdir(exist_ok=True)
    lines = []
    with storage.synced(url, workdir, lines.append):
        pass
    return "\n".join(lines)


def test_the_copy_is_what_is_there_and_follows_it(tmp_path):
    make_run(tmp_path, 5, 9)
    assert copy(tmp_path) == ""
    assert there() == files(tmp_path) and "checkpoints/9/manifest.sha256" in there()
    puts = [path for name, path in Flaky.done if name == "put"]
    for step in ("5", "9"):
        own = [i for i, path in enumerate(puts) if f"/checkpoints/{step}/" in path]
        # Metrics first, the mark of a whole checkpoint last.
        assert puts.index("/bucket/run/metrics.jsonl") < own[0] and puts[own[-1]].endswith("manifest.sha256")
    # A second pass copies nothing but what is new, and removes what is gone: its mark first.
    make_step(tmp_path / "checkpoints", 12)
    shutil.rmtree(tmp_path / "checkpoints" / "5")
    write(tmp_path / "metrics.jsonl", '{"step": 1}\n')
    Flaky.done.clear()
    assert copy(tmp_path) == ""
    assert there() == files(tmp_path)
    puts = {path.removeprefix("/bucket/run/") for name, path in Flaky.done if name == "put"}
    assert {p for p in puts if "checkpoints/12/" not in p} == {"metrics.jsonl", "files.sha256"}
    removed = [path for name, path in Flaky.done if name == "rm"]
    assert removed[0] == "/bucket/run/checkpoints/5/manifest.sha256"


def test_a_step_that_is_done_again_replaces_its_copy(tmp_path):
    """After going back to the best, say: nothing of the first one stays beside the second."""
    make_run(tmp_path, 5, 9)
    copy(tmp_path)
    # Other arrays under other names, as Orbax has them each time.
    folder = tmp_path / "checkpoints" / "9"
    shutil.rmtree(folder)
    write(folder / "arrays" / "of_the_second", "x")
    write(folder / "manifest.sha256", "y")
    copy(tmp_path)
    assert there() == files(tmp_path)


def test_what_is_left_behind_by_going_back_is_copied_too(tmp_path):
    make_run(tmp_path, 5, 9)
    copy(tmp_path)
    kept.quarantine(tmp_path / "checkpoints", "9", to="abandoned")
    copy(tmp_path)
    assert there() == files(tmp_path)
    assert "checkpoints/abandoned/9/manifest.sha256" in there() and "checkpoints/9/manifest.sha256" not in there()


@pytest.mark.parametrize("url", [URL, "memory://bucket/run", "local"])
def test_an_empty_directory_gets_the_run_back(tmp_path, url):
    make_run(tmp_path / "run", 5, 9)
    url = str(tmp_path / "bucket") if url == "local" else url
    copy(tmp_path / "run", url)
    (tmp_path / "new").mkdir()
    write(tmp_path / "new" / "run.lock", "held")
    write(tmp_path / "new" / "log.txt", "begun\n")
    with open(tmp_path / "new" / "log.txt", "ab", buffering=0) as log:
        said = copy(tmp_path / "new", url)
        log.write(b"more\n")
    assert said == f"brought back from {url}: checkpoints 5, 9"
    assert files(tmp_path / "new") == files(tmp_path / "run")
    assert (tmp_path / "new" / "log.txt").read_text() == "begun\nmore\n"
    # Once it is there, it is the run's own.
    assert copy(tmp_path / "new", url) == ""


def test_what_is_damaged_there_is_left_out(tmp_path):
    make_run(tmp_path / "run", 5, 9, 12)
    copy(tmp_path / "run")
    fs = fsspec.filesystem("flaky")
    fs.pipe_file("/bucket/run/checkpoints/9/arrays", b"rot")
    fs.rm_file("/bucket/run/checkpoints/12/manifest.sha256")  # half a copy
    fs.pipe_file("/bucket/run/adapter/adapter_model.safetensors", b"rot")
    fs.pipe_file("/bucket/run/metrics.jsonl", b'{"step": 1}\n{"st')
    said = copy(tmp_path / "new")
    assert "checkpoints/9 is damaged and left out: arrays is not the file that was saved" in said
    assert "adapter_model.safetensors is not the file that was copied there" in said and "metrics" not in said
    assert kept.steps(tmp_path / "new" / "checkpoints") == [5]
    # And the next pass repairs the copy.
    assert there().keys() >= files(tmp_path / "new").keys()
    assert not any(name.startswith(("checkpoints/9/", "checkpoints/12/")) for name in there())


def test_a_restore_that_breaks_off_begins_again(tmp_path):
    make_run(tmp_path / "run", 5, 9)
    copy(tmp_path / "run")
    Flaky.fault = staticmethod(lambda name, path: name == "get" and path.endswith("metrics.jsonl"))
    for _ in range(2):
        with pytest.raises(NetworkError, match="cannot be brought here: no route to host") as caught:
            copy(tmp_path / "new")
        assert caught.value.exit_code == 69
        assert kept.steps(tmp_path / "new" / "checkpoints") == [5, 9]
    Flaky.fault = staticmethod(lambda name, path: False)
    copy(tmp_path / "new")
    assert files(tmp_path / "new") == files(tmp_path / "run") == there()


def test_an_outage_stops_nothing_and_is_made_up_for(tmp_path):
    lines, passes = [], threading.Semaphore(0)

    def say(text):
        lines.append(text)
        passes.release()

    make_run(tmp_path, 5)
    with storage.synced(URL, tmp_path, say) as ask:
        fail("put")
        ask()
        assert passes.acquire(timeout=10)
        assert lines[0].startswith(f"WARNING: {URL}: {URL} could not be copied (no route to host (put))")
        Flaky.fault = staticmethod(lambda name, path: False)
        make_step(tmp_path / "checkpoints", 6)
    assert there() == files(tmp_path) and len(lines) == 1
    # To the very end: the last line says what is missing, and where it is.
    with storage.synced(URL, tmp_path, say):
        make_step(tmp_path / "checkpoints", 7)
        Flaky.fault = staticmethod(lambda name, path: name == "put" and "/checkpoints/7/" in path)
    assert lines[1:] == [
        f"WARNING: not everything is at {URL}: checkpoints/7 could not be copied (no route to host (put)). {tmp_path} "
        "has it all; the same command tries again."
    ]
    Flaky.fault = staticmethod(lambda name, path: False)
    assert copy(tmp_path) == "" and there() == files(tmp_path)


def test_an_outage_at_the_start(tmp_path):
    """Where there is nothing here, nobody knows whether there is something there."""
    fail("find")
    with pytest.raises(NetworkError, match="Nobody knows whether there is a run to go on with"):
        copy(tmp_path / "new")
    make_run(tmp_path / "run", 5)
    lines = []
    with storage.synced(URL, tmp_path / "run", lines.append):
        fail()
    assert len(lines) == 1 and "its copy is tried again" in lines[0]
    assert there() == files(tmp_path / "run")


def test_the_error_of_a_run_comes_through_and_its_files_are_copied(tmp_path):
    make_run(tmp_path, 5)
    with pytest.raises(KeyError), storage.synced(URL, tmp_path, print):
        raise KeyError
    assert there() == files(tmp_path)
    # A second Ctrl-C waits for nothing.
    make_step(tmp_path / "checkpoints", 6)
    with pytest.raises(KeyboardInterrupt), storage.synced(URL, tmp_path, print):
        raise KeyboardInterrupt
    assert "checkpoints/6/manifest.sha256" not in there()


def test_a_checkpoint_that_is_deleted_while_it_is_copied(tmp_path, monkeypatch):
    make_run(tmp_path, 5, 6)
    rmtree = shutil.rmtree

    def put(name, path):
        if path.endswith("checkpoints/5/record.json") and (tmp_path / "checkpoints" / "5").exists():
            rmtree(tmp_path / "checkpoints" / "5")
        return False

    Flaky.fault = staticmethod(put)
    assert copy(tmp_path) == ""
    assert "checkpoints/5/manifest.sha256" not in there()
    assert copy(tmp_path) == "" and there() == files(tmp_path)


def test_places_that_are_refused(tmp_path):
    make_run(tmp_path / "one", 5)
    make_run(tmp_path / "two", 5)
    copy(tmp_path / "one")
    before = there()
    with pytest.raises(CannotCreateError, match=r"a copy of another run than .*two\. Give another path"):
        copy(tmp_path / "two")
    fsspec.filesystem("flaky").pipe_file("/bucket/mine/thesis.tex", b"mine")
    with pytest.raises(CannotCreateError, match=r"holds what is no run: thesis\.tex"):
        copy(tmp_path / "two", "flaky://bucket/mine")
    assert there() | {"/bucket/mine/thesis.tex": b"mine"} == before | {"/bucket/mine/thesis.tex": b"mine"}
    for url, said in {
        "nope://x/y": "Protocol not known: nope",
        str(tmp_path / "two" / "copy"): "overlaps the run directory",
        str(tmp_path): "overlaps the run directory",
    }.items():
        with pytest.raises(UserError, match=said):
            copy(tmp_path / "two", url)


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch):
    def missing(url):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(storage.fsspec.core, "url_to_fs", missing)
    with pytest.raises(UserError, match=r"gs://b/x.*package is missing \(pip\): Please install gcsfs"):
        copy(tmp_path, "gs://b/x")


def test_digests_are_those_of_coreutils(tmp_path):
    make_run(tmp_path / "run", 5)
    copy(tmp_path / "run", str(tmp_path / "bucket"))
    lines = (tmp_path / "bucket" / "files.sha256").read_text().splitlines()
    assert len(lines) == 5
    for line in lines:
        digest, name = line.split("  ")
        assert hashlib.sha256((tmp_path / "bucket" / name).read_bytes()).hexdigest() == digest
    assert kept.verify(tmp_path / "bucket" / "checkpoints" / "5") is None
    # The copy is a run directory itself.
    assert rundir.open_workdir(tmp_path / "bucket") and os.path.isdir(tmp_path / "bucket")
