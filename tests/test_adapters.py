"""PEFT directories, both ways, held against the installed peft: same tensors, same logits, and refusals by name."""

import json
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import reference
from safetensors.numpy import load_file, save_file

import jaxtune
from jaxtune.errors import MissingInputError, UserError
from jaxtune.peft import lora, lora_init
from jaxtune.peft.method import Layout, Site, Start, layer_of

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
    "dora": ("gemma3", {"r": 5, "lora_alpha": 3, "use_dora": True, "target_modules": "all-linear"}),
    "dora_layers": (
        "gemma2",
        {
            "r": 3,
            "use_dora": True,
            "use_rslora": True,
            "target_modules": ["v_proj", "down_proj"],
            "layers_to_transform": [1, 2],
            "rank_pattern": {"layers.1.mlp.down_proj": 6},
        },
    ),
    "embedding": ("gemma2", {"r": 3, "target_modules": ["embed_tokens", "q_proj"], "lora_alpha": 5}),
    "embedding_gemma3": ("gemma3", {"r": 3, "target_modules": ["embed_tokens"], "layers_to_transform": None}),
    "embedding_and_head": ("gemma2_untied", {"r": 2, "target_modules": ["embed_tokens", "lm_head"]}),
    "head_of_tied": ("gemma2", {"r": 2, "target_modules": ["lm_head", "k_proj"]}),
    "token_rows": ("gemma2", {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": [3, 50, 96]}),
    "token_rows_untied": (
        "gemma2_untied",
        {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [7, 5]}},
    ),
    "token_rows_gemma3": ("gemma3", {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": [8, 9]}),
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
    # peft adds the base's own weight where an embedding is adapted; nobody needs it.
    theirs = {name: value for name, value in theirs.items() if "base_layer" not in name}
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


def layout_of(*sizes, layers=3):
    """A layout of query and value projections [in, out]."""
    modules = {"q": "q_proj", "v": "v_proj"}
    sites = tuple(
        Site(
            f"layers/attn/{short}/kernel",
            tuple(f"model.layers.{i}.self_attn.{name}" for i in range(layers)),
            (layers, *sizes),
            ("layers", "embed", "heads"),
            "linear",
        )
        for short, name in modules.items()
    )
    return Layout("gemma2", sites, True, 8.0, 97, sizes[0], layers, 4, 2, 24)


def draw(layout, **keys):
    weights = {site.path: jax.random.normal(jax.random.key(1), site.shape) for site in layout.sites}
    return nn.unbox(lora.init(jax.random.key(0), layout, lora.Config(**keys), Start(weights)))


def test_initial_distributions():
    """A and B as peft draws them: bounds, variance, zeros; reproducible, and different for every site and layer."""
    layout = layout_of(64, 96)
    kaiming = draw(layout, r=50)["layers/attn/q/kernel"]
    bound = 1 / np.sqrt(64)
    assert np.abs(kaiming.a).max() <= bound
    assert np.abs(kaiming.a).max() > 0.99 * bound
    np.testing.assert_allclose(np.std(kaiming.a), bound / np.sqrt(3), rtol=0.03)
    assert not np.any(kaiming.b)
    gaussian = draw(layout, r=50, init_lora_weights="gaussian")["layers/attn/q/kernel"]
    np.testing.assert_allclose(np.std(gaussian.a), 1 / 50, rtol=0.03)
    assert not np.any(gaussian.b)
    both = draw(layout, r=50, init_lora_weights=False)["layers/attn/q/kernel"]
    np.testing.assert_allclose(np.abs(both.b).max(), 1 / np.sqrt(50), rtol=0.01)
    assert np.array_equal(draw(layout, r=50)["layers/attn/q/kernel"].a, kaiming.a)
    assert not np.array_equal(draw(layout, r=50)["layers/attn/v/kernel"].a, kaiming.a)
    assert not np.array_equal(kaiming.a[0], kaiming.a[1])


def theirs_from(weight, how, r, alpha, rslora=False):
    """(A, B, the base that is left) as peft makes them for a weight [out, in]."""
    import torch

    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = torch.tensor(weight)
    model = torch.nn.ModuleDict({"q_proj": linear})
    config = peft.LoraConfig(r=r, lora_alpha=alpha, use_rslora=rslora, init_lora_weights=how, target_modules=["q_proj"])
    layer = peft.get_peft_model(model, config).base_model.model["q_proj"]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return a.detach().numpy(), b.detach().numpy(), layer.base_layer.weight.detach().numpy()


@pytest.mark.parametrize(("how", "rslora"), [("pissa", False), ("pissa", True), ("olora", False)])
def test_starts_from_the_weight_equal_peft(how, rslora):
    """A B, and what is left of the base, as peft has them (singular vectors may differ in sign); and the doubled rank
    that is exported gives the same function over the base as it was."""
    layout = layout_of(24, 36)
    adapter = draw(layout, r=5, lora_alpha=7, use_rslora=rslora, init_lora_weights=how)["layers/attn/q/kernel"]
    w = np.asarray(jax.random.normal(jax.random.key(1), (3, 24, 36)))
    a, b, left = theirs_from(w[1].T, how, 5, 7, rslora)
    np.testing.assert_allclose(np.asarray(adapter.a[1] @ adapter.b[1]), (b @ a).T, atol=2e-5)
    scale = np.asarray(adapter.scale.value)[1]
    np.testing.assert_allclose(w[1] - scale * np.asarray(adapter.a0.value[1] @ adapter.b0.value[1]), left.T, atol=2e-5)

    adapter = adapter.replace(a=adapter.a + 0.1)
    x = np.random.default_rng(0).standard_normal((4, 24)).astype(np.float32)
    y = layer_of(adapter, 1).linear(jnp.asarray(x), jnp.asarray(x @ w[1]), jnp.asarray(w[1]), None)
    config = lora.Config(r=5, lora_alpha=7, use_rslora=rslora, init_lora_weights=how)
    written = lora.Config(**lora.to_config(layout, config, {}))
    tensors = adapter.to_peft(layout.sites[0], 1)
    assert tensors["lora_A.weight"].shape == (10, 24) and written.init_lora_weights is True
    plain = lora.scales(layout.sites[0], (10, 10, 10), written)[0]
    product = (tensors["lora_B.weight"] @ tensors["lora_A.weight"]).T
    reference.close(np.asarray(y), x @ (w[1] + plain * product), 1e-5)
    reference.close(np.asarray(layer_of(adapter, 1).merged(jnp.asarray(w[1]))), w[1] + plain * product, 1e-5)


def test_pissa_by_subspace_iteration_comes_near_the_whole_one():
    site, scale = layout_of(24, 36).sites[0], np.ones(3, np.float32)
    u, _, v = jnp.linalg.svd(jax.random.normal(jax.random.key(2), (3, 24, 36)), full_matrices=False)
    w = (u * jnp.asarray(0.7 ** np.arange(24.0), jnp.float32)[None, None]) @ v
    near, whole = (
        lora_init.draw(jax.random.key(3), site, (5, 5, 5), scale, how, w) for how in ("pissa_niter_12", "pissa")
    )
    reference.close(np.asarray(near.a @ near.b), np.asarray(whole.a @ whole.b), 1e-2)


@pytest.mark.parametrize("rounds", [1, 3])
def test_loftq_holds_what_nf4_loses(rounds):
    """A B as peft's `loftq_init` makes them (which wants a GPU), of bitsandbytes' own rounding."""
    import bitsandbytes.functional
    import torch
    from peft.utils.loftq_utils import _low_rank_decomposition

    layout = layout_of(64, 96)
    keys = {"r": 5, "lora_alpha": 10, "init_lora_weights": "loftq", "loftq_config": {"loftq_iter": rounds}}
    adapter = draw(layout, **keys)["layers/attn/q/kernel"]
    w = np.asarray(jax.random.normal(jax.random.key(1), (3, 64, 96)))
    weight = torch.tensor(w[2].T.copy())
    left = weight
    for _ in range(rounds):
        packed, state = bitsandbytes.functional.quantize_4bit(left.contiguous(), quant_type="nf4", blocksize=64)
        lost = weight - bitsandbytes.functional.dequantize_4bit(packed, state)
        found = _low_rank_decomposition(lost, 5)
        product = found["L"] @ found["R"]
        left = weight - product
    # What they call A B is scaled by alpha/r here, as all of LoRA is.
    np.testing.assert_allclose(2 * np.asarray(adapter.a[2] @ adapter.b[2]).T, product.numpy(), atol=2e-5)
    written = lora.to_config(layout, lora.Config(**keys), {})
    assert (written["r"], written["lora_alpha"], written["init_lora_weights"]) == (10, 20, True)
    assert adapter.to_peft(layout.sites[0], 2)["lora_A.weight"].shape == (10, 64)


def test_orthogonal_start():
    adapter = draw(layout_of(64, 96), r=16, init_lora_weights="orthogonal")["layers/attn/q/kernel"]
    assert np.abs(adapter.a @ adapter.b).max() < 1e-6
    # A = X Q / 10 with X ~ N(0, 1) of r/2 columns: every entry has variance (r/2) / r / 100.
    for values in (adapter.a, adapter.b):
        np.testing.assert_allclose(np.std(values), np.sqrt(0.5) / 10, rtol=0.1)
    with pytest.raises(UserError, match="even ranks"):
        draw(layout_of(64, 96), r=5, init_lora_weights="orthogonal")


def test_trainable_parameters_of_the_founding_run(shared):
    """LoRA r=8 on all seven projections of Gemma 2 2b trains 10,383,360 values."""
    from jaxtune.hf.base import describe
    from jaxtune.tree import flatten

    config = json.loads((shared / "configs" / "gemma2-2b.config.json").read_text())
    base = describe("gemma2-2b", shared, config, dtype="bfloat16")
    adapters = jax.eval_shape(
        lambda key, flat: lora.init(key, base.layout, lora.Config(r=8, target_modules="all-linear"), Start(flat)),
        jax.random.key(0),
        flatten(nn.unbox(base.abstract)),
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
            ({"use_dora": True}, "has no tensor 'model.layers.0.self_attn.q_proj.lora_magnitude_vector'"),
            ({"use_qalora": True}, "sets use_qalora=True, which jaxtune does not support"),
            ({"lora_bias": True}, "lora_bias"),
            ({"layer_replication": [[0, 2]]}, "layer_replication"),
            ({"trainable_token_indices": [1]}, "has no tensor 'model.embed_tokens.token_adapter"),
            ({"trainable_token_indices": [97]}, "the vocabulary has 97"),
            ({"trainable_token_indices": {"lm_head": [1]}}, "names lm_head"),
            ({"trainable_token_indices": [1, 1]}, "different token ids"),
            ({"init_lora_weights": "pissa"}, "a base that PEFT altered"),
            ({"init_lora_weights": "loftq"}, "a base that PEFT altered"),
            ({"loftq_config": {"loftq_bits": 8}}, "It goes with init_lora_weights='loftq'"),
            ({"init_lora_weights": "eva"}, "init_lora_weights is 'eva'"),
            ({"peft_type": "LORRA"}, "Did you mean `LORA`"),
            ({"lora_alphas": 3}, "does not know. Did you mean `lora_alpha`"),
            ({"r": 0}, "It is an integer from 1"),
            ({"r": "8"}, "It is an integer from 1"),
            ({"r": True}, "It is an integer from 1"),
            ({"r": 4}, r"lora_A.weight has shape \[3, 48\]; rank 4 on this model needs \[4, 48\]"),
            ({"lora_dropout": 1.0}, "lora_dropout"),
            ({"lora_alpha": float("nan")}, "lora_alpha"),
            ({"bias": "some"}, "none, all, lora_only"),
            ({"target_modules": ["q_projj", "v_proj"]}, "8 tensors that its config and this model do not use"),
            ({"target_modules": "(q_proj"}, "no regular expression"),
            ({"target_modules": "q_proj"}, "A string is a regular expression for whole module paths"),
            ({"target_modules": ["q_proj", "v_proj", "input_layernorm"]}, "of kind norm"),
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

    from jaxtune.peft.keys import BOOKKEEPING

    known = {f.name for f in dataclasses.fields(lora.Config)} | set(lora.NEUTRAL) | BOOKKEEPING
    assert {f.name for f in dataclasses.fields(peft.LoraConfig)} <= known
