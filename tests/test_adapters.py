"""PEFT directories, both ways, held against the installed peft: same tensors, same logits, and refusals by name."""

import json
import re
import shutil

import jax
import numpy as np
import peft
import pytest
import reference
from safetensors.numpy import load_file, save_file

import jaxtune
from jaxtune.errors import MissingInputError, UserError
from jaxtune.hf.adapters import load_adapter
from jaxtune.hf.base import open_base
from jaxtune.peft import lora

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# (model, LoraConfig): every key that has meaning here, on awkward ranks.
CASES = {
    "default_targets": ("gemma2", {"r": 3}),
    "all_linear": ("gemma3", {"r": 5, "lora_alpha": 7, "target_modules": "all-linear"}),
    "regex": ("gemma2", {"r": 4, "target_modules": r".*layers\.[13]\..*(q_proj|down_proj)"}),
    "names": ("gemma", {"r": 1, "lora_alpha": 3, "target_modules": LINEARS}),
    "rslora": ("gemma2", {"r": 6, "lora_alpha": 5, "use_rslora": True, "target_modules": ["o_proj", "mlp.up_proj"]}),
    "layers": ("gemma2", {"r": 4, "target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 3]}),
    "layers_pattern": (
        "gemma2",
        {"r": 4, "target_modules": ["k_proj"], "layers_to_transform": 2, "layers_pattern": "layers"},
    ),
    "patterns": (
        "gemma2",
        {
            "r": 4,
            "lora_alpha": 9,
            "target_modules": LINEARS,
            "rank_pattern": {"q_proj": 7, r"layers\.1\.mlp\..*": 2, "^model.layers.3.self_attn.v_proj": 1},
            "alpha_pattern": {"down_proj": 31, "layers.0.self_attn.q_proj": 2.5},
        },
    ),
    "exclude": (
        "gemma2",
        {"r": 2, "target_modules": "all-linear", "exclude_modules": ["k_proj", "layers.2.mlp.gate_proj"]},
    ),
    "bias": ("gemma2", {"r": 2, "bias": "all", "target_modules": ["v_proj"]}),
    "save_norms": (
        "gemma3",
        {"r": 2, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["input_layernorm", "q_norm"]},
    ),
    "save_linear": ("gemma2", {"r": 2, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["o_proj"]}),
    "save_block": ("gemma2", {"r": 2, "target_modules": "all-linear", "modules_to_save": ["mlp"]}),
    "save_untied": (
        "gemma2_untied",
        {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "save_embedding_of_tied": ("gemma2", {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "save_head_of_tied": ("gemma2", {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
}


@pytest.fixture(scope="module")
def adapted(checkpoint, tmp_path_factory):
    """case -> (peft model, checkpoint directory, adapter directory), made once."""
    made = {}

    def get(case):
        if case not in made:
            import transformers

            name, keys = CASES[case]
            _, directory = checkpoint(name)
            base = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
            adapter = tmp_path_factory.mktemp(case)
            config = peft.LoraConfig(task_type="CAUSAL_LM", **keys)
            made[case] = (reference.adapt(base, config, adapter), directory, adapter)
        return made[case]

    return get


@pytest.mark.filterwarnings("ignore::UserWarning")  # peft's own, about biases and tied embeddings
@pytest.mark.parametrize("case", list(CASES))
def test_import_and_export_equal_peft(adapted, tmp_path, case):
    model, directory, adapter = adapted(case)
    ids, mask = reference.batch()
    expected = reference.logits(model, ids, mask)
    assert np.abs(expected - jaxtune.load(directory).logits(ids, mask)).max() > 1e-2  # the adapter shows

    lm = jaxtune.load(directory, adapter=adapter)
    reference.close(lm.logits(ids, mask), expected)

    lm.save_adapter(tmp_path / "out")
    ours, theirs = (
        load_file(tmp_path / "out" / "adapter_model.safetensors"),
        load_file(adapter / "adapter_model.safetensors"),
    )
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)
    reference.close(reference.logits(reference.with_adapter(directory, tmp_path / "out"), ids, mask), expected, 1e-6)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_multimodal_names(checkpoint, tmp_path):
    """peft over the multimodal class names the text tower in its paths; a text-only adapter has no such name."""
    import transformers

    model, directory = checkpoint("gemma3_multimodal")
    base = transformers.AutoModelForImageTextToText.from_pretrained(directory, attn_implementation="eager")
    config = peft.LoraConfig(r=3, target_modules=r".*language_model.*(q_proj|up_proj)")
    theirs = reference.adapt(base, config, tmp_path / "theirs")
    ids, _ = reference.batch()
    expected = reference.logits(theirs, ids)
    lm = jaxtune.load(directory, adapter=tmp_path / "theirs")
    reference.close(lm.logits(ids), expected)
    lm.save_adapter(tmp_path / "ours")
    reference.close(reference.logits(reference.with_adapter(directory, tmp_path / "ours"), ids), expected, 1e-6)
    assert model is not None


def test_initial_distributions():
    """A and B as peft draws them: bounds, variance, zeros; reproducible, and different for every site and layer."""
    sites = [
        lora.Site(
            "layers/attn/q/kernel",
            tuple(f"layers.{i}.q_proj" for i in range(3)),
            (3, 64, 96),
            ("layers", "embed", "heads"),
            "linear",
        ),
        lora.Site(
            "layers/attn/v/kernel",
            tuple(f"layers.{i}.v_proj" for i in range(3)),
            (3, 64, 96),
            ("layers", "embed", "heads"),
            "linear",
        ),
    ]

    def draw(**keys):
        import flax.linen as nn

        return nn.unbox(lora.init(jax.random.key(0), sites, lora.LoraConfig(r=50, **keys)))

    kaiming = draw()["layers/attn/q/kernel"]
    bound = 1 / np.sqrt(64)
    assert np.abs(kaiming.a).max() <= bound
    assert np.abs(kaiming.a).max() > 0.99 * bound
    np.testing.assert_allclose(np.std(kaiming.a), bound / np.sqrt(3), rtol=0.03)
    assert not np.any(kaiming.b)
    gaussian = draw(init_lora_weights="gaussian")["layers/attn/q/kernel"]
    np.testing.assert_allclose(np.std(gaussian.a), 1 / 50, rtol=0.03)
    assert not np.any(gaussian.b)
    both = draw(init_lora_weights=False)["layers/attn/q/kernel"]
    np.testing.assert_allclose(np.abs(both.b).max(), 1 / np.sqrt(50), rtol=0.01)
    assert np.array_equal(draw()["layers/attn/q/kernel"].a, kaiming.a)
    assert not np.array_equal(draw()["layers/attn/v/kernel"].a, kaiming.a)
    assert not np.array_equal(kaiming.a[0], kaiming.a[1])


def test_trainable_parameters_of_the_founding_run(shared):
    """LoRA r=8 on all seven projections of Gemma 2 2b trains 10,383,360 values."""
    from jaxtune.hf.base import describe
    from jaxtune.tree import flatten

    config = json.loads((shared / "configs" / "gemma2-2b.config.json").read_text())
    base = describe("gemma2-2b", shared, config, dtype="bfloat16")
    adapters = jax.eval_shape(
        lambda key: lora.init(key, base.sites, lora.LoraConfig(r=8, target_modules="all-linear")), jax.random.key(0)
    )
    leaves = flatten({path: adapter for path, adapter in adapters.items()})
    trained = sum(leaf.size for path, leaf in leaves.items() if "scale" not in path)
    assert trained == 10_383_360


class TestRefusals:
    @pytest.fixture
    def copy(self, adapted, tmp_path):
        _, directory, adapter = adapted("default_targets")
        shutil.copytree(adapter, tmp_path / "adapter")
        return directory, tmp_path / "adapter"

    def refused(self, copy, message, kind=UserError):
        with pytest.raises(kind, match=message):
            jaxtune.load(copy[0], adapter=copy[1])

    def edit(self, copy, **changes):
        path = copy[1] / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def edit_tensors(self, copy, change):
        path = copy[1] / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"use_dora": True}, "sets use_dora=True, which jaxtune does not support"),
            ({"lora_bias": True}, "lora_bias"),
            ({"layer_replication": [[0, 2]]}, "layer_replication"),
            ({"trainable_token_indices": [1]}, "trainable_token_indices"),
            ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
            ({"peft_type": "LORRA"}, "Did you mean `LORA`"),
            ({"lora_alphas": 3}, "does not know. Did you mean `lora_alpha`"),
            ({"r": 0}, "A rank is an integer"),
            ({"r": "8"}, "A rank is an integer"),
            ({"r": True}, "A rank is an integer"),
            ({"r": 4}, r"lora_A.weight has shape \[3, 48\]; rank 4 on this model needs \[4, 48\]"),
            ({"lora_dropout": 1.0}, "lora_dropout"),
            ({"lora_alpha": float("nan")}, "lora_alpha"),
            ({"bias": "some"}, "none, all, lora_only"),
            ({"target_modules": ["q_projj", "v_proj"]}, "Did you mean `q_proj`"),
            ({"target_modules": "(q_proj"}, "no regular expression"),
            ({"target_modules": "q_proj"}, "A string is a regular expression for whole module paths"),
            ({"target_modules": ["q_proj", "v_proj", "embed_tokens"]}, "of kind embedding"),
            ({"modules_to_save": ["lm_hed"]}, "Did you mean `lm_head`"),
            ({"modules_to_save": ["layers.0.mlp"]}, "in all layers or in none"),
        ],
    )
    def test_config(self, copy, changes, message):
        self.edit(copy, **changes)
        self.refused(copy, message)

    def test_missing_tensor(self, copy):
        self.edit_tensors(copy, lambda t: t.pop("base_model.model.model.layers.2.self_attn.v_proj.lora_B.weight"))
        self.refused(copy, "has no tensor 'model.layers.2.self_attn.v_proj.lora_B.weight'")

    def test_unexpected_tensor(self, copy):
        name = "base_model.model.model.layers.9.self_attn.v_proj.lora_B.weight"
        self.edit_tensors(copy, lambda t: t.update({name: np.zeros((2, 2), np.float32)}))
        self.refused(copy, "1 tensors that its config and this model do not use:\n  model.layers.9")

    def test_not_finite(self, copy):
        def poison(tensors):
            tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"][0, 0] = np.inf

        self.edit_tensors(copy, poison)
        self.refused(copy, "not finite")

    def test_integers(self, copy):
        name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
        self.edit_tensors(copy, lambda t: t.update({name: np.ones((3, 48), np.int32)}))
        self.refused(copy, "holds floats")

    def test_pickle(self, copy):
        (copy[1] / "adapter_model.safetensors").rename(copy[1] / "adapter_model.bin")
        self.refused(copy, "pickle, which runs code", MissingInputError)

    def test_huge_config(self, copy):
        (copy[1] / "adapter_config.json").write_text(" " * (2**20 + 1))
        self.refused(copy, "the limit for such a file")

    def test_nothing_named_in_it_is_imported(self, copy):
        import sys

        self.edit(copy, auto_mapping={"parent_library": "this", "base_model_class": "x"})
        before = set(sys.modules)
        jaxtune.load(copy[0], adapter=copy[1])
        assert "this" not in set(sys.modules) - before


def test_every_key_of_the_installed_peft_is_known():
    """A new key in peft's LoraConfig must be looked at, not dropped."""
    import dataclasses

    from jaxtune.peft.method import BOOKKEEPING

    known = {f.name for f in dataclasses.fields(lora.LoraConfig)} | set(lora.NEUTRAL) | BOOKKEEPING
    assert {f.name for f in dataclasses.fields(peft.LoraConfig)} <= known


def test_published_configs(shared, checkpoint):
    """Real adapter_config.json files are either understood or refused with the key that is in the way."""
    base = open_base(str(checkpoint("gemma2")[1]))
    outcomes = {}
    for path in sorted((shared / "adapters").rglob("*adapter_config.json")):
        directory = path.parent
        try:
            from jaxtune.hf.files import read_json
            from jaxtune.peft import BY_PEFT_TYPE
            from jaxtune.peft.method import read_config

            values = read_json(path)
            if values["peft_type"] not in BY_PEFT_TYPE:
                outcomes[path.name] = "other method"
                continue
            config = read_config(lora.LoraConfig, values, lora.NEUTRAL, path.name)
            assert config.r == values["r"]
            outcomes[path.name] = "ok"
        except UserError as error:
            outcomes[path.name] = re.sub(r"\s+", " ", str(error))
        assert directory.is_dir()
    assert outcomes["gemma-2-9b-it-lora-r64.adapter_config.json"] == "ok"
    assert outcomes["lora--llama-3.2-3B-rank64-rslora.adapter_config.json"] == "ok"
    assert "use_dora" in outcomes["lora--llama-3.2-3B-rank32-dora.adapter_config.json"]
    with pytest.raises(MissingInputError):
        load_adapter(shared / "adapters" / "configs_only", base.sites)
