"""Training equals a plain torch loop over peft; one device equals many; micro-batches equal one batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
import transformers

from jaxtune import mesh as meshes
from jaxtune import optim
from jaxtune.adapt import adapt
from jaxtune.config import get_default, to_json
from jaxtune.data.batches import collate
from jaxtune.hf.adapters import adapter_tensors
from jaxtune.hf.base import open_base
from jaxtune.state import make_state
from jaxtune.step import train_step
from jaxtune.tree import flatten

LENGTH = 24


def config(**peft_keys):
    c = get_default()
    c.peft.update({"target_modules": "all-linear", "r": 4, "lora_alpha": 8.0} | peft_keys)
    c.optim.update({"learning_rate": 3e-3, "schedule": "constant", "max_grad_norm": 0.0})
    return c


def ragged_rows(count, seed=0):
    """(tokens, mask) pairs of different lengths, some longer than the window, with very different target counts."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        n = int(rng.integers(6, LENGTH + 1))
        mask = np.zeros(n, bool)
        mask[int(rng.integers(1, n)) :] = True
        rows.append((rng.integers(3, 90, n).astype(np.int32), mask))
    return rows


class Run:
    """A jaxtune training run without files: model, state and the compiled step."""

    def __init__(self, directory, c, sizes=(1, 1, 1), turns=1, init_from=None, quant=None, remat="full", unroll=1):
        devices, slices = jax.devices()[: int(np.prod(sizes))], (*sizes, 1)[3]
        self.mesh = meshes.make_mesh(*sizes[:3], devices=devices, slices=slices)
        self.turns = turns
        base = open_base(str(directory), remat=remat, unroll=unroll, quant=quant)
        with jax.set_mesh(self.mesh):
            section = to_json(c)["peft"] | {"init_from": init_from}
            how = {"dtype": "float32", "seed": 0, "total_steps": 100, "encode": lambda text: [3]}
            self.adapted = adapt(section, base, self.mesh, **how)
            schedule = optim.make_schedule(c.optim, 100)
            optimiser = self.adapted.optimiser(optim.make_optimiser(c.optim, schedule))
            self.state = make_state(optimiser, self.adapted.trainable, self.mesh)
            parts = {"model": base.model, "structure": self.adapted.structure, "penalty": self.adapted.penalty()}
            update = functools.partial(train_step, **parts, optimiser=optimiser, schedule=schedule, seed=0)
            self.update = jax.jit(update, donate_argnums=0)

    def put(self, rows):
        batch = collate(rows, len(rows), LENGTH)
        where = meshes.batch_sharding(self.mesh, leading=1)
        return {k: jax.device_put(v.reshape(self.turns, -1, LENGTH), where) for k, v in batch.items()}

    def step(self, rows):
        with jax.set_mesh(self.mesh):
            self.state, metrics = self.update(self.state, self.adapted.frozen, self.put(rows))
        return {k: float(v) for k, v in metrics.items()}

    def compiled(self, rows):
        with jax.set_mesh(self.mesh):
            return self.update.lower(self.state, self.adapted.frozen, self.put(rows)).compile()


def torch_loss(model, rows):
    """transformers' loss of a batch: mean over the real target tokens of the whole batch."""
    ids, mask, labels = np.zeros((3, len(rows), LENGTH), np.int64)
    labels[:] = -100
    for i, (tokens, trained) in enumerate(rows):
        ids[i, : len(tokens)], mask[i, : len(tokens)] = tokens, 1
        labels[i, : len(tokens)] = np.where(trained, tokens, -100)
    return model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), labels=torch.tensor(labels)).loss


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_thirty_steps_equal_peft(checkpoint, tmp_path, name):
    """Same base, same first A and B, same batches, AdamW in float32: 30 losses and the final adapter are peft's."""
    _, directory = checkpoint(name)
    base = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    torch.manual_seed(0)
    keys = {"r": 3, "lora_alpha": 7, "use_rslora": True, "rank_pattern": {"down_proj": 5}}
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", **keys))
    model.save_pretrained(tmp_path / "first")

    c = config()
    # eps: Adam's first steps are the gradient's sign, and with 1e-8 the rounding of one near-zero gradient decides it.
    c.optim.update({"weight_decay": 0.1, "max_grad_norm": 0.5, "eps": 1e-6})
    ours = Run(directory, c, init_from=str(tmp_path / "first"))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=3e-3, weight_decay=0.1, eps=1e-6)
    model.train()
    for step in range(30):
        rows = ragged_rows(5, seed=step)
        loss = torch_loss(model, rows)
        optimiser.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimiser.step()
        metrics = ours.step(rows)
        assert metrics["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
        assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-3)

    adapters = flatten(ours.adapted.variables(ours.state.trainable)["adapters"], lambda x: hasattr(x, "to_peft"))
    tensors = adapter_tensors(adapters, open_base(str(directory)).layout)
    final = {n.replace(".default", ""): p.detach().numpy() for n, p in model.named_parameters() if p.requires_grad}
    assert tensors.keys() == final.keys()
    for side in ("lora_A", "lora_B"):
        ours_, theirs = (np.concatenate([t[k].ravel() for k in final if side in k]) for t in (tensors, final))
        assert np.linalg.norm(ours_ - theirs) <= 1e-3 * np.linalg.norm(theirs), side


@pytest.fixture(scope="module")
def one_device(checkpoint):
    """Six losses on a single device, whole batches of 16 rows."""
    run = Run(checkpoint("gemma2")[1], config())
    return [run.step(ragged_rows(16, seed=i)) for i in range(6)], run.state.trainable


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2), (8, 1, 1), (1, 2, 2, 2)])
def test_meshes_give_the_same_losses(checkpoint, one_device, sizes):
    run = Run(checkpoint("gemma2")[1], config(), sizes)
    for i, expected in enumerate(one_device[0]):
        metrics = run.step(ragged_rows(16, seed=i))
        assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert metrics["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    if sizes[1] > 1:
        whole = [p for p, x in run.adapted.frozen.items() if x.size > 1000 and x.sharding.is_fully_replicated]
        assert whole == [], "large parameters are replicated under fsdp"
        split = [p for p, x in run.state.trainable.items() if not x.sharding.is_fully_replicated]
        assert len(split) == 2 * 7 - (0 if sizes[2] > 1 else 7), split


def test_adapters_follow_their_weight(checkpoint):
    """A is split as the weight's input side, B as its output side, and Adam's moments as A and B."""
    run = Run(checkpoint("gemma2")[1], config(), (2, 2, 2))
    specs = {p: x.sharding.spec for p, x in run.state.trainable.items()}
    P = jax.sharding.PartitionSpec
    assert specs["adapters/layers/attn/q/kernel/a"] == P(None, "fsdp", None)
    assert specs["adapters/layers/attn/q/kernel/b"] == P(None, None, "tensor")
    assert specs["adapters/layers/mlp/down/kernel/a"] == P(None, "tensor", None)
    moments = [x for x in jax.tree.leaves(run.state.opt_state) if x.ndim == 3]
    assert len(moments) == 28
    assert sum(not x.sharding.is_fully_replicated for x in moments) == 28


def test_accumulation_equals_the_full_batch(checkpoint, one_device):
    """Four micro-batches with very different numbers of targets; a mean of means would differ."""
    run = Run(checkpoint("gemma2")[1], config(), turns=4)
    for i, expected in enumerate(one_device[0]):
        assert run.step(ragged_rows(16, seed=i))["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    for path, value in one_device[1].items():
        np.testing.assert_allclose(run.state.trainable[path], value, rtol=1e-3, atol=1e-5, err_msg=path)


def test_rows_without_targets(checkpoint):
    """A batch in which nothing is learnt changes nothing and is no NaN."""
    run = Run(checkpoint("gemma2")[1], config())
    before = {p: np.asarray(x) for p, x in run.state.trainable.items()}
    rows = [(tokens, np.zeros_like(mask)) for tokens, mask in ragged_rows(4)]
    metrics = run.step(rows)
    assert metrics["loss"] == 0 and metrics["target_tokens"] == 0 and metrics["grad_norm"] == 0
    for path, value in before.items():
        np.testing.assert_array_equal(run.state.trainable[path], value)


def test_dropout_is_of_step_and_seed(checkpoint):
    """Dropout changes the loss, the same step draws the same, another step draws anew, and evaluation has none."""
    directory = checkpoint("gemma2")[1]
    rows = ragged_rows(8)
    first, again = (Run(directory, config(lora_dropout=0.5, init_lora_weights=False)) for _ in range(2))
    without = Run(directory, config(init_lora_weights=False))
    a, b = first.step(rows)["loss"], again.step(rows)["loss"]
    assert a == b
    assert a != without.step(rows)["loss"]
    still = config(lora_dropout=0.5, init_lora_weights=False)
    still.optim.learning_rate = 0.0
    frozen = Run(directory, still)
    losses = [frozen.step(rows)["loss"] for _ in range(3)]
    assert losses[0] == a and len(set(losses)) == 3


def test_lora_dropout_is_on_the_input_of_a():
    """y - x W = s (mask * x / keep) A B: with A = B = 1 each row's sum tells the share kept."""
    from jaxtune.peft.lora import Lora
    from jaxtune.peft.method import Fixed

    x, y, w = jnp.ones((400, 50)), jnp.zeros((400, 1)), jnp.zeros((50, 1))
    lora = Lora(jnp.ones((50, 1)), jnp.ones((1, 1)), Fixed(jnp.float32(2.0)), (1,), 0.2)
    out = np.asarray(lora.linear(x, y, w, jax.random.key(0)))[:, 0] / 2
    kept = np.round(out * 0.8)
    np.testing.assert_allclose(out, kept / 0.8, rtol=1e-5)
    assert abs(kept.mean() / 50 - 0.8) < 0.01 and kept.std() > 2
    assert np.all(np.asarray(lora.linear(x, y, w, None)) == 100)


class TestOptimisers:
    def run(self, name, **keys):
        c = get_default()
        c.optim.update({"name": name, "learning_rate": 0.1, "schedule": "constant", "max_grad_norm": 0.0} | keys)
        tx = optim.make_optimiser(c.optim, optim.make_schedule(c.optim, 10))
        x = {"w": jnp.asarray([1.0, -2.0, 3.0])}
        state = tx.init(x)
        for i in range(5):
            grads = {"w": x["w"] * 0.3 + i}
            updates, state = tx.update(grads, state, x)
            x = optax.apply_updates(x, updates)
        return np.asarray(x["w"])

    def torch_run(self, make):
        x = torch.tensor([1.0, -2.0, 3.0], requires_grad=True)
        optimiser = make([x])
        for i in range(5):
            x.grad = x.detach() * 0.3 + i
            optimiser.step()
        return x.detach().numpy()

    def test_adamw_equals_torch(self):
        expected = self.torch_run(lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.2, betas=(0.8, 0.9), eps=1e-6))
        np.testing.assert_allclose(self.run("adamw", weight_decay=0.2, b1=0.8, b2=0.9, eps=1e-6), expected, rtol=1e-5)

    def test_sgd_equals_torch(self):
        expected = self.torch_run(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.05))
        np.testing.assert_allclose(self.run("sgd", momentum=0.9, weight_decay=0.05), expected, rtol=1e-5)

    def test_lion_and_adafactor_move_downhill(self):
        for name in ("lion", "adafactor"):
            assert np.all(self.run(name) < np.array([1.0, -1.0, 3.0]))

    @pytest.mark.parametrize(
        ("schedule", "theirs"),
        [("constant", "constant_with_warmup"), ("linear", "linear"), ("cosine", "cosine")],
    )
    def test_schedules_equal_transformers(self, schedule, theirs):
        c = get_default()
        c.optim.update({"learning_rate": 0.5, "schedule": schedule, "warmup_steps": 4})
        ours = optim.make_schedule(c.optim, 20)
        optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
        expected = transformers.get_scheduler(theirs, optimiser, num_warmup_steps=4, num_training_steps=20)
        for step in range(20):
            assert float(ours(step)) == pytest.approx(expected.get_last_lr()[0], abs=1e-6)
            optimiser.step()
            expected.step()


def test_full_training_reaches_every_weight(checkpoint):
    """method=full: every parameter is float32, gets a gradient and moves."""
    run = Run(checkpoint("gemma3")[1], config(method="full", target_modules=None, r=None, lora_alpha=None))
    before = {p: np.asarray(x) for p, x in run.state.trainable.items()}
    assert not run.adapted.frozen and len(before) == 16 - 1
    losses = [run.step(ragged_rows(8))["loss"] for _ in range(3)]
    assert losses[2] < losses[0]
    assert all(not np.array_equal(run.state.trainable[p], x) for p, x in before.items())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_modules_to_save_train_beside_lora(checkpoint):
    """They start as the base's weights, and train; the base stays."""
    run = Run(checkpoint("gemma2")[1], config(modules_to_save=("lm_head", "post_attention_layernorm")))
    saved = {p for p in run.state.trainable if p.endswith("/value")}
    assert saved == {"adapters/lm_head/table/value", "adapters/layers/post_attn_norm/scale/value"}
    np.testing.assert_array_equal(
        run.state.trainable["adapters/lm_head/table/value"], run.adapted.frozen["params/embed/table"]
    )
    plain = Run(checkpoint("gemma2")[1], config())
    rows = ragged_rows(8)
    first = run.step(rows)["loss"]
    assert first == pytest.approx(plain.step(rows)["loss"], rel=1e-6)
    assert not np.array_equal(
        run.state.trainable["adapters/lm_head/table/value"], run.adapted.frozen["params/embed/table"]
    )
