"""A LoRA training step of jaxtune beside transformers + peft, on one CPU core: `python benchmarks/step.py`.

The same random Gemma 2 (width 256, 8 layers, heads 8/4 x 32, hidden 1024, 32,000 words), the same adapter (r=16 on all
linear layers, float32), AdamW, clipping, no layer recomputed, no dropout.  Two kinds of data:

  even      8 rows of 256 tokens, all of them learnt
  ragged    rows as of instructions: lengths log-normal around 100, at most 256, the second part of each learnt.
            peft takes 8 at a time, padded to the longest of them (transformers' collator), jaxtune 8 packs
            (`data.packing`)

Each side is a process of its own on the same core, and waits while the other runs; they take turns, and the order
alternates.  Both read one checkpoint and one adapter from files, and their first losses must agree.  It prints seconds
of the processor for a step, real tokens (no padding) a second of the processor, the same by the clock, and the ratio;
the best round's.  Gemma's attention in transformers is `eager`: sdpa leaves out the soft-cap.

  python benchmarks/step.py --dtypes float32 --data even --remat full
  GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python benchmarks/step.py
"""

import argparse
import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

SIZES: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "sliding_window": 128,
    "max_position_embeddings": 2048,
}
ROWS, LENGTH, RANK, RATE = 8, 256, 16, 1e-4
# How far the first losses may be apart; in bfloat16 transformers rounds logits, and jaxtune sums them in float32.
CLOSE = {"float32": 1e-5, "bfloat16": 2e-3}
WARM_UP = 3  # steps on the first rows, whose losses are compared

Row = tuple[np.ndarray, np.ndarray]  # tokens, which of them are learnt


class Work(NamedTuple):
    """What a process does again and again.  losses: of the first steps.  tokens, steps: of a round, without padding."""

    losses: list[float]
    tokens: int
    steps: int
    run: Callable[[], Any]


def rows_of(kind: str, count: int) -> list[Row]:
    rng = np.random.default_rng(0)
    if kind == "even":
        return [(rng.integers(3, SIZES["vocab_size"], LENGTH, np.int32), np.ones(LENGTH, bool)) for _ in range(count)]
    lengths = np.clip(np.exp(rng.normal(np.log(85), 0.6, count)).astype(int), 16, LENGTH)
    rows = []
    for n in lengths.tolist():
        learnt = np.arange(n) >= int(n * rng.uniform(0.2, 0.8))
        rows.append((rng.integers(3, SIZES["vocab_size"], n, np.int32), learnt))
    return rows


def make(directory: Path, sizes: dict[str, Any], rank: int, dtype: str = "float32") -> None:
    """Writes a random Gemma 2 and an adapter.  B is not zero, so that the first losses know of it."""
    import peft
    import torch
    import transformers

    torch.manual_seed(0)
    model = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**sizes)).to(getattr(torch, dtype))
    model.save_pretrained(str(directory / "base"))
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    adapted = peft.get_peft_model(model, config)
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.02)
    adapted.save_pretrained(str(directory / "adapter"))


def peft_stepper(
    directory: Path, dtype: str, remat: str, **how: Any
) -> tuple[Callable[..., Any], Callable[..., float]]:
    """(rows to a batch, a batch to its loss) of peft's step.  how: of transformers' `from_pretrained`."""
    import peft
    import torch
    import transformers

    # Eager: sdpa leaves out the soft-cap.
    how |= {"dtype": getattr(torch, dtype), "attn_implementation": "eager", "use_cache": False}
    base = transformers.AutoModelForCausalLM.from_pretrained(directory / "base", **how)
    model: Any = peft.PeftModel.from_pretrained(base, directory / "adapter", is_trainable=True)
    if remat != "none":
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)

    def batch(rows: list[Row]) -> dict[str, Any]:
        ids, mask, labels = np.zeros((3, len(rows), max(len(tokens) for tokens, _ in rows)), np.int64)
        labels[:] = -100
        for i, (tokens, learnt) in enumerate(rows):
            ids[i, : len(tokens)], mask[i, : len(tokens)] = tokens, 1
            labels[i, : len(tokens)] = np.where(learnt, tokens, -100)
        arrays = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        return {k: torch.tensor(v, device=model.device) for k, v in arrays.items()}

    def step(rows: dict[str, Any]) -> float:
        loss = model(**rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return float(loss.detach())

    return batch, step


def by_peft(a: argparse.Namespace) -> Work:
    import torch

    torch.set_num_threads(1)
    batch, step = peft_stepper(a.directory, a.dtype, a.remat)
    rows = rows_of(a.data, a.rows)
    batches = [batch(rows[i : i + ROWS]) for i in range(0, len(rows), ROWS)]
    losses = [step(batches[0]) for _ in range(WARM_UP)]
    return Work(
        losses, sum(len(tokens) for tokens, _ in rows), len(batches), lambda: [step(b) for b in batches] and None
    )


def by_jaxtune(a: argparse.Namespace) -> Work:
    from jaxtune import compiler
    from jaxtune.data.batches import collate_packs
    from jaxtune.data.packing import pack
    from jaxtune.hf.base import open_base

    compiler.keep_memory()
    base = open_base(str(a.directory / "base"), dtype=a.dtype, remat=a.remat, unroll=a.unroll)
    section = {"method": "lora", "init_from": str(a.directory / "adapter"), "target_modules": "all-linear"}
    step, _ = stepper(base, section, dtype=a.dtype)

    def batches(rows: list[Row]) -> list[dict[str, np.ndarray]]:
        packs = [[rows[i] for i in own] for own in pack([len(tokens) for tokens, _ in rows], LENGTH)]
        return [collate_packs(packs[i : i + ROWS], ROWS, LENGTH) for i in range(0, len(packs), ROWS)]

    rows = rows_of(a.data, a.rows)
    own = batches(rows)
    losses = [step(batches(rows[:ROWS])[0]) for _ in range(WARM_UP)]
    return Work(losses, sum(len(tokens) for tokens, _ in rows), len(own), lambda: [step(b) for b in own])


def stepper(
    base: Any, section: dict[str, Any], *, dtype: str, params: Any = None
) -> tuple[Callable[..., float], dict[str, Any]]:
    """(jaxtune's own step over `base`, what it trains): a batch [B, T] to its loss, the state kept between calls.
    section: `peft`."""
    import jax

    from jaxtune import compiler, optim
    from jaxtune import mesh as meshes
    from jaxtune.adapt import adapt
    from jaxtune.config import get_default, to_json
    from jaxtune.state import make_state
    from jaxtune.step import train_step

    mesh, c = meshes.make_mesh(1, 1, 1, devices=jax.devices()[:1]), get_default()
    c.optim.update({"learning_rate": RATE, "schedule": "constant", "weight_decay": 0.0, "max_grad_norm": 1.0})
    with jax.set_mesh(mesh):
        how: dict[str, Any] = {"dtype": dtype, "seed": 0, "total_steps": 1000, "encode": lambda text: [3]}
        adapted = adapt(to_json(c)["peft"] | section, base, mesh, **how, params=params)
        schedule = optim.make_schedule(c.optim, 1000)
        optimiser = adapted.optimiser(optim.make_optimiser(c.optim, schedule))
        parts = {"model": base.model, "structure": adapted.structure, "optimiser": optimiser, "schedule": schedule}
        update = compiler.step_of(functools.partial(train_step, **parts, seed=0))
        kept = [make_state(optimiser, adapted.trainable, mesh)]
    where = meshes.batch_sharding(mesh, leading=1)

    def step(batch: dict[str, np.ndarray]) -> float:
        with jax.set_mesh(mesh):
            placed = {k: jax.device_put(v[None], where) for k, v in batch.items()}
            kept[0], metrics = update(kept[0], adapted.frozen, placed)
        return float(metrics["loss"])

    return step, adapted.trainable


SIDES = {"peft": by_peft, "jaxtune": by_jaxtune}


def serve(work: Work) -> None:
    """A side's process: what it is, then for each line that comes in, the seconds of a round."""
    work.run()  # compiles, and touches the memory, for the shapes that are not those of the first rows
    say({"losses": work.losses, "tokens": work.tokens, "steps": work.steps})
    for _ in sys.stdin:
        cpu, wall = time.process_time(), time.perf_counter()
        work.run()
        say({"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall})


def say(values: dict[str, Any]) -> None:
    print(json.dumps(values), flush=True)


@contextlib.contextmanager
def side(script: str, name: str, **how: Any) -> Iterator[Any]:
    """A process of `serve`, as a function that reads its next line, behind asking for a round with True.

    Args:
      script: which, called with `--side=name`, serves.  how: its other arguments.
    """
    words = [f"--{key}={value}" for key, value in how.items()]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    with subprocess.Popen([sys.executable, script, f"--side={name}", *words], **pipes) as process:
        ins, outs = process.stdin, process.stdout
        assert ins and outs

        def answer(ask: bool) -> dict[str, Any]:
            if ask:
                print("again", file=ins, flush=True)
            line = outs.readline()
            if not line:
                raise SystemExit(f"{name} ended with {process.wait()}")
            return json.loads(line)

        try:
            yield answer
        finally:
            ins.close()


def check(about: dict[str, Any], close: float) -> None:
    """Ends with both sides' first losses where they are not the same."""
    ours, theirs = (np.array(about[name]["losses"]) for name in ("jaxtune", "peft"))
    if not np.allclose(ours, theirs, rtol=close, atol=0):
        raise SystemExit(f"losses of the first steps differ: jaxtune {ours}, peft {theirs}")


def take_turns(ask: dict[str, Any], rounds: int) -> dict[str, dict[str, float]]:
    """The least seconds of a round of each side, by each clock; the order alternates."""
    best = {name: {"cpu": float("inf"), "wall": float("inf")} for name in ask}
    for turn in range(rounds):
        for name in list(ask)[:: 1 if turn % 2 == 0 else -1]:
            for clock, seconds in ask[name](True).items():
                best[name][clock] = min(best[name][clock], seconds)
    return best


def compare(directory: Path, data: str, dtype: str, a: argparse.Namespace) -> None:
    """Prints a line for each side."""
    how = {"directory": directory, "data": data, "dtype": dtype, "remat": a.remat, "unroll": a.unroll}
    how["rows"] = a.rows if data == "ragged" else ROWS
    with contextlib.ExitStack() as stack:
        ask = {name: stack.enter_context(side(__file__, name, **how)) for name in SIDES}
        about = {name: answer(False) for name, answer in ask.items()}
        check(about, CLOSE[dtype])
        best = take_turns(ask, a.rounds)
    speed = {name: {clock: about[name]["tokens"] / best[name][clock] for clock in ("cpu", "wall")} for name in SIDES}
    for name in SIDES:
        times = [speed[name][clock] / speed["peft"][clock] for clock in ("cpu", "wall")]
        cells = f"{best[name]['cpu'] / about[name]['steps']:>10.2f}{about[name]['steps']:>7}"
        cells += "".join(f"{speed[name][c]:>10,.0f}{t:>6.2f}" for c, t in zip(("cpu", "wall"), times, strict=True))
        print(f"{data:8}{dtype:10}{name:9}{cells}{about[name]['losses'][0]:>10.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="even,ragged")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--remat", default="none", help="of jaxtune; other than none, peft checkpoints its layers")
    parser.add_argument("--unroll", type=int, default=8, help="of jaxtune: train.unroll_layers")
    parser.add_argument("--rounds", type=int, default=3)
    # 56 rows fill three batches of packs to 94 %, as many rows would; 64 would leave most of a fourth empty.
    parser.add_argument("--rows", type=int, default=56, help="of a round, ragged")
    parser.add_argument("--core", type=int, default=0, help="the one core that everything runs on")
    for word in ("--side", "--dtype"):
        parser.add_argument(word, help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    a = parser.parse_args()
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "JAX_PLATFORMS": "cpu",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    if a.side == "make":
        make(a.directory, SIZES, RANK)
    elif a.side:
        serve(SIDES[a.side](a))
    else:
        # XLA's CPU backend has no other limit of threads; children inherit it.
        os.sched_setaffinity(0, {a.core})
        with tempfile.TemporaryDirectory() as name:
            subprocess.run([sys.executable, __file__, "--side=make", f"--directory={name}"], check=True)
            print(f"one core, remat {a.remat}, unrolled {a.unroll}; per second of the processor (cpu) and of the clock")
            heads = "".join(f"{name:>10}{'x':>6}" for name in ("tok/cpu s", "tok/s"))
            print(f"{'data':8}{'dtype':10}{'':9}{'cpu s/step':>10}{'steps':>7}{heads}{'loss':>10}", flush=True)
            for data in a.data.split(","):
                for dtype in a.dtypes.split(","):
                    compare(Path(name), data, dtype, a)


if __name__ == "__main__":
    main()
