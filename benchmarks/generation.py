"""How much faster answers come in sorted batches than one by one: `python benchmarks/generation.py [--rows 176]`.

Both ways answer the same prompts greedily in one process, in alternating order, on the same devices; everything is
compiled by a first pass that is not counted.  One by one, a prompt is padded to one of the same few lengths.  Two
models: the embedded tiny Gemma on the quickstart's questions, and a wider random one on prompts of 10 to 250 random
tokens.  It prints, for each, seconds (the best round's; on CPUs those of the processor, so that others on the machine
count less), new tokens a second and the ratio, and how many answers differ:

  taskset -c 0 python benchmarks/generation.py     # on one core; XLA's CPU backend has no other limit of threads
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
from jaxtune.hf.base import describe
from jaxtune.likelihood import bucket
from jaxtune.lm import encode_prompt, load
from jaxtune.measure import batched

WIDE = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8, "head_dim": 64}


def quickstart(rows: int) -> tuple[Any, Any, list[list[int]], tuple[int, ...]]:
    """(model, variables, prompts, stop tokens) of the embedded model and its held-back questions."""
    lm = load(ASSETS / "tiny_gemma")
    lines = (ASSETS / "quickstart" / "eval.jsonl").read_text(encoding="utf-8").splitlines()
    chats = [json.loads(line)["messages"][:-1] for line in lines[:rows]]
    assert lm.tokenizer is not None
    return lm.base.model, lm.variables, [encode_prompt(lm.tokenizer, chat) for chat in chats], lm.tokenizer.stop_ids


def wide(rows: int) -> tuple[Any, Any, list[list[int]], tuple[int, ...]]:
    """The same of a random model of 31 million parameters; answers end by chance, as in life."""
    config = json.loads((ASSETS / "tiny_gemma" / "config.json").read_text()) | WIDE
    config["layer_types"] = ["sliding_attention", "full_attention"] * 4
    with tempfile.TemporaryDirectory() as directory:
        base = describe("wide", Path(directory), config, dtype="float32")
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32) / 16, nn.unbox(base.abstract))
    prompts = [rng.integers(3, config["vocab_size"], n).tolist() for n in rng.integers(10, 250, rows)]
    return base.model, {"params": params}, prompts, tuple(range(3, 40))


def one_by_one(model: Any, variables: Any, ids: list[list[int]], **how: Any) -> list[list[int]]:
    return [generate(model, variables, [row], slots=bucket(len(row)), **how)[0] for row in ids]


def measure(make: Callable[[int], Any], arguments: argparse.Namespace) -> str:
    """A line of the table, without its name."""
    model, variables, ids, stops = make(arguments.rows)
    how = {"max_new_tokens": arguments.new, "stop_ids": stops}
    ways: dict[str, Callable[[], list[list[int]]]] = {
        "one": lambda: one_by_one(model, variables, ids, **how),
        "batched": lambda: batched(model, variables, ids, shards=1, batch_size=arguments.batch_size, **how),
    }
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    first = {way: run() for way, run in ways.items()}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(arguments.rounds):
        for way in list(ways)[:: 1 if turn % 2 == 0 else -1]:
            start = clock()
            ways[way]()
            seconds[way].append(clock() - start)
    tokens = sum(len(row) + 1 for row in first["one"])
    one, batch = (min(seconds[way]) for way in ways)
    cells = [f"{took:.2f} s ({tokens / took:,.0f}/s)" for took in (one, batch)]
    differ = sum(a != b for a, b in zip(first["one"], first["batched"], strict=True))
    return f"{tokens:>12}{cells[0]:>22}{cells[1]:>22}{one / batch:>8.1f}{differ:>8}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("both", "tiny", "wide"), default="both")
    parser.add_argument("--rows", type=int, default=176)
    parser.add_argument("--new", type=int, default=32, help="new tokens at most")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print(f"{jax.device_count()} {jax.default_backend()} device, float32, batches of {arguments.batch_size}")
    print(f"{'':8}{'new tokens':>12}{'one by one':>22}{'batched':>22}{'ratio':>8}{'differ':>8}", flush=True)
    for name, make in (("tiny", quickstart), ("wide", wide)):
        if arguments.model in ("both", name):
            print(f"{name:8}{measure(make, arguments)}", flush=True)


if __name__ == "__main__":
    main()
