"""AdaLoRA beside peft's own rank allocator: the same ranks given up at the same steps, and files without them."""

import json

import jax
import numpy as np
import peft
import pytest
import reference
import torch
import transformers
from safetensors.numpy import load_file
from test_training import Run, config, ragged_rows, torch_loss

import jaxtune
from jaxtune import tree
from jaxtune.errors import UserError
from jaxtune.hf.adapters import save_adapter
from jaxtune.hf.base import open_base
from jaxtune.peft import adalora
from jaxtune.peft.method import Start, from_variables, layer_of

# peft warns of its own ragged files: keys of rank_pattern that it does not know, tensors without rows.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

STEPS = 14
KEYS = {"init_r": 5, "target_r": 2, "tinit": 2, "tfinal": 3, "deltaT": 2, "total_step": STEPS, "lora_alpha": 6}
TARGETS = ["q_proj", "down_proj", "o_proj"]


def ours_config():
    c = config(method="adalora", r=None, lora_alpha=None, target_modules=None)
    c.optim.update({"learning_rate": 2e-2, "eps": 1e-6, "max_grad_norm": 1.0})
    return c


@pytest.fixture(scope="module")
def trained(checkpoint, tmp_path_factory):
    """(the checkpoint's directory, peft's model, our run, losses of both), after the same steps from the same start."""
    _, directory = checkpoint("gemma2")
    base = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    torch.manual_seed(0)
    model = peft.get_peft_model(base, peft.AdaLoraConfig(task_type="CAUSAL_LM", target_modules=TARGETS, **KEYS))
    first = tmp_path_factory.mktemp("first")
    model.save_pretrained(first)
    ours = Run(directory, ours_config(), init_from=str(first))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=2e-2, weight_decay=0.0, eps=1e-6)
    model.train()
    losses = []
    for step in range(STEPS):
        rows = ragged_rows(5, seed=step)
        loss = torch_loss(model, rows)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        model.base_model.update_and_allocate(step)
        penalty = float(ours.adapted.penalty()(ours.state.trainable, ours.adapted.frozen))
        losses.append((ours.step(rows)["loss"] + penalty, float(loss.detach())))
    return directory, model, ours, losses


def save(directory, run, where):
    base = open_base(str(directory))
    save_adapter(where, run.adapted.variables(run.state.trainable), base.layout, run.adapted.peft, str(directory))
    return json.loads((where / "adapter_config.json").read_text()), load_file(where / "adapter_model.safetensors")


def test_steps_and_ranks_equal_pefts(trained, tmp_path):
    directory, model, ours, losses = trained
    np.testing.assert_allclose(*zip(*losses, strict=True), rtol=2e-4)
    # It moved: had nothing been given up or learnt, the comparison would be empty.
    assert losses[-1] != losses[0]

    settings, tensors = save(directory, ours, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    theirs = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    assert settings["rank_pattern"] == theirs["rank_pattern"]
    kept = [sum(pattern) for pattern in settings["rank_pattern"].values()]
    assert sum(kept) == KEYS["target_r"] * len(kept) and len(set(kept)) > 1
    wanted = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert tensors.keys() == wanted.keys()
    for name, value in wanted.items():
        assert tensors[name].shape == value.shape, name
    for side in ("lora_A", "lora_E", "lora_B"):
        a, b = (np.concatenate([t[n].ravel() for n in sorted(wanted) if side in n]) for t in (tensors, wanted))
        assert np.linalg.norm(a - b) <= 1e-3 * np.linalg.norm(b), side


def test_ragged_export_loads_in_peft_and_here(trained, tmp_path):
    directory, _, ours, _ = trained
    save(directory, ours, tmp_path / "ours")
    ids, mask = reference.batch()
    theirs = reference.logits(reference.with_adapter(directory, tmp_path / "ours"), ids, mask)
    lm = jaxtune.load(directory, adapter=tmp_path / "ours")
    reference.close(lm.logits(ids, mask), theirs)
    lm.save_adapter(tmp_path / "again")
    first, again = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "again"))
    assert {k: v.tobytes() for k, v in first.items()} == {k: v.tobytes() for k, v in again.items()}


def test_a_module_without_ranks(trained, tmp_path):
    """Zero-row tensors, as peft writes them where every rank of a module is given up."""
    directory, _, ours, _ = trained
    name = "adapters/layers/attn/q/kernel/e"
    trainable = ours.state.trainable | {name: ours.state.trainable[name].at[1].set(0.0)}
    base = open_base(str(directory))
    save_adapter(tmp_path / "ours", ours.adapted.variables(trainable), base.layout, ours.adapted.peft, "x")
    tensors = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    module = "base_model.model.model.layers.1.self_attn.q_proj"
    assert tensors[f"{module}.lora_A"].shape == (0, 48) and tensors[f"{module}.lora_B"].shape == (80, 0)
    ids, mask = reference.batch()
    lm = jaxtune.load(directory, adapter=tmp_path / "ours")
    theirs = reference.logits(reference.with_adapter(directory, tmp_path / "ours"), ids, mask)
    reference.close(lm.logits(ids, mask), theirs)


@pytest.mark.parametrize("keys", [{}, {"layers_to_transform": [0, 2], "lora_alpha": 3, "init_r": 4, "target_r": 3}])
def test_random_weights_equal_peft(checkpoint, tmp_path, keys):
    _, directory = checkpoint("gemma3")
    base = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    asked = peft.AdaLoraConfig(task_type="CAUSAL_LM", target_modules=TARGETS, total_step=10, **keys)
    model = reference.adapt(base, asked, tmp_path / "theirs")
    ids, mask = reference.batch()
    expected = reference.logits(model, ids, mask)
    lm = jaxtune.load(directory, adapter=tmp_path / "theirs")
    reference.close(lm.logits(ids, mask), expected)
    lm.save_adapter(tmp_path / "ours")
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert {k: v.tobytes() for k, v in ours.items()} == {k: v.tobytes() for k, v in theirs.items()}
    reference.close(reference.logits(reference.with_adapter(directory, tmp_path / "ours"), ids, mask), expected, 1e-6)

    # Folded into the weights: peft's own merge.
    merged = model.merge_and_unload().state_dict()
    adapters, weights = from_variables(lm.variables), tree.flatten(lm.variables["params"])
    for path, adapter in adapters.items():
        for layer, module in enumerate(lm.base.layout.site(path).modules):
            whole = np.asarray(layer_of(adapter, layer).merged(weights[path][layer]))
            np.testing.assert_allclose(whole.T, merged[f"{module}.weight"].numpy(), atol=1e-5)


def test_initial_distributions(checkpoint):
    base = open_base(str(checkpoint("gemma2")[1]))
    asked = adalora.Config(init_r=24, target_modules="all-linear", layers_to_transform=[1, 2])
    made = adalora.init(jax.random.key(0), base.layout, asked, Start({}))["layers/mlp/up/kernel"]
    assert not made.e.value.any() and not made.a.value[0].any()
    for values in (made.a.value[1:3], made.b.value[1:3]):
        np.testing.assert_allclose(np.std(values), 0.02, rtol=0.03)
        assert abs(np.mean(values)) < 1e-3


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"tinit": 5, "tfinal": 5, "total_step": 10}, "leave no step of 10"),
        ({"target_r": 13}, "target_r is 13"),
        ({"beta1": 1.0}, "beta1"),
        ({"deltaT": 0}, "deltaT"),
    ],
)
def test_refusals(keys, message):
    with pytest.raises(ValueError, match=message):
        adalora.Config(**keys)


def test_a_run_too_short_for_its_schedule(checkpoint):
    c = ours_config()
    c.peft.update({"tinit": 60, "tfinal": 60, "target_modules": "all-linear"})
    with pytest.raises(UserError, match="leave no step of 100"):
        Run(checkpoint("gemma2")[1], c)


def test_every_key_of_the_installed_peft_is_known():
    import dataclasses

    from jaxtune.peft.keys import BOOKKEEPING

    known = {f.name for f in dataclasses.fields(adalora.Config)} | set(adalora.NEUTRAL) | BOOKKEEPING
    assert {f.name for f in dataclasses.fields(peft.AdaLoraConfig)} <= known
