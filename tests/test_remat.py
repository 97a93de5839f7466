"""What the backward pass keeps and computes again by each name of `train.remat`: the same numbers, other memory."""

import jax
import numpy as np
import pytest
from test_training import Run, config, ragged_rows

from jaxtune.remat import NAMES


def test_policies_differ_in_memory_alone(checkpoint):
    """One step of each: the same loss and gradient norm; the more is kept, the more temporary memory."""
    _, directory = checkpoint("gemma2")
    rows, found, memory = ragged_rows(6, seed=0), {}, {}
    for name in NAMES:
        run = Run(directory, config(), remat=name)
        if name == "offload":
            # A CPU's own memory is its host's, and XLA's CPU compiler has no such copies: what is traced must be there.
            with jax.set_mesh(run.mesh):
                text = str(jax.make_jaxpr(run.update)(run.state, run.adapted.frozen, run.put(rows)))
            assert "<host>[" in text
            continue
        sizes = run.compiled(rows).memory_analysis()
        assert sizes is not None
        memory[name] = sizes.temp_size_in_bytes
        found[name] = run.step(rows)
    # Layers three at a time, of four: the same again, and still computed again.
    found["unrolled"] = Run(directory, config(), remat="full", unroll=3).step(rows)
    for name, metrics in found.items():
        assert metrics["loss"] == pytest.approx(found["none"]["loss"], rel=1e-6), name
        assert metrics["grad_norm"] == pytest.approx(found["none"]["grad_norm"], rel=1e-5), name
    order = [memory[name] for name in ("full", "attn_out", "dots", "none")]
    assert order == sorted(order)
    assert len(set(order)) == len(order)
    assert np.all(np.array(order) > 0)
