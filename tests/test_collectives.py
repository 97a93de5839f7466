"""What the devices of a step send each other, read from the compiled program; and which of them are neighbours."""

import importlib.util
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from test_training import Run, config, ragged_rows

from jaxtune import mesh as meshes
from jaxtune.layers import take_rows
from jaxtune.plan.compile import COMPLAINTS


def summed(program):
    """The shapes that all-reduces and reduce-scatters of a program sum over devices, sizes in order: XLA turns some."""
    lines = (line.split(" = ", 1)[1] for line in program.splitlines() if " = " in line)
    sums = (re.match(r"(.*?) (?:all-reduce|reduce-scatter)(?:-start)?\(", line) for line in lines)
    found = [shape for line in sums if line for shape in re.findall(r"\w+\[([\d,]*)\]", line[1])]
    return [tuple(sorted(map(int, shape.split(",")))) if shape else () for shape in found]


def test_a_frozen_weight_has_no_gradient_collective(checkpoint):
    """Of LoRA under fsdp: the gradients of A and B, each once for each layer, the loss, counts and norms."""
    run = Run(checkpoint("gemma2")[1], config(r=5), (1, 8, 1))
    adapters = {tuple(sorted(x.shape[1:])) for x in run.state.trainable.values()}
    frozen = {tuple(sorted(x.shape[-2:])) for x in run.adapted.frozen.values() if x.ndim > 1}
    assert not adapters & frozen, "shapes would not tell an adapter's gradient from a weight's"
    found = summed(run.compiled(ragged_rows(16)).as_text())
    large = [shape for shape in found if np.prod(shape) > 8]
    assert set(large) == adapters
    assert len(large) == len(run.state.trainable), "summed more than once"


def test_one_that_trains_has():
    """That the test above would see one."""
    mesh = meshes.make_mesh(1, 8, 1)
    w = jax.ShapeDtypeStruct((32, 48), jnp.float32, sharding=meshes.replicated(mesh))
    x = jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=meshes.batch_sharding(mesh))
    program = jax.jit(jax.grad(lambda w, x: jnp.sum(jnp.tanh(x @ w)))).lower(w, x).compile()
    assert (32, 48) in summed(program.as_text())


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2), (1, 1, 8), (8, 1, 1), (1, 2, 2, 2)])
def test_rows_of_a_split_table(sizes):
    """Values and the table's gradient are those of the whole one: a batch that splits, and one that does not."""
    slices = (*sizes, 1)[3]
    mesh = meshes.make_mesh(*sizes[:3], slices=slices)
    table = jax.random.normal(jax.random.key(0), (24, 16))
    for rows in (8, 3):
        tokens = jax.random.randint(jax.random.key(1), (rows, 5), -2, 24)
        weight = jax.random.normal(jax.random.key(2), (rows, 5, 16))

        def weighed(table, tokens=tokens, weight=weight):
            return jnp.sum(take_rows(table, tokens) * weight)

        expected = jnp.take(table, tokens, axis=0, mode="clip"), jax.grad(weighed)(table)
        placed = jax.device_put(table, NamedSharding(mesh, meshes.spec(mesh, ("vocab", "embed"), table.shape)))
        with jax.set_mesh(mesh):
            found = jax.jit(take_rows)(placed, tokens), jax.jit(jax.grad(weighed))(placed)
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2), (1, 2, 2, 2)])
def test_nothing_is_replicated_against_our_will(checkpoint, sizes, capfd):
    """XLA says on stderr where it has to repeat a whole array or compute one again because of its place."""
    run = Run(checkpoint("gemma2")[1], config(r=5), sizes)
    capfd.readouterr()
    run.compiled(ragged_rows(16))
    said = [line for line in capfd.readouterr().err.splitlines() if COMPLAINTS.search(line)]
    assert said == []


# Two slices of eight chips, as libtpu describes them: no chip is needed.
SLICES = """
from jax.experimental import topologies
from jaxtune.errors import UserError
from jaxtune.mesh import make_mesh

chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4", num_slices=2).devices
found = make_mesh(1, -1, 2, chips, slices=2).devices
assert found.shape == (2, 1, 4, 2), found.shape
assert [{chip.slice_index for chip in half.flat} for half in found] == [{0}, {1}]
assert all(abs(a.coords[0] - b.coords[0]) + abs(a.coords[1] - b.coords[1]) == 1 for a, b in found.reshape(-1, 2))
try:
    make_mesh(1, -1, 1, chips)
except UserError as error:
    assert "`mesh.slice` is 1, and the 16 devices are of 2 TPU slices" in str(error), error
else:
    raise AssertionError("one axis over two slices")
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is absent")
def test_the_slice_axis_is_that_of_the_slices():
    quiet = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-8", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    quiet |= {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0", "JAX_PLATFORMS": "cpu"}
    found = subprocess.run([sys.executable, "-c", SLICES], env=os.environ | quiet, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
