"""The loss without logits: equal to plain float32 logits, and what the compiled programs hold and do."""

import collections
import functools
import re
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from test_training import LENGTH, Run, config

from jaxtune import mesh as meshes
from jaxtune.layers import output_logits
from jaxtune.loss import cross_entropy, how, token_scores
from jaxtune.quant import int8, nf4
from jaxtune.state import State
from jaxtune.step import train_step

ORDERS = "chunks", "blocks"


@pytest.fixture(params=ORDERS)
def order(request, monkeypatch):
    """Few tokens and words at a time, so that neither divides anything; the order of CPUs and GPUs, or of TPUs."""
    monkeypatch.setattr(how, "CHUNK_TOKENS", 7)
    monkeypatch.setattr(how, "CHUNK_TOKENS_CPU", 7)
    monkeypatch.setattr(how, "BLOCK_WORDS", 10)
    monkeypatch.setattr(how, "platform", lambda: {"chunks": "cpu", "blocks": "tpu"}[request.param])
    return request.param


def inputs(B=8, V=53, D=16, T=13, dtype=jnp.float32, seed=0):
    """(hidden, table, targets, weights): rows without a target, with one at every position, and with other weights."""
    rng = np.random.default_rng(seed)
    weights = (rng.random((B, T)) < 0.3).astype(np.float32)
    weights[0], weights[1], weights[2] = 0, 1, weights[2] * 0.5
    hidden, table = rng.standard_normal((B, T, D)), rng.standard_normal((V, D))
    targets = rng.integers(0, V, (B, T))
    targets[1, :2] = 0, V - 1
    return jnp.asarray(hidden, dtype), jnp.asarray(table, dtype), jnp.asarray(targets, jnp.int32), jnp.asarray(weights)


def plain(hidden, table, targets, weights, softcap, z_loss):
    """(what is trained on, cross-entropy) from all logits at once, in float32."""
    logits = output_logits(hidden.astype(jnp.float32), table.astype(jnp.float32), softcap)
    entropy = jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, targets) * weights)
    return entropy + z_loss * jnp.sum(weights * jax.nn.logsumexp(logits, axis=-1) ** 2), entropy


def both(softcap=None, z_loss=0.0, of=cross_entropy):
    """A jitted ((trained, entropy), (d_hidden, d_table))."""
    run = functools.partial(of, softcap=softcap, z_loss=z_loss)
    return jax.jit(jax.value_and_grad(run, (0, 1), has_aux=True))


def close(actual, expected, tolerance):
    """By the largest number: gradients have numbers near zero, whose own digits are rounding."""
    scale = max(float(jnp.abs(expected).max()), 1e-30)
    assert float(jnp.abs(actual.astype(jnp.float32) - expected.astype(jnp.float32)).max()) <= tolerance * scale


def mesh_of(sizes):
    return meshes.make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])


def placed(mesh, hidden, table, targets, weights):
    """As in training: rows over data and fsdp, the table over tensor and fsdp, whole where these do not divide it."""
    rows = NamedSharding(mesh, meshes.spec(mesh, ("batch",), hidden.shape[:1]))
    where = NamedSharding(mesh, meshes.spec(mesh, ("vocab", "embed"), table.shape))
    hidden, targets, weights = (jax.device_put(x, rows) for x in (hidden, targets, weights))
    return hidden, jax.device_put(table, where), targets, weights


@pytest.mark.parametrize(
    ("sizes", "shape", "softcap", "z_loss"),
    [
        ((1, 1, 1), {}, 3.0, 0.0),
        ((2, 1, 1), {}, None, 1e-2),
        ((1, 8, 1), {"V": 60}, 3.0, 1e-2),
        ((1, 8, 1), {"D": 12}, None, 0.0),  # no width for each device
        ((2, 2, 2), {"V": 52}, 3.0, 1e-2),  # 26 words each, in blocks of 10
        ((2, 2, 2), {"V": 52}, None, 0.0),
        ((2, 2, 2), {"B": 6}, 3.0, 0.0),  # no rows and no vocabulary for each
    ],
)
def test_equals_plain_logits(order, sizes, shape, softcap, z_loss):
    """Value and both gradients; the table's is split as the table."""
    given = inputs(**shape)
    expected, slopes = both(softcap, z_loss, plain)(*given)
    mesh = mesh_of(sizes)
    with jax.set_mesh(mesh):
        on_mesh = placed(mesh, *given)
        actual, found = both(softcap, z_loss)(*on_mesh)
    np.testing.assert_allclose(actual, expected, rtol=2e-6)
    for ours, theirs in zip(found, slopes, strict=True):
        close(ours, theirs, 2e-6)
    assert found[1].sharding.is_equivalent_to(on_mesh[1].sharding, 2)


def test_without_a_mesh_and_its_zeros(order):
    """No mesh, as in `jaxtune.load`'s calls; and no target at all, which is zero and no NaN."""
    hidden, table, targets, weights = inputs()
    run = both(5.0, 1e-3)
    expected, slopes = both(5.0, 1e-3, plain)(hidden, table, targets, weights)
    actual, found = run(hidden, table, targets, weights)
    np.testing.assert_allclose(actual, expected, rtol=2e-6)
    for ours, theirs in zip(found, slopes, strict=True):
        close(ours, theirs, 2e-6)
    nothing = jax.tree.leaves(run(hidden, table, targets, weights * 0))
    assert all(not np.any(x) for x in nothing)


def test_bfloat16(order):
    """Logits have bfloat16's factors and float32 sums, so that the loss is exact; what flows back is rounded once to
    bfloat16 before its products, 2 ** -9 of each number.  The table's gradient is added up in float32."""
    given = inputs(B=40, dtype=jnp.bfloat16)
    wide = [x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for x in given]
    expected, slopes = both(5.0, 1e-3, plain)(*wide)
    actual, found = both(5.0, 1e-3)(given[0], wide[1], *given[2:])
    np.testing.assert_allclose(actual, expected, rtol=2e-6)
    assert found[0].dtype == jnp.bfloat16 and found[1].dtype == jnp.float32
    for ours, theirs, tolerance in zip(found, slopes, (2**-7, 2**-8), strict=True):
        ours = ours.astype(jnp.float32)
        assert float(jnp.linalg.norm(ours - theirs) / jnp.linalg.norm(theirs)) < tolerance


@pytest.mark.parametrize("sizes", [None, (2, 2, 2)])
def test_work_follows_trained_tokens(order, sizes):
    """Positions behind the last chunk with a target are in no product: NaN there reaches nothing."""
    hidden, table, targets, _ = inputs(V=52)
    weights = np.zeros(targets.shape, np.float32)
    weights[::2, 3:10] = 1  # seven of each second row: whole chunks on every device
    hit = weights[..., None] > 0
    expected, slopes = both(3.0, of=plain)(hidden, table, targets, jnp.asarray(weights))
    given = jnp.where(hit, hidden, jnp.nan), table, targets, jnp.asarray(weights)
    if sizes is None:
        actual, found = both(3.0)(*given)
    else:
        with jax.set_mesh(mesh := mesh_of(sizes)):
            actual, found = both(3.0)(*placed(mesh, *given))
    np.testing.assert_allclose(actual, expected, rtol=2e-6)
    close(found[0], slopes[0], 2e-6)
    close(found[1], slopes[1], 2e-6)
    assert not np.any(np.asarray(found[0])[np.broadcast_to(~hit, hidden.shape)])


@pytest.mark.parametrize("sizes", [None, (2, 2, 2)])
def test_token_scores(order, sizes):
    """Log-probabilities and whether the target is the likeliest; positions without a target have none."""
    hidden, table, targets, weights = inputs(B=6, V=52)
    logits = output_logits(hidden, table, 4.0)
    targets = jnp.where(jnp.arange(targets.shape[1])[None] % 3 == 0, jnp.argmax(logits, axis=-1), targets)
    run = jax.jit(functools.partial(token_scores, softcap=4.0))
    if sizes is None:
        logprobs, best = run(hidden, table, targets, weights)
    else:
        with jax.set_mesh(mesh := mesh_of(sizes)):
            logprobs, best = run(*placed(mesh, hidden, table, targets, weights))
    own = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(logprobs, jnp.where(weights != 0, own, 0), rtol=1e-5, atol=1e-6)
    greedy = (jnp.argmax(logits, axis=-1) == targets) & (weights != 0)
    assert greedy.any() and (best == greedy).all()


BOXES = {
    "nf4": functools.partial(nf4.quantise, axis=-1),
    "nf4_doubly": functools.partial(nf4.quantise, axis=-1, double=True),
    "int8": functools.partial(int8.quantise, axis=-1),
}


@pytest.mark.parametrize("kind", BOXES)
def test_quantised_head(order, kind):
    """As with its numbers, on 2 x 2 x 2; where the vocabulary goes in blocks, no more than a block is dequantised."""
    hidden, table, targets, weights = inputs(V=300, D=128)
    box = jax.jit(BOXES[kind])(table)
    table = box.astype(jnp.float32)

    def run(of, table):
        return jax.jit(jax.value_and_grad(lambda h, table: of(h, table, targets, weights, 3.0, 0.0), has_aux=True))

    expected, slope = run(plain, table)(hidden, table)
    with jax.set_mesh(mesh_of((2, 2, 2))):
        compiled = run(cross_entropy, box).lower(hidden, box).compile()
        actual, found = compiled(hidden, box)
    np.testing.assert_allclose(actual, expected, rtol=2e-6)
    close(found, slope, 2e-6)
    if order == "blocks":
        floats = [dims for kind, dims in arrays(compiled) if kind in ("f32", "bf16") and 128 in dims]
        assert floats and max(map(np.prod, floats)) < 150 * 128  # 150 words on each device


# ---------------------------------------------------------------- Programs


def arrays(compiled):
    """(dtype, dimensions) of every array in a compiled program."""
    found = set(re.findall(r"\b([a-z]+\d+)\[([\d,]+)\]", compiled.as_text()))
    return {(kind, tuple(map(int, dims.split(",")))) for kind, dims in found}


def operations(text, name):
    """Output shapes of the operations of a program, by how often."""
    return collections.Counter(re.findall(rf"= (\w+\[[\d,]*\])(?:{{[\d,]*}})? {name}\(", text))


@pytest.mark.parametrize(("sizes", "trained"), [((1, 1, 1), False), ((2, 2, 2), True)])
def test_no_logits_in_a_training_step(order, checkpoint, sizes, trained):
    """Of the whole step, compiled: what has the vocabulary (97) in it is a table or a chunk's logits, and the gradient
    of a frozen head's table is no operation."""
    rows = [(np.full(LENGTH, 5, np.int32), np.ones(LENGTH, bool))] * 64
    c = config(**({"modules_to_save": ("lm_head",)} if trained else {}))
    compiled = Run(checkpoint("gemma2")[1], c, sizes).compiled(rows)
    tokens, block = 64 * LENGTH // (sizes[0] * sizes[1]), 97 if order == "chunks" else 10
    shapes = {dims for _, dims in arrays(compiled)}
    logits = {dims for dims in shapes if dims[-1] == block and dims[0] == 7}
    assert logits == {(7, block)}
    widest = 24 if order == "blocks" and sizes == (2, 2, 2) else 48  # split over fsdp, or gathered for all chunks
    assert max(np.prod(dims) for dims in shapes if 97 in dims) == 97 * widest, "more than a table"
    assert not any(np.prod(dims) in (tokens * 97, 64 * LENGTH * 97) for dims in shapes)
    dots = operations(compiled.as_text(), "dot")
    of_table = {shape: n for shape, n in dots.items() if shape in (f"f32[{block},48]", f"f32[48,{block}]")}
    assert sum(of_table.values()) == trained, dots


@pytest.mark.parametrize("trained", [False, True])
def test_collectives(order, trained):
    """Under fsdp: the table is gathered once (in blocks: a block for each pass), and only what trains is reduced."""
    hidden, table, targets, weights = inputs(V=60)
    with jax.set_mesh(mesh := mesh_of((1, 8, 1))):
        given = placed(mesh, hidden, table, targets, weights)
        run = jax.value_and_grad(cross_entropy, (0, 1) if trained else 0, has_aux=True)
        text = jax.jit(run, static_argnums=4).lower(*given, None).compile().as_text()
    gathers, sums = operations(text, "all-gather"), operations(text, "all-reduce") + operations(text, "reduce-scatter")
    assert gathers == ({"f32[60,16]": 1} if order == "chunks" else {"f32[10,16]": 2})
    slopes = {"chunks": ["f32[60,16]", "f32[60,2]"], "blocks": ["f32[10,16]", "f32[10,2]"]}[order]
    assert set(sums) - set(slopes) == {"f32[2]"}, "a reduction of what is frozen"
    assert sum(sums[shape] for shape in slopes) == trained


def test_only_the_head_trains(order):
    """No gradient of hidden states is made where none is asked for."""
    hidden, table, targets, weights = inputs()
    run = jax.jit(jax.grad(lambda table: cross_entropy(hidden, table, targets, weights, None)[0]))
    expected = jax.grad(lambda table: plain(hidden, table, targets, weights, None, 0.0)[0])(table)
    compiled = run.lower(table).compile()
    close(compiled(table), expected, 2e-6)
    dots = operations(compiled.as_text(), "dot")
    assert not any(shape in ("f32[7,16]", "f32[16,7]") for shape in dots)


# ---------------------------------------------------------------- z-loss in training; what is chosen


class Toy:
    """As much of a model as a step asks for: hidden states are rows of one table, and the head is another."""

    config = types.SimpleNamespace(final_softcap=3.0)

    def apply(self, variables, *tokens, method=None, rngs=None):
        return variables["head"] if method == "head" else (variables["rows"][tokens[0]], None)


@pytest.mark.parametrize("z_loss", [0.0, 0.2])
def test_a_step_of_micro_batches(order, z_loss):
    """Three micro-batches: their gradient is that of the whole batch's mean, with the z-loss, which is not reported."""
    _, table, targets, weights = inputs(B=9)
    rows = jnp.asarray(np.random.default_rng(1).standard_normal(table.shape), jnp.float32)
    trainable = {"head": table, "rows": rows}
    whole = {"tokens": targets[:, ::-1], "positions": targets, "segment_ids": targets}
    whole |= {"targets": targets, "weights": weights}

    def mean(trainable):
        hidden = trainable["rows"][whole["tokens"]]
        found = plain(hidden, trainable["head"], targets, weights, 3.0, z_loss)
        return found[0] / weights.sum(), found[1] / weights.sum()

    (_, entropy), slopes = jax.value_and_grad(mean, has_aux=True)(trainable)
    optimiser = optax.sgd(1.0)
    state = State(jnp.int32(0), trainable, optimiser.init(trainable))
    how = {"model": Toy(), "structure": {"head": 0, "rows": 0}, "optimiser": optimiser, "seed": 0, "z_loss": z_loss}
    step = jax.jit(functools.partial(train_step, **how, schedule=optax.constant_schedule(1.0)))
    after, metrics = step(state, {}, {k: x.reshape(3, 3, -1) for k, x in whole.items()})
    assert float(metrics["loss"]) == pytest.approx(float(entropy), rel=2e-6)
    assert float(metrics["grad_norm"]) == pytest.approx(float(optax.tree.norm(slopes)), rel=1e-5)
    for name, before in trainable.items():
        close(before - after.trainable[name], slopes[name], 1e-5)


def test_sizes_are_even():
    assert [how.even(n, 1024, 8) for n in (1, 1000, 1024, 1025, 3000, 4096)] == [1, 1000, 1024, 520, 1000, 1024]
    assert how.even(256000, how.BLOCK_WORDS, 128) == 16000
    for n in (17000, 32003, 50257, 151936, 262144):
        size = how.even(n, how.BLOCK_WORDS, 128)
        assert size <= how.BLOCK_WORDS and -(-n // size) == -(-n // how.BLOCK_WORDS)


def test_order_is_of_the_mesh(monkeypatch):
    """A program for TPUs has blocks although the backend is a CPU's: the devices of the mesh decide."""
    table = jax.ShapeDtypeStruct((256000, 2304), jnp.bfloat16)
    assert how.choose(4096, table, 30.0).blocks == 1 and how.choose(4096, table, 30.0).chunk == how.CHUNK_TOKENS_CPU
    monkeypatch.setattr(how, "platform", lambda: "gpu")
    assert how.choose(4096, table, 30.0) == how.How(30.0, 0.0, 512, 256000, 256000)
    monkeypatch.undo()
    here = mesh_of((1, 4, 2)).abstract_mesh
    there = here.update(abstract_device=type(here.abstract_device)("TPU v5 lite", 1, "tpu"))
    with jax.sharding.use_abstract_mesh(there):
        chosen = how.choose(8192, table, 30.0)
    assert chosen == how.How(30.0, 0.0, 512, 128000, 16000, ("fsdp",), ("tensor",), ("fsdp",))
    assert how.specs(chosen)["table"] == PartitionSpec(("tensor",), ("fsdp",))


def test_blocks_on_the_chip(monkeypatch):
    """Compiled for 8 chips of TPU v5e, with Gemma 2 2b's head: the whole loss and its gradient in little memory."""
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    for name, value in {
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        monkeypatch.setenv(name, value)
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    with jax.set_mesh(mesh := meshes.make_mesh(1, 8, 1, devices=devices)):
        rows = meshes.batch_sharding(mesh)
        hidden = jax.ShapeDtypeStruct((16, 2048, 2304), jnp.bfloat16, sharding=rows)
        where = NamedSharding(mesh, meshes.spec(mesh, ("vocab", "embed"), (256000, 2304)))
        table = jax.ShapeDtypeStruct((256000, 2304), jnp.bfloat16, sharding=where)
        targets = jax.ShapeDtypeStruct((16, 2048), jnp.int32, sharding=rows)
        weights = jax.ShapeDtypeStruct((16, 2048), jnp.float32, sharding=rows)
        run = jax.jit(jax.value_and_grad(cross_entropy, has_aux=True), static_argnums=4)
        compiled: Any = run.lower(hidden, table, targets, weights, 30.0).compile()
    # 0.17 GiB: a block, its logits and the gradient of hidden states.  All logits of these rows would be 3.9.
    assert compiled.memory_analysis().temp_size_in_bytes < 0.2 * 2**30
    gathers = [line for line in compiled.as_text().splitlines() if "all-gather" in line]
    assert any("16000,2304" in line for line in gathers) and not any("256000,2304" in line for line in gathers)
