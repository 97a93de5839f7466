"""A run of the training command small enough to be started dozens of times: a random Gemma of two layers with the
embedded tokenizer, on chat rows of the quickstart."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from jaxtune.config import ASSETS
from jaxtune.hf.base import describe
from jaxtune.hf.weights import save_params

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "layer_types": ["sliding_attention", "full_attention"],
}
STEPS = 48
# What a line of metrics.jsonl says of the time it took.
TIMED = {"seconds", "tokens_per_second", "tokens_per_second_per_chip", "mfu"}

# 60 rows in batches of 8: six epochs and a part of the seventh.  Two micro-batches, dropout, a schedule with warm-up.
RECIPE = """
from jaxtune.config import get_default


def get_config():
    c = get_default()
    c.model.id = {model!r}
    c.model.dtype = "float32"
    c.peft.r = 4
    c.peft.lora_alpha = 8.0
    c.peft.lora_dropout = 0.1
    c.peft.target_modules = "all-linear"
    c.data.train = {train!r}
    c.data.eval = {eval!r}
    c.data.max_length = 64
    c.optim.learning_rate = 5e-3
    c.optim.warmup_steps = 2
    c.train.steps = {steps}
    c.train.global_batch_size = 8
    c.train.gradient_accumulation_steps = 2
    c.train.eval_every = 8
    c.train.save_every = 3
    c.train.log_every = 1
    c.train.remat = "none"
    return c
"""


class Place(NamedTuple):
    """What a run is made of: paths of its recipe, model and rows, under `root`."""

    root: Path
    recipe: Path
    model: Path
    train: Path
    eval: Path


def make(root: Path, steps: int = STEPS) -> Place:
    """A place with everything in it."""
    place = Place(root, root / "recipe.py", root / "model", root / "train.jsonl", root / "eval.jsonl")
    make_model(place.model)
    for path, rows in ((place.train, 60), (place.eval, 10)):
        lines = (ASSETS / "quickstart" / path.name).read_text(encoding="utf-8").splitlines()[:rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    place.recipe.write_text(RECIPE.format(**{k: str(v) for k, v in place._asdict().items()} | {"steps": steps}))
    return place


def make_model(directory: Path) -> None:
    """A random Gemma 2 in Hugging Face's layout."""
    source = directory.with_name(directory.name + ".source")
    source.mkdir()
    for name in TOKENIZER:
        shutil.copy(ASSETS / "tiny_gemma" / name, source / name)
    config = json.loads((ASSETS / "tiny_gemma" / "config.json").read_text()) | SMALL
    (source / "config.json").write_text(json.dumps(config))
    base = describe("tiny", source, config, dtype="float32")
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda x: random.standard_normal(x.shape, np.float32) / 8, nn.unbox(base.abstract))
    save_params(directory, base.rows, params, source, dtype="float32")
    shutil.rmtree(source)


def arguments(place: Place, workdir: Path, *settings: str) -> list[str]:
    """The command line; settings are written `train.seed=1`."""
    return ["--config", str(place.recipe), "--workdir", str(workdir), *(f"--config.{s}" for s in settings)]


def start(place: Place, workdir: Path, *settings: str, devices: int = 2, **environment: str) -> subprocess.Popen:
    """The command as a user runs it.  Compiled functions are kept under `root` from one run to the next; that they give
    the same bits as fresh ones is part of what `test_resume` finds out.  Its screen goes to `<workdir>.screen`."""
    fixed = {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": str(place.root / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    # Whoever watches a run, to hit it at some moment, comes before it where processors are few.
    command = ["nice", "-n", "10", sys.executable, "-m", "jaxtune.train", *arguments(place, workdir, *settings)]
    with open(f"{workdir}.screen", "ab") as screen:
        return subprocess.Popen(command, stdout=screen, stderr=screen, env=os.environ | fixed | environment)


def metrics(workdir: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl."""
    path = workdir / "metrics.jsonl"
    whole = path.read_bytes().rpartition(b"\n")[0] if path.exists() else b""
    return [json.loads(line) for line in whole.splitlines()]


def contents(directory: Path) -> dict[str, bytes]:
    """Every file by its path, but for those that every start of a run writes: its log and its lock."""
    files = sorted(p for p in directory.rglob("*") if p.is_file() and p.name not in ("log.txt", "run.lock"))
    return {str(p.relative_to(directory)): p.read_bytes() for p in files}
