"""How the cost of a LoRA training step grows with length, layers and chips: `python benchmarks/growth.py`.

A random Gemma 2 (width 256, heads 8/4 x 32, hidden 1024, 2,048 words, local layers of 128), float32, jaxtune's own step
on one CPU core, 4096 tokens a step: 32 rows of 128 to 1 row of 4096, with layers of both kinds and with all of them
global; and 1 to 16 layers at 256.  It prints seconds of the processor for a step (the best of `--rounds`) and the slope
between neighbours on a log plot, where 0 is a step that costs the same and 1 one that costs twice as much for twice the
length or depth, and draws the plot with `--plot FILE.png` (needs matplotlib).

Of chips there are none here: what is printed for them is the bound that `jaxtune.plan` gives a step of 256 rows of 2048
with Gemma 2 2b, LoRA and fsdp over all of them; a slope of -1 is a step that takes half as long on twice as many.
"""

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from step import SIZES, stepper

TOKENS, USUAL_LENGTH, USUAL_LAYERS = 4096, 256, 4
LENGTHS, LAYERS = (128, 256, 512, 1024, 2048, 4096), (1, 2, 4, 8, 16)
ROWS = 256  # of a step over chips
CHIPS = "chips (planned, not measured)"
# Few words: the head costs the same at any length, and would hide what grows.
WORDS = 2048


def seconds(length: int, layers: int, *, window: bool, remat: str, rounds: int) -> float:
    """Of the processor, for a step.  window: whether every second layer sees no more than its last 128 tokens."""
    import flax.linen as nn
    import jax

    from jaxtune.config import ASSETS
    from jaxtune.data.batches import collate
    from jaxtune.hf.base import describe

    kinds = ("sliding_attention" if window else "full_attention", "full_attention")
    config = {
        **SIZES,
        "model_type": "gemma2",
        "vocab_size": WORDS,
        "num_hidden_layers": layers,
        "layer_types": [kinds[i % 2] for i in range(layers)],
        "max_position_embeddings": max(LENGTHS),
        "hidden_activation": "gelu_pytorch_tanh",
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    }
    base, rng = describe("random", ASSETS, config, dtype="float32", remat=remat), np.random.default_rng(0)
    weights = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32) / 16, nn.unbox(base.abstract))
    section = {"method": "lora", "r": 16, "target_modules": "all-linear"}
    step, _ = stepper(base, section, dtype="float32", params=jax.tree.map(jax.numpy.asarray, weights))
    rows = [(rng.integers(3, WORDS, length, np.int32), np.ones(length, bool)) for _ in range(TOKENS // length)]
    batch, best = collate(rows, len(rows), length), float("inf")
    step(batch)
    for _ in range(rounds):
        start = time.process_time()
        step(batch)
        best = min(best, time.process_time() - start)
    return best


def bounds() -> tuple[list[int], list[float]]:
    """(chips, the least seconds of a step) for each slice of v5e on which it fits."""
    from jaxtune.plan import refresh, search
    from jaxtune.plan.abstract import open_config
    from jaxtune.plan.chips import chip_named

    chip, found = chip_named("v5e"), []
    with refresh.config_of(refresh.Case("gemma-2-2b", "lora", "v5e", 1, ROWS, {})) as c:
        base = open_config(c)
        for count in chip.counts():
            if ROWS % count == 0 and (one := search.plan(c, base, chip, count)).fits:
                found.append((count, one.bound.step))
    return [count for count, _ in found], [step for _, step in found]


def slopes(x: Sequence[int], y: Sequence[float]) -> list[float]:
    """Between each and the one before it, on a log plot."""
    return (np.diff(np.log(y)) / np.diff(np.log(x))).tolist()


def draw(curves: dict[str, tuple[Sequence[int], list[float]]], path: Path) -> None:
    """All axes logarithmic; the legend has the slope between the last two points."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (measured, planned) = plt.subplots(1, 2, figsize=(10, 4))
    for name, (x, y) in curves.items():
        axes = planned if name == CHIPS else measured
        axes.loglog(x, y, "o-", base=2, label=f"{name}: slope {slopes(x, y)[-1]:.2f} at the end")
    measured.set(title=f"A LoRA step of {TOKENS} tokens, one CPU core", ylabel="processor seconds")
    measured.set_xlabel(f"tokens of a row ({USUAL_LAYERS} layers), or layers (rows of {USUAL_LENGTH})")
    planned.set(title=f"A LoRA step of Gemma 2 2b, {ROWS} rows of 2048", ylabel="least seconds, by the plan")
    planned.set_xlabel("v5e chips")
    for axes in (measured, planned):
        axes.grid(True, which="both", alpha=0.3)
        axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--remat", default="full")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--core", type=int, default=0, help="the one core that everything runs on")
    parser.add_argument("--plot", type=Path)
    a = parser.parse_args()
    os.sched_setaffinity(0, {a.core})
    os.environ["JAX_PLATFORMS"] = "cpu"
    from jaxtune import compiler

    compiler.keep_memory()
    how = {"remat": a.remat, "rounds": a.rounds}
    curves: dict[str, tuple[Sequence[int], list[float]]] = {}
    for name, window in (("length, half the layers local", True), ("length, all layers global", False)):
        curves[name] = LENGTHS, [seconds(length, USUAL_LAYERS, window=window, **how) for length in LENGTHS]
        show(name, *curves[name])
    curves["layers"] = LAYERS, [seconds(USUAL_LENGTH, layers, window=True, **how) for layers in LAYERS]
    show("layers", *curves["layers"])
    curves[CHIPS] = bounds()
    show(CHIPS, *curves[CHIPS])
    if a.plot:
        draw(curves, a.plot)


def show(name: str, x: Sequence[int], y: list[float]) -> None:
    print(name)
    for n, s, slope in zip(x, y, [float("nan"), *slopes(x, y)], strict=True):
        print(f"{n:>8}{s:>9.3f} s" + ("" if np.isnan(slope) else f"   slope {slope:5.2f}"), flush=True)


if __name__ == "__main__":
    main()
