"""torch_gpu on encoder-decoders: its loss, batches, answers, quantised and halved bases, and a run beside a plain loop
over transformers and peft."""

import json
from typing import Any

import numpy as np
import peft
import pytest
import reference
import tiny_run
import torch
import transformers
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from safetensors.torch import load_file, save_file
from test_data_seq2seq import PLAIN, small_t5_tokenizer
from torch import nn

from jaxtune.config import get_default, set_value, to_json
from jaxtune.data.batches import eval_batches
from jaxtune.data.splits import read_prompts, read_splits
from jaxtune.data.virtual import Virtual
from jaxtune.errors import UserError
from jaxtune.tokenizer import load_tokenizer
from torch_gpu import generate, loss, method, model, train
from torch_gpu.batches import to_inputs

CPU = {"": "cpu"}
# Heads that are wider together than the model, fewer encoder layers than decoder layers; widths for bitsandbytes.
SIZES = {
    "vocab_size": 300,
    "d_model": 64,
    "d_kv": 64,
    "num_heads": 2,
    "d_ff": 192,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.0,
}
KINDS = {
    "v1_0": {"feed_forward_proj": "relu", "tie_word_embeddings": True},
    "v1_1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}
ROWS = [{"q": "how are you " * (1 + i % 3), "a": "fine today " * (1 + i % 4) + str(i), "t": i % 3} for i in range(20)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A random T5 of either kind in Hugging Face's layout, as the original checkpoints say what they are."""
    found = {}
    for kind, keys in KINDS.items():
        folder = small_t5_tokenizer(tmp_path_factory.mktemp(kind))
        (folder / "config.json").write_text(json.dumps({"model_type": "t5", "pad_token_id": 0, **SIZES, **keys}))
        torch.manual_seed(0)
        net = transformers.T5ForConditionalGeneration(transformers.T5Config(**SIZES, **keys))
        with torch.no_grad():
            for name, p in net.named_parameters():
                # T5 does not scale its scores, its weights are small instead: noise like Gemma's would saturate them.
                p.add_(torch.randn(p.shape) * (0.3 if "norm" in name or "relative" in name else 0.01))
        tensors = {n: t.clone() for n, t in net.state_dict().items() if "embed_tokens" not in n}
        tensors["lm_head.weight"] = torch.randn(300, 64) / 8
        if keys["tie_word_embeddings"]:
            del tensors["lm_head.weight"]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        found[kind] = folder
    return found


def plain_model(folder, **how):
    """transformers' own, untouched by torch_gpu."""
    return transformers.AutoModelForSeq2SeqLM.from_pretrained(folder, **how)


def section(name="lora", **keys):
    c = get_default()
    for key, value in {"method": name, **keys}.items():
        set_value(c, f"peft.{key}", value)
    return to_json(c)["peft"]


def loaded(folder, dtype=torch.float32, quant=None):
    return model.load(model.describe(str(folder)), {"quant": quant, "double_quant": False}, dtype, CPU)


def adapted(folder, name="lora", **keys):
    how = {"total_steps": 10, "quantised": False, "encode": lambda text: [5, 7, 9]}
    net = method.adapt(loaded(folder), section(name, **keys), **how)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in method.trainable(net).values():
            p.add_(0.1 * torch.randn(p.shape))
    return net.eval()


def batch(seed=0, rows=3, source=11, target=9):
    random = np.random.default_rng(seed)
    ids, labels = (torch.tensor(random.integers(3, 300, (rows, n))) for n in (source, target))
    mask = torch.arange(source)[None] < torch.tensor([[source], [source - 3], [4]])[:rows]
    labels[torch.arange(target)[None] >= torch.tensor([[target], [2], [5]])[:rows]] = -100
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


def config(source, folder, **changes):
    c = get_default()
    keys = {"model.id": str(folder), "model.dtype": "float32", "data.train": source, "data.shuffle": False}
    keys |= {f"data.{k}": v for k, v in PLAIN.items()} | {"data.max_length": 24, "data.max_target_length": 16}
    for path, value in {**keys, **changes}.items():
        set_value(c, path, value)
    return c


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


# ---------------------------------------------------------------- Loss


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", ["base", "lora", "lora_head", "saved"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_loss_and_its_gradient_are_transformers(kind, head, folders, monkeypatch):
    """Through every kind of head, tied and scaled or neither, in chunks that do not divide the targets."""
    monkeypatch.setattr(loss, "CHUNK_TOKENS", 7)
    net: Any = plain_model(folders[kind])
    assert (net.lm_head.weight is net.shared.weight) == (kind == "v1_0")
    if head != "base":
        own: Any = {"modules_to_save": ["lm_head"]} if head == "saved" else {}
        targets = ["q", "wo"] + ["lm_head"] * (head == "lora_head")
        torch.manual_seed(0)
        net = peft.get_peft_model(net, peft.LoraConfig(r=3, target_modules=targets, init_lora_weights=False, **own))
    found = {}
    for ours in (False, True):
        if ours:
            loss.install(net if head == "base" else net.get_base_model())
        net.zero_grad()
        out = net(**batch())
        out.loss.backward()
        found[ours] = (out.loss, {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None})
    torch.testing.assert_close(found[True][0], found[False][0], rtol=1e-6, atol=0)
    assert found[True][1].keys() == found[False][1].keys()
    for n, expected in found[False][1].items():
        reference.close(found[True][1][n].numpy(), expected.numpy(), 2e-5)


# ---------------------------------------------------------------- Methods


@pytest.mark.parametrize("name", method.CONFIGS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_method_computes_pefts_loss_and_is_read_by_peft(name, folders, tmp_path):
    """peft's forward over transformers' own model gives the same sums; what is written is for SEQ_2_SEQ_LM, and peft
    alone computes the same from it."""
    net = adapted(folders["v1_1"], name)
    more = {"task_ids": torch.zeros(3, dtype=torch.int64)} if name.startswith("multitask") else {}
    out = net(**batch(), **more)
    out.loss.backward()
    assert all(p.grad is not None and p.dtype == torch.float32 for p in method.trainable(net).values())
    if name == "adalora":
        net.peft_config["default"].rank_pattern = None
    method.export(net, tmp_path / "out", name=str(folders["v1_1"]), readme="", over={"quant": None})
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert written["task_type"] == "SEQ_2_SEQ_LM"
    trains = name == "adalora"  # whose penalty peft adds in any case, and otherwise does not find
    theirs = peft.PeftModel.from_pretrained(plain_model(folders["v1_1"]), tmp_path / "out", is_trainable=trains).eval()
    with torch.no_grad():
        expected = theirs(**batch(), **more).loss
    torch.testing.assert_close(out.loss.detach(), expected, rtol=2e-6, atol=0)
    plain = plain_model(folders["v1_1"])(**batch()).loss
    assert abs(float(plain - expected)) > 1e-4


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_targets_are_those_of_t5(folders):
    names = {n.rsplit(".", 1)[-1] for n, m in adapted(folders["v1_1"]).named_modules() if hasattr(m, "base_layer")}
    assert names == {"q", "v"}
    net = adapted(folders["v1_1"], target_modules="all-linear")
    names = {n.rsplit(".", 1)[-1] for n, m in net.named_modules() if hasattr(m, "base_layer")}
    assert names == {"q", "k", "v", "o", "wi_0", "wi_1", "wo"}
    with pytest.raises(UserError, match=r"target_modules has 'q_proj', and the model has no such module"):
        adapted(folders["v1_1"], target_modules=("q_proj",))


# ---------------------------------------------------------------- Batches


PROMPTS = {"lora": {}, "prompt_tuning": {}, "multitask_prompt_tuning": {"num_tasks": 3}}


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_batches_compute_what_rows_do_one_by_one(name, folders, source):
    """The summed loss of padded batches is that of transformers' tokens, row by row, through peft on its own."""
    folder, tokens = folders["v1_0"], {} if name == "lora" else {"num_virtual_tokens": 3}
    keys = {**PROMPTS[name], **tokens}
    multitask = name.startswith("multitask")
    c = config(source, folder, **{"data.task_id": "t"} if multitask else {})
    virtual = method.virtual_tokens(section(name, **keys), seq2seq=True)
    assert virtual == (Virtual(3, 3, decoder=True) if multitask else Virtual(3 if tokens else 0))
    rows, _, length = read_splits(c.data, load_tokenizer(folder), lambda text: None, virtual, start_id=0)
    net = adapted(folder, name, **keys)
    sums, widths = [], set()
    with torch.no_grad():
        for given in eval_batches(rows, 8, length):
            inputs = to_inputs(given, virtual)
            widths |= {(inputs["input_ids"].shape[1], inputs["labels"].shape[1])}
            sums.append(float(net(**inputs, num_items_in_batch=1).token_loss))
    assert len(sums) == 3 and all(a % 8 == b % 8 == 0 and a <= 24 and b <= 16 for a, b in widths)
    del net.get_base_model().forward  # transformers' own
    theirs, expected = transformers.PreTrainedTokenizerFast.from_pretrained(folder), 0.0
    with torch.no_grad():
        for row in ROWS:
            one = theirs(f"Say: {row['q']}", max_length=24, truncation=True, return_tensors="pt")
            labels = theirs(row["a"], max_length=16, truncation=True, return_tensors="pt").input_ids
            more = {"task_ids": torch.tensor([row["t"]])} if multitask else {}
            inputs = {"input_ids": one.input_ids, "attention_mask": one.attention_mask, "labels": labels}
            expected += float(net(**inputs, **more).loss) * labels.shape[1]
    assert sum(sums) == pytest.approx(expected, rel=1e-5)


# ---------------------------------------------------------------- Answers


@pytest.mark.parametrize("name", ["lora", "prompt_tuning", "prefix_tuning", "multitask_prompt_tuning"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_answers_are_what_teacher_forcing_says(name, folders, source):
    """Each token is the likeliest behind those before it, by peft's forward without a cache, one row at a time."""
    folder, keys = folders["v1_1"], {"num_virtual_tokens": 3} if name != "lora" else {}
    keys |= {"num_tasks": 3} if name.startswith("multitask") else {}
    c = config(source, folder, **{"data.task_id": "t"} if name.startswith("multitask") else {})
    virtual, tokenizer = method.virtual_tokens(section(name, **keys), seq2seq=True), load_tokenizer(folder)
    prompts = read_prompts(c.data, tokenizer, 7, virtual, start_id=0)
    net = adapted(folder, name, **keys)
    given = generate.answer(net, tokenizer, prompts, virtual, max_new_tokens=6)
    del net.get_base_model().forward
    for i, (prompt, text) in enumerate(zip(prompts, given, strict=True)):
        ids, answer = torch.tensor([prompt.ids[virtual.count :]]), []
        more = {"task_ids": torch.tensor([ROWS[i]["t"]])} if name.startswith("multitask") else {}
        while len(answer) < 6 and answer[-1:] != [1]:
            with torch.no_grad():
                labels = torch.tensor([[*answer, 0]])
                out = net(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, **more)
            answer.append(int(out.logits[0, -1].argmax()))
        assert text == tokenizer.decode([token for token in answer if token != 1]).strip()
    assert len(set(given)) > 1


# ---------------------------------------------------------------- Fewer bits


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("quant", ["nf4", "int8", None])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_fewer_bits_are_near_float32(quant, dtype, folders):
    """Norms are float32 and `wo`, in which T5 overflows, is as in float32 where the rest is float16; gradients come."""
    inputs = {k: v for k, v in batch().items() if k != "labels"} | {"decoder_input_ids": batch(1)["input_ids"]}
    with torch.no_grad():
        exact = plain_model(folders["v1_1"])(**inputs).logits
    net = loaded(folders["v1_1"], getattr(torch, dtype), quant)
    small = {"nf4": Linear4bit, "int8": Linear8bitLt, None: nn.Linear}[quant]
    for name, module in net.named_modules():
        if isinstance(module, nn.Linear):
            assert type(module) is (nn.Linear if name == "lm_head" or name.endswith(".wo") else small), name
        if name.endswith("layer_norm"):
            assert module.weight.dtype == torch.float32
        if name.endswith(".wo"):
            assert module.weight.dtype == (torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    with torch.no_grad():
        out = net(**inputs).logits
    error = float((out.float() - exact).norm() / exact.norm())
    assert error < {"nf4": 0.3, "int8": 0.06, None: 0.02}[quant], error
    assert error > 1e-5 or (quant, dtype) == (None, "float32")
    how = {"total_steps": 1, "quantised": quant is not None, "encode": lambda text: []}
    trained = method.adapt(net, section(target_modules="all-linear"), **how)
    trained(**batch()).loss.backward()
    grads = [p.grad for p in method.trainable(trained).values()]
    assert all(g is not None and torch.isfinite(g).all() for g in grads) and any(g.any() for g in grads)


def test_a_t5_that_outgrows_float16_stays_finite_and_near(folders, tmp_path):
    """The larger Flan-T5s: activations beyond 65504 in the feed-forward layers."""
    tensors = load_file(folders["v1_1"] / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("DenseReluDense.wo.weight"):
            tensor *= 1e6
    for file in folders["v1_1"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    inputs = {k: v for k, v in batch().items() if k != "labels"} | {"decoder_input_ids": batch(1)["input_ids"]}
    with torch.no_grad():
        exact = plain_model(tmp_path)(**inputs, output_hidden_states=True)
        ours = loaded(tmp_path, torch.float16)(**inputs).logits
    assert max(float(h.abs().max()) for h in exact.encoder_hidden_states) > 65504
    assert torch.isfinite(ours).all()
    reference.close(ours.float().numpy(), exact.logits.numpy(), 2e-2)


def test_bytes_count_wo_as_it_is_held(folders):
    base = model.describe(str(folders["v1_1"]))
    attention, wo = (2 + 2 * 3) * 4 * 64 * 128, 5 * 64 * 192
    linear = attention + 5 * 2 * 64 * 192
    others = sum(int(np.prod(s)) for s in base.shapes.values()) - linear - wo
    assert base.bytes(torch.float16, "nf4", False) == int(linear * 4.5 / 8) + 4 * wo + 2 * others
    assert base.bytes(torch.bfloat16, None, False) == 2 * (linear + wo + others)
    assert not base.softcapped


# ---------------------------------------------------------------- A run


def plain_loop(folder, begun, steps):
    """Losses of a loop over transformers and peft with nothing of ours, and what it has trained."""
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    net = peft.PeftModel.from_pretrained(plain_model(folder), begun, is_trainable=True).train()
    collator = transformers.DataCollatorForSeq2Seq(theirs, net.get_base_model())
    optimiser = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], 1e-2, weight_decay=0.0)
    schedule = transformers.get_cosine_schedule_with_warmup(optimiser, 2, steps)
    losses = []
    for step in range(steps):
        rows = [ROWS[(step * 8 + i) % len(ROWS)] for i in range(8)]
        features = [dict(theirs(f"Say: {row['q']}", max_length=24, truncation=True)) for row in rows]
        for feature, row in zip(features, rows, strict=True):
            feature.pop("token_type_ids", None)
            feature["labels"] = theirs(row["a"], max_length=16, truncation=True).input_ids
        value = net(**collator(features)).loss
        value.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        losses.append(float(value.detach()))
    return losses, {n: t.detach() for n, t in peft.get_peft_model_state_dict(net).items()}


RECIPE = """
from jaxtune.config import get_default


def get_config():
    c = get_default()
    c.model.id, c.model.dtype = {model!r}, "float32"
    c.peft.init_from = {begun!r}
    c.data.train = c.data.eval = {rows!r}
    c.data.format, c.data.prompt, c.data.completion = "prompt_completion", "Say: {{q}}", "{{a}}"
    c.data.max_length, c.data.max_target_length, c.data.shuffle, c.data.max_eval_rows = 24, 16, False, 6
    c.optim.learning_rate, c.optim.warmup_steps = 1e-2, 2
    c.train.steps, c.train.global_batch_size, c.train.gradient_accumulation_steps = 6, 8, 2
    c.train.log_every = 1
    c.evaluate.samples, c.evaluate.max_new_tokens = 3, 5
    c.logging.tensorboard = False
    return c
"""


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_run_is_a_plain_loop(folders, source, tmp_path):
    """Two micro-batches a step and layers computed again; six steps over the end of an epoch."""
    folder = folders["v1_0"]
    begun = adapted(folder, target_modules=("q", "v", "wi", "wo"), r=4, lora_alpha=8.0)
    method.export(begun, tmp_path / "begun", name=str(folder), readme="", over={"quant": None})
    recipe = tmp_path / "recipe.py"
    recipe.write_text(RECIPE.format(model=str(folder), begun=str(tmp_path / "begun"), rows=source))
    assert train.main(["--config", str(recipe), "--workdir", str(tmp_path / "run")]) == 0
    lines = [row for row in tiny_run.metrics(tmp_path / "run") if "loss" in row]
    losses, trained = plain_loop(folder, tmp_path / "begun", 6)
    assert [row["loss"] for row in lines] == pytest.approx(losses, rel=2e-4) and losses[-1] < 0.9 * losses[0]
    written = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert written.keys() == trained.keys()
    for name, tensor in trained.items():
        reference.close(written[name].numpy(), tensor.numpy(), 2e-2)
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [row["reference"] for row in samples] == [row["a"] for row in ROWS[:3]]
    # Both sides are counted.
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    sides = [[len(theirs(text).input_ids) for text in (f"Say: {row['q']}", row["a"])] for row in ROWS[:8]]
    assert lines[0]["tokens"] == sum(map(sum, sides)) and lines[0]["target_tokens"] == sum(b for _, b in sides)
