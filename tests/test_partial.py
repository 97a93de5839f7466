"""Chosen modules of the base trained in place: what moves, what stays, and both forms of the result."""

import dataclasses
import json

import numpy as np
import pytest
import reference
import tiny_run
import torch
import transformers
from safetensors.numpy import load_file
from test_training import Run, config, ragged_rows, torch_loss

import jaxtune
from jaxtune import adapt, train
from jaxtune.config import get_default, to_json
from jaxtune.data.virtual import by_column
from jaxtune.errors import UserError
from jaxtune.hf.base import open_base
from jaxtune.peft import METHODS, partial


def ours_config(**keys):
    c = config(method="partial", r=None, lora_alpha=None, **keys)
    c.optim.update({"learning_rate": 1e-2, "eps": 1e-6, "weight_decay": 0.1})
    return c


@pytest.mark.parametrize(
    ("name", "targets", "chosen"),
    [
        # On a tied model embed_tokens and lm_head are one parameter, in torch as here.
        ("gemma2", ["embed_tokens", "lm_head"], ("embed_tokens",)),
        ("gemma2_untied", ["embed_tokens", "lm_head"], ("embed_tokens", "lm_head")),
        (
            "gemma3",
            r".*layers\.[25]\.(mlp\..*|self_attn\.q_norm)|model.norm",
            ("layers.2.mlp", "layers.5.mlp", "layers.2.self_attn.q_norm", "layers.5.self_attn.q_norm", "model.norm"),
        ),
    ],
)
def test_three_steps_equal_torch(checkpoint, name, targets, chosen):
    """AdamW with decay and clipping: what is chosen moves as in torch, and nothing else moves at all."""
    _, directory = checkpoint(name)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    for parameter, value in model.named_parameters():
        value.requires_grad_(any(part in parameter for part in chosen))
    c = ours_config(target_modules=targets)
    c.optim.max_grad_norm = 0.5
    run = Run(directory, c)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1, eps=1e-6)
    first = dict(run.adapted.trainable) | {k: np.asarray(v) for k, v in run.adapted.trainable.items()}
    for step in range(3):
        rows = ragged_rows(4, seed=step)
        loss = torch_loss(model, rows)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.5)
        optimiser.step()
        assert run.step(rows)["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
    state = {name: value.detach().numpy() for name, value in model.named_parameters()}
    base = open_base(str(directory))
    moved = 0
    for row in base.rows:
        value = run.state.trainable.get(f"params/{row.path}")
        if value is None:
            continue
        for layer, tensor in enumerate(row.names):
            here = np.asarray(value[layer] if row.stacked else value)
            there = state[tensor].T if row.transposed else state[tensor]
            if any(part in tensor for part in chosen):
                np.testing.assert_allclose(here, there, atol=2e-4, err_msg=tensor)
                moved += 1
            else:
                before = first[f"params/{row.path}"]
                np.testing.assert_array_equal(here, before[layer] if row.stacked else before, err_msg=tensor)
    assert moved == len(trained)
    assert all(any(part in n for part in chosen) for n, p in model.named_parameters() if p.requires_grad)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tiny_run.make(tmp_path_factory.mktemp("place"), steps=4)


def run(place, workdir, *settings):
    usual = [
        "peft.method=partial",
        "peft.target_modules=['embed_tokens','lm_head']",
        "train.gradient_accumulation_steps=1",
        "optim.learning_rate=0.02",
        "train.eval_every=0",
        "mesh.fsdp=1",
        "mesh.data=-1",
    ]
    assert train.main(tiny_run.arguments(place, workdir, *usual, *settings)) == 0


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_founding_case_in_both_forms(place, tmp_path, capsys):
    """embed_tokens + lm_head of a tied model: a checkpoint still tied, or a PEFT directory of the same function."""
    run(place, tmp_path / "whole")
    out = capsys.readouterr().out
    assert "partial: 32,768 parameters train, learning rate 0.02" in out and "AutoModelForCausalLM" in out
    settings = json.loads((tmp_path / "whole" / "model" / "config.json").read_text())
    assert settings.get("tie_word_embeddings", True)
    assert "lm_head.weight" not in load_file(tmp_path / "whole" / "model" / "model.safetensors")
    ids, mask = reference.batch()
    whole = jaxtune.load(tmp_path / "whole" / "model").logits(ids, mask)
    assert np.abs(whole - jaxtune.load(place.model).logits(ids, mask)).max() > 1e-2
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "whole" / "model", attn_implementation="eager", dtype="float32"
    )
    reference.close(reference.logits(model, ids, mask), whole)

    run(place, tmp_path / "part", "export.format=adapter")
    reference.close(jaxtune.load(place.model, adapter=tmp_path / "part" / "adapter").logits(ids, mask), whole, 1e-5)
    theirs = reference.with_adapter(place.model, tmp_path / "part" / "adapter")
    reference.close(reference.logits(theirs, ids, mask), whole)


def section(**keys):
    return to_json(get_default())["peft"] | keys


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"method": "partial"}, "Name the modules"),
        ({"method": "partial", "target_modules": ["embed_token"]}, "Did you mean `embed_tokens`"),
        ({"method": "partial", "target_modules": ["q_proj"], "r": 4}, "partial has no such key"),
        ({"method": "full", "target_modules": ["q_proj"]}, "full has no such key. It has: none"),
        ({"method": "partial", "target_modules": "(q_proj"}, "no regular expression"),
    ],
)
def test_refusals(checkpoint, keys, message):
    with pytest.raises(UserError, match=message):
        adapt.check_targets(section(**keys), open_base(str(checkpoint("gemma2")[1])))


def test_some_layers_are_no_module_to_save(checkpoint):
    base = open_base(str(checkpoint("gemma2")[1]))
    layers = partial.plan(base.layout, partial.Config(target_modules=r".*layers\.1\.mlp\.up_proj"))
    assert layers == {"layers/mlp/up/kernel": (False, True, False, False)}
    with pytest.raises(UserError, match="Only some layers of layers/mlp/up/kernel"):
        partial.as_adapters(base.layout, layers, {"layers/mlp/up/kernel": np.zeros(1)})


def test_every_key_of_every_method_is_a_setting():
    """And no setting is nobody's.  Sizes of the model, and what a run keeps to itself, are not for setting."""
    not_set = {"token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules"}
    not_set |= {"tokenizer_name_or_path", "tokenizer_kwargs", "use_effective_conv2d"}
    keys = {f.name for m in METHODS.values() for f in dataclasses.fields(m.Config)} - not_set
    settings = set(get_default().peft) - {"method", "init_from"}
    assert keys ^ settings == set()


@pytest.mark.parametrize("name", [*METHODS, "full"])
def test_a_method_by_its_name_alone_is_a_sensible_run(checkpoint, name):
    """Nothing else has to be set: targets, sizes and a learning rate are there."""
    base = open_base(str(checkpoint("gemma3")[1]))
    adapt.check_targets(section(method=name), base)
    assert 1e-5 < adapt.learning_rate(section(method=name)) < 1
    by_column(adapt.virtual_tokens(section(method=name), base), None)
