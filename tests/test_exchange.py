"""An adapter goes from torch_gpu to jaxtune and back, over one NF4 base: no step in the loss, the same logits."""

import json
import shutil

import numpy as np
import peft
import pytest
import reference
import tiny_run
from test_qlora import NF4_BITS, bits
from test_torch_gpu_train import RECIPE, TINY, quick, words

import jaxtune
import jaxtune.train
from jaxtune import adapt
from jaxtune.config import ASSETS, get_default, to_json
from jaxtune.hf.base import open_base
from jaxtune.quant import scheme_of
from torch_gpu import train

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

METHODS = {
    "lora": ["peft.r=3", "peft.lora_alpha=7.0", "peft.lora_dropout=0.1"],
    "p_tuning": ["peft.num_virtual_tokens=5", "peft.encoder_hidden_size=32"],
    "ia3": [],
    "prefix_tuning": ["peft.num_virtual_tokens=4"],
}
# Prompts and prefixes move at these, and hardly at LoRA's.
RATES = {"prompt_tuning": 0.05, "prefix_tuning": 0.3}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    root = tmp_path_factory.mktemp("recipe")
    for name, rows in (("train", 60), ("eval", 10)):
        lines = (ASSETS / "quickstart" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:rows]
        (root / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    paths = {name: str(root / f"{name}.jsonl") for name in ("train", "eval")}
    (root / "recipe.py").write_text(RECIPE.format(model=str(TINY), **paths))
    return root / "recipe.py"


@pytest.mark.parametrize("name", quick(METHODS, "lora", "p_tuning"))
def test_begun_on_a_gpu_and_continued_on_both(name, recipe, tmp_path):
    """torch_gpu, jaxtune, torch_gpu: three runs of four steps, each from the adapter that the last one left."""
    common = ["model.quant=nf4", "train.steps=4", "train.eval_every=0", "train.save_every=9", "optim.warmup_steps=0"]
    common += ["train.gradient_accumulation_steps=1"] + ["peft.target_modules=none"] * (name != "lora")
    ids = np.random.default_rng(0).integers(3, 2000, (2, 12))
    before, curve = None, []
    for number, main in enumerate((train.main, jaxtune.train.main, train.main)):
        method = "prompt_tuning" if before and name == "p_tuning" else name  # the file has no encoder
        keys = [*common, f"peft.method={method}", f"train.seed={number}"]
        keys += [f"peft.init_from={before}"] if before else METHODS[name]
        keys += [f"optim.learning_rate={RATES[method]}"] if method in RATES else []
        assert main(words(recipe, tmp_path / str(number), *keys)) == 0
        losses = [row["eval_loss"] for row in tiny_run.metrics(tmp_path / str(number)) if "eval_loss" in row]
        assert len(losses) == 2
        if curve:
            assert losses[0] == pytest.approx(curve[-1][-1], rel=1e-4)
        curve.append(losses)
        assert "WARNING" not in (tmp_path / str(number) / "log.txt").read_text()
        before = tmp_path / str(number) / "adapter"
        model = peft.PeftModel.from_pretrained(bits(TINY, **NF4_BITS), before).eval()
        expected = reference.logits(model, ids)[:, -12:]
        reference.close(jaxtune.load(TINY, adapter=before, quant="nf4").logits(ids), expected)
    print(name, [[round(loss, 4) for loss in losses] for losses in curve])
    # Each run trained; four steps of a prompt are too few to see which way.
    assert all(abs(last - first) > 1e-3 for first, last in curve)
    assert name != "lora" or curve[0][0] > curve[1][0] > curve[2][0] > curve[2][1]


def test_what_is_handed_over_wrongly_is_named(recipe, tmp_path):
    """Another base, another quantisation, other targets and settings: by both sides, in the same words."""
    made = ["model.quant=nf4", "train.steps=1", "peft.r=3", "peft.target_modules=('q_proj','v_proj')", "data.eval=none"]
    assert train.main(words(recipe, tmp_path / "made", *made, "optim.warmup_steps=0")) == 0
    adapter = tmp_path / "made" / "adapter"
    assert json.loads((adapter / "jaxtune.json").read_text())["base"]["quant"] == "nf4"
    shutil.copytree(TINY, tmp_path / "other")
    path = tmp_path / "other" / "model.safetensors"
    tensors = reference.load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    reference.save_file(tensors, path, metadata={"format": "pt"})

    c = get_default()
    c.peft.update({"init_from": str(adapter), "r": 3})
    same = open_base(str(TINY), quant=scheme_of("nf4"))
    assert adapt.handed_over(to_json(c)["peft"], same) == []
    c.peft.update({"r": 4, "target_modules": "all-linear"})
    lines = adapt.handed_over(to_json(c)["peft"], open_base(str(tmp_path / "other")))
    expected = [
        "its base was another: other weights, or the same ones saved in another way",
        "its base was quantised (quant=nf4), and is not quantised now. Over the same one it computes what was trained",
        "it adapts q_proj, v_proj, and the config asks for down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, "
        "v_proj: its own targets stand",
        "its r is 3, and `peft.r` 4: its own stands",
    ]
    assert lines == expected
    wrong = [f"model.id={tmp_path / 'other'}", "train.steps=1", f"peft.init_from={adapter}", "peft.r=4"]
    assert train.main(words(recipe, tmp_path / "wrong", *wrong, "data.eval=none", "optim.warmup_steps=0")) == 0
    said = (tmp_path / "wrong" / "log.txt").read_text()
    for line in expected:
        assert f"WARNING: {adapter}: {line}" in said
