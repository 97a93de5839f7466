"""AdamW whose two moments take a byte each, in blocks of at most 256 with one float32 scale.

Dettmers et al. 2022 (8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861), as bitsandbytes' AdamW8bit: codes
are places in the dynamic map (jaxtune/quant/dynamic.py), signed for the first moment and unsigned for the second; a
step dequantises, updates, moves the weight by the exact moments and quantises them again; tensors of fewer than 4096
values keep float32 moments, which cost nothing.

Codes have their weight's shape and sharding.  Blocks run along one axis, so that a shard holds whole blocks;
bitsandbytes' run over the weight as it lies in memory, which is the same where they run along `in`.  A stacked weight
[L, I, O] is done layer by layer, so that no more than a layer's moments exist in float32.

Inside a step, codes are found and read by arithmetic: the values between two powers of ten lie on a line.  A search in
the table would be gathers, which are slow on TPUs.  It differs from the nearest value of the table in one or two codes
of a million, where two are equally near, and from the values by 6e-7 of themselves.

One thing is not as in bitsandbytes: a second moment above zero never becomes zero.  There, a number whose gradients are
1/2500 of its block's largest loses its second moment and keeps its first, and the next step divides by eps.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, UInt8

from jaxtune.quant.dynamic import dynamic_map

BLOCK = 256
SMALLEST = 64
# Fewer values than these keep moments in float32.
LEAST = 4096
# Into how many parts meshes may cut a table's rows so that each has whole blocks.
PARTS = 16


class Adam8bit(NamedTuple):
    """count: steps done, int32.  mu, nu: {path: moment}, uint8 codes of the weight's shape, or float32 where the weight
    is small.  mu_scale, nu_scale: {path: the largest magnitude of each block} of those in codes: the weight's shape,
    but for the axis of blocks, which has their number."""

    count: Any
    mu: dict[str, Any]
    nu: dict[str, Any]
    mu_scale: dict[str, Any]
    nu_scale: dict[str, Any]


def adamw8bit(
    rate: optax.ScalarOrSchedule, b1: float, b2: float, eps: float, weight_decay: float
) -> optax.GradientTransformation:
    """The rule for a flat dict {path: weight}.

    Args:
      rate: the learning rate, by the number of steps done before.
    """

    def init(params: Any) -> Any:
        coded = [path for path, w in params.items() if w.size >= LEAST]
        moments = [
            {p: jnp.zeros(w.shape, jnp.uint8 if p in coded else jnp.float32) for p, w in params.items()}
            for _ in range(2)
        ]
        scales = [{p: jnp.zeros(scales_shape(params[p].shape), jnp.float32) for p in coded} for _ in range(2)]
        return Adam8bit(jnp.zeros((), jnp.int32), *moments, *scales)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        count = state.count + 1
        lr: Any = rate(state.count) if callable(rate) else rate
        # 1 - b ** count, which float32 has no digits for in the first steps.
        left1, left2 = (-jnp.expm1(count.astype(jnp.float32) * math.log(b)) if b else 1.0 for b in (b1, b2))

        def adam(g: Any, w: Any, m: Any, v: Any) -> tuple[Any, Any, Any]:
            m = b1 * m + (1 - b1) * g
            v = b2 * v + (1 - b2) * g * g
            move = m / left1 / (jnp.sqrt(v / left2) + eps)
            return -lr * (move + weight_decay * w if weight_decay else move), m, v

        moved: dict[str, Any] = {}
        new = Adam8bit(count, {}, {}, {}, {})
        for path, g in updates.items():
            moments = state.mu[path], state.nu[path]
            if path not in state.mu_scale:
                move, new.mu[path], new.nu[path] = adam(
                    g.astype(jnp.float32), params[path].astype(jnp.float32), *moments
                )
                moved[path] = move.astype(g.dtype)
                continue
            one = functools.partial(_step, adam, *layout(g.shape))
            leaves = g, *moments, state.mu_scale[path], state.nu_scale[path]
            over = _by_layer(one, leaves, params[path]) if g.ndim > 2 else one(*leaves, params[path])
            moved[path], new.mu[path], new.nu[path], new.mu_scale[path], new.nu_scale[path] = over
        return moved, new

    return optax.GradientTransformation(init, update)


def _step(
    adam: Any, axis: int, size: int, g: Any, mu: Any, nu: Any, mu_scale: Any, nu_scale: Any, w: Any
) -> tuple[Any, ...]:
    """(move, mu, nu, mu_scale, nu_scale) of a weight with blocks of `size` along `axis`."""
    cut = functools.partial(_blocks, axis=axis, size=size)
    m = decode(cut(mu), signed=True) * jnp.expand_dims(mu_scale, axis)
    v = decode(cut(nu), signed=False) * jnp.expand_dims(nu_scale, axis)
    move, m, v = adam(cut(g.astype(jnp.float32)), cut(w.astype(jnp.float32)), m, v)
    (mu, mu_scale), (nu, nu_scale) = (_quantise(x, axis, signed) for x, signed in ((m, True), (v, False)))
    move, mu, nu = (_joined(x, axis, w.shape[axis]) for x in (move, mu, nu))
    return move.astype(g.dtype), mu, nu, mu_scale, nu_scale


def _by_layer(one: Any, leaves: tuple[Any, ...], w: Any) -> tuple[Any, ...]:
    """`one` of each layer in turn, in the place of its arguments: the gradient's becomes the move's."""

    def layer(i: Any, leaves: Any) -> Any:
        of = functools.partial(jax.lax.dynamic_index_in_dim, index=i, axis=0, keepdims=False)
        new = one(*map(of, leaves), of(w))
        return tuple(jax.lax.dynamic_update_index_in_dim(x, y, i, 0) for x, y in zip(leaves, new, strict=True))

    return jax.lax.fori_loop(0, w.shape[0], layer, leaves)


# ---------------------------------------------------------------- blocks


def layout(shape: tuple[int, ...]) -> tuple[int, int]:
    """(axis, size) of a weight's blocks; the axis is -1 or -2.  It does not depend on the mesh: a checkpoint of one is
    read on another.

    Of stacked weights [L, I, O], 256 along the axis that they fill, and of two that whose number of blocks can be
    halved more often, as meshes do: usually not the model's width (9 blocks of 2304), which `fsdp` splits.

    Of a table [V, D], within rows, since some tokens are a thousand times as frequent as others; the size is the
    largest from 64 to 256 that gives a multiple of 16 blocks (144 of 2304), where there is one.
    """
    n = shape[-1]
    if len(shape) < 3:
        return -1, max((s for s in range(SMALLEST, BLOCK + 1) if n % (PARTS * s) == 0), default=min(n, BLOCK))

    def worth(axis: int) -> tuple[bool, int, int]:
        blocks = -(-shape[axis] // BLOCK)
        return shape[axis] % BLOCK == 0, blocks & -blocks, shape[axis]

    axis = max((-2, -1), key=worth)
    return axis, min(shape[axis], BLOCK)


def scales_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    axis, size = layout(shape)
    return tuple(-(-n // size) if i == len(shape) + axis else n for i, n in enumerate(shape))


def _blocks(x: Array, axis: int, size: int) -> Array:
    """[..., n, ...] to [..., ⌈n/size⌉, size, ...], the last block filled up with zeros."""
    place, n = x.ndim + axis, x.shape[axis]
    if n % size:
        x = jnp.pad(x, [(0, -n % size if i == place else 0) for i in range(x.ndim)])
    return x.reshape(*x.shape[:place], -1, size, *x.shape[place + 1 :])


def _joined(x: Array, axis: int, n: int) -> Array:
    """The way back, to n values."""
    place = x.ndim + axis
    x = x.reshape(*x.shape[: place - 1], -1, *x.shape[place + 1 :])
    return x if x.shape[axis] == n else jax.lax.slice_in_dim(x, 0, n, axis=x.ndim + axis)


# ---------------------------------------------------------------- codes


@functools.cache
def _lines(signed: bool) -> list[tuple[float, int, int, float, float]]:
    """The map's magnitudes as lines: zero, seven decades, one.

    (border, first, last, step, start): magnitudes above `border` belong to places `first` to `last`, and place i has
    the magnitude i * step + start.
    """
    values = dynamic_map(signed).astype(np.float64)
    sizes = values[values >= 0]
    fewest = 1 if signed else 2  # values in the lowest decade; each has twice as many as the one below
    firsts = [0, *(fewest * (2**decade - 1) + 1 for decade in range(7)), len(sizes) - 1]
    lines = []
    for first, after in zip(firsts, [*firsts[1:], len(sizes)], strict=True):
        step = (sizes[after - 1] - sizes[first]) / max(after - 1 - first, 1)
        border = (sizes[first - 1] + sizes[first]) / 2 if first else -1.0
        lines.append((float(border), first, after - 1, float(step), float(sizes[first] - step * first)))
    return lines


def encode(x: Float[Array, "*N"], signed: bool) -> UInt8[Array, "*N"]:
    """The code nearest to each number, from -1 (or 0) to 1; without a sign, what is above 0 has a code above 0."""
    size = jnp.abs(x)
    low, high, slope, shift = (jnp.zeros_like(size) for _ in range(4))
    for border, first, last, step, start in _lines(signed)[1:]:
        here = size > border
        of_line = float(first), float(last), *((1 / step, start / step + 0.5) if step else (0.0, 0.0))
        low, high, slope, shift = (
            jnp.where(here, new, old) for new, old in zip(of_line, (low, high, slope, shift), strict=True)
        )
    place = jnp.clip(jnp.ceil(size * slope - shift), low, high)
    if signed:  # 127 is zero; there is no -1
        place = jnp.where(x < 0, 127 - jnp.minimum(place, 127), 127 + place)
    else:
        place = jnp.where(x > 0, jnp.maximum(place, 1), place)
    return place.astype(jnp.int32).astype(jnp.uint8)


def decode(codes: UInt8[Array, "*N"], signed: bool) -> Float[Array, "*N"]:
    """The number that each code stands for."""
    place = codes.astype(jnp.int32).astype(jnp.float32) - (127 if signed else 0)
    size = jnp.abs(place)
    slope, shift = jnp.zeros_like(size), jnp.zeros_like(size)
    for _, first, _, step, start in _lines(signed)[1:]:
        here = size >= first
        slope, shift = jnp.where(here, step, slope), jnp.where(here, start, shift)
    return jnp.sign(place) * (size * slope + shift)


def _quantise(blocks: Float[Array, "..."], axis: int, signed: bool) -> tuple[UInt8[Array, "..."], Float[Array, "..."]]:
    """(codes, scales) of blocks along `axis`; a block of zeros has scale 0."""
    scale = jnp.max(jnp.abs(blocks), axis=axis)
    inverse = jnp.where(scale > 0, 1.0 / scale, 0.0)
    return encode(blocks * jnp.expand_dims(inverse, axis), signed), scale
