"""Llama, Mistral and Qwen 3: logits, training and answers equal transformers', or the checkpoint is refused by name."""

import json
import shutil
from typing import Any

import numpy as np
import peft
import pytest
import reference
import torch
import transformers
from reference import LLAMA3_ROPE
from test_qlora import NF4_BITS, SIZES, bits
from test_training import Run, config, ragged_rows, torch_loss

import jaxtune
from jaxtune import mesh as meshes
from jaxtune.errors import UserError
from jaxtune.generate import generate
from jaxtune.hf.base import describe
from jaxtune.models import table_of
from jaxtune.models.decoder import Rope
from jaxtune.tree import count
from torch_gpu import model as gpu


@pytest.mark.parametrize("name", list(reference.LLAMAS))
def test_logits_equal_transformers(checkpoint, name):
    """With padding on the left, on the right and without."""
    model, directory = checkpoint(name)
    lm = jaxtune.load(directory)
    ids, mask = reference.batch()
    reference.close(lm.logits(ids), reference.logits(model, ids), 1e-5)
    reference.close(lm.logits(ids, mask), reference.logits(model, ids, mask), 1e-5)


def edited(directory, where, **changes):
    shutil.copytree(directory, where)
    path = where / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return where


def rope_of(**changes):
    return {"rope_parameters": reference.LLAMA3_ROPE | changes}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", rope_of(factor=4.0)),
        ("llama", rope_of(high_freq_factor=1.0)),
        ("llama_mha", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
        ("mistral", {"sliding_window": None}),
        ("qwen3_windows", {"layer_types": ["full_attention"] * 4}),
        ("qwen3_windows", {"layer_types": ["sliding_attention"] * 4}),
        ("llama_tied", {"rms_norm_eps": 1e-2}),
    ],
)
def test_what_the_comparison_above_would_see(checkpoint, tmp_path, name, changes):
    """Each of these moves the logits by a thousand times what is allowed there."""
    _, directory = checkpoint(name)
    ids, _ = reference.batch()
    other = jaxtune.load(edited(directory, tmp_path / "other", **changes)).logits(ids)
    mine = jaxtune.load(directory).logits(ids)
    assert np.abs(mine - other).max() > 1e-2 * np.abs(mine).max()


def test_frequencies_equal_transformers():
    """Those of Llama 3.2 1B, to the last bits of float32."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    values = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    theirs = transformers.LlamaConfig(
        head_dim=64, rope_parameters=values | {"rope_type": "llama3", "rope_theta": 500_000.0}
    )
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](theirs)
    ours = Rope(500_000.0, 32.0, (1.0, 4.0, 8192.0)).inverse_frequency(64)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, expected.numpy(), rtol=1e-6)


def test_ways_to_write_a_rope(shared):
    """The old keys, the new ones, and both at once as in a real file, which has its theta in the new ones alone."""
    real = json.loads((shared / "configs" / "llama-3.2-1b.config.json").read_text())
    both = table_of(real).config_from_hf(real)["ropes"][0]
    assert both == (500_000.0, 32.0, (1.0, 4.0, 8192.0))
    new = {k: v for k, v in real.items() if k != "rope_scaling"}
    new["rope_parameters"] = real["rope_scaling"] | real["rope_parameters"]
    scaling = {("type" if k == "rope_type" else k): v for k, v in real["rope_scaling"].items()}
    old = {k: v for k, v in real.items() if k != "rope_parameters"} | {"rope_theta": 5e5, "rope_scaling": scaling}
    assert table_of(new).config_from_hf(new)["ropes"] == table_of(old).config_from_hf(old)["ropes"] == (both,) * 16
    for how in (new, old):  # as transformers reads them
        theirs: Any = transformers.LlamaConfig.from_dict(json.loads(json.dumps(how))).rope_parameters
        assert theirs["rope_theta"] == 5e5 and theirs["rope_type"] == "llama3"
        assert theirs["original_max_position_embeddings"] == 8192


def test_both_ways_at_once_are_one_model_on_both_stacks(checkpoint, tmp_path):
    """transformers takes the old keys alone and a theta of its own, which is another model."""
    model, directory = checkpoint("llama")
    theta = {"rope_theta": reference.LLAMA3_ROPE["rope_theta"], "rope_type": "llama3"}
    scaling = {k: v for k, v in reference.LLAMA3_ROPE.items() if k != "rope_theta"}
    both = edited(directory, tmp_path / "both", rope_parameters=theta, rope_scaling=scaling)
    ids, _ = reference.batch()
    expected = reference.logits(model, ids)
    reference.close(jaxtune.load(both).logits(ids), expected, 1e-5)
    base = gpu.describe(str(both))
    on_torch = gpu.load(base, {"quant": None, "double_quant": False}, torch.float32, {"": "cpu"})
    reference.close(reference.logits(on_torch, ids), expected, 1e-5)


def test_a_mesh_and_shards_change_nothing(checkpoint, tmp_path):
    """Shards of a checkpoint on eight devices; the single kv head stays whole where it cannot be split."""
    model, directory = checkpoint("llama")
    reference.save(model, tmp_path / "sharded", max_shard_size="60KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    ids, mask = reference.batch()
    one = jaxtune.load(directory).logits(ids, mask)
    for sizes in ((1, 4, 2), (2, 2, 2)):
        many = jaxtune.load(tmp_path / "sharded", mesh=meshes.make_mesh(*sizes)).logits(ids, mask)
        reference.close(many, one, 1e-5)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_greedy_equals_transformers(checkpoint, name):
    """Prompts of different lengths, answers beyond the windows."""
    model, directory = checkpoint(name)
    lm = jaxtune.load(directory)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(10, 97, n).tolist() for n in (3, 11, 1, 19)]
    ours = generate(lm.base.model, lm.variables, prompts, max_new_tokens=16, stop_ids=(5,))
    ids, mask = np.zeros((2, 4, 19), np.int64)
    for i, prompt in enumerate(prompts):
        ids[i, 19 - len(prompt) :], mask[i, 19 - len(prompt) :] = prompt, 1
    how = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": 5, "pad_token_id": 0}
    with torch.no_grad():
        theirs = model.generate(torch.tensor(ids), attention_mask=torch.tensor(mask), **how).numpy()[:, 19:]
    for row, answer in zip(theirs.tolist(), ours, strict=True):
        assert answer == row[: row.index(5) if 5 in row else None]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_steps_equal_peft(checkpoint, tmp_path):
    """LoRA on everything, an untied head and its embedding trained whole beside it: losses, norms and the adapter."""
    _, directory = checkpoint("llama")
    base = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    torch.manual_seed(0)
    saved = ["embed_tokens", "lm_head", "norm"]
    keys = {"r": 3, "lora_alpha": 7, "target_modules": "all-linear", "modules_to_save": saved}
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **keys))
    model.save_pretrained(tmp_path / "first")
    c = config()
    c.optim.update({"weight_decay": 0.1, "max_grad_norm": 0.5, "eps": 1e-6})
    ours = Run(directory, c, init_from=str(tmp_path / "first"))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=3e-3, weight_decay=0.1, eps=1e-6)
    model.train()
    for step in range(12):
        rows = ragged_rows(5, seed=step)
        loss = torch_loss(model, rows)
        optimiser.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimiser.step()
        metrics = ours.step(rows)
        assert metrics["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
        assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-3)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_nf4_equals_bitsandbytes(tmp_path):
    """An untied head, which stays as it is, and a single kv head."""
    directory = reference.save(reference.randomise(reference.llama(**SIZES, rope_parameters=LLAMA3_ROPE)), tmp_path)
    ids, mask = reference.batch()
    exact = jaxtune.load(directory).logits(ids, mask) * mask[..., None]
    theirs = reference.logits(bits(directory, **NF4_BITS), ids, mask) * mask[..., None]
    ours = jaxtune.load(directory, quant="nf4").logits(ids, mask) * mask[..., None]
    reference.close(ours, theirs)
    assert np.abs(theirs - exact).max() > 0.02 * np.abs(theirs).max()


@pytest.mark.parametrize(("name", "parameters"), [("llama-2-7b", 6_738_415_616), ("llama-3.2-1b", 1_235_814_400)])
def test_published_sizes(shared, name, parameters):
    """The real models, laid out without a weight."""
    config = json.loads((shared / "configs" / f"{name}.config.json").read_text())
    assert count(describe(name, shared, config, dtype="bfloat16").abstract) == parameters


def test_published_names(shared):
    """Every tensor of the published Llama 3 8B, by name and shape, and no other."""
    stored = json.loads((shared / "configs" / "llama3_hf_param_shapes.json").read_text())
    config = {
        "model_type": "llama",
        "vocab_size": 128256,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "rope_theta": 500_000.0,
    }
    base = describe("llama3-8b", shared, config, dtype="bfloat16")
    needed = {name: row.tensor_shape for row in base.rows for name in row.names}
    assert {name: tuple(shape) for name, shape in stored.items()} == needed


@pytest.mark.parametrize(
    ("config", "theirs"),
    [
        ({"model_type": "llama"}, transformers.LlamaConfig),
        ({"model_type": "mistral"}, transformers.MistralConfig),
        ({"model_type": "mistral", "sliding_window": None}, transformers.MistralConfig),
        ({"model_type": "qwen3"}, transformers.Qwen3Config),
        ({"model_type": "qwen3", "use_sliding_window": True, "num_hidden_layers": 36}, transformers.Qwen3Config),
    ],
)
def test_what_a_config_leaves_out(config, theirs):
    """The sizes and windows of a bare config.json are those of transformers' class."""
    ours, theirs = table_of(config).config_from_hf(config), theirs.from_dict(dict(config))
    for mine, key in (
        ("vocab_size", "vocab_size"),
        ("width", "hidden_size"),
        ("hidden", "intermediate_size"),
        ("heads", "num_attention_heads"),
        ("kv_heads", "num_key_value_heads"),
        ("head_dim", "head_dim"),
        ("norm_eps", "rms_norm_eps"),
        ("tied", "tie_word_embeddings"),
    ):
        assert ours[mine] == getattr(theirs, key), key
    kinds = getattr(theirs, "layer_types", None) or ["sliding_attention"] * theirs.num_hidden_layers
    window = getattr(theirs, "sliding_window", None)
    assert ours["windows"] == tuple(window if kind == "sliding_attention" else None for kind in kinds)
    assert ours["ropes"][0] == (theirs.rope_parameters["rope_theta"], 1.0, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen2"}, "qwen2 is none of them: its q, k and v have biases"),
        ({"model_type": "mixtral"}, "mixture of experts"),
        ({"model_type": "llama2"}, "Did you mean `llama`"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"num_key_value_heads": 3}, "must be a multiple"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0"),
        ({"vocab_size": True}, "vocab_size=True"),
        ({"head_dim": None, "num_attention_heads": 5, "num_key_value_heads": 5}, "no head_dim"),
        ({"head_dim": 7}, "even"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'. llama supports: default, linear"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope type 'yarn'"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope type 'longrope'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor=0"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": None}}, "low_freq_factor=None"),
        ({"rope_scaling": {"low_freq_factor": 4.0}, **rope_of()}, "low_freq_factor=4.0 and high_freq_factor=2.0"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "the same in all layers"),
        ({"rope_scaling": "linear"}, "rope_scaling='linear'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
    ],
)
def test_configs_we_would_compute_wrongly(checkpoint, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        jaxtune.load(edited(checkpoint("llama")[1], tmp_path / "model", **changes))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("mistral", {"layer_types": ["full_attention", "sliding_attention"] * 2}, "in all layers or in none"),
        ("mistral", {"sliding_window": 0}, "sliding_window=0"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 4}, "sliding_window=None"),
        ("qwen3", {"layer_types": ["chunked_attention"] * 4}, "full_attention or sliding_attention"),
    ],
)
def test_windows_we_would_get_wrong(checkpoint, tmp_path, name, changes, message):
    with pytest.raises(UserError, match=message):
        jaxtune.load(edited(checkpoint(name)[1], tmp_path / "model", **changes))
