"""Several processes as one run: started by the environment, of one mind, and ended together.

Each host runs the same command.  The process 0 alone writes to the run directory, which all of them see; everything
that is computed is computed by all, in the same order.  A host that is refused or breaks tells the others through the
key-value store of `jax.distributed`, and they end with its words and its exit code: nobody waits for one who has gone.
One that is killed tells nobody; jax notices within HEARTBEAT seconds and aborts the others.
"""

import atexit
import contextlib
import hashlib
import itertools
import json
import os
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src import clusters, distributed  # the store has no public name; orbax and flax reach for it here, too
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtune.errors import CannotCreateError, NetworkError, UserError
from jaxtune.typing import Tree

# Seconds until all processes have come, and after which one that is silent counts as dead (jax's own default).
COMING, HEARTBEAT = 120, 100
# Seconds that a process may take longer than another to read the data, or to end.
READING = 3600
# Launchers whose variables jax understands; Kubernetes alone says nothing of how many processes there are.
LAUNCHERS = ("gcetpu", "gketpu", "slurm", "ompi")
FAILED = "jaxtune/failed"


def asked() -> dict[str, Any]:
    """What the environment says of several processes, as `jax.distributed.initialize` takes it; empty for a single one.

    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; else what Slurm, Open MPI, GKE or a TPU VM set.

    Raises:
      UserError: one of the three variables without the others, or no number.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = {name: os.environ[name] for name in names if os.environ.get(name)}
    with contextlib.suppress(KeyError, ValueError):
        address, count, index = given[names[0]], int(given[names[1]]), int(given[names[2]])
        if 0 <= index < count and address.rpartition(":")[2].isdecimal():
            said = {"coordinator_address": address, "num_processes": count, "process_id": index}
            return said if count > 1 else {}
    apart = os.environ.get("TPU_PROCESS_BOUNDS") == "1,1,1"  # one host of a slice, on its own chips
    cpu = os.environ.get("JAX_PLATFORMS") == "cpu"
    for kind in clusters.ClusterEnv._cluster_types:
        if kind.name in LAUNCHERS and not (apart or (cpu and kind.name.endswith("tpu"))):
            # A machine that looks like one of these and cannot be asked is a single one.
            with contextlib.suppress(Exception):
                if kind.is_env_present() and not given.keys() - {names[0]}:
                    count = kind.get_process_count()
                    return {"num_processes": count, "process_id": kind.get_process_id()} if count > 1 else {}
    if given:
        raise UserError(
            f"The environment has {', '.join(f'{k}={v}' for k, v in given.items())}. Several processes need all of "
            f"{names[0]}=HOST:PORT (of process 0), {names[1]}=N and {names[2]}=0 to N-1; one process none of them."
        )
    return {}


def start() -> None:
    """Joins the other processes, where the environment says that there are any.  Call it before a device is touched.
    Where they do not come, this process ends with a NetworkError's code.

    Raises:
      NetworkError: they cannot be joined.  UserError: as `asked`.
    """
    given = asked()
    if not given or jax.distributed.is_initialized():
        return
    own, count = given["process_id"], given["num_processes"]
    where = given.get("coordinator_address", "the first of them")
    print(f"process {own} of {count}: waiting for the others at {where}", file=sys.stderr, flush=True)

    def nobody() -> None:
        late = NetworkError(
            f"This is process {own} of {count}, and not all of them met at {where} within {COMING} s.\nStart the same "
            "command on every host (gcloud … ssh --worker=all, srun); the port of process 0 must be open to the others."
        )
        print(f"error: {late}", file=sys.stderr)
        _leave(late.exit_code)

    # Where jax gives up it aborts, with pages of C++.
    timer = threading.Timer(COMING, nobody)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(**given, initialization_timeout=2 * COMING, heartbeat_timeout_seconds=HEARTBEAT)
    except RuntimeError as error:
        said = str(error).splitlines()[0][:300]
        raise NetworkError(
            f"This is process {own} of {count}, which could not join the others at {where}: {said}"
        ) from None
    finally:
        timer.cancel()


def alone(command: str) -> None:
    """Refuses several processes.

    Raises:
      UserError: the environment asks for them.
    """
    if given := asked():
        raise UserError(
            f"{command} runs in a single process, and this is process {given['process_id']} of "
            f"{given['num_processes']}. Run it on one host, without JAX_NUM_PROCESSES or srun; on a host of a TPU "
            "slice with TPU_PROCESS_BOUNDS=1,1,1 TPU_CHIPS_PER_PROCESS_BOUNDS=2,2,1 (its own four chips), or with "
            "JAX_PLATFORMS=cpu."
        )


def several() -> bool:
    return jax.process_count() > 1


def first() -> bool:
    """Whether this process alone writes to the run directory."""
    return jax.process_index() == 0


def _store() -> Any:
    return distributed.global_state.client


# ---------------------------------------------------------------------------------------------------- Ending together
@contextlib.contextmanager
def together(ended: Callable[[BaseException], None] = lambda error: None) -> Iterator[None]:
    """Around a command: what breaks it here ends it on all hosts, and what breaks it elsewhere ends it here.

    Args:
      ended: told of the end of another host, before this process is ended.
    """
    if not several():
        yield
        return
    done = threading.Event()
    watch = threading.Thread(target=_watch, args=(done, ended), daemon=True)
    watch.start()
    try:
        yield
        barrier("the end")  # what one has still to copy or push, the others wait for
    except BaseException as error:
        done.set()
        code = getattr(error, "exit_code", 130 if isinstance(error, KeyboardInterrupt) else 1)
        _tell(str(error) or type(error).__name__, code)
        # Behind the last words, and before jax waits for hosts that have ended.
        atexit.register(_leave, code)
        raise
    finally:
        done.set()
        watch.join()


def _tell(words: str, code: int) -> None:
    """Others learn why this process ends, and get some seconds to hear of it: without process 0 there is no store."""
    with contextlib.suppress(Exception):
        store, own = _store(), jax.process_index()
        said = {"process": own, "host": socket.gethostname(), "words": words[:2000], "code": code}
        store.key_value_set(FAILED, json.dumps(said))
        for other in range(jax.process_count()):
            if other != own:
                store.blocking_key_value_get(f"{FAILED}/{other}", 5000)


def _watch(done: threading.Event, ended: Callable[[BaseException], None]) -> None:
    store, own = _store(), jax.process_index()
    while not done.wait(1.0):
        try:
            said = json.loads(store.key_value_try_get(FAILED))
        except Exception:
            continue  # nothing is there
        if said["process"] == own:
            return
        error = UserError(f"Process {said['process']} on {said['host']} ended: {said['words']}")
        error.exit_code = said["code"]
        with contextlib.suppress(Exception):
            store.key_value_set(f"{FAILED}/{own}", "heard")
        with contextlib.suppress(Exception):
            ended(error)
        print(f"error: {error}", file=sys.stderr)
        _leave(said["code"])


def _leave(code: int) -> None:
    """Ends this process at once: its main thread may wait in a collective, or jax at its exit, for those who have
    ended."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def stopping(signals: Sequence[int]) -> Callable[[], bool]:
    """A function to be called behind each step, as often on each host: whether to stop there, the same on all of them.

    One process stops when a signal has come.  Of several, jax's preemption service (SIGTERM, on whichever host) finds a
    step that all of them have before them; until then the answer costs no message.

    Args:
      signals: no longer empty when this process is to stop.
    """
    if not several():
        return lambda: bool(signals)
    # Calls of this start, not steps: a signal may come before a resumed run has made any.
    calls, reached = itertools.count(1), []

    def stop() -> bool:
        if not reached and multihost_utils.reached_preemption_sync_point(next(calls)):
            reached.append(True)
        return bool(reached)

    return stop


# ---------------------------------------------------------------------------------------------------- Of one mind
def agree(what: Mapping[str, Any]) -> None:
    """Refuses to go on where a host would do something else, and waits until all are here.

    Raises:
      UserError: a table of what differs from process 0.  NetworkError: a host does not come.
    """
    if not several():
        return
    own = {name: str(value) for name, value in what.items()}
    theirs = said_by_first(own)
    keys = [key for key in sorted(own.keys() | theirs.keys()) if own.get(key) != theirs.get(key)]
    if keys:
        rows = [("", "process 0", "here"), *((k, theirs.get(k, "absent"), own.get(k, "absent")) for k in keys[:10])]
        cells = [[text if len(text) <= 45 else f"{text[:44]}…" for text in row] for row in rows]
        widths = [max(len(row[i]) for row in cells) for i in range(3)]
        lines = ["  ".join(f"{text:{w}}" for text, w in zip(row, widths, strict=True)).rstrip() for row in cells]
        table = "\n  ".join(lines)
        raise UserError(
            f"Process {jax.process_index()} on {socket.gethostname()} would not do what process 0 does:\n  {table}\n"
            "Give every host the same command, code and data."
        )
    barrier("all agree")


_turns = itertools.count()


def said_by_first(value: Any) -> Any:
    """What process 0 gives, a value that JSON has, on every host."""
    if not several():
        return value
    key = f"jaxtune/said/{next(_turns)}"
    if first():
        _store().key_value_set(key, json.dumps(value))
        return value
    with _waiting("process 0"):
        return json.loads(_store().blocking_key_value_get(key, READING * 1000))


def barrier(what: str) -> None:
    """Waits for all hosts."""
    if several():
        with _waiting("the others"):
            _store().wait_at_barrier(f"jaxtune/{what}/{next(_turns)}", READING * 1000)


@contextlib.contextmanager
def _waiting(whom: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise NetworkError(f"Waiting for {whom} has failed: {str(error).splitlines()[0][:300]}") from None


def check_shared(workdir: Path) -> None:
    """Refuses a run directory that is not one and the same for all hosts: each writes its part of a checkpoint there.

    Raises:
      CannotCreateError: this host does not see what process 0 has written.
    """
    if not several():
        return
    token = workdir / said_by_first(f".hosts-{uuid.uuid4().hex}")
    with contextlib.ExitStack() as stack:
        if first():
            token.touch()
            stack.callback(token.unlink, missing_ok=True)
        barrier("the token is written")
        until = time.monotonic() + 5
        while not token.exists() and time.monotonic() < until:
            time.sleep(0.2)
        if not token.exists():
            raise CannotCreateError(
                f"`--workdir` is {workdir}, which process {jax.process_index()} on {socket.gethostname()} does not "
                "share with process 0. Hosts write their parts of a checkpoint into one directory: give one on a disk "
                "that all of them have mounted (NFS, Filestore, Lustre); `storage.sync_to` copies it to gs://."
            )
        barrier("the token is seen")


def code() -> str:
    """A hash of jaxtune's own files."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------- Arrays
def whole(x: Any) -> np.ndarray:
    """The values of an array, wherever they lie.  All hosts call it, in the same order."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable and not x.is_fully_replicated:
        return multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


@contextlib.contextmanager
def place(workdir: Path) -> Iterator[Path]:
    """Where to write what all hosts must make together, for its gathers: the run directory, or what is thrown away."""
    if first():
        yield workdir
        return
    with tempfile.TemporaryDirectory(prefix="jaxtune-") as nowhere:
        yield Path(nowhere)


def replicated(mesh: Mesh, arrays: Tree) -> Tree:
    """Arrays, with a whole copy on every device where they are spread over several hosts."""
    if not several():
        return arrays
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))(arrays)
