"""What XLA is told beside the program: options per platform, where compiled programs are kept, and on CPUs memory."""

import ctypes
import functools
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxtune.mesh import platform

OPTIONS: dict[str, dict[str, str]] = {
    # Left to itself XLA turns the product with an fsdp weight into a loop over its shards (windowed einsum), which
    # hides the way of the shards behind small products.  In a LoRA step of Gemma 2 2B on v5e-8 that is 9,282
    # permutations and, by the compiler's own estimate, 1.55 times the arithmetic; the gathers that it hides are a tenth
    # of the step.
    "tpu": {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "100000"},
}

# Where programs are kept unless JAX_COMPILATION_CACHE_DIR says so.
KEPT = Path("~/.cache/jaxtune/programs")

# mallopt(3): one heap for all threads (what another thread's asks for at once is mapped, and unmapped again), nothing
# of it mapped by itself, and nothing given back.
M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD = -8, -4, -1
KEEP_MEMORY = {M_ARENA_MAX: 1, M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1}


def step_of(function: Callable[..., Any]) -> Any:
    """A training step, jitted for the devices of the mesh that is set; its state (the first argument) is donated."""
    return jax.jit(function, donate_argnums=0, compiler_options=OPTIONS.get(platform()))


@functools.cache
def keep_programs() -> None:
    """Has JAX keep what it compiles for accelerators, so that a run that goes on does not compile for minutes again.

    Call it before the first program is compiled.  On CPUs, where compiling takes seconds, a directory must be named in
    JAX_COMPILATION_CACHE_DIR: a program is for one kind of CPU, and homes are shared.
    """
    if jax.default_backend() != "cpu" and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(KEPT.expanduser()))


def keep_memory() -> None:
    """Has glibc keep the memory that a step frees for the next step, where JAX has only CPUs.

    XLA asks for all of a program's temporary memory at once and frees it when the program ends; the kernel would hand
    it out page by page, cleared, for a sixth of a step's time.  Call it before JAX has threads.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and only_cpus():
        for setting, value in KEEP_MEMORY.items():
            mallopt(setting, value)


def only_cpus() -> bool:
    """Whether JAX can find nothing else, as far as can be said before it looks."""
    named = os.environ.get("JAX_PLATFORMS")
    return named == "cpu" if named else not any(map(importlib.util.find_spec, ("libtpu", "jax_plugins")))
