"""8-bit AdamW beside bitsandbytes' and where its state lies: on shards, in the host's memory, in checkpoints."""

import functools
import types

import bitsandbytes
import bitsandbytes.backends.cpu.ops
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from jax.sharding import NamedSharding, PartitionSpec
from test_training import LENGTH, ragged_rows

from jaxtune import adamw8bit, optim
from jaxtune import mesh as meshes
from jaxtune.adapt import adapt
from jaxtune.checkpoint import Checkpoints
from jaxtune.config import get_default, to_json
from jaxtune.data.batches import collate
from jaxtune.errors import UserError
from jaxtune.hf.base import open_base
from jaxtune.peft import partial
from jaxtune.quant import dynamic
from jaxtune.state import make_state, resume, to_save
from jaxtune.step import train_step

P = PartitionSpec


@pytest.mark.parametrize("signed", [True, False])
class TestMap:
    def test_equals_bitsandbytes(self, signed):
        theirs = bitsandbytes.functional.create_dynamic_map(signed=signed).numpy()
        np.testing.assert_array_equal(dynamic.dynamic_map(signed), theirs)

    def test_nearest(self, signed):
        values = dynamic.dynamic_map(signed)
        middles = (values[1:] + values[:-1]) / np.float32(2)
        np.testing.assert_array_equal(dynamic.nearest(jnp.asarray(middles), values), np.arange(255))
        above = jnp.asarray(np.nextafter(middles, np.float32(2)))
        np.testing.assert_array_equal(dynamic.nearest(above, values), np.arange(1, 256))
        blocks = jnp.asarray(np.stack([values * 3, values * 0]))
        codes, absmax = dynamic.quantise(blocks, values)
        assert absmax.tolist() == [3, 0]
        np.testing.assert_allclose(dynamic.dequantise(codes, absmax, values), blocks, rtol=1e-6)

    def test_arithmetic_is_the_table(self, signed):
        values, codes = dynamic.dynamic_map(signed), np.arange(256, dtype=np.uint8)
        np.testing.assert_allclose(adamw8bit.decode(jnp.asarray(codes), signed), values, rtol=7e-7)
        np.testing.assert_array_equal(adamw8bit.encode(jnp.asarray(values), signed), codes)
        x = np.random.default_rng(0).standard_normal(300_000).astype(np.float32) ** 5
        x = x / np.abs(x).max() if signed else np.abs(x) / np.abs(x).max()
        ours = np.asarray(adamw8bit.encode(jnp.asarray(x), signed)).astype(int)
        table = np.asarray(dynamic.nearest(jnp.asarray(x), values)).astype(int)
        expected = table if signed else np.maximum(table, x > 0)
        assert np.abs(ours - expected).max() <= 1 and np.mean(ours != expected) <= 1e-5


def cuda_codes(x, code, absmax, out, blocksize):
    """bitsandbytes' CUDA rule, in place of its CPU build's table (which has no unsigned code below 7)."""
    blocks = x.reshape(-1, blocksize)
    absmax.copy_(blocks.abs().amax(1))
    middles = (code[1:] + code[:-1]) / 2
    out.copy_(torch.searchsorted(middles, (blocks / absmax[:, None]).clamp(-1, 1)).reshape(x.shape))


@pytest.mark.parametrize(("rule", "near"), [("cuda", 3e-4), ("cpu", 3e-3)])
def test_steps_follow_bitsandbytes(monkeypatch, rule, near):
    """Ten steps of a stacked weight [2, 512, 48], whose blocks are those of its [out, in], and of a small one."""
    if rule == "cuda":
        monkeypatch.setattr(bitsandbytes.backends.cpu.ops, "_quant_blockwise_fp32_direct", cuda_codes)
    rng = np.random.default_rng(0)
    first = {"w": rng.standard_normal((2, 512, 48), np.float32), "small": rng.standard_normal((5, 7), np.float32)}
    theirs = [torch.nn.Parameter(torch.tensor(w)) for w in (*first["w"].transpose(0, 2, 1).copy(), first["small"])]
    keys = {"betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    optimiser = bitsandbytes.optim.AdamW8bit(theirs, lr=1e-2, **keys)
    rule_ = adamw8bit.adamw8bit(1e-2, 0.9, 0.99, 1e-6, 0.1)
    ours, state, update = first, rule_.init(first), jax.jit(rule_.update)
    for _ in range(10):
        # Not below a hundredth of the block's largest, where our second moments stay above zero and theirs do not.
        grads = {p: np.copysign(rng.uniform(0.05, 4, w.shape), rng.standard_normal(w.shape)) for p, w in first.items()}
        grads = {p: g.astype(np.float32) for p, g in grads.items()}
        for weight, g in zip(theirs, [*grads["w"].transpose(0, 2, 1).copy(), grads["small"]], strict=True):
            weight.grad = torch.tensor(g)
        optimiser.step()
        updates, state = update({p: jnp.asarray(g) for p, g in grads.items()}, state, ours)
        ours = optax.apply_updates(ours, updates)

    assert state.mu["w"].dtype == jnp.uint8 and state.mu["small"].dtype == jnp.float32
    *w, small = (p.detach().numpy() for p in theirs)
    np.testing.assert_allclose(ours["small"], small, rtol=1e-5, atol=1e-6)
    w = np.stack(w).transpose(0, 2, 1)
    assert np.linalg.norm(ours["w"] - w) <= near * np.linalg.norm(w - first["w"])
    same = [
        np.mean(optimiser.state[theirs[i]][name].numpy() == np.asarray(codes["w"][i]).T)
        for codes, name in ((state.mu, "state1"), (state.nu, "state2"))
        for i in range(2)
    ]
    assert min(same) > (0.999 if rule == "cuda" else 0.9), same


def test_moments_that_are_small_in_their_block():
    """A second moment that became zero beside a first that did not would be a step of thousands of learning rates."""
    rule = adamw8bit.adamw8bit(1e-3, 0.9, 0.999, 1e-8, 0.0)
    w = {"w": jnp.zeros((1, 256, 16))}
    g = jnp.where(jnp.arange(256)[None, :, None] == 0, 1.0, 1e-4) * jnp.ones((1, 256, 16))
    _, state = rule.update({"w": g}, rule.init(w), w)
    assert int(state.mu["w"].min()) > 127 and int(state.nu["w"].min()) == 1
    updates, _ = rule.update({"w": jnp.zeros_like(g)}, state, w)
    assert float(jnp.abs(updates["w"]).max()) < 2e-3


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((26, 2304, 9216), (-1, 256)),
        ((26, 9216, 2304), (-2, 256)),
        ((26, 2304, 8), (-2, 256)),
        ((26, 8, 1024), (-1, 256)),
        ((26, 40, 24), (-2, 40)),
        ((256000, 2304), (-1, 144)),
        ((1000, 16), (-1, 16)),
        ((5000,), (-1, 256)),
    ],
)
def test_where_blocks_lie(shape, expected):
    assert adamw8bit.layout(shape) == expected


def optimiser_of(name, **keys):
    c = get_default()
    c.optim.update({"name": name, "learning_rate": 1e-2, "schedule": "constant"} | keys)
    return optim.make_optimiser(c.optim, optim.make_schedule(c.optim, 10))


def leaves(sizes):
    """Weights on a mesh; `uneven` has rows that do not fill blocks, and three of them for two devices."""
    mesh = meshes.make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
    specs = {
        "layers/up": ((3, 512, 768), P(None, "fsdp", "tensor")),
        "embed/table": ((64, 512), P("tensor", "fsdp")),
        "layers/uneven": ((2, 30, 600), P(None, None, "fsdp")),
        "small": ((8,), P("fsdp")),
    }
    rng = np.random.default_rng(0)
    return mesh, {
        path: jax.device_put(rng.standard_normal(shape, np.float32), NamedSharding(mesh, spec))
        for path, (shape, spec) in specs.items()
    }


def test_state_lies_where_its_weight_does():
    """And a step of eight devices is that of one; so it is in the host's memory."""
    ends = {}
    for sizes, offload in (((1, 1, 1), False), ((2, 2, 2), False), ((2, 2, 2), True)):
        mesh, weights = leaves(sizes)
        rule = optimiser_of("adamw8bit", weight_decay=0.1)
        rule = optim.offloaded(rule) if offload else rule
        state = make_state(rule, weights, mesh, offload=offload)
        update = jax.jit(lambda w, s, rule=rule: rule.update(jax.tree.map(jnp.sin, w), s, w), donate_argnums=1)
        now = state.opt_state
        for _ in range(3):
            before, (updates, now) = now, update(weights, now)
            weights = {p: w + updates[p] for p, w in weights.items()}
            assert all(x.is_deleted() for x in jax.tree.leaves(before))
        [adam] = [s for s in jax.tree.leaves(now, is_leaf=lambda x: hasattr(x, "mu_scale")) if hasattr(s, "mu_scale")]
        assert {x.sharding.memory_kind for x in jax.tree.leaves(adam) if x.ndim} == {
            "pinned_host" if offload else "device"
        }
        ends[sizes, offload] = {p: np.asarray(w) for p, w in weights.items()}
        if sizes == (2, 2, 2):
            where = [{p: x.sharding.spec for p, x in part.items()} for part in adam[1:]]
            assert where[0] == where[1] == {p: w.sharding.spec for p, w in weights.items()}
            assert {p: x.shape for p, x in adam.mu_scale.items()} == {
                "layers/up": (3, 2, 768),
                "embed/table": (64, 2),
                "layers/uneven": (2, 30, 3),
            }
            assert (
                where[2]
                == where[3]
                == {
                    "layers/up": P(None, "fsdp", "tensor"),
                    "embed/table": P("tensor", "fsdp"),
                    "layers/uneven": P(),
                }
            )
    one, many, host = ends.values()
    for path in one:
        # A few of a million codes are another: the compilers round otherwise where two are equally near.
        differ = ~np.isclose(many[path], one[path], rtol=1e-5, atol=1e-6)
        assert differ.mean() < 1e-4 and np.abs(many[path] - one[path]).max() < 1e-3, path
        np.testing.assert_array_equal(host[path], many[path], err_msg=path)


def test_layers_that_do_not_train_stay():
    rule = partial.optimiser(optimiser_of("adamw8bit"), {"w": (True, False)})
    w = {"w": jnp.ones((2, 256, 16))}
    updates, _ = rule.update(w, rule.init(w), w)
    assert bool(jnp.all(updates["w"][0] != 0)) and not updates["w"][1].any()


def test_adafactor_factors_the_last_two_axes():
    """Of a stacked weight, not the layers; every part of the state is placed."""
    mesh, weights = leaves((2, 2, 2))
    state = make_state(optimiser_of("adafactor"), weights, mesh).opt_state
    shapes = {x.shape for x in jax.tree.leaves(state)}
    assert {(3, 512), (3, 768)} <= shapes and (3, 512, 768) not in shapes
    assert all(isinstance(x.sharding, NamedSharding) for x in jax.tree.leaves(state))


def test_offload_is_refused_where_it_cannot_be(monkeypatch):
    def check(platform=None, memory=None, **keys):
        if platform:
            kind = types.SimpleNamespace(kind=memory)
            device = types.SimpleNamespace(platform=platform, addressable_memories=lambda: [kind])
            monkeypatch.setattr(jax, "local_devices", lambda: [device])
        c = get_default()
        c.optim.update(keys)
        optim.check_offload(c.optim)

    check(offload=True)
    check("abacus", "rods", offload=False)
    with pytest.raises(UserError, match=r"^`optim.offload` .*abacus devices have no pinned_host .*rods.*adamw8bit"):
        check("abacus", "rods", offload=True)
    check("tpu", "pinned_host", offload=True, name="adamw")
    with pytest.raises(UserError, match=r"^`optim.offload` .*TPUs does not compile .*`optim.name` to adamw\.$"):
        check("tpu", "pinned_host", offload=True, name="adamw8bit")


class AdaLoraRun:
    """AdaLoRA's optimiser around 8-bit AdamW and clipping, micro-batches, a mesh."""

    def __init__(self, directory, offload):
        c = get_default()
        c.peft.update({"method": "adalora", "target_modules": ("q_proj", "down_proj"), "init_r": 6, "target_r": 2})
        c.optim.update({"name": "adamw8bit", "learning_rate": 3e-3, "max_grad_norm": 0.1})
        self.mesh = meshes.make_mesh(1, 2, 1, devices=jax.devices()[:2])
        base = open_base(str(directory), remat="full")
        with jax.set_mesh(self.mesh):
            how = {"dtype": "float32", "seed": 0, "total_steps": 8, "encode": lambda text: [3]}
            self.adapted = adapt(to_json(c)["peft"], base, self.mesh, **how)
            schedule = optim.make_schedule(c.optim, 8)
            rule = self.adapted.optimiser(optim.make_optimiser(c.optim, schedule))
            rule = optim.offloaded(rule) if offload else rule
            self.state = make_state(rule, self.adapted.trainable, self.mesh, offload=offload)
            parts = {"model": base.model, "structure": self.adapted.structure, "penalty": self.adapted.penalty()}
            step = functools.partial(train_step, **parts, optimiser=rule, schedule=schedule, seed=0)
            self.update = jax.jit(step, donate_argnums=0)

    def steps(self, numbers):
        for n in numbers:
            where = meshes.batch_sharding(self.mesh, leading=1)
            batch = collate(ragged_rows(8, seed=n), 8, LENGTH)
            batch = {k: jax.device_put(v.reshape(2, -1, LENGTH), where) for k, v in batch.items()}
            with jax.set_mesh(self.mesh):
                self.state, _ = self.update(self.state, self.adapted.frozen, batch)
        return {p: np.asarray(x) for p, x in self.state.trainable.items()}


def test_offload_and_resume_give_the_same_bits(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(adamw8bit, "LEAST", 256)
    directory = checkpoint("gemma2")[1]
    plain = AdaLoraRun(directory, offload=False)
    expected = plain.steps(range(6))

    host = AdaLoraRun(directory, offload=True)
    fresh = host.state
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), fresh)
    how = {"keep_last_n": 1, "keep_best_n": 0, "identity": {}}
    host.steps(range(3))
    kinds = {x.dtype: x.sharding.memory_kind for x in jax.tree.leaves(host.state.opt_state) if x.ndim}
    assert kinds[jnp.dtype("uint8")] == kinds[jnp.dtype("float32")] == kinds[jnp.dtype("bool")] == "pinned_host"
    with Checkpoints(tmp_path / "checkpoints", **how) as checkpoints:
        checkpoints.save(3, to_save(host.state), rows=24)
    with Checkpoints(tmp_path / "checkpoints", **how) as checkpoints:
        host.state, rows, _ = resume(checkpoints, abstract)
    assert rows == 24
    assert {x.sharding.memory_kind for x in jax.tree.leaves(host.state.opt_state) if x.ndim} == {"pinned_host"}
    actual = host.steps(range(3, 6))
    for path, value in expected.items():
        np.testing.assert_array_equal(actual[path], value, err_msg=path)
    for a, b in zip(jax.tree.leaves(host.state.opt_state), jax.tree.leaves(plain.state.opt_state), strict=True):
        np.testing.assert_array_equal(a, b)
