"""What the loss over a large vocabulary costs: plain logits, chunks of tokens, blocks of words.

    python benchmarks/loss.py                # CPU seconds of one value and gradient, and the compiled temporary memory
    python benchmarks/loss.py --dtype float32 --words 256000 --width 256

One process, the orders alternating, compiling not counted.  Chunks are what `jaxtune.loss` takes on CPUs and GPUs,
blocks what it takes on TPUs; here both run on a CPU.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.layers import output_logits
from jaxtune.loss import cross_entropy, how

ORDERS = ("plain logits", "chunks", "blocks")


def plain(hidden: Any, table: Any, targets: Any, weights: Any, softcap: float) -> Any:
    logits = output_logits(hidden, table, softcap)
    own = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.sum((jax.nn.logsumexp(logits, axis=-1) - own) * weights)


def compiled(order: str, trained: bool, given: Any) -> Any:
    """The compiled (loss, gradients) of an order; `trained`: the table's gradient, too."""
    how.platform = lambda: "tpu" if order == "blocks" else "cpu"

    def loss(hidden: Any, table: Any, targets: Any, weights: Any) -> Any:
        if order == "plain logits":
            return plain(hidden, table, targets, weights, 30.0)
        return cross_entropy(hidden, table, targets, weights, 30.0)[0]

    return jax.jit(jax.value_and_grad(loss, (0, 1) if trained else 0)).lower(*given).compile()


def cpu_seconds(run: Callable[..., Any], given: Any) -> float:
    start = time.process_time()
    jax.block_until_ready(run(*given))
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, usual in (("rows", 8), ("length", 256), ("width", 256), ("words", 32000), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=usual)
    parser.add_argument("--dtype", default="bfloat16")
    a = parser.parse_args()
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((a.rows, a.length, a.width)), a.dtype)
    table = jnp.asarray(rng.standard_normal((a.words, a.width)) * 0.05, a.dtype)
    targets = jnp.asarray(rng.integers(0, a.words, (a.rows, a.length)), jnp.int32)
    share = {"all": 1.0, "25 %": 0.25}
    weights = {name: jnp.asarray(rng.random(targets.shape) < part, jnp.float32) for name, part in share.items()}
    print(f"{a.rows} x {a.length} tokens, width {a.width}, {a.words:,} words, {a.dtype}")
    print("CPU seconds of a value and gradient, and (beside plain logits)")
    print(f"{'head':8} {'order':14} {'temporary':>12} {'all trained':>18} {'25 % trained':>18}")
    for trained in (False, True):
        runs = {order: compiled(order, trained, (hidden, table, targets, weights["all"])) for order in ORDERS}
        best = {(order, name): float("inf") for order in ORDERS for name in weights}
        for i in range(a.rounds + 1):
            for order in ORDERS if i % 2 else reversed(ORDERS):
                for name, weight in weights.items():
                    seconds = cpu_seconds(runs[order], (hidden, table, targets, weight))
                    best[order, name] = min(best[order, name], seconds) if i else float("inf")
        for order in ORDERS:
            shown = [f"{best[order, n]:8.3f} ({best[order, n] / best[ORDERS[0], n]:.2f})" for n in weights]
            temporary = runs[order].memory_analysis().temp_size_in_bytes / 2**20
            head = "trained" if trained else "frozen"
            print(f"{head:8} {order:14} {temporary:8.1f} MiB {shown[0]:>18} {shown[1]:>18}", flush=True)


if __name__ == "__main__":
    main()
