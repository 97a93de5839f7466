"""How much faster answers come in sorted batches than one by one: `python benchmarks/generation.py [--rows 176]`.

Both ways answer the same prompts greedily in one process, in alternating order, on the same devices; everything is
compiled by a first pass that is not counted.  One by one, a prompt is padded to one of the same few lengths.  Two
models: the embedded tiny Gemma on the quickstart's questions, and a wider random one on prompts of 10 to `--longest`
random tokens.  It prints, for each, seconds (the best round's; on CPUs those of the processor, so that others on the
machine count less), new tokens a second and the ratio, and how many answers differ:

  taskset -c 0 python benchmarks/generation.py     # on one core; XLA's CPU backend has no other limit of threads

With `--peers`, transformers' `generate` answers them too, one thread, in the same sorted batches padded on the left,
with the same weights, its own cache and eager attention (sdpa leaves out Gemma 2's soft-cap).
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from jaxtune.config import ASSETS
from jaxtune.generate import generate
from jaxtune.hf.base import Base, describe
from jaxtune.hf.weights import save_params
from jaxtune.likelihood import bucket
from jaxtune.lm import encode_prompt, load
from jaxtune.measure import batched

WIDE = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8, "head_dim": 64}


def quickstart(rows: int, longest: int) -> tuple[Base, Any, list[list[int]], tuple[int, ...]]:
    """(base, variables, prompts, stop tokens) of the embedded model and its held-back questions."""
    lm = load(ASSETS / "tiny_gemma")
    lines = (ASSETS / "quickstart" / "eval.jsonl").read_text(encoding="utf-8").splitlines()
    chats = [json.loads(line)["messages"][:-1] for line in lines[:rows]]
    assert lm.tokenizer is not None
    prompts = [encode_prompt(lm.tokenizer, chat) for chat in chats]
    return lm.base, lm.variables, [ids for ids in prompts if len(ids) <= longest], lm.tokenizer.stop_ids


def wide(rows: int, longest: int) -> tuple[Base, Any, list[list[int]], tuple[int, ...]]:
    """The same of a random model of 31 million parameters; answers end by chance, as in life."""
    config = json.loads((ASSETS / "tiny_gemma" / "config.json").read_text()) | WIDE
    config["layer_types"] = ["sliding_attention", "full_attention"] * 4
    with tempfile.TemporaryDirectory() as directory:
        base = describe("wide", Path(directory), config, dtype="float32")
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32) / 16, nn.unbox(base.abstract))
    prompts = [rng.integers(3, config["vocab_size"], n).tolist() for n in rng.integers(10, longest, rows)]
    return base, {"params": params}, prompts, tuple(range(3, 40))


def one_by_one(model: Any, variables: Any, ids: list[list[int]], **how: Any) -> list[list[int]]:
    return [generate(model, variables, [row], slots=bucket(len(row)), **how)[0] for row in ids]


def by_transformers(
    base: Base, variables: Any, ids: list[list[int]], size: int, *, max_new_tokens: int, stop_ids: tuple[int, ...]
) -> Callable[[], list[list[int]]]:
    """What answers the prompts with transformers, the longest first, `size` at a time."""
    import torch
    import transformers

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        where, changes = Path(name) / "model", {**base.hf_config, "dtype": "float32"}
        save_params(where, base.rows, variables["params"], ASSETS / "tiny_gemma", dtype=np.float32, changes=changes)
        how: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(where, **how).eval()
    ends: dict[str, Any] = {"eos_token_id": list(stop_ids), "pad_token_id": 0, "do_sample": False}
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))

    def run() -> list[list[int]]:
        found: dict[int, list[int]] = {}
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            tokens, mask = np.zeros((2, len(rows), len(ids[rows[0]])), np.int64)
            for i, row in enumerate(rows):
                tokens[i, -len(ids[row]) :], mask[i, -len(ids[row]) :] = ids[row], 1
            given = {"input_ids": torch.tensor(tokens), "attention_mask": torch.tensor(mask)}
            out = model.generate(**given, max_new_tokens=max_new_tokens, **ends)[:, tokens.shape[1] :].tolist()
            for row, new in zip(rows, out, strict=True):
                end = next((i for i, token in enumerate(new) if token in stop_ids), len(new))
                found[row] = new[:end]
        return [found[i] for i in range(len(ids))]

    return run


def measure(make: Callable[[int, int], Any], arguments: argparse.Namespace) -> str:
    """A line of the table, without its name."""
    base, variables, ids, stops = make(arguments.rows, arguments.longest)
    model, size = base.model, arguments.batch_size
    how: dict[str, Any] = {"max_new_tokens": arguments.new, "stop_ids": stops}
    ways: dict[str, Callable[[], list[list[int]]]] = {
        "one": lambda: one_by_one(model, variables, ids, **how),
        "batched": lambda: batched(model, variables, ids, shards=1, batch_size=size, **how),
    }
    if arguments.peers:
        ways["transformers"] = by_transformers(base, variables, ids, size, **how)
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    first = {way: run() for way, run in ways.items()}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(arguments.rounds):
        for way in list(ways)[:: 1 if turn % 2 == 0 else -1]:
            start = clock()
            ways[way]()
            seconds[way].append(clock() - start)
    tokens = sum(len(row) + 1 for row in first["one"])
    best = {way: min(all_rounds) for way, all_rounds in seconds.items()}
    line = f"{tokens:>12}"
    for way, took in best.items():
        line += f"{took:.2f} s ({tokens / took:,.0f}/s)".rjust(22)
        if way != "one":
            differ = sum(
                a != b for a, b in zip(first["batched" if way != "batched" else "one"], first[way], strict=True)
            )
            line += f"{best['one'] / took if way == 'batched' else took / best['batched']:>8.1f}{differ:>8}"
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("both", "tiny", "wide"), default="both")
    parser.add_argument("--rows", type=int, default=176)
    parser.add_argument("--longest", type=int, default=250, help="tokens of the longest prompt")
    parser.add_argument("--new", type=int, default=64, help="new tokens at most")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", action="store_true", help="transformers, too")
    arguments = parser.parse_args()
    print(f"{jax.device_count()} {jax.default_backend()} device, float32, batches of {arguments.batch_size}")
    heads = f"{'':8}{'new tokens':>12}{'one by one':>22}{'batched':>22}{'ratio':>8}{'differ':>8}"
    print(heads + (f"{'transformers':>22}{'ratio':>8}{'differ':>8}" if arguments.peers else ""), flush=True)
    for name, make in (("tiny", quickstart), ("wide", wide)):
        if arguments.model in ("both", name):
            print(f"{name:8}{measure(make, arguments)}", flush=True)


if __name__ == "__main__":
    main()
