"""What XLA is told, and where programs and memory are kept."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from jaxtune import compiler


def test_options_of_the_platform_reach_the_compiler(monkeypatch):
    """Shown by one that there is not; without options the step runs, and gives its state away."""
    monkeypatch.setattr(compiler, "OPTIONS", {"cpu": {"xla_no_such_option": "1"}})
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
        compiler.step_of(lambda x: x + 1)(jnp.ones(4))
    monkeypatch.setattr(compiler, "OPTIONS", {"tpu": {"xla_no_such_option": "1"}})
    state = jnp.ones(4)
    assert compiler.step_of(lambda x: x + 1)(state).tolist() == [2, 2, 2, 2]
    assert state.is_deleted()


@pytest.mark.parametrize(
    ("backend", "named", "expected"),
    [("tpu", None, ".cache/jaxtune/programs"), ("cpu", None, None), ("gpu", "elsewhere", None)],
)
def test_programs_are_kept_for_accelerators(monkeypatch, tmp_path, backend, named, expected):
    """Unless the user names a place, which jax reads itself."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    if named:
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", named)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    before = jax.config.jax_compilation_cache_dir
    compiler.keep_programs.cache_clear()
    try:
        compiler.keep_programs()
        found = jax.config.jax_compilation_cache_dir
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        compiler.keep_programs.cache_clear()
    assert found == (str(tmp_path / expected) if expected else before)


STEPS_OF_64_MB = """
import json, resource, jax, jax.numpy as jnp
from jaxtune import compiler
compiler.keep_memory()
step = jax.jit(lambda x: jnp.sum(jnp.tanh(x @ x.T) @ x))
x, faults = jnp.ones((4096, 8)), []
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(json.dumps(faults))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc alone is told")
def test_steps_on_cpus_use_the_memory_of_those_before():
    """16,384 pages, of which none is fresh again."""
    code = [sys.executable, "-c", STEPS_OF_64_MB]
    done = subprocess.run(code, env=os.environ | {"JAX_PLATFORMS": "cpu"}, check=True, capture_output=True, text=True)
    assert max(json.loads(done.stdout)[2:]) < 1000


@pytest.mark.parametrize(
    ("named", "installed", "expected"),
    [
        ("cpu", "libtpu", True),
        ("tpu,cpu", "", False),
        ("", "", True),
        ("", "libtpu", False),
        ("", "jax_plugins", False),
    ],
)
def test_only_cpus(monkeypatch, named, installed, expected):
    """jax_plugins is where the wheels for GPUs are."""
    monkeypatch.setenv("JAX_PLATFORMS", named)
    monkeypatch.setattr(compiler.importlib.util, "find_spec", lambda name: True if name == installed else None)
    assert compiler.only_cpus() is expected
