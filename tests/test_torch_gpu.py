"""torch_gpu piece by piece: its loss, its half precision, its schedule, its batches, what it refuses. No run; see
test_torch_gpu_train.py."""

import json
import subprocess
import sys
from typing import Any

import jax.numpy as jnp
import numpy as np
import peft
import pytest
import reference
import torch
from torch import nn

from jaxtune import optim as jax_optim
from jaxtune.config import ASSETS, get_default, set_value, to_json
from jaxtune.data.splits import read_splits, train_batches
from jaxtune.defaults import LEARNING_RATES
from jaxtune.errors import UserError
from jaxtune.hf.adapters import load_adapter
from jaxtune.hf.base import open_base
from jaxtune.peft import METHODS, lora
from jaxtune.peft.method import select
from jaxtune.tokenizer import load_tokenizer
from torch_gpu import half, loss, method, model, optim, settings
from torch_gpu.batches import Micro
from torch_gpu.model import Processes

TINY = ASSETS / "tiny_gemma"
CPU = {"": "cpu"}


def config(**changes):
    c = get_default()
    c.model.id, c.model.dtype = str(TINY), "float32"
    c.data.train, c.data.eval = (str(ASSETS / "quickstart" / f"{name}.jsonl") for name in ("train", "eval"))
    c.data.max_length = 64
    for path, value in changes.items():
        set_value(c, path.replace("__", "."), value)
    return c


def loaded(dtype=torch.float32, **changes):
    c = to_json(config(**{f"model__{k}": v for k, v in changes.items()}))
    return model.load(model.describe(str(TINY)), c["model"], dtype, CPU)


def rows(seed=0, batch=3, length=17, vocab=97):
    random = np.random.default_rng(seed)
    ids = torch.tensor(random.integers(3, vocab, (batch, length)))
    labels = torch.where(torch.tensor(random.random((batch, length)) < 0.5), ids, -100)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


# ---------------------------------------------------------------- Loss


HEADS = {
    "capped": lambda: reference.gemma2(),
    "untied": lambda: reference.MODELS["gemma2_untied"](),
    "gemma3": lambda: reference.gemma3(),
    "frozen": lambda: reference.gemma2(),
    "lora": lambda: reference.gemma2(tie_word_embeddings=False),
    "saved": lambda: reference.MODELS["gemma2_untied"](),
}


def with_head(name, net):
    if name in ("lora", "saved"):
        targets = ["q_proj"] + ["lm_head"] * (name == "lora")
        own: Any = {"modules_to_save": ["lm_head"]} if name == "saved" else {}
        net = peft.get_peft_model(net, peft.LoraConfig(r=3, target_modules=targets, init_lora_weights=False, **own))
    if name == "frozen":
        net.requires_grad_(False)
        net.model.layers[0].requires_grad_(True)
    return net


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_loss_and_its_gradient_are_transformers(name, monkeypatch):
    """Through every kind of head, in chunks that do not divide the targets."""
    monkeypatch.setattr(loss, "CHUNK_TOKENS", 7)
    torch.manual_seed(0)
    net = reference.randomise(HEADS[name]())
    net = with_head(name, net)
    batch = rows()
    found = {}
    for ours in (False, True):
        if ours:
            loss.install(net.get_base_model() if name in ("lora", "saved") else net)
        net.zero_grad()
        out = net(**batch)
        out.loss.backward()
        found[ours] = (out.loss, {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None})
    torch.testing.assert_close(found[True][0], found[False][0], rtol=1e-6, atol=0)
    assert found[True][1].keys() == found[False][1].keys()
    for n, expected in found[False][1].items():
        reference.close(found[True][1][n].numpy(), expected.numpy(), 2e-5)


def test_without_targets_the_loss_is_zero_and_has_a_gradient():
    net = reference.randomise(reference.gemma2())
    loss.install(net)
    batch = rows()
    batch["labels"][:] = -100
    out = net(**batch, num_items_in_batch=0)
    out.loss.backward()
    assert float(out.loss.detach()) == 0 and not any(p.grad.any() for p in net.parameters() if p.grad is not None)


def test_only_a_chunk_of_logits_exists_and_only_of_learnt_positions(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_TOKENS", 16)
    seen, ordinary = [], loss.product
    monkeypatch.setattr(loss, "product", lambda a, b: seen.append((len(a), b.shape[1])) or ordinary(a, b))
    net = reference.randomise(reference.gemma2())
    net.requires_grad_(False)
    loss.install(net)
    batch = rows(length=60)
    net(**batch)
    sizes = [n for n, width in seen if width == 97]
    assert max(sizes) == 16 and sum(sizes) == int((batch["labels"][:, 1:] != -100).sum())


# ---------------------------------------------------------------- Half precision


def tiny(kind, **changes):
    """Of widths that are multiples of 64, for bitsandbytes on a CPU."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "head_dim": 64}
    return reference.randomise(getattr(reference, kind)(**sizes | {"num_hidden_layers": 3} | changes))


def halved(kind, scale, safe):
    net = tiny(kind)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "post_feedforward" in name or "pre_feedforward" in name:
                p.mul_(scale)  # norms that make the stream grow, as Gemma 3's do
        exact = net(**rows(length=12), output_hidden_states=True)
    net = net.to(torch.float16)
    if safe:
        half.make_safe(net, torch.float16)
    with torch.no_grad():
        out = net(**rows(length=12))
    return exact.logits, out.logits.float(), max(float(h.abs().max()) for h in exact.hidden_states)


@pytest.mark.parametrize("kind", ["gemma2", "gemma3", "llama", "qwen3"])
def test_float16_is_near_float32(kind):
    exact, ours, _ = halved(kind, 1.0, True)
    reference.close(ours.numpy(), exact.detach().numpy(), 4e-3)


def test_a_gemma_3_that_outgrows_float16_stays_finite_and_near():
    exact, plain, largest = halved("gemma3", 45000.0, False)
    assert largest > 65504 and not torch.isfinite(plain).all()
    _, ours, _ = halved("gemma3", 45000.0, True)
    assert torch.isfinite(ours).all()
    reference.close(ours.numpy(), exact.detach().numpy(), 5e-3)


def test_gradients_in_float16_are_near_those_in_float32():
    grads = []
    for dtype in (torch.float32, torch.float16):
        net = tiny("gemma2").to(dtype)
        net.requires_grad_(False)
        half.make_safe(net, dtype)
        loss.install(net)
        torch.manual_seed(0)
        adapted = peft.get_peft_model(net, peft.LoraConfig(target_modules="all-linear", init_lora_weights=False))
        torch.mul(adapted(**rows()).loss, 1024).backward()
        grads.append({n: p.grad / 1024 for n, p in adapted.named_parameters() if p.grad is not None})
        assert all(p.dtype == torch.float32 for p in adapted.parameters() if p.requires_grad)
    for name, exact in grads[0].items():
        reference.close(grads[1][name].numpy(), exact.numpy(), 3e-2)


def test_the_module_where_numbers_stop_being_finite_is_named():
    net = tiny("gemma2")
    assert half.first_not_finite(net, [rows()]) is None
    with torch.no_grad():
        net.model.layers[1].mlp.up_proj.weight[0, 0] = torch.inf
    assert str(half.first_not_finite(net, [rows()])).startswith("model.layers.1.mlp.up_proj (its largest input is")


def test_rows_are_shrunk_by_powers_of_two_alone():
    x = torch.tensor([[1.0, -3.0], [256.0, 7.0], [257.0, 0.1], [1e6, -1e7], [0.0, 0.0]])
    small, factor = half.shrunk(x)
    assert torch.equal(small * factor, x) and small.abs().max() <= half.LARGEST_INPUT
    assert torch.equal(factor[:, 0], torch.tensor([1.0, 1.0, 2.0, 65536.0, 1.0]))
    assert not torch.isfinite(half.shrunk(torch.tensor([[torch.inf, 1.0], [torch.nan, 1.0]]))[0][:, 0]).any()


@pytest.mark.parametrize(("asked", "capability", "gets"), [
    ("bfloat16", (7, 5), torch.float16),
    ("bfloat16", (8, 0), torch.bfloat16),
    ("float16", (9, 0), torch.float16),
    ("float32", (7, 5), torch.float32),
])  # fmt: skip
def test_precision_is_chosen_by_compute_capability(asked, capability, gets, monkeypatch):
    """A T4 says that it has bfloat16, for it can be emulated."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    said = []
    assert model.precision(asked, torch.device("cuda", 0), said.append) == gets
    assert bool(said) == (gets != getattr(torch, asked))
    assert model.precision("bfloat16", torch.device("cpu"), said.append) == torch.bfloat16


# ---------------------------------------------------------------- Cards


class Card:
    total_memory = 15 * 10**9


def test_layers_are_spread_only_where_one_card_is_too_small(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Card)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    card, said = torch.device("cuda", 1), []
    assert model.placement(5 * 10**9, card, Processes(1, 2, 1), said.append) == {"": 1}
    assert model.placement(50 * 10**9, card, Processes(0, 1, 1), said.append) == "balanced" and "2 cards" in said[0]
    with pytest.raises(UserError, match=r"A copy on each GPU does not fit: the base takes about 50.0 GB"):
        model.placement(50 * 10**9, card, Processes(0, 2, 1), said.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert model.placement(50 * 10**9, card, Processes(0, 1, 1), said.append) == {"": 1} and "WARNING" in said[1]
    assert model.placement(50 * 10**9, torch.device("cpu"), Processes(0, 1, 0), said.append) == CPU


def test_one_process_takes_one_card_and_says_how_to_use_all(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    said = []
    assert model.device_of(Processes(0, 1, 0), said.append, "python -m torch_gpu.train --config x").index == 0
    assert "torchrun --nproc_per_node=2 -m torch_gpu.train --config x" in said[0]
    assert model.device_of(Processes(1, 2, 1), said.append).index == 1 and len(said) == 1
    with pytest.raises(UserError, match="there are 2 GPUs"):
        model.device_of(Processes(2, 3, 2), said.append)


def test_the_bytes_of_a_base_are_counted_from_shapes():
    base = model.describe(str(TINY))
    linear = 6 * (192 * 256 * 2 + 192 * 128 * 2 + 3 * 192 * 640)
    others = sum(int(np.prod(s)) for s in base.shapes.values()) - linear
    assert base.bytes(torch.float16, None, False) == 2 * (linear + others)
    assert base.bytes(torch.float16, "nf4", False) == int(linear * 4.5 / 8) + 2 * others
    assert base.softcapped


# ---------------------------------------------------------------- Schedule, batches


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 5, 50])
def test_the_schedule_is_jaxtunes(schedule, warmup):
    changes = {"optim__schedule": schedule, "optim__warmup_steps": warmup, "optim__end_fraction": 0.1}
    c = config(optim__learning_rate=3e-3, **changes).optim
    ours, theirs = optim.make_schedule(c, 30), jax_optim.make_schedule(c, 30)
    np.testing.assert_allclose(
        [ours(n) for n in range(32)], [np.asarray(theirs(jnp.int32(n))) for n in range(32)], rtol=2e-6, atol=1e-10
    )


@pytest.mark.parametrize("name", ["lora", "prompt_tuning", "multitask_prompt_tuning"])
def test_batches_are_jaxtunes_token_for_token(name, tmp_path):
    """Of two processes and two micro-batches, from the middle, over the end of an epoch to a batch that is cut."""
    c = config(peft__method=name)
    lines = (ASSETS / "quickstart" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:20]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(json.loads(line) | {"t": i % 3}) for i, line in enumerate(lines)))
    c.data.train, c.data.eval = str(path), None
    if name.startswith("multitask"):
        c.peft.num_tasks, c.data.task_id = 3, "t"
    virtual = method.virtual_tokens(to_json(c)["peft"])
    assert virtual.count == (0 if name == "lora" else 20)
    data, _, length = read_splits(c.data, load_tokenizer(TINY), lambda text: None, virtual)
    for process in range(2):
        how: Any = {"batch_size": 8, "seed": 1, "shuffle": True, "start_row": 8, "stop_row": 45, "length": length}
        share: Any = {"process_index": process, "process_count": 2}
        micro = Micro(data, virtual=virtual, turns=2, steps=6, **how, **share)
        given = iter(micro)
        for batch, cursor in train_batches(data, **how, **share):
            for part in range(2):
                inputs = {k: v.numpy() for k, v in next(given).items()}
                mine = {k: v[part * 2 : part * 2 + 2, virtual.count :] for k, v in batch.items()}
                width = inputs["input_ids"].shape[1]
                assert not mine["segment_ids"][:, width:].any() and width % 8 == 0
                real = mine["segment_ids"][:, :width] > 0
                assert np.array_equal(inputs["input_ids"], mine["tokens"][:, :width])
                assert np.array_equal(inputs["attention_mask"][real.any(1)], real[real.any(1)])
                learnt = inputs["labels"][:, 1:] != -100
                assert np.array_equal(learnt, mine["weights"][:, : width - 1] == 1)
                assert np.array_equal(inputs["labels"][:, 1:][learnt], mine["targets"][:, : width - 1][learnt])
                if "task_ids" in inputs:
                    first = batch["tokens"][part * 2 : part * 2 + 2, 0]
                    assert np.array_equal(inputs["task_ids"][first < 0], (-1 - first[first < 0]) // 20)
            assert micro.cursor == cursor and micro.tokens == batch["segment_ids"].sum()
        assert next(given, None) is None


# ---------------------------------------------------------------- Settings


REFUSED = {
    "mesh__fsdp=2": "`mesh.fsdp` is 2. On GPUs torchrun says",
    "mesh__tensor=2": "`mesh.tensor` is 2",
    "model__quant_embedding=True": "`model.quant_embedding` is true",
    "train__z_loss=3.0": "`train.z_loss` is 3: transformers' losses have no such term",
    "model__double_quant=True": "`model.double_quant` is true, and `model.quant` is not nf4",
    "peft__method=full": "`peft.method` is full, which trains the base itself",
    "peft__method=partial": "take jaxtune.train",
    "peft__method=lroa": "Did you mean `lora`?",
    "peft__alpha=3.0": "`peft.alpha` is set, and lora has no such key. Did you mean `lora_alpha`?",
    "peft__soft_prompt_scale=pre": "`peft.soft_prompt_scale` is set, and lora has no such key",
    "peft__method=p_tuning peft__soft_prompt_scale=pre": "`peft.soft_prompt_scale` is 'pre'. Here it can only be post",
    "peft__init_lora_weights=pissa": "`peft.init_lora_weights` is 'pissa', which would alter the base",
    "peft__method=vera peft__save_projection=False": "`peft.save_projection` is false",
    "optim__offload=True optim__name=sgd": "`optim.offload` is true, and sgd has no paged form",
    "export__format=checkpoint": "`export.format` is checkpoint",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_this_backend_cannot_honour_is_refused_by_name(words):
    values = dict(word.split("=") for word in words.split())
    changes = {k: {"True": True, "False": False, "2": 2, "3.0": 3.0}.get(v, v) for k, v in values.items()}
    with pytest.raises(UserError) as caught:
        settings.check(to_json(config(**changes)))
    assert REFUSED[words] in str(caught.value)


def test_jaxtunes_defaults_and_its_recipes_are_accepted():
    settings.check(to_json(config()))
    assert set(method.CONFIGS) == set(LEARNING_RATES) - {"full", "partial"}


def test_no_jax_is_loaded():
    code = "import torch_gpu.train, sys; print(sorted({'jax', 'flax', 'optax', 'orbax'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_a_width_that_bitsandbytes_computes_wrongly_on_a_cpu_is_refused(tmp_path):
    reference.save(reference.gemma2(), tmp_path / "odd")
    with pytest.raises(UserError, match="rows of 80: on a CPU"):
        model.check_widths(model.describe(str(tmp_path / "odd")))


# ---------------------------------------------------------------- Methods


@pytest.fixture(scope="module")
def base():
    return open_base(str(TINY))


def adapter_of(name, total_steps=10, **keys):
    section = to_json(config(peft__method=name, **{f"peft__{k}": v for k, v in keys.items()}))["peft"]
    how = {"total_steps": total_steps, "quantised": False, "encode": lambda text: [2, 5, 7]}
    return method.adapt(loaded(), section, **how), section


@pytest.mark.parametrize("name", method.CONFIGS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_method_trains_a_step_and_its_config_is_jaxtunes(name, base, tmp_path):
    """adapter_config.json has jaxtune's values at every key that jaxtune writes, the targets' spelling aside."""
    adapted, _ = adapter_of(name)
    more = {"task_ids": torch.zeros(3, dtype=torch.int64)} if name.startswith("multitask") else {}
    before = {n: p.detach().clone() for n, p in method.trainable(adapted).items()}
    adapted.train()(**rows(vocab=2000), **more).loss.backward()
    torch.optim.AdamW(list(method.trainable(adapted).values()), 1e-2).step()
    assert any(not torch.equal(p, before[n]) for n, p in method.trainable(adapted).items())
    assert all(p.dtype == torch.float32 for p in method.trainable(adapted).values())

    if name == "adalora":
        adapted.peft_config["default"].rank_pattern = None
    method.export(adapted, tmp_path / "out", name="me/base", readme="", over={"quant": None})
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    usual = METHODS[name].Config(**({"total_step": 10} if name == "adalora" else {}))
    loaded_again = load_adapter(tmp_path / "out", base.layout)
    same = {k: v for k, v in METHODS[name].to_config(base.layout, usual, {}).items() if k != "soft_prompt_scale"}
    for key in ("target_modules", "feedforward_modules", "token_dim", "num_attention_heads", "rank_pattern"):
        same.pop(key, None)
    assert {k: written.get(k) for k in same} == same
    assert written["base_model_name_or_path"] == "me/base" and loaded_again.method is METHODS[name]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_all_linear_is_jaxtunes(base):
    adapted, _ = adapter_of("lora", target_modules="all-linear")
    ours = {n.removeprefix("base_model.model.") for n, m in adapted.named_modules() if hasattr(m, "base_layer")}
    found = select(base.layout, lora.Config(target_modules="all-linear"), {"": ()})
    theirs = {module for path in found for module in base.layout.site(path).modules}
    assert ours == theirs and len(ours) == 6 * 7


def test_a_target_that_matches_nothing_is_refused():
    with pytest.raises(UserError, match=r"target_modules has 'q_porj'.*Did you mean `q_proj`"):
        adapter_of("lora", target_modules=("v_proj", "q_porj"))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("quant", ["nf4", "int8"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_quantised_base_computes_what_its_weights_say(quant, dtype):
    """Near the plain base in float32; gradients reach float32 adapters; norms are float32 and the embedding is not."""
    exact = loaded()(**{k: v for k, v in rows(vocab=2000).items() if k != "labels"}).logits
    net = loaded(getattr(torch, dtype), quant=quant)
    assert net.model.norm.weight.dtype == torch.float32
    assert net.model.embed_tokens.weight.dtype == getattr(torch, dtype)
    assert type(net.lm_head) is nn.Linear
    with torch.no_grad():
        out = net(**{k: v for k, v in rows(vocab=2000).items() if k != "labels"}).logits
    error = float((out.float() - exact).norm() / exact.norm())
    assert error < {"nf4": 0.3, "int8": 0.06}[quant], error
    section = to_json(config(peft__target_modules="all-linear"))["peft"]
    adapted = method.adapt(net, section, total_steps=1, quantised=True, encode=lambda text: [])
    adapted(**rows(vocab=2000)).loss.backward()
    grads = [p.grad for p in method.trainable(adapted).values()]
    assert all(g is not None and torch.isfinite(g).all() for g in grads)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_on_a_card_are_float32(dtype):
    a, b = torch.randn(64, 256, device="cuda"), torch.randn(256, 512, device="cuda").to(dtype)
    out = loss.product(a, b)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, a.to(dtype).float() @ b.float(), rtol=1e-3, atol=1e-3)
