"""Every recipe of configs/: at full size laid out without a weight, and run whole on a tiny model with real rows."""

import functools
import importlib.util
import json
import os
import runpy
import subprocess
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import pytest
import tiny_run

from jaxtune import config, tree
from jaxtune.adapt import read_method
from jaxtune.hf.base import describe
from jaxtune.peft import partial, saved
from jaxtune.peft.method import Start, is_trainable, to_variables

ROOT = Path(__file__).parents[1]
TOOL = runpy.run_path(str(ROOT / "tools" / "run_recipes.py"))
RECIPES = TOOL["RECIPES"]


class Size(NamedTuple):
    """config: the base's published config.json, as a file of shared/configs or as what it says.  total, trained:
    parameters."""

    config: str | dict[str, Any]
    total: int
    trained: int


GEMMA2 = ("gemma2-2b", 2_614_341_888)
GEMMA = ("gemma-2b", 2_506_172_416)
GEMMA_7B = ({"model_type": "gemma"}, 8_537_680_896)
LLAMA2 = ("llama-2-7b", 6_738_415_616)
FLAN_T5_BASE = (
    {
        "model_type": "t5",
        "d_model": 768,
        "d_ff": 2048,
        "num_heads": 12,
        "num_layers": 12,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    },
    247_577_856,
)

# What trains of Gemma 2 2b is printed by the notebook that these recipes come from (shared/configs); Flan-T5's figure
# is that of its course's notebook; the others are r * (inputs + outputs) over the layers' kernels.
SIZES = {
    "gemma2_persian_p_tuning": Size(*GEMMA2, 654_848),
    "gemma2_persian_qlora": Size(*GEMMA2, 10_383_360),
    "gemma2_persian_embed_head": Size(*GEMMA2, 256_000 * 2304),
    "llama2_persian_qa_lora": Size(*LLAMA2, 39_976_960),
    "llama2_persian_qa_qlora": Size(*LLAMA2, 39_976_960),
    "flan_t5_dialogsum_lora": Size(*FLAN_T5_BASE, 3_538_944),
    "gemma_quotes_lora": Size(*GEMMA, 9_805_824),
    "gemma_quotes_qlora": Size(*GEMMA, 9_805_824),
    "gemma_quotes_fsdp": Size(*GEMMA_7B, 3_211_264),
    "gemma11_sst2_lora": Size(*GEMMA, 4_902_912),
    "gemma11_squad_v2_lora": Size(*GEMMA, 4_902_912),
    "gemma_lora": Size(*GEMMA2, 10_383_360),
}


def load(name: str) -> Any:
    path = ROOT / "configs" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_recipe_is_here():
    there = {path.stem for path in (ROOT / "configs").glob("*.py")}
    assert there == RECIPES.keys() | {"quickstart"} == SIZES.keys() | {"quickstart"}


@pytest.mark.parametrize("name", RECIPES)
def test_docstring_says_how(name):
    """What, data, hardware, what to expect, and a command for each device that it is for."""
    said = load(name).__doc__
    for word in ("What: ", "Data: ", "Hardware: ", "Expect: ", "\nTPU: ", "\nCPU: "):
        assert word in said, word
    assert ("\nGPU: " in said) == ("torch_gpu" in RECIPES[name].stacks)
    assert f"{SIZES[name].trained:,}" in said


@pytest.mark.parametrize("name", RECIPES)
def test_full_size(name, shared):
    """Total and trained parameters of the published model, from shapes alone."""
    size, c = SIZES[name], config.to_json(load(name).get_config())
    source = shared / "configs"
    base_config = size.config
    if isinstance(base_config, str):
        base_config = json.loads((source / f"{base_config}.config.json").read_text())
    base = describe(c["model"]["id"], source, base_config, dtype=c["model"]["dtype"])
    assert tree.count(base.abstract) == size.total
    assert trained(c["peft"], base) == size.trained


def trained(section: dict[str, Any], base: Any) -> int:
    """Parameters that train under a `peft` section, without making one."""
    method, settings = read_method(section)
    leaves = tree.flatten(nn.unbox(base.abstract))
    if method is None:
        return sum(leaves[path].size for path in partial.plan(base.layout, settings))

    def init(key, params):
        start = Start(params, lambda text: [0], MappingProxyType({}))
        whole = saved.init(saved.choose(base.sites, settings.modules_to_save), start)
        return nn.unbox(to_variables(method.init(key, base.layout, settings, start) | whole))

    made = jax.eval_shape(init, jax.random.key(0), leaves)["adapters"]
    return sum(leaf.size for path, leaf in tree.flatten(made).items() if is_trainable(path))


# ---------------------------------------------------------------- Runs


@pytest.fixture(scope="session")
def tiny(shared, tmp_path_factory):
    """tiny("llama") -> a checkpoint of a few million parameters under the family's real tokenizer."""
    root = tmp_path_factory.mktemp("recipes")
    return functools.cache(lambda family: TOOL["tiny_model"](family, shared / "tokenizers", root / family))


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_runs(name, shared, tiny, tmp_path):
    """The recipe as it stands but for its model, its rows and the length of its answers."""
    recipe, c = RECIPES[name], load(name).get_config()
    batch = c.train.global_batch_size
    rows = shared / recipe.rows
    settings = {
        "model__id": tiny(recipe.tiny),
        "model__dtype": "float32",
        "data__train": TOOL["some_rows"](rows / "train.jsonl", tmp_path / "train.jsonl", batch * 2, recipe.longest),
        "data__eval": TOOL["some_rows"](rows / "eval.jsonl", tmp_path / "eval.jsonl", batch, recipe.longest),
        "train__epochs": 1,
        "evaluate__samples": min(c.evaluate.samples, 4),
        "evaluate__max_new_tokens": 4,
    }
    command = TOOL["command"]("jaxtune", name, tmp_path / "run", **settings)
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    steps = [row for row in tiny_run.metrics(tmp_path / "run") if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2]
    assert all(np.isfinite(row["loss"]) for row in steps)
    ended = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert np.isfinite(ended["eval_loss"])
    for metric, key in (("rouge", "rougeL"), ("chrf", "chrf"), ("squad_v2", "f1"), ("accuracy", "accuracy")):
        if metric in (c.evaluate.metrics or ()):
            assert {f"{key}_before", f"{key}_after"} <= ended.keys()
    assert (tmp_path / "run" / ("model" if c.peft.method == "partial" else "adapter")).is_dir()
