"""Quantised weights beside bitsandbytes: the same codes, scales and values, to the bit; and where they may lie."""

import bitsandbytes.functional as bnb
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import PartitionSpec

from jaxtune import mesh as meshes
from jaxtune.errors import UserError
from jaxtune.quant import Scheme, dynamic, int8, nf4, scheme_of
from jaxtune.quant.box import spec


def weights():
    """[out, in] or [vocab, width], as Hugging Face stores them; of one size, to be compiled once."""
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((64, 256))
    ties = np.tile(nf4.MIDPOINTS[np.arange(64) % 15], (64, 4))
    ties[:, ::64] = 1.0  # the block's largest, so that the others stay on the midpoints
    wild = np.where(rng.random((64, 256)) < 0.5, 0, normal * np.exp(4 * rng.standard_normal((64, 256))))
    found = {
        "normal": normal * 0.05,
        "ties": ties,
        "zeros": np.zeros((64, 256)),
        "blocks_of_zeros": np.where(np.arange(256) < 128, 0, normal),
        "wild": wild,
        "one_sided": -np.abs(normal),
        "tiny": normal * 1e-30,
        "with_denormals": np.where(rng.random((64, 256)) < 0.3, 1e-41, normal),
        "of_gemma_2": rng.standard_normal((1024, 2304)) * 0.03,
    }
    return {name: w.astype(np.float32) for name, w in found.items()}


quantise = jax.jit(nf4.quantise, static_argnames=("double", "axis"))
value = jax.jit(lambda box: box.astype(jnp.float32))


def stored(w, axis):
    """A kernel's or a table's layout of what Hugging Face stores."""
    return jnp.asarray(w.T if axis == -2 else w)


def codes_of(box):
    """The box's codes as bitsandbytes counts them, one a weight, in its order."""
    halves = np.asarray(box.codes).astype(np.int64)
    halves = np.moveaxis(halves, box.axis, -1)
    blocks = halves.reshape(*halves.shape[:-1], -1, 32)
    return np.concatenate([blocks >> 4, blocks & 15], axis=-1).reshape(-1)


@pytest.mark.parametrize("name", list(weights()))
@pytest.mark.parametrize("axis", [-2, -1])
def test_nf4_equals_bitsandbytes(name, axis):
    w = weights()[name]
    packed, state = bnb.quantize_4bit(torch.tensor(w), quant_type="nf4", blocksize=64)
    box = quantise(stored(w, axis), axis=axis)
    theirs = packed.numpy().reshape(-1).astype(np.int64)
    theirs = np.stack([theirs >> 4, theirs & 15], axis=1).reshape(-1)
    if name != "with_denormals":  # XLA, as CUDA with --use_fast_math, takes them for zeros; so do both codes
        np.testing.assert_array_equal(codes_of(box), theirs)
    absmax = np.asarray(box.absmax).T if axis == -2 else np.asarray(box.absmax)
    np.testing.assert_array_equal(absmax.reshape(-1), state.absmax.numpy())
    values = bnb.dequantize_4bit(packed, state).numpy()
    np.testing.assert_array_equal(value(box), stored(values, axis))
    assert box.shape == stored(w, axis).shape
    if axis == -1:
        index = np.array([[2, 0], [3, 2]])
        np.testing.assert_array_equal(box.rows(jnp.asarray(index)), values[index])


def by_the_kernel(w):
    """Double quantisation as bitsandbytes' CUDA kernels do it, in numpy: (codes, nested, offset) of the scales."""
    _, state = bnb.quantize_4bit(torch.tensor(w), quant_type="nf4", blocksize=64)
    absmax, values = state.absmax.numpy(), bnb.create_dynamic_map().numpy()
    offset = np.float32(absmax.mean(dtype=np.float64))
    padded = np.pad(absmax - offset, (0, -absmax.size % 256)).reshape(-1, 256)
    nested = np.abs(padded).max(axis=1)
    inverse = np.divide(np.float32(1), nested, where=nested > 0, out=np.zeros_like(nested))
    midpoints = (values[:-1] + values[1:]) / np.float32(2)
    codes = np.searchsorted(midpoints, padded * inverse[:, None], side="left")
    return codes.reshape(-1)[: absmax.size], nested, offset


@pytest.mark.parametrize("name", ["normal", "one_sided", "wild", "of_gemma_2", "zeros"])
@pytest.mark.parametrize("axis", [-2, -1])
def test_double_quantisation(name, axis):
    w = weights()[name]
    box = quantise(stored(w, axis), axis=axis, double=True)
    codes, nested, offset = by_the_kernel(w)
    found = np.asarray(box.absmax).T if axis == -2 else np.asarray(box.absmax)
    # The offset is a mean, whose last bit depends on the order of the sum: now and then a code is the next one.
    assert np.asarray(box.offset) == pytest.approx(offset, rel=1e-6)
    assert np.abs(found.reshape(-1).astype(int) - codes).max() <= 1
    assert np.mean(found.reshape(-1) != codes) < 2e-3
    np.testing.assert_allclose(box.nested, nested, rtol=1e-5)
    # What the stored numbers stand for is bitsandbytes' own to the bit.
    theirs = bnb.dequantize_blockwise(
        torch.tensor(found.reshape(-1).copy()),
        absmax=torch.tensor(np.asarray(box.nested)),
        code=bnb.create_dynamic_map(),
        blocksize=256,
    ).numpy() + np.asarray(box.offset)
    scales = np.asarray(jax.jit(lambda box: box.scales())(box))
    np.testing.assert_array_equal((scales.T if axis == -2 else scales).reshape(-1), theirs)


def test_maps_equal_bitsandbytes():
    np.testing.assert_array_equal(nf4.CODES, bnb.get_4bit_type("nf4", device="cpu").numpy())
    np.testing.assert_array_equal(dynamic.dynamic_map(signed=True), bnb.create_dynamic_map(signed=True).numpy())


def test_rows_that_end_inside_a_block():
    """bitsandbytes' CPU build dequantises such weights wrongly, so its codes and scales are put together here."""
    w = np.random.default_rng(1).standard_normal((7, 50)).astype(np.float32)
    packed, state = bnb.quantize_4bit(torch.tensor(w), quant_type="nf4", blocksize=64)
    packed = packed.numpy().reshape(-1)
    codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[: w.size]
    theirs = nf4.CODES[codes] * np.repeat(state.absmax.numpy(), 64)[: w.size]
    np.testing.assert_array_equal(np.asarray(nf4.rounded(jnp.asarray(w.T))).T.reshape(-1), theirs)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_values_are_rounded_once_to_what_the_weight_was(dtype):
    w = weights()["normal"]
    half = torch.tensor(w).to(torch.bfloat16 if dtype == jnp.bfloat16 else torch.float16)
    packed, state = bnb.quantize_4bit(half, quant_type="nf4", blocksize=64)
    theirs = bnb.dequantize_4bit(packed, state)
    assert theirs.dtype == half.dtype
    box = nf4.quantise(jnp.asarray(w.T).astype(dtype))
    for kind in (jnp.float32, dtype):
        np.testing.assert_array_equal(box.astype(kind).astype(jnp.float32).T, theirs.float().numpy())


@pytest.mark.parametrize("name", ["normal", "zeros", "one_sided", "of_gemma_2"])
def test_int8_equals_bitsandbytes(name):
    """Whose weights are float16 when they are quantised."""
    w = weights()[name].astype(np.float16)
    codes, absmax, _ = bnb.int8_vectorwise_quant(torch.tensor(w), threshold=0.0)
    box = jax.jit(int8.quantise)(jnp.asarray(w.T))
    np.testing.assert_array_equal(np.asarray(box.codes).T, codes.numpy())
    np.testing.assert_array_equal(box.absmax, absmax.numpy())
    x = np.random.default_rng(3).standard_normal((5, w.shape[1])).astype(np.float32)
    expected = x @ (codes.numpy().astype(np.float32) * absmax.numpy()[:, None] / 127).T
    np.testing.assert_allclose(box.matmul(jnp.asarray(x)), expected, rtol=1e-4, atol=1e-4)
    rows = int8.quantise(jnp.asarray(w), axis=-1).rows(jnp.arange(2))
    np.testing.assert_array_equal(rows, value(box).T[:2])


@pytest.mark.parametrize("kind", [Scheme("nf4"), Scheme("nf4", double=True), Scheme("int8")], ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_product_and_its_gradient(kind, dtype):
    """x @ w and its gradient are those of the dequantised matrix; nothing flows to the box."""
    rng = np.random.default_rng(2)
    box = kind.quantise(jnp.asarray(rng.standard_normal((128, 96)).astype(np.float32)), -2)
    x = jnp.asarray(rng.standard_normal((5, 128)).astype(np.float32)).astype(dtype)
    ct = jnp.asarray(rng.standard_normal((5, 96)).astype(np.float32))
    whole = box.astype(jnp.float32)
    y, back = jax.vjp(lambda x: box.matmul(x), x)
    expected = x.astype(jnp.float32) @ whole
    assert y.dtype == jnp.float32
    tolerance = 1e-5 if dtype == jnp.float32 else 1e-2
    assert float(jnp.abs(y - expected).max()) <= tolerance * float(jnp.abs(expected).max())
    (dx,), wanted = back(ct), ct @ whole.T
    assert dx.dtype == dtype
    assert float(jnp.abs(dx.astype(jnp.float32) - wanted).max()) <= tolerance * float(jnp.abs(wanted).max())


def test_blocks_are_never_cut():
    mesh = meshes.make_mesh(1, 8, 1)
    assert spec(mesh, "w", ("embed", "mlp"), (1024, 96), 0, 64) == PartitionSpec("fsdp", "tensor")
    # 2304 / 8 = 4.5 blocks: the outputs are split instead, for which 8 ways are fine.
    assert spec(mesh, "w", ("embed", "heads"), (2304, 2048), 0, 64) == PartitionSpec(None, ("tensor", "fsdp"))
    assert spec(mesh, "w", ("vocab", "embed"), (1000, 2304), 1, 64) == PartitionSpec(("tensor", "fsdp"), None)
    # What the mesh would leave whole stays whole.
    assert spec(mesh, "w", ("embed", "mlp"), (64 * 3 + 4, 96), 0, 4) == PartitionSpec(None, "tensor")
    both = meshes.make_mesh(1, 4, 2)
    assert spec(both, "w", ("embed", "mlp"), (384, 64), 0, 64) == PartitionSpec(None, ("tensor", "fsdp"))
    assert spec(both, "w", ("mlp", "embed"), (384, 64), 0, 64) == PartitionSpec("tensor", "fsdp")
    with pytest.raises(UserError, match=r"k is 320 x 36 in .*its 5 blocks nor its other 36.*: 1, 2, 3, 4, 5"):
        spec(mesh, "k", ("embed", "heads"), (320, 36), 0, 64)


def test_settings_that_mean_nothing():
    assert scheme_of(None) is None and scheme_of("nf4", True, True) == Scheme("nf4", True, True)
    for given, said in (
        (("int4",), "int4"),
        (("int8", True), "double_quant"),
        ((None, True), "double_quant"),
        ((None, False, True), "quant_embedding"),
    ):
        with pytest.raises(UserError, match=said):
            scheme_of(*given)
