"""A LoRA and a QLoRA step of Gemma 2 2b on one GPU, jaxtune beside transformers + peft: `python benchmarks/gpu.py`.

Random weights of its shapes in bfloat16, as they are and in doubly quantised NF4 (of bitsandbytes for peft), a float32
adapter of rank 8 on all linear layers, AdamW, clipping, `--tokens` a step in rows of each of `--lengths`, all learnt.
peft checkpoints its layers unless `--remat none`.  Each side is a process of its own and waits while the other runs;
they take turns, and the order alternates.  Both read one checkpoint and one adapter, and their first losses must agree.

It prints milliseconds of a step, tokens a second, how many times peft's that is, and MFU: what the model asks for
(`jaxtune.plan.flops`, without what is computed again) of the chip's peak; a step without anything else has an MFU of 1.

  python benchmarks/gpu.py --weights bfloat16 --lengths 2048 --remat none
  python benchmarks/gpu.py --sizes small --tokens 1024 --lengths 256,512 --weights bfloat16   # anywhere, to see it run
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import step as steps

from jaxtune.models.gemma_hf import DEFAULTS

SIZES: dict[str, dict[str, Any]] = {"small": steps.SIZES, "gemma-2-2b": DEFAULTS["gemma2"]}
RANK = 8
CLOSE = 5e-3  # of losses: transformers rounds logits to bfloat16, and each has kernels of its own


def rows_of(a: argparse.Namespace) -> list[steps.Row]:
    rng = np.random.default_rng(0)
    words = SIZES[a.sizes]["vocab_size"]
    return [(rng.integers(3, words, a.length, np.int32), np.ones(a.length, bool)) for _ in range(a.tokens // a.length)]


def by_peft(a: argparse.Namespace) -> steps.Work:
    import torch
    import transformers

    how: dict[str, Any] = {}
    if a.weights == "nf4":
        how["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    on = {"": 0} if torch.cuda.is_available() else {"": "cpu"}
    batch, step = steps.peft_stepper(a.directory, "bfloat16", a.remat, device_map=on, **how)
    rows = batch(rows_of(a))
    return steps.Work([step(rows) for _ in range(steps.WARM_UP)], a.tokens, 1, lambda: step(rows))


def by_jaxtune(a: argparse.Namespace) -> steps.Work:
    from jaxtune import compiler
    from jaxtune.data.batches import collate
    from jaxtune.hf.base import open_base
    from jaxtune.quant import scheme_of

    compiler.keep_memory()
    scheme = scheme_of("nf4", double=True) if a.weights == "nf4" else None
    base = open_base(str(a.directory / "base"), dtype="bfloat16", remat=a.remat, quant=scheme)
    section = {"method": "lora", "init_from": str(a.directory / "adapter"), "target_modules": "all-linear"}
    step, trainable = steps.stepper(base, section, dtype="bfloat16")
    rows = rows_of(a)
    batch = collate(rows, len(rows), a.length)
    losses = [step(batch) for _ in range(steps.WARM_UP)]
    steps.say(facts(base, trainable, a.length))
    return steps.Work(losses, a.tokens, 1, lambda: step(batch))


def facts(base: Any, trainable: Any, length: int) -> dict[str, float | None]:
    """What the model asks of a token, FLOP, and what the chip can do in a second; None of one that is not known."""
    import jax

    from jaxtune.plan.chips import chip_of_kind
    from jaxtune.plan.flops import flops

    chip = chip_of_kind(jax.devices()[0].device_kind)
    return {"flops": flops(base, trainable, length).per_token, "peak": chip and chip.flops("bfloat16")}


SIDES = {"peft": by_peft, "jaxtune": by_jaxtune}


def compare(directory: Path, weights: str, length: int, a: argparse.Namespace) -> None:
    """Prints a line for each side."""
    how = {"directory": directory, "weights": weights, "length": length, "tokens": a.tokens}
    how |= {"remat": a.remat, "sizes": a.sizes}
    with contextlib.ExitStack() as stack:
        ask = {name: stack.enter_context(steps.side(__file__, name, **how)) for name in SIDES}
        chip = ask["jaxtune"](False)
        about = {name: answer(False) for name, answer in ask.items()}
        steps.check(about, CLOSE)
        best = {name: clocks["wall"] for name, clocks in steps.take_turns(ask, a.rounds).items()}
    for name in SIDES:
        speed = a.tokens / best[name]
        mfu = f"{speed * chip['flops'] / chip['peak']:.2f}" if chip["peak"] else "-"
        cells = f"{best[name] * 1e3:>9.0f}{speed:>10,.0f}{best['peft'] / best[name]:>6.2f}{mfu:>6}"
        print(f"{weights:9}{length:>7}{a.tokens // length:>6}  {name:9}{cells}{about[name]['losses'][0]:>10.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="bfloat16,nf4")
    parser.add_argument("--lengths", default="2048,8192")
    parser.add_argument("--tokens", type=int, default=16384, help="of a step")
    parser.add_argument("--remat", default="attn_out", help="of jaxtune")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", default="gemma-2-2b", choices=SIZES)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    a = parser.parse_args()
    # Two processes share the GPU: neither may take all of it at once.
    settings = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    os.environ |= settings
    if a.side == "make":
        steps.make(a.directory, SIZES[a.sizes], RANK, "bfloat16")
    elif a.side:
        steps.serve(SIDES[a.side](a))
    else:
        with tempfile.TemporaryDirectory() as name:
            made = [sys.executable, __file__, "--side=make", f"--directory={name}", f"--sizes={a.sizes}"]
            subprocess.run(made, check=True)
            print(f"{a.sizes}, remat {a.remat}; by the clock")
            heads = f"{'ms/step':>9}{'tok/s':>10}{'x':>6}{'mfu':>6}{'loss':>10}"
            print(f"{'weights':9}{'length':>7}{'rows':>6}  {'':9}{heads}", flush=True)
            for weights in a.weights.split(","):
                for length in a.lengths.split(","):
                    try:
                        compare(Path(name), weights, int(length), a)
                    except SystemExit as end:  # one case does not fit, or is not what the other computes: the rest may
                        print(f"{weights:9}{length:>7}  {end}", flush=True)


if __name__ == "__main__":
    main()
