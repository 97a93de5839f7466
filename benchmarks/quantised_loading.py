"""How much memory it takes to load a checkpoint into NF4: `python benchmarks/quantised_loading.py [--gigabytes 5]`.

Writes a random bfloat16 Gemma 2 of about that size in several files (in a temporary directory), loads it in a fresh
process on one device and prints, in GB: the checkpoint, the loaded boxes and arrays, the largest tensor, and by how
much the process grew at its peak beyond what stays.  On a CPU the device's memory is the host's, so that the growth
counts the layer that is being quantised, too.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

CONFIG = {
    "model_type": "gemma2",
    "vocab_size": 64000,
    "hidden_size": 3584,
    "intermediate_size": 14336,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 256,
}


def write(directory: Path, gigabytes: float) -> None:
    """A checkpoint of random weights, in files of at most 2 GB."""
    import ml_dtypes
    import numpy as np

    from jaxtune.hf.base import describe
    from jaxtune.hf.weights import Tensor, split, write_safetensors

    def described(layers: int):
        return describe("random", directory, CONFIG | {"num_hidden_layers": layers}, dtype="bfloat16")

    def size(layers: int) -> int:
        return 2 * sum(len(row.names) * math.prod(row.tensor_shape) for row in described(layers).rows)

    layers = max(2, round((gigabytes * 1e9 - 2 * size(1) + size(2)) / (size(2) - size(1))))
    rng, dtype = np.random.default_rng(0), np.dtype(ml_dtypes.bfloat16)
    tensors = [
        Tensor(
            name, row.tensor_shape, dtype, lambda shape=row.tensor_shape: rng.random(shape, np.float32).astype(dtype)
        )
        for row in described(layers).rows
        for name in row.names
    ]
    weight_map = {}
    for number, shard in enumerate(split(tensors, 2 * 10**9)):
        write_safetensors(directory / f"model-{number}.safetensors", shard)
        weight_map |= {tensor.name: f"model-{number}.safetensors" for tensor in shard}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))


def anonymous() -> int:
    """Bytes of this process that are in no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


def load(directory: str) -> None:
    import jax
    import jax.numpy as jnp

    from jaxtune.hf.base import load_base, open_base
    from jaxtune.mesh import make_mesh
    from jaxtune.quant import scheme_of

    base = open_base(directory, dtype="bfloat16", quant=scheme_of("nf4", double=True))
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    jax.block_until_ready(jnp.zeros(1))
    before, peak, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    start = time.perf_counter()
    params = jax.block_until_ready(load_base(base, mesh, lambda path: jnp.dtype("bfloat16")))
    seconds = time.perf_counter() - start
    done.set()
    thread.join()
    tensor = max(2 * math.prod(row.tensor_shape) for row in base.rows)
    stays = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    rows = {
        "checkpoint": sum(2 * len(row.names) * math.prod(row.tensor_shape) for row in base.rows),
        "loaded": stays,
        "largest tensor": tensor,
        "peak beyond what stays": peak[0] - before - stays,
    }
    for name, value in rows.items():
        print(f"{name:24} {value / 1e9:7.3f} GB")
    print(f"{'seconds':24} {seconds:7.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=5.0)
    parser.add_argument("--load", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        load(arguments.load)
        return
    with tempfile.TemporaryDirectory() as directory:
        write(Path(directory), arguments.gigabytes)
        subprocess.run([sys.executable, __file__, "--load", directory], check=True)


if __name__ == "__main__":
    main()
