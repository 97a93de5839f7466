"""Makes the embedded tiny Gemma: a real Gemma 2, small enough to ship, trained from nothing on text generated here.

    python tools/make_tiny_gemma.py tokenizer|data|train|card|all --out jaxtune/assets/tiny_gemma

`tokenizer` writes the tokenizer and the configs, `data` the quickstart's rows (beside the model, in `quickstart/`),
`train` the weights and `card` the README.  Seeds are fixed: the same versions write the same files.  Training takes
half an hour on two cores; GLIBC_TUNABLES=glibc.malloc.hugetlb=1 before the command makes it a third faster.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

import ml_dtypes
import numpy as np
import sentencepiece as spm
from safetensors.numpy import load_file, save_file
from tiny_gemma import text, tokenizer

import jaxtune.train as training
from jaxtune.config import get_default
from jaxtune.console import Console
from jaxtune.hf.base import describe
from jaxtune.hf.files import read_json
from jaxtune.hf.weights import save_params
from jaxtune.tree import nest

SEED = 0
TOKENIZER_LINES = 20_000
DOCUMENTS, HELD_OUT_DOCUMENTS = 32_000, 200  # each is read once
BATCH, STEPS_OF_TRAINING = 8, 4000
# Tokens of a pretraining document, <bos> and <eos> included.
MAX_LENGTH = 128

# Every width is a multiple of 64, as quantisation blocks want; documents are longer than the sliding window.
SIZES = {
    "vocab_size": 2048,
    "hidden_size": 192,
    "intermediate_size": 640,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "query_pre_attn_scalar": 64,
    "sliding_window": 32,
    "max_position_embeddings": 1024,
    # Gemma has 0.02, at 12 times this width.  Here that leaves attention flat, and copying is learnt much later.
    "initializer_range": 0.06,
}


def model_config(ids: dict[str, int]) -> dict:
    """config.json, with every key a Gemma 2 has."""
    return {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        **SIZES,
        "layer_types": ["full_attention" if i % 2 else "sliding_attention" for i in range(SIZES["num_hidden_layers"])],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "use_cache": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": ids[tokenizer.BOS],
        "eos_token_id": ids[tokenizer.EOS],
        "pad_token_id": ids[tokenizer.PAD],
    }


def write_tokenizer(out: Path) -> None:
    """The tokenizer's files, config.json and generation_config.json."""
    model = tokenizer.train(text.tokenizer_lines(SEED, TOKENIZER_LINES), SIZES["vocab_size"])
    sp = spm.SentencePieceProcessor(model_proto=model)
    names = (tokenizer.BOS, tokenizer.EOS, tokenizer.PAD, tokenizer.END_OF_TURN)
    ids = {name: sp.piece_to_id(name) for name in names}
    tokenizer.write(model, out)
    tokenizer.write_json(out / "config.json", model_config(ids))
    generation = {
        "bos_token_id": ids[tokenizer.BOS],
        # A turn ends an answer as well as the text's end does.
        "eos_token_id": [ids[tokenizer.EOS], ids[tokenizer.END_OF_TURN]],
        "pad_token_id": ids[tokenizer.PAD],
    }
    tokenizer.write_json(out / "generation_config.json", generation)


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as f:
        f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_quickstart(out: Path) -> None:
    """quickstart/{train,eval}.jsonl beside the model."""
    train_rows, eval_rows = text.quickstart_rows(text.QUICKSTART_SEED)
    write_rows(out.parent / "quickstart" / "train.jsonl", train_rows)
    write_rows(out.parent / "quickstart" / "eval.jsonl", eval_rows)


def write_pretraining(model_dir: Path, to: Path) -> None:
    """{train,eval}.jsonl of {"text": ...} rows in `to`; the text format adds <bos> and <eos> to each."""
    sp = spm.SentencePieceProcessor(model_file=str(model_dir / "tokenizer.model"))
    for name, seed, n in (("train", SEED + 1, DOCUMENTS), ("eval", SEED + 2, HELD_OUT_DOCUMENTS)):
        documents = text.pretraining_documents(seed, n, lambda piece: len(sp.encode(piece)), MAX_LENGTH - 2)
        write_rows(to / f"{name}.jsonl", ({"text": document} for document in documents))


def write_random_weights(out: Path) -> None:
    """model.safetensors: zero norms, all else normal with `initializer_range`."""
    base = describe(str(out), out, read_json(out / "config.json"), dtype="float32")
    rng = np.random.default_rng(SEED)
    params = {}
    for row in base.rows:
        std = 0.0 if row.path.endswith("/scale") else SIZES["initializer_range"]
        params[row.path] = (rng.standard_normal(row.shape) * std).astype(np.float32)
    save_params(out / "random", base.rows, nest(params), out, dtype=np.float32)


def train(out: Path) -> None:
    """The weights, by jaxtune's full training from a random initialisation."""
    with tempfile.TemporaryDirectory() as scratch:
        data, start, run = (Path(scratch) / name for name in ("data", "start", "run"))
        write_pretraining(out, data)
        shutil.copytree(out, start, ignore=shutil.ignore_patterns("*.safetensors", "README.md"))
        write_random_weights(start)

        c = get_default()
        c.model.id = str(start / "random")
        c.model.dtype = "float32"
        c.peft.method = "full"
        c.data.train, c.data.eval = str(data / "train.jsonl"), str(data / "eval.jsonl")
        c.data.format = "text"
        c.data.max_length = MAX_LENGTH
        c.optim.update({"learning_rate": 3e-3, "warmup_steps": 100, "end_fraction": 0.02, "b2": 0.98})
        c.train.update({"steps": STEPS_OF_TRAINING, "global_batch_size": BATCH, "eval_every": 1000, "save_every": 1000})
        c.train.remat = "none"
        run.mkdir()
        training.train(c, run, Console(run / "log.txt"))
        # Stored in half the space: bfloat16 has float32's range and more digits than these weights need.
        tensors = load_file(run / "model" / "model.safetensors")
        halved = {name: value.astype(ml_dtypes.bfloat16) for name, value in tensors.items()}
        save_file(halved, out / "model.safetensors", metadata={"format": "pt"})


def parameters() -> int:
    """Weights of a model of SIZES; the head is the embedding."""
    d, f, h = SIZES["hidden_size"], SIZES["intermediate_size"], SIZES["head_dim"]
    attention = 2 * d * h * (SIZES["num_attention_heads"] + SIZES["num_key_value_heads"])
    norms = 4 * d
    return SIZES["vocab_size"] * d + SIZES["num_hidden_layers"] * (attention + 3 * d * f + norms) + d


def write_card(out: Path) -> None:
    """README.md, from tools/tiny_gemma/card.md."""
    template = (Path(__file__).parent / "tiny_gemma" / "card.md").read_text(encoding="utf-8")
    card = template.format(
        **SIZES, parameters=f"{parameters():,}", documents=f"{DOCUMENTS:,}", max_length=MAX_LENGTH, **text.MIX
    )
    (out / "README.md").write_text(card, encoding="utf-8")


STEPS = {"tokenizer": write_tokenizer, "data": write_quickstart, "train": train, "card": write_card}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=(*STEPS, "all"))
    parser.add_argument("--out", type=Path, required=True, help="the model's directory")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, step in STEPS.items():
        if args.step in (name, "all"):
            step(args.out)


if __name__ == "__main__":
    main()
