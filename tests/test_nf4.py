"""NF4 beside bitsandbytes: the same codes, scales and values, to the bit."""

import bitsandbytes.functional
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxtune.quant import nf4


def weights():
    rng = np.random.default_rng(0)
    ties = np.tile(nf4.MIDPOINTS[np.arange(64) % 15], (32, 1)).astype(np.float32)
    ties[:, 0] = 1.0  # the block's largest, so that the others stay on the midpoints
    wild = rng.standard_normal((64, 256)) * np.exp(4 * rng.standard_normal((64, 256)))
    return {
        "normal": rng.standard_normal((96, 128)).astype(np.float32) * 0.05,
        "ties": ties,
        "zeros": np.zeros((4, 64), np.float32),
        "wild": np.where(rng.random(wild.shape) < 0.5, 0, wild).astype(np.float32),
        "one_sided": -np.abs(rng.standard_normal((8, 192))).astype(np.float32),
    }


@pytest.mark.parametrize("name", list(weights()))
def test_equals_bitsandbytes(name):
    w = weights()[name]
    packed, state = bitsandbytes.functional.quantize_4bit(torch.tensor(w), quant_type="nf4", blocksize=64)
    codes, absmax = jax.jit(nf4.quantise)(jnp.asarray(w.reshape(-1, 64)))
    flat = np.asarray(codes).reshape(-1)
    np.testing.assert_array_equal(flat[0::2] << 4 | flat[1::2], packed.numpy().reshape(-1))
    np.testing.assert_array_equal(absmax, state.absmax.numpy())
    theirs = bitsandbytes.functional.dequantize_4bit(packed, state).numpy()
    np.testing.assert_array_equal(jax.jit(nf4.rounded)(jnp.asarray(w.T)).T, theirs)


def test_rows_that_end_inside_a_block():
    """bitsandbytes' CPU build dequantises such weights wrongly, so its codes and scales are put together here."""
    w = np.random.default_rng(1).standard_normal((7, 50)).astype(np.float32)
    packed, state = bitsandbytes.functional.quantize_4bit(torch.tensor(w), quant_type="nf4", blocksize=64)
    packed = packed.numpy().reshape(-1)
    codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[: w.size]
    theirs = nf4.CODES[codes] * np.repeat(state.absmax.numpy(), 64)[: w.size]
    np.testing.assert_array_equal(np.asarray(nf4.rounded(jnp.asarray(w.T))).T.reshape(-1), theirs)
