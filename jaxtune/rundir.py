"""The run directory: opened, locked for one run at a time; files written whole or not at all, and hashed.

Standard library only: `jaxtune.train` and `torch_gpu.train` share it.
"""

import contextlib
import datetime
import fcntl
import hashlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jaxtune.errors import CannotCreateError, StorageError

# The exit code of a run that saved and stopped: the same command goes on.
STOPPED = 75
LOCK = "run.lock"
MANIFEST = "manifest.sha256"


def now() -> str:
    """UTC, to the second: '2026-01-31T12:00:00+00:00'."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def open_workdir(path: str | Path) -> Path:
    """The absolute path of a run directory, created if it is not there; `~` and relative paths are resolved.

    Raises:
      CannotCreateError: it is a file, cannot be created, or holds files of something that is not a run.
    """
    try:
        workdir = Path(path).expanduser().resolve()
        workdir.mkdir(parents=True, exist_ok=True)
        names = sorted(os.listdir(workdir))
    except (OSError, RuntimeError) as error:
        raise CannotCreateError(
            f"`--workdir` is {str(path)!r} and cannot be a run directory: {error}.\n"
            f"Give a directory that can be written to, or a path where one can be created."
        ) from error
    if names and not {LOCK, "run.json"} & set(names):
        raise CannotCreateError(
            f"`--workdir` is {workdir}, which is not a run directory and not empty: it holds {', '.join(names[:5])}"
            f"{', …' if len(names) > 5 else ''}.\nGive a new or empty directory, e.g. {workdir / 'run'}."
        )
    return workdir


@contextlib.contextmanager
def run_lock(workdir: Path) -> Iterator[None]:
    """Holds the directory for this process.  The kernel drops the lock of a dead process, so no lock is ever stale.

    Raises:
      CannotCreateError: another run holds it (named by host, pid and start), or the directory cannot be locked.
    """
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(workdir / LOCK, "a+", encoding="utf-8"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise CannotCreateError(
                f"Another run is using {workdir}: {file.read().strip() or 'it has just started'}.\n"
                f"Wait for it, stop it, or give another `--workdir`."
            ) from None
        except OSError as error:
            raise CannotCreateError(
                f"{workdir} cannot be written to or locked: {error}.\nGive another `--workdir`."
            ) from error
        # The file stays when the run ends: deleting it could pull it from under a run that has just opened it.
        with contextlib.suppress(OSError):
            file.truncate(0)
            file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": now()}) + "\n")
            file.flush()
        yield


def sync_directory(path: Path) -> None:
    """Makes the names in a directory survive a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomic(path: Path, data: bytes) -> None:
    """Replaces a file: whatever happens, it holds either the old bytes or all of the new ones.

    Raises:
      StorageError: the disk is full or read-only; the old file is intact.
    """
    tmp = path.with_name(f".{path.name}.tmp")
    try:
        with open(tmp, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(tmp, path)
        sync_directory(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            tmp.unlink(missing_ok=True)
        raise StorageError(
            f"{path} cannot be written: {error}. Free some space or give another `--workdir`."
        ) from error


def write_json_atomic(path: Path, value: Any) -> None:
    """Writes a value as indented JSON; the file is never seen half-written.

    Raises:
      StorageError: as `write_atomic`.
    """
    write_atomic(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_json_or(path: Path, otherwise: Any) -> Any:
    """What a JSON file holds, or `otherwise` where it is not there or torn."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return otherwise


def update_run(workdir: Path, status: str, **fields: Any) -> None:
    """Writes `run.json`: status, started, ended, and `fields` (exit_code, resume_command, step, …) over what is there.

    `status` is 'running', which starts the record anew, or one of 'finished', 'stopped', 'failed', which end it.

    Raises:
      StorageError: as `write_atomic`.
    """
    path = workdir / "run.json"
    if status == "running":
        record = {"status": status, "exit_code": None, "started": now(), "ended": None}
    else:
        record = json.loads(path.read_text()) | {"status": status, "ended": now()}
    write_json_atomic(path, record | fields)


class RunRecord:
    """`config.json` and `run.json` of one run.

    Until `start`, those of an earlier run in the directory stand: a command that is refused changes neither.

    Args:
      command: what to type to go on.
      quiet: write nothing (every process of a run but the first).
    """

    def __init__(self, workdir: Path, command: str, quiet: bool = False):
        self._workdir, self._command, self._quiet = workdir, command, quiet
        self._started = False

    def start(self, config: dict[str, Any]) -> None:
        """The run is accepted: it and its config, as plain values, replace what is there.

        Raises:
          StorageError: as `write_atomic`.
        """
        if not self._quiet:
            write_json_atomic(self._workdir / "config.json", config)
            update_run(self._workdir, "running", resume_command=self._command)
            self._started = True

    def note(self, **facts: Any) -> None:
        """Numbers of the run, for `jaxtune.compare`.

        Raises:
          StorageError: as `write_atomic`.
        """
        if self._started:
            record = json.loads((self._workdir / "run.json").read_text())
            write_json_atomic(self._workdir / "run.json", record | facts)

    def end(self, exit_code: int) -> None:
        """The run came to its end, or (75) stopped where it can go on.

        Raises:
          StorageError: as `write_atomic`.
        """
        if self._started:
            update_run(self._workdir, "stopped" if exit_code == STOPPED else "finished", exit_code=exit_code)

    def fail(self, error: BaseException) -> None:
        """The run broke off.  What broke it matters more than that this cannot be written."""
        if self._started:
            code = getattr(error, "exit_code", 130 if isinstance(error, KeyboardInterrupt) else 1)
            said = str(error)[:2000] or type(error).__name__
            with contextlib.suppress(StorageError):
                update_run(self._workdir, "failed", exit_code=code, error=said)


class Appender:
    """A file that grows by whole pieces, and is given up with one warning when it cannot."""

    def __init__(self, path: Path, say: Callable[[str], None]):
        self._path, self._say, self._file = path, say, None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered: what was written is in the kernel's hands, safe from kill -9, when `write` returns.
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        except OSError as error:
            self.give_up(error)

    def write(self, data: bytes) -> None:
        """Appends, or gives up."""
        if self._file is None:
            return
        try:
            if self._file.write(data) != len(data):
                raise OSError("no space left for a whole line")
        except OSError as error:
            self.give_up(error)

    def give_up(self, error: Exception) -> None:
        self.close()
        self._say(f"WARNING: {self._path} cannot be written: {error}. The run goes on without it.")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _manifest(directory: Path) -> bytes:
    # Hidden files (of file managers and of NFS) are nobody's.
    files = sorted(p for p in directory.rglob("*") if p.is_file() and p != directory / MANIFEST and p.name[0] != ".")
    # hashlib lets go of the interpreter while it works, so threads hash in parallel.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        lines = [
            f"{digest}  {file.relative_to(directory).as_posix()}\n"
            for digest, file in zip(pool.map(_digest, files), files, strict=True)
        ]
    return "".join(lines).encode()


def write_manifest(directory: Path) -> None:
    """Writes `manifest.sha256`, one line a file: `sha256sum -c manifest.sha256` checks it by hand, too.

    Raises:
      OSError, StorageError: a file cannot be read, or the manifest not written.
    """
    write_atomic(directory / MANIFEST, _manifest(directory))


def check_manifest(directory: Path) -> str | None:
    """None if a directory holds exactly the bytes it held when its manifest was written, else the files that differ.

    Raises:
      OSError: a file cannot be read, or there is no manifest.
    """
    stored, actual = (directory / MANIFEST).read_bytes(), _manifest(directory)
    if stored == actual:
        return None
    was, found = ({line[66:]: line[:64] for line in m.decode(errors="replace").splitlines()} for m in (stored, actual))
    problems = [f"{name} is missing" for name in was if name not in found]
    problems += [
        f"{name} is not the file that was saved (SHA-256)" for name in was if found.get(name, was[name]) != was[name]
    ]
    problems += [f"{name} is not in {MANIFEST}" for name in found if name not in was]
    return "; ".join(problems[:3]) or f"{MANIFEST} is damaged"
