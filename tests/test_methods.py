"""Every method but LoRA beside the installed peft: files both ways, merging, first values, and steps of training."""

import dataclasses
import json
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import reference
import torch
import transformers
from safetensors.numpy import load_file, save_file
from test_training import Run, config, ragged_rows, torch_loss

import jaxtune
from jaxtune import tree
from jaxtune.errors import UserError
from jaxtune.hf.adapters import adapter_tensors, save_adapter
from jaxtune.hf.base import open_base
from jaxtune.layers import matmul
from jaxtune.lm import forward_logits
from jaxtune.peft import BY_PEFT_TYPE, METHODS
from jaxtune.peft.keys import BOOKKEEPING, read_config
from jaxtune.peft.method import Layout, Site, Start, from_variables, layer_of, to_variables

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # peft's own, about sizes it adjusts and saves

CONFIGS = {
    "ia3": peft.IA3Config,
    "loha": peft.LoHaConfig,
    "lokr": peft.LoKrConfig,
    "ln_tuning": peft.LNTuningConfig,
    "oft": peft.OFTConfig,
    "boft": peft.BOFTConfig,
    "vera": peft.VeraConfig,
    "randlora": peft.RandLoraConfig,
}

# case: (model, peft's keys); the method is what stands before the first dot.
CASES = {
    "ia3.default": ("gemma2", {}),
    "ia3.regex": ("gemma3", {"target_modules": r".*[135]\.(mlp|self_attn)\..*_proj", "feedforward_modules": ".*_proj"}),
    "loha.default": ("gemma2", {"r": 3}),
    "loha.patterns": (
        "gemma3",
        {
            "r": 4,
            "alpha": 9,
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 7, r"layers\.1\.mlp\..*": 2},
            "alpha_pattern": {"down_proj": 31},
        },
    ),
    "loha.layers": ("gemma2_untied", {"r": 9, "target_modules": ["v_proj", "up_proj"], "layers_to_transform": [1, 2]}),
    "lokr.default": ("gemma2", {"r": 3, "alpha": 5, "target_modules": "all-linear"}),
    "lokr.both": ("gemma3", {"r": 2, "target_modules": ["k_proj", "down_proj"], "decompose_both": True}),
    "lokr.full": ("gemma", {"r": 64, "alpha": 40, "target_modules": "all-linear", "decompose_factor": 16}),
    "lokr.patterns": (
        "gemma2",
        {
            "r": 2,
            "target_modules": ["q_proj", "gate_proj"],
            "decompose_factor": 4,
            "rank_pattern": {"layers.2.self_attn.q_proj": 3},
            "layers_to_transform": [0, 2],
        },
    ),
    "ln_tuning.default": ("gemma2", {}),
    "ln_tuning.gemma3": ("gemma3", {}),
    "ln_tuning.regex": ("gemma", {"target_modules": r".*layers\.[13]\.input_layernorm"}),
    "oft.default": ("gemma2", {}),  # 48 inputs: blocks of 24 or 48, not 32
    "oft.exact": ("gemma3", {"r": 4, "oft_block_size": 0, "use_cayley_neumann": False}),
    "oft.shared": (
        "gemma2_untied",
        {
            "oft_block_size": 8,
            "block_share": True,
            "num_cayley_neumann_terms": 7,
            "target_modules": ["q_proj", "down_proj"],
            "layers_to_transform": [1, 2],
        },
    ),
    "oft.coft": ("gemma2", {"oft_block_size": 4, "coft": True, "eps": 0.9, "target_modules": ["o_proj", "up_proj"]}),
    "boft.default": ("gemma2", {}),
    "boft.number": ("gemma3", {"boft_block_size": 0, "boft_block_num": 8, "target_modules": ["k_proj", "down_proj"]}),
    "boft.butterfly": (
        "gemma2_untied",
        {
            "boft_block_size": 6,
            "boft_n_butterfly_factor": 3,
            "target_modules": ["q_proj", "gate_proj"],
            "layers_to_transform": [0, 3],
        },
    ),
    "vera.default": ("gemma2", {}),
    "vera.all": ("gemma3", {"r": 5, "target_modules": "all-linear", "projection_prng_key": 7}),
    "vera.layers": ("gemma2_untied", {"r": 3, "target_modules": ["up_proj", "o_proj"], "layers_to_transform": [1, 2]}),
    "randlora.default": ("gemma2", {}),
    "randlora.all": ("gemma3", {"r": 7, "randlora_alpha": 21, "target_modules": "all-linear"}),
    "randlora.sparse": (
        "gemma2_untied",
        {"r": 5, "sparse": True, "target_modules": ["gate_proj", "o_proj"], "layers_to_transform": [0, 2]},
    ),
}


def method_of(case):
    return case.split(".")[0]


class Blocks:
    """Stands for peft's CUDA extension, without which its BOFT makes no more than one factor."""

    @staticmethod
    def forward(blocks):
        return [torch.stack([torch.block_diag(*factor) for factor in blocks])]

    @staticmethod
    def backward(grad, blocks):
        size = blocks.shape[-1]
        parts = [grad[:, i * size : (i + 1) * size, i * size : (i + 1) * size] for i in range(blocks.shape[1])]
        return [torch.stack(parts, dim=1)]


@pytest.fixture(scope="module", autouse=True)
def extension():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("peft.tuners.boft.layer._FBD_CUDA", Blocks)
        yield


@pytest.fixture(scope="module")
def adapted(checkpoint, tmp_path_factory):
    """case -> (peft model with random weights, checkpoint directory, adapter directory), made once."""
    made = {}

    def get(case):
        if case not in made:
            name, keys = CASES[case]
            _, directory = checkpoint(name)
            base = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
            where = tmp_path_factory.mktemp(case)
            made[case] = (
                reference.adapt(base, CONFIGS[method_of(case)](task_type="CAUSAL_LM", **keys), where),
                directory,
                where,
            )
        return made[case]

    return get


def save(lm, directory):
    """As `lm.save_adapter`, without its run of the model, which takes a while to compile."""
    save_adapter(directory, lm.variables, lm.base.layout, lm.peft, str(lm.base.directory))


@jax.jit
def merged_layer(adapter, w, layer):
    return layer_of(adapter, layer).merged(w[layer])


def merged_params(lm):
    """The base's parameters with every adapter folded in, layer by layer."""
    flat = tree.flatten(lm.variables["params"])
    for path, adapter in from_variables(lm.variables).items():
        w = flat[path]
        if lm.base.layout.site(path).stacked:
            flat[path] = jnp.stack([merged_layer(adapter, w, jnp.int32(layer)) for layer in range(len(w))])
        else:
            flat[path] = adapter.merged(w)
    return tree.unflatten(lm.variables["params"], flat)


@pytest.mark.parametrize("case", list(CASES))
def test_files_and_merge_equal_pefts(adapted, tmp_path, case):
    model, directory, adapter = adapted(case)
    ids, mask = reference.batch()
    expected = reference.logits(model, ids, mask)
    lm = jaxtune.load(directory, adapter=adapter)
    reference.close(lm.logits(ids, mask), expected)

    params = merged_params(lm)
    segments, tokens = mask.astype(np.int32), ids.astype(np.int32)
    with jax.set_mesh(lm.mesh):
        base, merged = (
            np.asarray(forward_logits(lm.base.model, {"params": p}, tokens, segments))
            for p in (lm.variables["params"], params)
        )
    assert np.abs(expected - base).max() > 1e-2 * np.abs(base).max()  # the adapter shows
    reference.close(merged, expected)

    save(lm, tmp_path / "out")
    ours, theirs = (load_file(d / "adapter_model.safetensors") for d in (tmp_path / "out", adapter))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)
    again = reference.with_adapter(directory, tmp_path / "out")
    reference.close(reference.logits(again, ids, mask), expected, 1e-6)

    # The merged weights themselves, tensor by tensor.
    whole = {name: value.numpy() for name, value in again.merge_and_unload().state_dict().items()}
    flat = tree.flatten(params)
    for row in lm.base.rows:
        values = np.asarray(flat[row.path]) if row.stacked else np.asarray(flat[row.path])[None]
        for name, value in zip(row.names, values, strict=True):
            reference.close(value.T if row.transposed else value, whole[name], 1e-5)


# One configuration a method whose layers do not all have an adapter, to train.
TRAINED = {
    "ia3": {"target_modules": r".*layers\.[13]\..*(k_proj|down_proj)"},
    "loha": {"r": 3, "alpha": 5, "target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 2]},
    "lokr": {
        "r": 2,
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"layers.0.mlp.down_proj": 3},
        "layers_to_transform": [0, 2],
    },
    "ln_tuning": {"target_modules": r".*layers\.[13]\.(post_attention|pre_feedforward)_layernorm"},
    "oft": {"oft_block_size": 8, "target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 2]},
    "oft.coft": {"coft": True, "eps": 0.5, "target_modules": ["v_proj"], "layers_to_transform": [0, 2]},
    "boft": {"boft_n_butterfly_factor": 2, "target_modules": ["q_proj"], "layers_to_transform": [0, 2]},
    "vera": {"r": 6, "target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 2]},
    "randlora": {"r": 5, "target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 2]},
}


@pytest.mark.parametrize("case", list(TRAINED))
def test_two_steps_equal_pefts(checkpoint, tmp_path, case):
    """AdamW from the same random adapter: losses, gradient norms and the adapter after two steps; what trains has
    moved, and layers without an adapter have not."""
    _, directory = checkpoint("gemma2")
    base = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    name, keys = method_of(case), TRAINED[case]
    model = reference.adapt(base, CONFIGS[name](task_type="CAUSAL_LM", **keys), tmp_path / "first")
    # eps as in test_thirty_steps_equal_peft.
    c = config(method=name, r=None, lora_alpha=None, target_modules=None)
    c.optim.update({"learning_rate": 3e-3, "eps": 1e-6})
    ours = Run(directory, c, init_from=str(tmp_path / "first"))
    first = {path: np.asarray(x) for path, x in ours.state.trainable.items()}
    optimiser = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=3e-3, weight_decay=0.0, eps=1e-6
    )
    model.train()
    for step in range(2):
        rows = ragged_rows(4, seed=step)
        loss = torch_loss(model, rows)
        optimiser.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        optimiser.step()
        metrics = ours.step(rows)
        assert metrics["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
        assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-3)

    layout = open_base(str(directory)).layout
    adapters = from_variables(ours.adapted.variables(ours.state.trainable))
    tensors = adapter_tensors(adapters, layout)
    final = {n.replace(".default", ""): p.detach().numpy() for n, p in model.named_parameters() if p.requires_grad}
    assert final.keys() <= tensors.keys()
    before = load_file(tmp_path / "first" / "adapter_model.safetensors")
    for key, value in final.items():
        step = value - before[key]
        assert np.linalg.norm(tensors[key] - value) <= 1e-3 * np.linalg.norm(step), key
        # All that can move does (BOFT's diagonals cannot).
        assert np.mean(step != 0) >= 0.75 and np.mean((tensors[key] != before[key]) == (step != 0)) > 0.99, key

    # What a layer without an adapter has in a stack has not moved.
    for path, adapter in adapters.items():
        for layer in range(len(layout.site(path).modules)):
            if not adapter.to_peft(layout.site(path), layer):
                parts = {p: x for p, x in first.items() if p.startswith(f"adapters/{path}/")}
                assert parts
                for p, x in parts.items():
                    np.testing.assert_array_equal(np.asarray(ours.state.trainable[p])[layer], x[layer], err_msg=p)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_nothing_changes_at_first(checkpoint, name):
    """A fresh adapter leaves the base's logits as they are, in the layers that have one and in the others."""
    lm = jaxtune.load(checkpoint("gemma2")[1])
    method, layout = METHODS[name], lm.base.layout
    settings = read_config(method.Config, TRAINED[name], method.NEUTRAL, "test")
    start = Start(tree.flatten(lm.variables["params"]))
    fresh = jax.jit(lambda key: nn.unbox(to_variables(method.init(key, layout, settings, start))))
    ids, mask = reference.batch()
    expected = lm.logits(ids, mask)
    lm.variables |= fresh(jax.random.key(0))
    reference.close(lm.logits(ids, mask), expected, 1e-6)


def layout_of(rows, columns):
    modules = tuple(f"model.layers.{i}.self_attn.q_proj" for i in range(3))
    site = Site("layers/attn/q/kernel", modules, (3, rows, columns), ("layers", "embed", "heads"), "linear")
    return Layout("gemma2", (site,), True, 8.0, 97, rows, 3, 4, 2, 24)


def first_values(name, rows, columns, **keys):
    """({suffix: our first values of a middle layer}, {suffix: peft's}) of a q_proj [out, in] of that size."""
    layout, method = layout_of(rows, columns), METHODS[name]
    start = Start({site.path: jax.random.normal(jax.random.key(1), site.shape) for site in layout.sites})
    settings = read_config(method.Config, keys | {"target_modules": ["q_proj"]}, method.NEUTRAL, "test")
    adapters = jax.jit(lambda key: nn.unbox(method.init(key, layout, settings, start)))(jax.random.key(0))
    tensors = adapter_tensors(adapters, layout)
    ours = {n.removeprefix("base_model.model.model.layers.1.self_attn.q_proj."): v for n, v in tensors.items()}
    model = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(rows, columns, bias=False)})
    model = peft.get_peft_model(model, CONFIGS[name](target_modules=["q_proj"], **keys))
    theirs = peft.get_peft_model_state_dict(model)
    theirs = {n.removeprefix("base_model.model.q_proj."): v.numpy() for n, v in theirs.items()}
    assert theirs.keys() <= ours.keys()
    return {name: ours[name] for name in theirs}, theirs


DRAWS = {
    "ia3.ones": {"feedforward_modules": []},
    "ia3.random": {"init_ia3_weights": False, "feedforward_modules": ["q_proj"]},
    "loha.zero": {"r": 24},
    "loha.random": {"r": 24, "init_weights": False},
    "lokr.zero": {"r": 5},
    "lokr.random": {"r": 5, "init_weights": False, "decompose_factor": 10, "decompose_both": True},
    "lokr.lycoris": {"r": 5, "init_weights": "lycoris"},
    "lokr.full": {"r": 64, "init_weights": "lycoris"},
    "oft.zero": {},
    "oft.random": {"oft_block_size": 8, "init_weights": False},
    "boft.zero": {},
    "boft.random": {"init_weights": False},
    "vera.zero": {},
    "vera.random": {"r": 64, "init_weights": False},
    "randlora.zero": {"r": 24},
    "randlora.random": {"r": 50, "init_weights": False},
    "randlora.sparse": {"r": 24, "sparse": True},
    "randlora.very_sparse": {"r": 24, "very_sparse": True},
}


@pytest.mark.parametrize("draw", list(DRAWS))
def test_first_values_are_drawn_as_pefts(draw):
    """The same zeros, the same spread and the same bounds; the samples are small, and so is the trust in them."""
    torch.manual_seed(0)
    ours, theirs = first_values(method_of(draw), 240, 360, **DRAWS[draw])
    for name, value in theirs.items():
        assert ours[name].shape == value.shape, name
        if np.ptp(value) == 0:
            np.testing.assert_array_equal(ours[name], value, err_msg=name)
            continue
        error = 6 / np.sqrt(value.size)
        np.testing.assert_allclose(ours[name].std(), value.std(), rtol=error, err_msg=name)
        np.testing.assert_allclose(ours[name].mean(), value.mean(), atol=error * value.std(), err_msg=name)
        if np.abs(value).max() < 2 * value.std():  # uniform: its bounds are sharp
            np.testing.assert_allclose(np.abs(ours[name]).max(), np.abs(value).max(), rtol=error, err_msg=name)


# ---------------------------------------------------------------- one layer


def random_layer(name, **keys):
    """(adapter, x [N, in], w [in, out]) of one layer, the adapter fresh and random."""
    layout, method = layout_of(48, 40), METHODS[name]
    settings = read_config(method.Config, keys | {"target_modules": ["q_proj"]}, method.NEUTRAL, "test")
    adapters = jax.jit(lambda key: nn.unbox(method.init(key, layout, settings, Start({}))))(jax.random.key(0))
    x, w = jax.random.normal(jax.random.key(2), (5, 48)), jax.random.normal(jax.random.key(1), (48, 40))
    return layer_of(adapters["layers/attn/q/kernel"], 1), x, w


def outputs(name, draws, **keys):
    """(without dropout, with it [draws, N, out], the base's own) of one layer."""
    adapter, x, w = random_layer(name, **keys, init_weights=False)
    y, rngs = x @ w, jax.random.split(jax.random.key(3), draws)
    many = jax.jit(jax.vmap(lambda rng: adapter.linear(x, y, w, rng)))(rngs)
    return np.asarray(adapter.linear(x, y, w, None)), np.asarray(many), np.asarray(y)


@pytest.mark.parametrize("name", sorted(set(CONFIGS) - {"ln_tuning"}))
def test_activations_in_bfloat16(name):
    """The products are made in bfloat16, what trains stays float32, and both XLA and strict promotion allow it."""
    keys = {"init_ia3_weights" if name == "ia3" else "init_weights": False}
    adapter, x, w = random_layer(name, **keys)
    run = jax.jit(lambda x, w: adapter.linear(x, matmul(x, w), w, None))
    half = run(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16))
    assert half.dtype == jnp.float32
    reference.close(np.asarray(half), np.asarray(run(x, w)), 2e-2)


@pytest.mark.parametrize("name", ["loha", "lokr"])
def test_dropout_of_outputs_and_of_modules(name):
    """As peft's LyCORIS layers: what is added loses outputs, the same ones for every row, or all of them at once."""
    full, many, base = outputs(name, 400, r=4, module_dropout=0.25)
    gone = np.abs(many - base).max((1, 2)) == 0
    assert 0.15 < gone.mean() < 0.35
    np.testing.assert_allclose(many[~gone], np.broadcast_to(full, many[~gone].shape), rtol=1e-5, atol=1e-5)

    rescaled = name == "loha"
    full, many, base = outputs(name, 400, r=4, rank_dropout=0.25)
    gone = np.abs(many - base).max(1) == 0  # [draws, out]
    assert 0.22 < gone.mean() < 0.28
    factor = 1 / (1 - gone.mean(1)) if rescaled else np.ones(400)
    expected = np.where(gone[:, None], base, base + factor[:, None, None] * (full - base))
    np.testing.assert_allclose(many, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["vera", "randlora"])
def test_dropout_of_inputs(name):
    """The mean over many draws is what is added without dropout; some draw differs."""
    full, many, base = outputs(name, 4000, r=8, **{f"{name}_dropout": 0.25})
    assert np.abs(many[0] - full).max() > 0.01 * np.abs(full - base).max()
    error = np.abs(many.mean(0) - full).max() / many.std(0).max()
    assert error < 6 / np.sqrt(4000)


@pytest.mark.parametrize(("name", "key"), [("oft", "module_dropout"), ("boft", "boft_dropout")])
def test_dropout_of_blocks(name, key):
    """A fixed share of the blocks, chosen anew, stays unturned."""
    size = {"oft": {"oft_block_size": 8}, "boft": {"boft_block_size": 8}}[name]
    x, drop = jax.random.normal(jax.random.key(1), (6, 8, 8)), METHODS["oft"].drop_blocks
    many = np.asarray(jax.vmap(lambda rng: drop(x, 0.4, rng))(jax.random.split(jax.random.key(0), 300)))
    gone = (many == 0).all((2, 3))
    assert (gone.sum(1) == 2).all() and (np.abs(gone.mean(0) - 1 / 3) < 0.1).all()
    np.testing.assert_array_equal(many[~gone], np.broadcast_to(np.asarray(x), many.shape)[~gone])
    full, many, _ = outputs(name, 12, **size, **{key: 0.4})
    assert all(np.abs(y - full).max() > 1e-3 for y in many) and np.ptp(many, axis=0).max() > 1e-3


def test_every_key_of_the_installed_peft_is_known():
    for name, theirs in CONFIGS.items():
        method = METHODS[name]
        known = {f.name for f in dataclasses.fields(method.Config)} | set(method.NEUTRAL) | BOOKKEEPING
        assert {f.name for f in dataclasses.fields(theirs)} <= known, name
        assert BY_PEFT_TYPE[theirs().peft_type.value] is method
        # Defaults too, where they are values.
        for field in dataclasses.fields(method.Config):
            default = getattr(theirs(), field.name)
            if default not in (None, {}):
                assert getattr(method.Config(), field.name) == default, (name, field.name)


# ---------------------------------------------------------------- refusals

SETTINGS = [
    ("ia3", {"target_modules": ["q_projj"]}, "Did you mean `q_proj`"),
    ("ia3", {"target_modules": ["input_layernorm"]}, "of kind norm"),
    ("ia3", {"target_modules": ["q_proj"], "feedforward_modules": ["v_proj"]}, "must be among target_modules"),
    ("ia3", {"feedforward_modules": "(down"}, "no regular expression"),
    ("ia3", {"feedforward_modules": r".*[12]\.mlp\.down_proj"}, "some layers of layers/mlp/down/kernel and not others"),
    ("ia3", {"fan_in_fan_out": True}, "sets fan_in_fan_out=True"),
    ("loha", {"r": 0}, "r is 0"),
    ("loha", {"rank_dropout": 1.0}, "rank_dropout is 1.0"),
    ("loha", {"lora_alpha": 4}, "does not know"),
    ("lokr", {"init_weights": "other"}, "init_weights is 'other'. It can be: True, False, lycoris"),
    ("lokr", {"decompose_factor": 0}, "decompose_factor is 0"),
    ("lokr", {"r": 2, "rank_pattern": {"layers.1.self_attn.q_proj": 64}}, "different forms .*lokr_w2_b"),
    ("ln_tuning", {"target_modules": ["q_proj"]}, "This method adapts: norm"),
    ("oft", {"r": 4}, "r is 4 and oft_block_size is 32"),
    ("oft", {"r": 48, "oft_block_size": 0}, "r=48 divides the 48 inputs of layers/attn/q/kernel into blocks of 1"),
    ("oft", {"target_modules": ["lm_head"]}, "of kind head"),
    ("boft", {"boft_block_size": 0}, "boft_block_size is 0 and boft_block_num is 0"),
    ("boft", {"boft_block_size": 5}, "boft_block_size=5 does not divide the 48 inputs"),
    ("boft", {"boft_block_size": 16, "boft_n_butterfly_factor": 2}, "has 3 blocks of 16"),
    ("vera", {"save_projection": False}, "torch's generator, which cannot be reproduced"),
    ("randlora", {"save_projection": False}, "torch's generator, which cannot be reproduced"),
]


@pytest.mark.parametrize(("name", "keys", "message"), SETTINGS)
def test_settings_are_refused_by_name(checkpoint, name, keys, message):
    method, layout = METHODS[name], open_base(str(checkpoint("gemma2")[1])).layout
    with pytest.raises(UserError, match=message):
        method.plan(layout, read_config(method.Config, keys, method.NEUTRAL, "`config.peft`"))


FILES = [
    ("ia3.default", "layers.2.self_attn.v_proj.ia3_l"),
    ("loha.default", "layers.1.self_attn.q_proj.hada_w2_a"),
    ("lokr.default", "layers.3.mlp.up_proj.lokr_w1"),
    ("ln_tuning.default", "model.norm.ln_tuning_layers.weight"),
    ("oft.default", "layers.0.self_attn.q_proj.oft_R.weight"),
    ("boft.default", "layers.0.self_attn.q_proj.boft_s"),
    ("vera.default", "base_model.vera_B"),
    ("randlora.default", "base_model.randlora_A"),
]


@pytest.mark.parametrize(("case", "tensor"), FILES)
def test_files_that_lack_a_tensor_are_refused(adapted, tmp_path, case, tensor):
    _, directory, adapter = adapted(case)
    shutil.copytree(adapter, tmp_path / "copy")
    path = tmp_path / "copy" / "adapter_model.safetensors"
    tensors = load_file(path)
    (name,) = (n for n in tensors if n.endswith(tensor))
    value = tensors.pop(name)
    save_file(tensors, path)
    with pytest.raises(UserError, match=f"has no tensor '.*{tensor}'"):
        jaxtune.load(directory, adapter=tmp_path / "copy")
    save_file(tensors | {name: np.concatenate([value, value])}, path)
    with pytest.raises(UserError, match=rf"{tensor} has shape \[{2 * value.shape[0]}"):
        jaxtune.load(directory, adapter=tmp_path / "copy")


def test_the_exported_config_is_what_was_read(adapted, tmp_path):
    _, directory, adapter = adapted("lokr.patterns")
    save(jaxtune.load(directory, adapter=adapter), tmp_path / "out")
    ours, theirs = (json.loads((d / "adapter_config.json").read_text()) for d in (tmp_path / "out", adapter))
    for key, value in ours.items():
        if key not in BOOKKEEPING:
            assert sorted(value) == sorted(theirs[key]) if key == "target_modules" else value == theirs[key], key


def test_boft_made_without_the_extension(checkpoint, tmp_path, monkeypatch):
    """peft's config then names more factors than there are."""
    monkeypatch.setattr("peft.tuners.boft.layer._FBD_CUDA", False)
    _, directory = checkpoint("gemma2")
    base = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    settings = peft.BOFTConfig(task_type="CAUSAL_LM", boft_n_butterfly_factor=2)
    expected = reference.logits(reference.adapt(base, settings, tmp_path / "theirs"), *reference.batch())
    lm = jaxtune.load(directory, adapter=tmp_path / "theirs")
    reference.close(lm.logits(*reference.batch()), expected)
    save(lm, tmp_path / "ours")
    assert json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())["boft_n_butterfly_factor"] == 2
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["boft_n_butterfly_factor"] == 1


def test_copies_of_a_randlora_basis(adapted, tmp_path):
    """peft reads a file that holds the bases once, and so is it read here; copies that differ are refused."""
    _, directory, adapter = adapted("randlora.default")
    shutil.copytree(adapter, tmp_path / "copy")
    path = tmp_path / "copy" / "adapter_model.safetensors"
    tensors = load_file(path)
    copies = [n for n in tensors if n.startswith("base_model.model.") and n.endswith(("randlora_A", "randlora_B"))]
    save_file({n: v for n, v in tensors.items() if n not in copies}, path)
    save(jaxtune.load(directory, adapter=tmp_path / "copy"), tmp_path / "out")
    whole = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert whole.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(whole[name], value, err_msg=name)
    save_file(tensors | {copies[0]: tensors[copies[0]] + 1}, path)
    with pytest.raises(UserError, match="damaged, or joined from two"):
        jaxtune.load(directory, adapter=tmp_path / "copy")


@pytest.mark.parametrize("name", ["ia3", "randlora"])
def test_multimodal_names(checkpoint, tmp_path, name):
    """Of tensors, of feed-forward modules and of what belongs to no module, over the multimodal class."""
    _, directory = checkpoint("gemma3_multimodal")
    base = transformers.AutoModelForImageTextToText.from_pretrained(directory, attn_implementation="eager")
    keys = {"feedforward_modules": ".*down_proj"} if name == "ia3" else {"r": 9}
    settings = CONFIGS[name](target_modules=r".*language_model.*(q_proj|down_proj)", **keys)
    ids, _ = reference.batch()
    expected = reference.logits(reference.adapt(base, settings, tmp_path / "theirs"), ids)
    lm = jaxtune.load(directory, adapter=tmp_path / "theirs")
    reference.close(lm.logits(ids), expected)
    save(lm, tmp_path / "ours")
    reference.close(reference.logits(reference.with_adapter(directory, tmp_path / "ours"), ids), expected, 1e-6)
