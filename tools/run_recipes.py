"""Runs the recipes of configs/ on models of a few million parameters with real rows, and prints README's table.

    python tools/run_recipes.py --rows DIR --tokenizers DIR [--out DIR] [--only NAME,…] [--stacks jaxtune,torch_gpu]

DIR of --rows has a folder a dataset with train.jsonl and eval.jsonl in the Hub's own columns; DIR of --tokenizers has
`llama2` and `t5`.  A recipe runs as it stands but for its model, its files and its steps.  Gemma recipes get the
embedded model, which has learnt some English; Llama's and T5's are random, so that their scores say that everything
works and no more.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from jaxtune.hf.base import describe
from jaxtune.hf.weights import save_params

ROOT = Path(__file__).parents[1]


class Recipe(NamedTuple):
    """system: README's words.  rows: the folder of its dataset.  tiny: the family of the model that it runs on here.
    longest: characters of a row; longer ones are left out.  stacks: those that it is for."""

    system: str
    rows: str
    tiny: str
    longest: int = 1200
    stacks: tuple[str, ...] = ("jaxtune", "torch_gpu")


RECIPES = {
    "gemma2_persian_p_tuning": Recipe("Persian chat, P-tuning", "persian_slimorca", "gemma", 600),
    "gemma2_persian_qlora": Recipe("Persian chat, QLoRA", "persian_slimorca", "gemma", 600),
    "gemma2_persian_embed_head": Recipe(
        "Persian chat, embeddings and head", "persian_slimorca", "gemma", 600, stacks=("jaxtune",)
    ),
    "llama2_persian_qa_lora": Recipe("Persian QA, LoRA", "persian_qa", "llama", 1800),
    "llama2_persian_qa_qlora": Recipe("Persian QA, QLoRA", "persian_qa", "llama", 1800),
    "flan_t5_dialogsum_lora": Recipe("Dialogue summaries, LoRA", "dialogsum", "t5"),
    "gemma_quotes_lora": Recipe("Quotations, LoRA", "english_quotes", "gemma"),
    "gemma_quotes_qlora": Recipe("Quotations, QLoRA", "english_quotes", "gemma"),
    "gemma_quotes_fsdp": Recipe("Quotations, LoRA over 8 devices", "english_quotes", "gemma", stacks=("jaxtune",)),
    "gemma11_sst2_lora": Recipe("Sentiment (SST-2), LoRA", "sst2", "gemma"),
    "gemma11_squad_v2_lora": Recipe("SQuAD v2, LoRA", "squad_v2", "gemma", 1800),
    "gemma_lora": Recipe("Any chat, LoRA", "persian_slimorca", "gemma", 600),
}

# Random models of these shapes; their tokenizers are the published ones.
SIZES: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "t5": {
        "model_type": "t5",
        "vocab_size": 32128,
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 128,
        "num_heads": 4,
        "num_layers": 2,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "decoder_start_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 0,
    },
}
TOKENIZER = {"llama": ("llama2", "tokenizer.json"), "t5": ("t5", "tokenizer.json", "tokenizer_config.json")}


def tiny_model(family: str, tokenizers: Path, directory: Path) -> Path:
    """A checkpoint of the family, made in `directory` where it is not there yet."""
    if family == "gemma":
        return ROOT / "jaxtune" / "assets" / "tiny_gemma"
    if (directory / "config.json").exists():
        return directory
    source = directory.with_name(directory.name + ".source")
    source.mkdir(parents=True)
    folder, *files = TOKENIZER[family]
    for name in files:
        shutil.copy(tokenizers / folder / name, source / name)
    (source / "config.json").write_text(json.dumps(SIZES[family]))
    base = describe(family, source, SIZES[family], dtype="float32")
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda x: random.standard_normal(x.shape, np.float32) / 8, nn.unbox(base.abstract))
    save_params(directory, base.rows, params, source, dtype="float32")
    shutil.rmtree(source)
    return directory


def some_rows(source: Path, target: Path, count: int, longest: int) -> Path:
    """The first `count` rows of at most so many characters."""
    lines = [line for line in source.read_text(encoding="utf-8").splitlines() if len(line) <= longest][:count]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return target


def command(stack: str, name: str, workdir: Path, **settings: Any) -> list[str]:
    """The line that runs a recipe; settings are written train__steps=3."""
    start = [sys.executable, "-m", f"{stack}.train", "--config", str(ROOT / "configs" / f"{name}.py")]
    given = {key.replace("__", "."): value for key, value in settings.items()}
    return [*start, "--workdir", str(workdir), *(f"--config.{key}={value}" for key, value in given.items())]


def scores(workdir: Path) -> str:
    """What a run ended with: evaluation loss and the scores of answers, before → after."""
    evaluations = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = [row["eval_loss"] for row in evaluations if "eval_loss" in row]
    ended = json.loads((workdir / "eval.json").read_text())
    parts = [f"loss {losses[0]:.2f} → {losses[-1]:.2f}"]
    for key in ("chrf", "rougeL", "exact", "f1", "accuracy"):
        if f"{key}_before" in ended:
            parts.append(f"{key} {ended[f'{key}_before']:.3g} → {ended[f'{key}_after']:.3g}")
    return ", ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--tokenizers", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/recipes"))
    parser.add_argument("--only", default=",".join(RECIPES))
    parser.add_argument("--stacks", default="jaxtune,torch_gpu")
    parser.add_argument("--steps", type=int, default=40)
    given = parser.parse_args()
    print("| System | Recipe | Stack | Steps | Result |\n|---|---|---|---|---|")
    for name in given.only.split(","):
        recipe = RECIPES[name]
        model = tiny_model(recipe.tiny, given.tokenizers, given.out / recipe.tiny)
        rows = {
            split: some_rows(given.rows / recipe.rows / f"{split}.jsonl", given.out / name / f"{split}.jsonl", *size)
            for split, size in (("train", (1200, recipe.longest)), ("eval", (64, recipe.longest)))
        }
        for stack in recipe.stacks:
            if stack not in given.stacks.split(","):
                continue
            workdir = given.out / name / stack
            settings = {"model__id": model, "model__dtype": "float32", "data__train": rows["train"]}
            settings |= {"data__eval": rows["eval"], "train__steps": given.steps, "optim__warmup_steps": 5}
            settings |= {
                "evaluate__max_new_tokens": 16,
                "train__global_batch_size": 8,
                "train__gradient_accumulation_steps": 1,
            }
            line = command(stack, name, workdir, **settings)
            with open(f"{workdir}.screen", "ab") as screen:
                done = subprocess.run(line, stdout=screen, stderr=subprocess.STDOUT)
            result = scores(workdir) if done.returncode == 0 else f"exit code {done.returncode}"
            print(f"| {recipe.system} | `{name}` | {stack} | {given.steps} | {result} |", flush=True)


if __name__ == "__main__":
    main()
