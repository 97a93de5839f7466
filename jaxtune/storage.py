"""A copy of the run directory elsewhere (`storage.sync_to`): kept up by a thread, brought back to a bare machine.

    URL/sync.json                 which run this is
    URL/metrics.jsonl …           files as in the run directory, and files.sha256, a digest of each
    URL/checkpoints/100/…         its manifest.sha256 goes last and is removed first: without it there is no checkpoint

Metrics go before the checkpoints that they belong to, so that whatever comes back has every step up to its checkpoint.
The run directory is what counts: what is gone there goes here, too.  Nothing that fails here stops a run.

No jax: `torch_gpu` uses it too.
"""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import fsspec
from fsspec.implementations.local import LocalFileSystem

from jaxtune.errors import CannotCreateError, NetworkError, UserError
from jaxtune.kept import steps
from jaxtune.rundir import LOCK, MANIFEST, check_manifest, read_json_or, write_json_atomic

RUN = "sync.json"
DIGESTS = "files.sha256"
# There while a run is being brought back: what the directory holds is then a part of it.
RESTORING = "restoring"
# They grow, so that their digest may be of less than what is there; whole lines of them are good all the same.
LINES = ("metrics.jsonl", "log.txt")
# Of this machine.
LOCAL = (LOCK, RUN, RESTORING, "wandb")
CHECKPOINTS = "checkpoints"


class Remote(NamedTuple):
    """A place that fsspec knows: its file system, the path there, and as it was given."""

    fs: Any
    root: str
    url: str

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def names(self) -> list[str]:
        """Every file, relative to the root; none where there is no such place."""
        self.fs.invalidate_cache()
        found = [str(PurePosixPath(path)) for path in self.fs.find(self.root)]
        start = str(PurePosixPath(self.root)) + "/"
        names = [path[path.index(start) + len(start) :] for path in found if start in path]
        return sorted(name for name in names if ".." not in name.split("/"))


def open_remote(url: str, workdir: Path) -> Remote:
    """The place that a URL names.

    Raises:
      UserError: nobody knows it, the package for it is not installed, or it is in the run directory.
    """
    try:
        fs, root = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise UserError(f"`storage.sync_to` is {url!r}, for which a package is missing (pip): {error}.") from None
    except ValueError as error:
        raise UserError(
            f"`storage.sync_to` is {url!r}: {error}. It takes a path of a file system that fsspec knows: gs://…, "
            "s3://…, /mnt/…"
        ) from None
    if isinstance(fs, LocalFileSystem):
        fs, here = LocalFileSystem(auto_mkdir=True), Path(root).resolve()
        if here == workdir or workdir in here.parents or here in workdir.parents:
            raise UserError(f"`storage.sync_to` is {url!r}, which overlaps the run directory {workdir}.")
    return Remote(fs, root.rstrip("/"), url)


@contextlib.contextmanager
def synced(url: str | None, workdir: Path, say: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Brings back the run that is at `url` where `workdir` has none, and gives what asks for a copy; the last is made
    at the end, also of a run that failed.

    Raises:
      UserError: as `open_remote` and `begin`.
    """
    if url is None:
        yield lambda: None
        return
    copier = Copier(open_remote(url, workdir), workdir, say)
    begin(copier.remote, workdir, say)
    copier.start()
    try:
        yield copier.ask
    except Exception:
        copier.finish()
        raise
    copier.finish()


def begin(remote: Remote, workdir: Path, say: Callable[[str], None]) -> None:
    """Before the first step: sees whose copy is there, and brings a run back to an empty directory.

    Raises:
      CannotCreateError: the place has another run, or something else.
      NetworkError: it cannot be read, so that nobody knows whether there is a run to go on with.
    """
    own = read_json_or(workdir / RUN, {}).get("id")
    partly = (workdir / RESTORING).exists()
    has_run = not partly and bool((workdir / "run.json").exists() or steps(workdir / CHECKPOINTS))
    try:
        names = remote.names()
        there = json.loads(remote.fs.cat_file(remote.path(RUN)))["id"] if RUN in names else None
        if there is not None and not has_run:
            restore(remote, names, workdir, say)
            return
    except Exception as error:
        if has_run:
            say(f"WARNING: {remote.url} cannot be read: {reason(error)}. The run goes on; its copy is tried again.")
            if own is None:
                write_json_atomic(workdir / RUN, {"id": secrets.token_hex(8)})
            return
        raise NetworkError(
            f"`storage.sync_to` is {remote.url!r}, and what is there cannot be brought here: {reason(error)}.\nNobody "
            "knows whether there is a run to go on with. Run the same command again, or leave `storage.sync_to` out."
        ) from error
    if names and there is None:
        raise CannotCreateError(
            f"`storage.sync_to` is {remote.url!r}, which holds what is no run: {listed(names, 3)}. Give a path of its "
            "own."
        )
    if there is not None and there != own:
        raise CannotCreateError(
            f"`storage.sync_to` is {remote.url!r}, which has a copy of another run than {workdir}. Give another path; "
            "or an empty --workdir, to go on with that run."
        )
    if own is None:
        write_json_atomic(workdir / RUN, {"id": secrets.token_hex(8)})


def restore(remote: Remote, names: list[str], workdir: Path, say: Callable[[str], None]) -> None:
    """Fills an empty run directory.  Checkpoints have to be what their manifests say; other files their digests."""
    shutil.rmtree(workdir / CHECKPOINTS, ignore_errors=True)
    (workdir / RESTORING).touch()
    digests = {}
    if DIGESTS in names:
        digests = {line[66:]: line[:64] for line in remote.fs.cat_file(remote.path(DIGESTS)).decode().splitlines()}
    units = {unit_of(name) for name in names if name.endswith(f"/{MANIFEST}")} - {None}
    for unit in sorted(map(str, units)):
        target, work = workdir / unit, workdir / CHECKPOINTS / "tmp" / unit
        for name in [name for name in names if unit_of(name) == unit]:
            (workdir / CHECKPOINTS / "tmp" / name).parent.mkdir(parents=True, exist_ok=True)
            remote.fs.get_file(remote.path(name), str(workdir / CHECKPOINTS / "tmp" / name))
        damage = check_manifest(work)
        if damage is not None:
            say(f"WARNING: {remote.url}/{unit} is damaged and left out: {damage}.")
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rename(work, target)
    for name in names:
        if unit_of(name) is not None or name in (DIGESTS, RUN):
            continue
        data = remote.fs.cat_file(remote.path(name))
        if hashlib.sha256(data).hexdigest() != digests.get(name) and name not in LINES:
            say(f"WARNING: {remote.url}/{name} is not the file that was copied there (SHA-256) and left out.")
            continue
        path = workdir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        # This start's log is open already: what was there before goes before it, in place.
        begun = path.read_bytes() if name == "log.txt" and path.exists() else b""
        path.write_bytes(begun if begun.startswith(data) else data + begun)
    path = workdir / RUN
    path.write_bytes(remote.fs.cat_file(remote.path(RUN)))
    (workdir / RESTORING).unlink()
    there = steps(workdir / CHECKPOINTS)
    say(f"brought back from {remote.url}: {f'checkpoints {listed(there)}' if there else 'a run without checkpoints'}")


class Copier:
    """A thread that copies when asked; what is asked while it copies is one more pass.  Its errors are warnings."""

    def __init__(self, remote: Remote, workdir: Path, say: Callable[[str], None]):
        self.remote, self._workdir, self._say = remote, workdir, say
        # What is known to be there: digests of files, and of the manifests of checkpoints.  None: not looked yet.
        self._files: dict[str, str] | None = None
        self._units: dict[str, str] = {}
        self._asked, self._ending, self._failing = threading.Event(), False, False
        # Not waited for when a second Ctrl-C ends the run at once.
        self._thread = threading.Thread(target=self._run, name="storage", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def ask(self) -> None:
        """Has a pass made soon."""
        self._asked.set()

    def finish(self) -> None:
        """Makes the last pass, and says what is missing after it."""
        self._ending = True
        self._asked.set()
        self._thread.join()
        missing = self.copy()
        if missing:
            self._say(
                f"WARNING: not everything is at {self.remote.url}: {listed(list(missing))} could not be copied "
                f"({next(iter(missing.values()))}). {self._workdir} has it all; the same command tries again."
            )

    def _run(self) -> None:
        while self._asked.wait() and not self._ending:
            self._asked.clear()
            missing = self.copy()
            if missing and not self._failing:
                self._say(
                    f"WARNING: {self.remote.url}: {listed(list(missing))} could not be copied "
                    f"({next(iter(missing.values()))}). The run goes on; the next checkpoint tries again."
                )
            self._failing = bool(missing)

    def copy(self) -> dict[str, str]:
        """One pass; {what could not be copied: why}."""
        missing: dict[str, str] = {}

        def attempt(name: str, what: Callable[[], None]) -> None:
            try:
                what()
            except Exception as error:
                missing[name] = reason(error)

        local: list[str] = []
        attempt(self.remote.url, self._look)
        # A step that is deleted in this moment: the next pass sees clear.
        attempt(CHECKPOINTS, lambda: local.extend(units(self._workdir)))
        if self._files is None or missing:
            return missing
        before = dict(self._files)
        for name in loose(self._workdir):
            attempt(name, lambda name=name: self._copy_file(name))
        if self._files != before:
            text = "".join(f"{digest}  {name}\n" for name, digest in sorted(self._files.items()))
            attempt(DIGESTS, lambda: self.remote.fs.pipe_file(self.remote.path(DIGESTS), text.encode()))
        for unit in local:
            attempt(unit, lambda unit=unit: self._copy_unit(unit))
        for unit in [unit for unit in self._units if unit not in local]:
            attempt(unit, lambda unit=unit: self._remove_unit(unit))
        return missing

    def _look(self) -> None:
        """At first: what is there already."""
        if self._files is not None:
            return
        names, fs = self.remote.names(), self.remote.fs
        own = (self._workdir / RUN).read_bytes()
        if RUN not in names:
            fs.pipe_file(self.remote.path(RUN), own)
        elif json.loads(fs.cat_file(self.remote.path(RUN)))["id"] != json.loads(own)["id"]:
            raise OSError("it has a copy of another run")
        text = fs.cat_file(self.remote.path(DIGESTS)).decode() if DIGESTS in names else ""
        for unit in sorted({str(unit_of(name)) for name in names if unit_of(name) is not None}):
            manifest = f"{unit}/{MANIFEST}"
            self._units[unit] = digest(fs.cat_file(self.remote.path(manifest))) if manifest in names else ""
        self._files = {line[66:]: line[:64] for line in text.splitlines() if line[66:] in names}

    def _copy_file(self, name: str) -> None:
        assert self._files is not None
        try:
            data = (self._workdir / name).read_bytes()
        except FileNotFoundError:  # replaced in this moment: the next pass has it
            return
        if self._files.get(name) != digest(data):
            self.remote.fs.pipe_file(self.remote.path(name), data)
            self._files[name] = digest(data)

    def _copy_unit(self, unit: str) -> None:
        local = self._workdir / unit
        try:
            manifest = (local / MANIFEST).read_bytes()
            if self._units.get(unit) == digest(manifest):
                return
            if unit in self._units:  # another of this step, or a part of one: its files would stay among the new ones
                self._remove_unit(unit)
            self._units[unit] = ""
            for path in sorted(p for p in local.rglob("*") if p.is_file() and p != local / MANIFEST):
                name = path.relative_to(self._workdir).as_posix()
                self.remote.fs.put_file(str(path), self.remote.path(name))
            self.remote.fs.pipe_file(self.remote.path(f"{unit}/{MANIFEST}"), manifest)
        except FileNotFoundError:
            if local.exists():
                raise
            return  # deleted as an old one meanwhile: the next pass removes what has been copied
        self._units[unit] = digest(manifest)

    def _remove_unit(self, unit: str) -> None:
        fs, manifest = self.remote.fs, self.remote.path(f"{unit}/{MANIFEST}")
        self.remote.fs.invalidate_cache()
        if fs.exists(manifest):
            fs.rm_file(manifest)
        if fs.exists(self.remote.path(unit)):
            fs.rm(self.remote.path(unit), recursive=True)
        del self._units[unit]


def unit_of(name: str) -> str | None:
    """'checkpoints/100' of 'checkpoints/100/arrays/d/x'; None of a file of no checkpoint."""
    parts = name.split("/")
    depth = 3 if parts[1:2] == ["abandoned"] else 2
    return "/".join(parts[:depth]) if parts[0] == CHECKPOINTS and len(parts) > depth else None


def units(workdir: Path) -> list[str]:
    """The checkpoints of a run directory, those left behind included."""
    folder = workdir / CHECKPOINTS
    left = sorted((folder / "abandoned").iterdir()) if (folder / "abandoned").is_dir() else []
    return [f"{CHECKPOINTS}/{step}" for step in steps(folder)] + [f"{CHECKPOINTS}/abandoned/{p.name}" for p in left]


def loose(workdir: Path) -> list[str]:
    """Every other file of a run directory that is copied."""
    found = [p.relative_to(workdir).as_posix() for p in (workdir / CHECKPOINTS).glob("*.json")]
    # Unlike rglob, it does not mind a folder that goes away meanwhile.
    for folder, inner, names in os.walk(workdir):
        here = Path(folder).relative_to(workdir)
        left_out = (*LOCAL, CHECKPOINTS) if here == Path() else ()
        inner[:] = [name for name in inner if name[0] != "." and name not in left_out]
        found += [(here / name).as_posix() for name in names if name[0] != "." and name not in left_out]
    return sorted(name for name in found if Path(name).name[0] != ".")


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def reason(error: Exception) -> str:
    """The first line of what an error says."""
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def listed(names: list[Any], most: int = 5) -> str:
    return ", ".join(map(str, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")
