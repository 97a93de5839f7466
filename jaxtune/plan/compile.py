"""The training step of a config, compiled by the real compiler for chips that are not here, and what it says of it.

libtpu compiles for TPUs on any x86 Linux machine (`pip install "libtpu==0.0.42.*"`); a GPU's step compiles where that
GPU is.  What comes out was never run: memory and collectives are the compiler's, times are not there.
"""

import contextlib
import importlib.util
import os
import re
import tempfile
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from jaxtune import mesh as meshes
from jaxtune.compiler import step_of
from jaxtune.errors import MissingInputError, UserError
from jaxtune.hf.base import Base
from jaxtune.plan import collectives
from jaxtune.plan.abstract import Laid, lay_out
from jaxtune.plan.chips import Chip, chip_of_kind

# So that libtpu asks no server what machine this is, and several processes may compile at a time.  They do not say for
# which chip is compiled.
QUIET = {
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

# What XLA says on stderr where a sharding makes it repeat or gather a whole array.
COMPLAINTS = re.compile(r"(?i)involuntary full remat|fully? replicat|rematerializ")


class Compiled(NamedTuple):
    """Bytes of one chip, by the compiler: total = argument + temp + output - alias + code; peak is its own figure of
    the most that lives at a time.  None of them where it does not fit, but `needs`.

    collectives: {kind: {count, bytes}} of a step.  complaints: lines in which XLA says that it copies more than asked.
    """

    argument: int
    temp: int
    output: int
    alias: int
    code: int
    peak: int
    total: int
    collectives: dict[str, dict[str, int]]
    complaints: list[str]
    seconds: float
    text: str


class DoesNotFit(NamedTuple):
    """What the compiler said of a step that has no room.  needs, has: bytes of one chip, as far as it said."""

    needs: int | None
    has: int | None
    message: str
    seconds: float


def devices_of(chip: Chip, chips: int, slices: int = 1) -> list[Any]:
    """The devices of a slice, described: TPUs from libtpu, which need not be there; others must be attached.

    Args:
      chips: in all.  slices: into how many slices they are split.

    Raises:
      MissingInputError: no libtpu.  UserError: a GPU that is not here, or no such slice.
    """
    if chip.platform != "tpu":
        here = [d for d in jax.devices() if chip_of_kind(d.device_kind) == chip]
        if len(here) < chips:
            raise UserError(
                f"--compile asks for {chips} {chip.name}, and {len(here)} are attached. GPUs compile where they are; "
                "any TPU compiles here (--chip v5e). Drop --compile for the prediction."
            )
        return here[:chips]
    if importlib.util.find_spec("libtpu") is None:
        raise MissingInputError(
            '--compile needs the TPU compiler, which is not installed: pip install "libtpu==0.0.42.*" (it works '
            "without a TPU). Drop --compile for the prediction."
        )
    if slices < 1 or chips % slices or chips // slices not in (chip.slices or {}):
        raise UserError(
            f"{chips} {chip.name} in {slices} slices: each would have to have one of {chip.counts()} chips."
        )
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    shape = (chip.slices or {})[chips // slices]
    single = {"chips_per_host_bounds": [1, 1, 1]} if chips // slices == 1 else {}
    many = {"num_slices": slices} if slices > 1 else {}
    described = topologies.get_topology_desc(platform="tpu", topology_name=f"{chip.name}:{shape}", **single, **many)
    if len(described.devices) != chips:
        raise UserError(
            f"--compile: libtpu describes the cores of {chip.name} one by one, as no program sees them. Drop it."
        )
    return list(described.devices)


def compile_config(c: Any, base: Base, chip: Chip, chips: int, length: Any = None) -> Compiled | DoesNotFit:
    """The config's training step on a whole slice.

    Raises:
      MissingInputError, UserError: as `devices_of` and `lay_out`.
    """
    devices = devices_of(chip, chips, c.mesh.slice)
    mesh = meshes.make_mesh(c.mesh.data, c.mesh.fsdp, c.mesh.tensor, devices=devices, slices=c.mesh.slice)
    laid = lay_out(c, base, mesh, length)  # makes a key, which described devices could not
    with jax.set_mesh(mesh):
        return compile_step(laid)


def compile_step(laid: Laid) -> Compiled | DoesNotFit:
    """Compiles the step of a run that is laid out on the mesh that is set (`jax.set_mesh`)."""
    start = time.monotonic()
    with _stderr() as said:
        try:
            compiled = step_of(laid.step).lower(laid.state, laid.frozen, laid.batch).compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return _does_not_fit(str(error), time.monotonic() - start)
    sizes, text = compiled.memory_analysis(), compiled.as_text()
    assert sizes is not None and text is not None
    argument, temp, output = sizes.argument_size_in_bytes, sizes.temp_size_in_bytes, sizes.output_size_in_bytes
    alias, code = sizes.alias_size_in_bytes, sizes.generated_code_size_in_bytes
    return Compiled(
        *(argument, temp, output, alias, code),
        peak=sizes.peak_memory_in_bytes,
        total=argument + temp + output - alias + code,
        collectives=collectives.count(text),
        complaints=[line for line in said() if COMPLAINTS.search(line)],
        seconds=time.monotonic() - start,
        text=text,
    )


def _does_not_fit(message: str, seconds: float) -> DoesNotFit:
    """Reads `… Used 28.75G of 15.75G hbm …` or `… temporaries (16.84G) exceeds available HBM (15.75G)`."""
    found = re.search(r"Used ([\d.]+[KMGT]) of ([\d.]+[KMGT]) hbm", message) or re.search(
        r"\(([\d.]+[KMGT])\) exceeds available HBM \(([\d.]+[KMGT])\)", message
    )
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    needs, has = (int(float(x[:-1]) * units[x[-1]]) for x in found.groups()) if found else (None, None)
    return DoesNotFit(needs, has, " ".join(message.split())[:500], seconds)


@contextlib.contextmanager
def _stderr() -> Iterator[Any]:
    """What the process writes to stderr meanwhile, XLA's C++ too, as a function that gives its lines afterwards."""
    with tempfile.TemporaryFile() as file:
        lines: list[str] = []
        kept = os.dup(2)
        try:
            os.dup2(file.fileno(), 2)
            yield lambda: lines
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            lines += file.read().decode("utf-8", "replace").splitlines()
