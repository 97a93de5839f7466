"""Every method over T5 beside the installed peft: files both ways, merging, what peft does of its own, and steps."""

import json
import shutil
from typing import Any

import jax
import numpy as np
import peft
import pytest
import reference
import torch
import transformers
from safetensors.numpy import load_file
from test_data_seq2seq import small_t5_tokenizer
from test_qlora import dequantised
from test_t5 import edit, rows, torch_rows
from test_training import Run, config

import jaxtune
from jaxtune import export, train, tree
from jaxtune.data.batches import collate
from jaxtune.data.seq2seq import Lengths
from jaxtune.errors import UserError
from jaxtune.generate import generate
from jaxtune.hf.adapters import adapter_tensors, save_adapter
from jaxtune.hf.base import open_base
from jaxtune.peft import METHODS, partial, saved
from jaxtune.peft.keys import read_config
from jaxtune.peft.method import from_variables, virtual_of
from jaxtune.quant import Quantised

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # peft's own, about sizes it adjusts and saves
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning"),  # peft's, of its own AdaLoRA
]

CONFIGS = {
    "lora": peft.LoraConfig,
    "adalora": peft.AdaLoraConfig,
    "ia3": peft.IA3Config,
    "loha": peft.LoHaConfig,
    "lokr": peft.LoKrConfig,
    "vera": peft.VeraConfig,
    "randlora": peft.RandLoraConfig,
    "oft": peft.OFTConfig,
    "boft": peft.BOFTConfig,
    "ln_tuning": peft.LNTuningConfig,
    "prompt_tuning": peft.PromptTuningConfig,
    "p_tuning": peft.PromptEncoderConfig,
    "prefix_tuning": peft.PrefixTuningConfig,
    "multitask_prompt_tuning": peft.MultitaskPromptTuningConfig,
}
VIRTUAL = {"num_virtual_tokens": 5}

# case: (model, peft's keys); the method is what stands before the first dot.
CASES = {
    "lora.default": ("t5", {"r": 3, "lora_alpha": 7}),
    "lora.dora": ("t5_v11", {"r": 4, "target_modules": "all-linear", "use_dora": True, "use_rslora": True}),
    "lora.patterns": (
        "t5_deep",
        {
            "r": 2,
            "target_modules": ["q", "wo", "lm_head"],
            "layers_to_transform": [1, 3],
            "rank_pattern": {"EncDecAttention.q": 5},
            "alpha_pattern": {r"encoder\.block\.1\..*": 20},
        },
    ),
    "lora.saved": ("t5", {"r": 2, "modules_to_save": ["relative_attention_bias", "final_layer_norm", "lm_head"]}),
    "lora.tokens": ("t5", {"r": 2, "trainable_token_indices": {"shared": [5, 40, 41]}}),
    "adalora.default": ("t5", {"init_r": 5, "target_r": 3, "total_step": 9}),
    "adalora.gated": ("t5_v11", {"init_r": 4, "target_r": 2, "total_step": 9}),
    "ia3.default": ("t5_v11", {}),
    "ia3.mt5": ("mt5", {}),
    "loha.default": ("t5_v11", {"r": 3}),
    "lokr.all": ("t5", {"r": 2, "target_modules": "all-linear"}),
    "vera.all": ("t5_deep", {"r": 5, "target_modules": "all-linear"}),
    "randlora.some": ("t5_v11", {"r": 9, "target_modules": ["v", "wi_1"]}),
    "oft.some": ("t5", {"oft_block_size": 8, "target_modules": ["q", "wo"]}),
    "boft.some": ("t5_v11", {"boft_block_size": 4, "target_modules": ["v", "wo"]}),
    "ln_tuning.default": ("t5_deep", {}),
    "prompt_tuning.default": ("t5", VIRTUAL),
    "p_tuning.mlp": ("t5_v11", VIRTUAL | {"encoder_hidden_size": 11}),
    "p_tuning.lstm": ("t5", VIRTUAL | {"encoder_hidden_size": 7, "encoder_reparameterization_type": "LSTM"}),
    "multitask_prompt_tuning.three": ("t5_v11", VIRTUAL | {"num_tasks": 3, "num_ranks": 2}),
    "prefix_tuning.odd": ("t5_quantisable", VIRTUAL),
    "prefix_tuning.even": ("t5_even", VIRTUAL),
}
TASKS = [2, 0, 1]


def method_of(case):
    return case.split(".")[0]


def auto(directory):
    return transformers.AutoModelForSeq2SeqLM.from_pretrained(directory, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def adapted(checkpoint, tmp_path_factory):
    """case -> (peft model with random weights, checkpoint directory, adapter directory), made once."""
    made = {}

    def get(case):
        if case not in made:
            name, keys = CASES[case]
            _, directory = checkpoint(name)
            where = tmp_path_factory.mktemp(case)
            made_of = CONFIGS[method_of(case)](task_type="SEQ_2_SEQ_LM", **keys)
            made[case] = reference.adapt(auto(directory), made_of, where), directory, where
        return made[case]

    return get


def tasks(case):
    return {"task_id": TASKS} if "multitask" in case else {}


def theirs(case, model, ids, mask, labels):
    """peft's logits; of prompts, each row's without padding on the left, which they would stand before.  (With labels
    peft's AdaLoRA fails once it has been read from a file.)"""
    model = model.base_model.model if method_of(case) == "adalora" else model
    if method_of(case) not in ("prompt_tuning", "p_tuning", "multitask_prompt_tuning"):
        return reference.t5_logits(model, ids, mask, labels)
    found = []
    for i in range(len(ids)):
        more = {"task_ids": np.array(TASKS[i : i + 1])} if tasks(case) else {}
        real = mask[i] > 0
        found.append(reference.t5_logits(model, ids[i : i + 1, real], mask[i : i + 1, real], labels[i : i + 1], **more))
    return np.concatenate(found)


@pytest.mark.parametrize("case", list(CASES))
def test_files_equal_pefts(adapted, tmp_path, case):
    model, directory, adapter = adapted(case)
    ids, mask, labels = reference.t5_batch()
    expected = theirs(case, model, ids, mask, labels)
    base = reference.t5_logits(auto(directory), ids, mask, labels)
    assert np.abs(expected - base).max() > 1e-2 * np.abs(base).max()  # the adapter shows
    lm = jaxtune.load(directory, adapter=adapter)
    reference.close(lm.logits(ids, mask, labels=labels, **tasks(case)), expected)

    assert lm.peft is not None
    save_adapter(tmp_path / "out", lm.variables, lm.base.layout, lm.peft, str(directory))
    tensors, stored = (load_file(d / "adapter_model.safetensors") for d in (tmp_path / "out", adapter))
    needless = {name for name in stored if name.endswith("base_layer.weight")}
    assert tensors.keys() == stored.keys() - needless
    for name, value in tensors.items():
        np.testing.assert_array_equal(value, stored[name], err_msg=name)
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert written["task_type"] == "SEQ_2_SEQ_LM"
    again = reference.with_adapter(directory, tmp_path / "out")
    reference.close(theirs(case, again, ids, mask, labels), expected, 1e-6)


# ---------------------------------------------------------------- merging

MERGED = {
    "lora.dora": (False, False),  # case: tied, scaled, as config.json says it afterwards
    "lora.patterns": (False, False),  # a tied head that is adapted becomes another matrix
    "lora.saved": (False, False),  # and takes the scale with it
    "lora.tokens": (True, True),
    "lokr.all": (True, True),
}


@pytest.mark.parametrize("case", list(MERGED))
def test_merged_checkpoints_load_in_transformers(adapted, tmp_path, case):
    """In 5, and by what 4 would read: it scales where, and only where, the head is tied."""
    model, directory, adapter = adapted(case)
    batch = reference.t5_batch()
    expected = reference.t5_logits(model, *batch)
    lm = jaxtune.load(directory, adapter=adapter)
    lm.save_merged(tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["tie_word_embeddings"], written["scale_decoder_outputs"]) == MERGED[case]
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert ("lm_head.weight" in tensors) != MERGED[case][0] and "encoder.embed_tokens.weight" not in tensors
    reference.close(reference.t5_logits(auto(tmp_path / "out"), *batch), expected)
    again = jaxtune.load(tmp_path / "out").logits(batch[0], batch[1], labels=batch[2])
    reference.close(again, expected)


# ---------------------------------------------------------------- generation


@pytest.mark.parametrize("case", ["lora.default", "p_tuning.lstm", "prefix_tuning.odd"])
def test_generation_equals_peft(adapted, case):
    """Greedy answers to prompts of different lengths side by side: peft's to each by itself."""
    model, directory, adapter = adapted(case)
    lm = jaxtune.load(directory, adapter=adapter)
    texts = [[11, 12, 13], list(range(20, 41)), [50, 7, 8, 9, 10]]
    prompts = [lm.virtual.ids().tolist() + text for text in texts]
    ours = generate(lm.base.model, lm.variables, prompts, max_new_tokens=10, stop_ids=())
    how = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
    for text, answer in zip(texts, ours, strict=True):
        ids = torch.tensor([text])
        with torch.no_grad():
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **how)[0, 1:].tolist()
        assert answer == out


def test_multitask_answers_are_what_was_trained(adapted):
    """Behind the decoder's own prompt too, which peft's `generate` leaves out: what the model says without a cache."""
    _, directory, adapter = adapted("multitask_prompt_tuning.three")
    lm = jaxtune.load(directory, adapter=adapter)
    texts = [[11, 12, 13], list(range(20, 41)), [50, 7, 8]]
    prompts = [lm.virtual.ids(task).tolist() + text for task, text in zip(TASKS, texts, strict=True)]
    answers = generate(lm.base.model, lm.variables, prompts, max_new_tokens=10, stop_ids=())
    ids, mask = np.zeros((2, 3, 21), np.int32)
    for i, text in enumerate(texts):
        ids[i, : len(text)], mask[i, : len(text)] = text, 1
    said = lm.logits(ids, mask, labels=np.array(answers), task_id=TASKS).argmax(-1)
    assert said.tolist() == answers
    assert lm.logits(ids, mask, labels=np.array(answers), task_id=[0, 0, 0]).argmax(-1).tolist() != answers


@pytest.mark.parametrize("name", ["t5", "t5_deep"])
def test_prefixes_that_peft_would_not_make(checkpoint, tmp_path, name):
    """d_kv is not d_model / num_heads, the decoder is deeper: peft reads ours, whose config has the sizes."""
    directory = checkpoint(name)[1]
    c = config(method="prefix_tuning", num_virtual_tokens=4, r=None, lora_alpha=None, target_modules=None)
    run = T5Run(directory, c)
    lm = jaxtune.load(directory)
    lm.variables = run.adapted.variables(run.state.trainable)
    assert run.adapted.peft is not None
    save_adapter(tmp_path / "out", lm.variables, lm.base.layout, run.adapted.peft, str(directory))
    batch = reference.t5_batch()
    model = reference.with_adapter(directory, tmp_path / "out")
    reference.close(lm.logits(batch[0], batch[1], labels=batch[2]), reference.t5_logits(model, *batch))


# ---------------------------------------------------------------- training


class T5Run(Run):
    """`test_training.Run` with an encoder's rows, virtual tokens first."""

    def put(self, rows):
        peft_ = self.adapted.peft
        ids = virtual_of(peft_.method, self.layout, peft_.config).ids() if peft_ else np.zeros(0, np.int32)
        rows = [(np.concatenate([ids, row]), np.concatenate([ids > 0, learnt])) for row, learnt in rows]
        batch = collate(rows, len(rows), Lengths(64, 32, 0, 0))
        return {k: jax.numpy.asarray(v)[None] for k, v in batch.items()}

    def __init__(self, directory, c, **how):
        self.layout = open_base(str(directory)).layout
        super().__init__(directory, c, **how)


@pytest.mark.parametrize("case", ["lora.saved", "prompt_tuning.default", "prefix_tuning.even"])
def test_two_steps_equal_pefts(checkpoint, tmp_path, case):
    """AdamW from the same random adapter: losses, gradient norms and what has moved, which in a file of prompts is not
    all that it holds."""
    name, keys = CASES[case]
    directory = checkpoint(name)[1]
    calm = tmp_path / "calm"
    shutil.copytree(directory, calm)
    edit(calm, dropout_rate=0.0)
    made = CONFIGS[method_of(case)](task_type="SEQ_2_SEQ_LM", **keys)
    model = reference.adapt(auto(calm), made, tmp_path / "first")
    c = config(method=method_of(case), r=None, lora_alpha=None, target_modules=None)
    c.optim.update({"learning_rate": 3e-3, "eps": 1e-6})
    ours = T5Run(calm, c, init_from=str(tmp_path / "first"))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimiser = torch.optim.AdamW(trained.values(), lr=3e-3, weight_decay=0.0, eps=1e-6)
    model.train()
    for step in range(2):
        batch = rows(4, seed=step)
        loss = model(**{k: torch.tensor(v) for k, v in torch_rows(batch).items()}).loss
        optimiser.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        optimiser.step()
        metrics = ours.step(batch)
        assert metrics["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
        assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-3)
    model.eval()
    model.save_pretrained(tmp_path / "last")
    layout = open_base(str(calm)).layout
    tensors = adapter_tensors(from_variables(ours.adapted.variables(ours.state.trainable)), layout)
    first, last = (load_file(tmp_path / when / "adapter_model.safetensors") for when in ("first", "last"))
    for key, value in last.items():
        step = value - first[key]
        assert np.linalg.norm(tensors[key] - value) <= 2e-3 * np.linalg.norm(step), key
        if "prompt" in case:  # rows for the decoder, which nobody reads
            assert step[:5].all() and not step[5:].any() and np.array_equal(tensors[key][5:], first[key][5:])


def test_partial_and_full(checkpoint, tmp_path):
    """Weights of both stacks train where they are, some layers of them too."""
    directory = checkpoint("t5")[1]
    c = config(method="partial", r=None, lora_alpha=None, target_modules=r".*(encoder|decoder)\.block\.1\..*\.v|shared")
    run = T5Run(directory, c)
    before = {path: np.asarray(x) for path, x in run.adapted.trainable.items()}
    assert set(before) == {
        "params/embed/table",
        "params/encoder/layers/attn/v/kernel",
        "params/decoder/layers/attn/v/kernel",
        "params/decoder/layers/cross/v/kernel",
    }
    run.step(rows(3))
    for path, old in before.items():
        moved = np.abs(np.asarray(run.state.trainable[path]) - old).reshape(len(old), -1).max(1) > 0
        assert moved.tolist() == [layer == 1 for layer in range(len(old))] if "layers" in path else moved.any()
    with pytest.raises(UserError, match="share its weight"):
        partial.as_adapters(open_base(str(directory)).layout, {"embed/table": (True,)}, before)
    whole = T5Run(directory, config(method="full", r=None, lora_alpha=None, target_modules=None))
    assert tree.count(whole.adapted.trainable) == tree.count(open_base(str(directory)).abstract)


# ---------------------------------------------------------------- fewer bits


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_quantised_bases_equal_bitsandbytes(checkpoint, tmp_path, kind):
    """transformers keeps `wo` and the head as they are; so does this.  In 8 bits as transformers saves them: it rounds
    to float16 before."""
    directory = checkpoint("t5_quantisable")[1]
    how: Any = {"load_in_8bit": True} if kind == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    settings = transformers.BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.float32, **how)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", quantization_config=settings
    ).eval()
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    assert {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if type(m) is torch.nn.Linear} == {"wo", "lm_head"}
    if kind == "int8":
        model.save_pretrained(tmp_path / "stored")
    lm = jaxtune.load(tmp_path / "stored") if kind == "int8" else jaxtune.load(directory, quant=kind)
    leaves = tree.flatten(lm.variables["params"], lambda x: isinstance(x, Quantised))
    boxes = {p.rsplit("/", 2)[-2] for p, x in leaves.items() if isinstance(x, Quantised)}
    assert boxes == {"q", "k", "v", "o", "gate", "up"}
    batch = reference.t5_batch()
    expected = reference.t5_logits(dequantised(model), *batch)
    reference.close(lm.logits(batch[0], batch[1], labels=batch[2]), expected)
    plain = reference.t5_logits(auto(directory), *batch)
    assert np.abs(expected - plain).max() > 1e-3 * np.abs(plain).max()


# ---------------------------------------------------------------- adapters of others, refusals


def test_a_real_adapter(shared, tmp_path):
    """A LoRA of t5-small that somebody trained with peft in 2024, over a random base of that size."""
    torch.manual_seed(0)
    sizes: Any = {"decoder_start_token_id": 0}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
    model.save_pretrained(tmp_path / "base")
    del model
    adapter = shared / "adapters" / "t5-small-lora-r8-a32"
    rng = np.random.default_rng(0)
    ids, labels = rng.integers(3, 32000, (2, 150)), rng.integers(3, 32000, (2, 9))  # longer than the last bucket
    mask = np.ones_like(ids)
    mask[1, 70:] = 0
    expected = reference.t5_logits(reference.with_adapter(tmp_path / "base", adapter), ids, mask, labels)
    lm = jaxtune.load(tmp_path / "base", adapter=adapter)
    reference.close(lm.logits(ids, mask, labels=labels), expected)
    base = reference.t5_logits(auto(tmp_path / "base"), ids, mask, labels)
    assert np.abs(expected - base).max() > 1e-3 * np.abs(base).max()
    lm.save_adapter(tmp_path / "out")
    ours, theirs_ = (load_file(d / "adapter_model.safetensors") for d in (tmp_path / "out", adapter))
    assert ours.keys() == theirs_.keys() and all(np.array_equal(ours[n], theirs_[n]) for n in theirs_)


REFUSED = [
    ("lora", "t5", {"target_modules": ["shared"]}, "through which no token goes"),
    ("lora", "t5", {"modules_to_save": ["shared"]}, "through which no token goes"),
    ("lora", "t5", {"target_modules": ["embed_tokens"]}, "No module matches"),
    ("lora", "t5", {"target_modules": ["q_proj"]}, "The model has: final_layer_norm, k, o, q, v, wo"),
    ("lora", "t5", {"target_modules": ["relative_attention_bias"]}, "of kind bias"),
    ("lora", "t5_v11", {"trainable_token_indices": [5]}, "head is not tied to shared"),
    ("adalora", "t5_v11", {"target_modules": ["q", "wi"]}, "No module matches target_modules"),
    ("p_tuning", "t5", {"num_transformer_submodules": 1}, "num_transformer_submodules=1"),
    ("prefix_tuning", "t5", {"token_dim": 40, "num_attention_heads": 5}, "token_dim=40, and this model needs 35"),
    ("prefix_tuning", "t5_deep", {"num_layers": 3}, "num_layers=3, and this model needs 4"),
]


@pytest.mark.parametrize(("method", "name", "keys", "message"), REFUSED)
def test_what_t5_cannot_have(checkpoint, method, name, keys, message):
    layout, module = open_base(str(checkpoint(name)[1])).layout, METHODS[method]
    settings = read_config(module.Config, keys, module.NEUTRAL, "`config.peft`")
    with pytest.raises(UserError, match=message):
        module.plan(layout, settings)
        saved.choose(layout.sites, settings.modules_to_save)


# ---------------------------------------------------------------- the command


RECIPE = """
from jaxtune.config import get_default


def get_config():
    c = get_default()
    c.model.id, c.model.dtype = {model!r}, "float32"
    c.peft.r, c.peft.lora_alpha = 4, 16.0
    c.peft.target_modules = ("q", "v", "wo")
    c.data.train = c.data.eval = {rows!r}
    c.data.format, c.data.prompt, c.data.completion = "prompt_completion", "{{q}}", "{{a}}"
    c.data.max_length, c.data.max_target_length = 24, 16
    c.optim.learning_rate, c.optim.schedule = 2e-2, "constant"
    c.train.steps, c.train.global_batch_size, c.train.gradient_accumulation_steps = 40, 16, 2
    c.evaluate.samples, c.evaluate.max_new_tokens = 3, 6
    c.logging.tensorboard = False
    return c
"""


def test_a_run_from_rows_to_an_adapter_that_peft_reads(tmp_path):
    """The loss falls; the adapter computes the same in peft; texts go in and come out; merged it is a checkpoint."""
    torch.manual_seed(0)
    model = reference.randomise(reference.t5(vocab_size=300, dropout_rate=0.0))
    small_t5_tokenizer(reference.save(model, tmp_path / "model"))
    made = [{"q": f"how are you {i % 4}", "a": ["fine", "not so fine", "well", "ill today"][i % 4]} for i in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    (tmp_path / "recipe.py").write_text(RECIPE.format(model=str(tmp_path / "model"), rows=str(tmp_path / "rows.jsonl")))
    run = tmp_path / "run"
    assert train.main(["--config", str(tmp_path / "recipe.py"), "--workdir", str(run)]) == 0

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scores = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert scores[-1] < 0.9 * scores[0]
    assert "AutoModelForSeq2SeqLM" in (run / "log.txt").read_text()
    assert "AutoModelForSeq2SeqLM" in (run / "adapter" / "README.md").read_text()
    ids, mask, labels = reference.t5_batch()
    theirs_ = reference.with_adapter(tmp_path / "model", run / "adapter")
    lm = jaxtune.load(tmp_path / "model", adapter=run / "adapter")
    expected = reference.t5_logits(theirs_, ids, mask, labels)
    reference.close(lm.logits(ids, mask, labels=labels), expected)

    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "model" / "tokenizer.json"))
    texts = ["how are you 1", "how are you 3, fine"]
    answers = []
    for text in texts:
        with torch.no_grad():
            out = theirs_.generate(
                input_ids=torch.tensor([tokenizer(text)["input_ids"]]), max_new_tokens=6, do_sample=False
            )
        answers.append(tokenizer.decode(out[0], skip_special_tokens=True))
    assert lm.generate(texts, max_new_tokens=6) == answers and any(answers)

    assert export.main([str(run), "--merged"]) == 0
    reference.close(reference.t5_logits(auto(run / "merged"), ids, mask, labels), expected)
