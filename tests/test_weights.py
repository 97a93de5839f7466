"""Checkpoints out and in: what is saved loads in transformers, in shards of the asked size, and loading stays small."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
import reference
import transformers
from safetensors.numpy import load_file, save_file

import jaxtune
from jaxtune import mesh as meshes
from jaxtune.errors import MissingInputError, NetworkError
from jaxtune.hf.base import open_base
from jaxtune.hf.files import fingerprint
from jaxtune.hf.weights import save_params


@pytest.mark.parametrize("name", ["gemma", "gemma2_untied", "gemma3"])
def test_saved_checkpoint_is_transformers_own(checkpoint, tmp_path, name):
    """Tensor for tensor the file that transformers wrote, in one shard and in many."""
    model, directory = checkpoint(name)
    lm = jaxtune.load(directory)
    for limit, shards in ((2**30, 1), (60_000, 4)):
        out = tmp_path / str(limit)
        save_params(out, lm.base.rows, lm.variables["params"], directory, dtype=np.float32, shard_bytes=limit)
        files = sorted(out.glob("*.safetensors"))
        assert len(files) >= shards and (len(files) == 1 or all(f.stat().st_size < 2 * limit for f in files))
        ours = {k: v for f in files for k, v in load_file(f).items()}
        theirs = load_file(directory / "model.safetensors")
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            np.testing.assert_array_equal(ours[key], value)
        ids, _ = reference.batch()
        again = transformers.AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager")
        reference.close(reference.logits(again, ids), reference.logits(model, ids), 1e-6)


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2)])
def test_sharded_loading_is_bit_equal(checkpoint, sizes):
    """Every device reads its own part; together they are the checkpoint."""
    _, directory = checkpoint("gemma2")
    whole = jaxtune.load(directory).variables["params"]
    split = jaxtune.load(directory, mesh=meshes.make_mesh(*sizes)).variables["params"]
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(split), strict=True):
        np.testing.assert_array_equal(a, b)
    kernel = split["layers"]["mlp"]["gate"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // (sizes[1] * sizes[2])


def test_fingerprint_sees_every_file(checkpoint, tmp_path):
    model, directory = checkpoint("gemma2")
    reference.save(model, tmp_path / "a", max_shard_size="60KB")
    first = fingerprint(tmp_path / "a")
    assert first == fingerprint(tmp_path / "a") != fingerprint(directory)
    path = sorted((tmp_path / "a").glob("*.safetensors"))[-1]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert fingerprint(tmp_path / "a") != first


@pytest.mark.slow
def test_loading_holds_one_parameter_besides_the_model(tmp_path):
    """Peak anonymous memory over the model itself stays below 1.5 times the largest stacked parameter."""
    config = {
        "model_type": "gemma2",
        "vocab_size": 64000,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 128,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    base = open_base(str(tmp_path))
    shards, weight_map = [{}], {}
    for row in base.rows:
        for name in row.names:
            shards[-1][name] = np.full(row.tensor_shape, 0.01, np.float32)
            if sum(t.nbytes for t in shards[-1].values()) > 200e6:
                shards.append({})
    for i, shard in enumerate(shards):
        save_file(shard, tmp_path / f"model-{i}.safetensors")
        weight_map |= {name: f"model-{i}.safetensors" for name in shard}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    del shards
    script = textwrap.dedent("""
        import sys, threading, time
        import jax, jaxtune
        from jaxtune.hf.base import load_base, open_base
        from jaxtune.mesh import make_mesh
        from jaxtune.quant import scheme_of
        def anonymous():
            return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('RssAnon')) * 1024
        base = open_base(sys.argv[1], quant=scheme_of(*sys.argv[2:] or [None]))
        mesh = make_mesh(1, 1, 1); jax.block_until_ready(jax.numpy.zeros(1))
        before, peak, done = anonymous(), [0], threading.Event()
        def watch():
            while not done.wait(0.002):
                peak[0] = max(peak[0], anonymous())
        thread = threading.Thread(target=watch); thread.start()
        params = jax.block_until_ready(load_base(base, mesh, lambda path: jax.numpy.float32))
        done.set(); thread.join()
        sizes = [leaf.nbytes for leaf in jax.tree.leaves(params)]
        print(peak[0] - before, sum(sizes), max(sizes))
    """)
    one_device = os.environ | {"XLA_FLAGS": ""}
    for quant in ([], ["nf4"]):
        command = [sys.executable, "-c", script, str(tmp_path), *quant]
        out = subprocess.run(command, capture_output=True, text=True, check=True, env=one_device)
        peak, model, largest = map(int, out.stdout.split())
        print(f"{quant} peak {peak / 1e6:.0f} MB, model {model / 1e6:.0f} MB, largest part {largest / 1e6:.0f} MB")
        assert peak - model < 1.5 * largest


class TestHub:
    """Hub ids, against a cache laid out as huggingface_hub does and no network."""

    @pytest.fixture
    def cache(self, checkpoint, tmp_path, monkeypatch):
        """org/tiny at revision main, as a download leaves it: snapshots of links to blobs named by their hash."""
        _, directory = checkpoint("gemma2")
        repository = tmp_path / "hub" / "models--org--tiny"
        snapshot = repository / "snapshots" / ("a" * 40)
        for folder in (repository / "blobs", repository / "refs", snapshot):
            folder.mkdir(parents=True)
        (repository / "refs" / "main").write_text("a" * 40)
        for path in directory.iterdir():
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            shutil.copy(path, repository / "blobs" / digest)
            (snapshot / path.name).symlink_to(repository / "blobs" / digest)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        return snapshot

    def test_id_loads_from_the_cache(self, cache, checkpoint):
        lm = jaxtune.load("org/tiny")
        ids, _ = reference.batch()
        np.testing.assert_array_equal(lm.logits(ids), jaxtune.load(checkpoint("gemma2")[1]).logits(ids))

    def test_fingerprint_is_that_of_the_files(self, cache, checkpoint):
        """Blobs are named by their SHA-256, which is taken as it stands: either way the model is the same."""
        assert fingerprint(cache) == fingerprint(checkpoint("gemma2")[1])

    @pytest.mark.usefixtures("cache")
    def test_unknown_id_says_what_to_do(self):
        with pytest.raises(NetworkError, match="Give a local directory"):
            jaxtune.load("org/other")
        with pytest.raises(MissingInputError, match="no such directory"):
            jaxtune.load("org:bad id")
