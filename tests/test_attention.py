"""Every implementation of attention against the plain one, which `tests/test_gemma.py` compares with transformers."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune import mesh as meshes
from jaxtune.attention import Prefix, attend, causal, prefix_visible, visible
from jaxtune.attention.blocks import by_blocks
from jaxtune.attention.mosaic import first_keys, mosaic
from jaxtune.attention.share import repeated
from jaxtune.attention.splash import padded_length, splash

# Real tokens of two packed segments, then padding; and one row that is padded on the left.
B, T, H = 2, 300, 16


def inputs(heads, kv_heads, dtype=jnp.float32, length=T):
    keys = jax.random.split(jax.random.key(heads), 4)
    q = jax.random.normal(keys[0], (B, length, heads, H), dtype)
    k, v = (jax.random.normal(key, (B, kv_heads, length, H), dtype) for key in keys[1:3])
    segments = np.zeros((B, length), np.int32)
    segments[0, : length // 3], segments[0, length // 3 : length - 30], segments[1, 40:] = 1, 2, 1
    real = jnp.asarray(segments > 0)[:, :, None, None]
    weight = jnp.where(real, jax.random.normal(keys[3], (B, length, heads, H)), 0.0)
    return (q, k, v), jnp.asarray(segments), weight


def plain(q, k, v, segments, *, window, prefix=None, **how: Any):
    slots = jnp.arange(q.shape[1])
    distance = jnp.int32(2**30 if window is None else window)
    return attend(q, k, v, visible(slots, segments, slots, segments, distance), prefix=prefix, **how)


def outcome(attention: Any, qkv, segments, weight, **how):
    """Outputs of real tokens, and the gradients of q, k and v."""

    def weighed(q, k, v):
        out = attention(q, k, v, segments, **how)
        return jnp.sum(jnp.where(weight != 0, out.astype(jnp.float32) * weight, 0.0)), out

    gradients, out = jax.jit(jax.grad(weighed, argnums=(0, 1, 2), has_aux=True))(*qkv)
    return (jnp.where(weight != 0, out, 0.0), *gradients)


def close(got, expected, tolerance):
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, expected, strict=True):
        error = np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).max()
        assert error <= tolerance * np.abs(np.asarray(b, np.float32)).max(), (name, error)


CASES = [(4, 2, None, None), (4, 1, 50.0, 37), (3, 3, None, 130)]


@pytest.mark.parametrize(("heads", "kv_heads", "softcap", "window"), CASES)
def test_blocks(heads, kv_heads, softcap, window):
    qkv, segments, weight = inputs(heads, kv_heads)
    how = {"window": window, "scale": 0.3, "softcap": softcap}
    expected = outcome(plain, qkv, segments, weight, **how)
    close(outcome(lambda *x, **y: by_blocks(*x, block=64, **y), qkv, segments, weight, **how), expected, 2e-6)


@pytest.mark.parametrize(("heads", "kv_heads", "softcap", "window"), CASES)
def test_splash(heads, kv_heads, softcap, window):
    """The kernel for TPUs, interpreted."""
    qkv, segments, weight = inputs(heads, kv_heads)
    how = {"window": window, "scale": 0.25, "softcap": softcap}
    expected = outcome(plain, qkv, segments, weight, **how)
    kernel = outcome(lambda *x, **y: splash(*x, interpret=True, **y), qkv, segments, weight, **how)
    close(kernel, expected, 1e-5)


@pytest.mark.parametrize(("heads", "kv_heads", "softcap", "window"), CASES)
def test_mosaic(heads, kv_heads, softcap, window):
    """What the kernel for GPUs is asked, answered by tokamax's plain operation."""
    pytest.importorskip("tokamax")
    qkv, segments, weight = inputs(heads, kv_heads)
    how = {"scale": 0.3, "softcap": softcap}
    expected = outcome(plain, qkv, segments, weight, window=window, **how)
    distance = jnp.int32(2**30 if window is None else window)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        asked = outcome(lambda *x, **y: mosaic(*x, distance, operation="xla", **y), qkv, segments, weight, **how)
    close(asked, expected, 2e-6)


def test_first_keys():
    """Of a packed row, of padding on the left, and of a window."""
    segments = jnp.array([[1, 1, 2, 2, 2, 0], [0, 0, 1, 1, 1, 1]])
    assert first_keys(segments, jnp.int32(2**30)).tolist() == [[0, 0, 2, 2, 2, 5], [0, 0, 2, 2, 2, 2]]
    assert first_keys(segments, jnp.int32(2)).tolist() == [[0, 0, 2, 2, 3, 5], [0, 0, 2, 2, 3, 4]]


def test_blocks_behind_a_prefix():
    qkv, segments, weight = inputs(4, 2)
    keys = jax.random.normal(jax.random.key(9), (2, 5, 2, H))
    positions = jnp.maximum(jnp.cumsum(segments > 0, axis=1) - 1, 0) + 5
    prefix = Prefix(keys[0], keys[1], prefix_visible(positions, 5, jnp.int32(90)))
    how = {"window": 90, "scale": 0.3, "softcap": None, "prefix": prefix}
    expected = outcome(plain, qkv, segments, weight, **how)
    close(outcome(lambda *x, **y: by_blocks(*x, block=64, **y), qkv, segments, weight, **how), expected, 2e-6)


def test_splash_on_a_mesh():
    """Rows over data, heads over tensor: with kv heads that split, and with one that is repeated."""
    mesh = meshes.make_mesh(2, 1, 4)
    for heads, kv_heads in ((8, 4), (4, 1)):
        qkv, segments, weight = inputs(heads, kv_heads, length=256)
        how = {"window": None, "scale": 0.25, "softcap": 30.0}
        expected = outcome(plain, qkv, segments, weight, **how)
        with jax.set_mesh(mesh):
            kernel = outcome(lambda *x, **y: splash(*x, interpret=True, **y), qkv, segments, weight, **how)
        close(kernel, expected, 1e-5)


def test_layers_of_two_windows_take_their_own():
    """`causal` beyond the plain length: each kind its own window, in one program."""
    qkv, segments, weight = inputs(2, 1, length=600)
    windows = (100, None, 700)
    how: dict[str, Any] = {"scale": 0.3, "softcap": None}
    run = jax.jit(lambda kind: causal(*qkv, segments, windows=windows, kind=kind, **how))
    for kind, window in enumerate(windows):
        expected = plain(*qkv, segments, window=window, **how)
        got = run(jnp.int32(kind))
        np.testing.assert_allclose(jnp.where(weight != 0, got, 0.0), jnp.where(weight != 0, expected, 0.0), atol=2e-6)


def largest_square(text, length):
    """The most elements of an array in a compiled program with `length` twice in its shape."""
    shapes = [tuple(map(int, found.split(","))) for found in re.findall(r"f32\[([\d,]+)\]", text)]
    return max((int(np.prod(s)) for s in shapes if sum(size == length for size in s) > 1), default=0)


def test_no_square_of_a_long_text():
    """Neither pass keeps or makes an array of all scores; the plain one does, so that this could fail."""
    (q, k, v), segments, weight = inputs(2, 1, length=1200)

    def program(attention: Any):
        def loss(q, k, v):
            return jnp.sum(attention(q, k, v) * weight)

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, v).compile().as_text()

    how: dict[str, Any] = {"scale": 0.3, "softcap": 50.0}
    whole = program(lambda q, k, v: plain(q, k, v, segments, window=None, **how))
    assert largest_square(whole, 1200) >= B * 2 * 1200 * 1200
    chosen = program(lambda q, k, v: causal(q, k, v, segments, windows=(None,), kind=jnp.int32(0), **how))
    assert largest_square(chosen, 1200) == 0


@pytest.mark.parametrize(
    ("length", "expected"), [(100, (256, 256)), (512, (512, 512)), (2048, (2048, 512)), (2080, (2304, 384))]
)
def test_lengths_of_the_kernel(length, expected):
    assert padded_length(length) == expected


def test_heads_are_repeated_only_as_far_as_it_helps():
    x = jnp.arange(2 * 3 * 4 * 5, dtype=jnp.float32).reshape(2, 3, 4, 5)
    assert repeated(x, 12, 2).shape[1] == 6
    assert repeated(x, 12, 6).shape[1] == 6
    assert repeated(x, 3, 2).shape[1] == 3  # three query heads do not split in two
    assert repeated(x[:, :1], 8, 4).shape[1] == 4
    np.testing.assert_array_equal(repeated(x, 12, 2)[:, 0], repeated(x, 12, 2)[:, 1])
