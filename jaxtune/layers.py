"""The layers every model is built of, and the doorways at which adapters are read.

A layer knows no method.  It looks up its own adapter by name in the collection `adapters` and, where one is there,
hands it what it has: `Linear` calls `adapter.linear(x, y, w, rng)`, the embedding `adapter.embed(table, tokens)`, a
norm and the head `adapter.weight(w)`.

Shapes: N rows of a flattened batch (B*T), I and O the sides of a kernel, D width, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxtune.mesh import alone_on_cpu, spec
from jaxtune.quant.box import Quantised
from jaxtune.typing import Tree

# The name of what a linear layer gives, for policies of `jax.checkpoint`: by the operation they would not find it,
# since they do not look into `_matmul`.
PRODUCT = "product"
# The axes of an embedding table.
TABLE = ("vocab", "embed")


def matmul(x: Float[Array, "N I"], w: Any) -> Float[Array, "N O"]:
    """x @ w at the speed of x's dtype, accumulated in float32; the result is float32, w's gradient has w's dtype.

    Args:
      w: [I, O], or the box of a quantised one.
    """
    return w.matmul(x) if isinstance(w, Quantised) else _matmul(x, w)


@jax.custom_vjp
def _matmul(x, w):
    """The cotangent is rounded to x's dtype before the two products of the backward pass: left to itself, JAX would
    multiply a float32 cotangent with a bfloat16 weight, which runs at float32 speed."""
    return jnp.matmul(x, w.astype(x.dtype), preferred_element_type=jnp.float32)


def _matmul_forward(x, w):
    return _matmul(x, w), (x, w)


def _matmul_backward(residuals, g):
    x, w = residuals
    g = g.astype(x.dtype)
    return _of_input(w.astype(x.dtype), g).astype(x.dtype), _of_weight(x, w, g)


_matmul.defvjp(_matmul_forward, _matmul_backward)


def _of_input(w, g):
    """x's gradient, float32."""
    return jax.lax.dot_general(g, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _of_weight(x, w, g):
    """w's gradient.  The narrower side is the one to turn over: for an adapter's A a CPU takes a fifth of the time.
    (Without the barrier XLA turns it back.)"""
    a, b = (x, g) if x.shape[1] <= g.shape[1] else (g, x)
    dw = jax.lax.dot_general(a, b, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    return (dw if a is x else jax.lax.optimization_barrier(dw).T).astype(w.dtype)


def with_low_rank(
    y: Float[Array, "N O"], x: Float[Array, "N I"], w: Any, low: Float[Array, "N R"], b: Float[Array, "R O"]
) -> Float[Array, "N O"]:
    """y + low B, where y is x W.

    On a CPU in float32 one product of both, where it is wide: a second array of y's size, in memory that no one has
    touched yet, takes as long as the product by B.
    """
    wide = not isinstance(w, Quantised) and w.shape[0] <= w.shape[1]
    if wide and x.dtype == jnp.float32 and alone_on_cpu():
        return _joined(x, w, low, b)
    return y + matmul(low, b)


@jax.custom_vjp
def _joined(x, w, low, b):
    """[x low] @ [W; B]"""
    return jnp.matmul(*_side_by_side(x, w, low, b), preferred_element_type=jnp.float32)


def _side_by_side(x, w, low, b):
    return jnp.concatenate([x, low], axis=1), jnp.concatenate([w.astype(x.dtype), b.astype(x.dtype)])


def _joined_forward(x, w, low, b):
    return _joined(x, w, low, b), (x, w, low, b)


def _joined_backward(residuals, g):
    x, w, low, b = residuals
    g = g.astype(x.dtype)
    _, weights = _side_by_side(x, w, low, b)
    dx, d_low = jnp.split(_of_input(weights, g).astype(x.dtype), [x.shape[1]], axis=1)
    return dx, _of_weight(x, w, g), d_low, _of_weight(low, b, g)


_joined.defvjp(_joined_forward, _joined_backward)


def take_rows(table: Any, tokens: Int[Array, "*batch"]) -> Float[Array, "*batch D"]:
    """Rows of a table [V, D], or of the box of a quantised one."""
    if isinstance(table, Quantised):
        return table.rows(tokens)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size > 1 and tokens.ndim == 2:
        return _rows_of_shards(mesh, table, tokens)
    return jnp.take(table, tokens, axis=0, mode="clip")


def _rows_of_shards(mesh: Any, table: Float[Array, "V D"], tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Rows of a table that is split over devices.  Each looks its own columns up for all tokens of its group and sends
    them where the tokens are.  Left to itself XLA gathers the table, or all tokens' rows on every device, where both
    axes are split."""
    vocab, width = (axis if axis and mesh.shape[axis] > 1 else None for axis in spec(mesh, TABLE, table.shape))
    if not (vocab or width):
        return jnp.take(table, tokens, axis=0, mode="clip")
    rows = spec(mesh, ("batch",), tokens.shape[:1])[0]
    swap = width is not None and rows is not None and width in rows

    def local(table, tokens):
        tokens = jax.lax.all_gather(tokens, width, tiled=True) if swap else tokens
        first = jax.lax.axis_index(vocab) * len(table) if vocab else 0
        x = jnp.take(table, tokens - first, axis=0, mode="clip")
        if vocab:
            here = (tokens >= first) & (tokens < first + len(table))
            x = jax.lax.psum(jnp.where(here[..., None], x, jnp.zeros((), x.dtype)), vocab)
        if swap:
            return jax.lax.all_to_all(x, width, split_axis=0, concat_axis=2, tiled=True)
        return jax.lax.all_gather(x, width, axis=2, tiled=True) if width else x

    tokens = jnp.clip(tokens, 0, len(table) - 1)
    places = P(vocab, width), P(rows)
    return jax.shard_map(local, mesh=mesh, in_specs=places, out_specs=P(rows), check_vma=False)(table, tokens)


def weight_of(module: nn.Module, name: str, init: Callable, axes: tuple[str, ...], shape: tuple[int, ...]) -> Any:
    """A float32 parameter with logical axes where it is made; afterwards what stands there: an array of any dtype, or
    the box of a quantised one, whose arrays have shapes that Linen's own check would refuse."""
    if isinstance(there := module.get_variable("params", name), Quantised):
        return there
    return module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)


def adapter_of(module: nn.Module, name: str) -> Any:
    """The adapter of `module`'s parameter `name`, or None; with what all layers share, which is not stacked."""
    adapter, shared = module.get_variable("adapters", name), module.get_variable("shared", name)
    return adapter if shared is None else adapter.replace(shared=shared)


def dropout(x: Array, rate: float, rng: Any) -> Array:
    """Inverted dropout; `rng` None turns it off."""
    if not rate or rng is None:
        return x
    keep = jax.random.bernoulli(rng, 1 - rate, x.shape)
    return jnp.where(keep, x / jnp.asarray(1 - rate, x.dtype), jnp.zeros((), x.dtype))


class Linear(nn.Module):
    """y = x W without bias.  Activations are flattened to [B*T, I] for the product: XLA's CPU backend multiplies 2-D
    operands 1.6 times faster, and kernels stay plain matrices for quantisation, sharding and exchange."""

    features: int
    axes: tuple[str, str]

    @nn.compact
    def __call__(self, x: Float[Array, "*batch I"]) -> Float[Array, "*batch O"]:
        shape = (x.shape[-1], self.features)
        w = weight_of(self, "kernel", nn.initializers.normal(0.02), self.axes, shape)
        rows = x.reshape(-1, shape[0])
        y = matmul(rows, w)
        adapter = adapter_of(self, "kernel")
        if adapter is not None:
            y = adapter.linear(rows, y, w, self.make_rng("dropout") if self.has_rng("dropout") else None)
        return checkpoint_name(y.astype(x.dtype), PRODUCT).reshape(*x.shape[:-1], self.features)


def gated(activation: Callable[[Array], Array], gate: Float[Array, "*b I"], up: Float[Array, "*b I"]) -> Array:
    """activation(gate) * up, of which the backward pass keeps no more than the two: the widest arrays of a layer."""
    return _gated(activation, gate, up)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gated(activation, gate, up):
    return activation(gate) * up


def _gated_forward(activation, gate, up):
    return _gated(activation, gate, up), (gate, up)


def _gated_backward(activation, residuals, g):
    gate, up = residuals
    y, back = jax.vjp(activation, gate)
    return back(g * up)[0], g * y


_gated.defvjp(_gated_forward, _gated_backward)


class RMSNorm(nn.Module):
    """x / rms(x) * (offset + scale), in float32: transformers' `Gemma2RMSNorm` with offset 1, `LlamaRMSNorm` with 0."""

    eps: float
    offset: float
    axes: tuple[str] = ("norm",)

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        scale = weight_of(self, "scale", nn.initializers.constant(1.0 - self.offset), self.axes, x.shape[-1:])
        adapter = adapter_of(self, "scale")
        if adapter is not None:
            scale = adapter.weight(scale)
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        gain = jnp.expand_dims(self.offset + scale.astype(jnp.float32), tuple(range(x.ndim - 1)))
        return (x32 * gain).astype(x.dtype)


def _table(module: nn.Module, vocab: int, features: int) -> Any:
    return weight_of(module, "table", nn.initializers.normal(0.02), TABLE, (vocab, features))


class Embedding(nn.Module):
    """The [V, D] matrix whose rows are looked up."""

    vocab: int
    features: int
    scale: float

    def setup(self):
        self.base = _table(self, self.vocab, self.features)

    def __call__(self, tokens: Int[Array, "B T"], dtype: Any) -> Float[Array, "B T D"]:
        """Rows of the table, times `scale` rounded to the activations' dtype as transformers does."""
        adapter = adapter_of(self, "table")
        rows = take_rows(self.base, tokens) if adapter is None else adapter.embed(self.base, tokens)
        return rows.astype(dtype) if self.scale == 1 else rows.astype(dtype) * jnp.asarray(self.scale, dtype)

    def tied(self) -> Any:
        """The table of a head that is tied to it, an array or a box.  As in PEFT an adapter does not reach it, unless
        its rows are the tokens' own (`ties`)."""
        adapter = adapter_of(self, "table")
        return adapter.weight(self.base) if getattr(adapter, "ties", False) else self.base


class Head(nn.Module):
    """The [V, D] matrix of the output: its own, or the one it is tied to."""

    vocab: int
    features: int

    @nn.compact
    def __call__(self, tied_to: Any) -> Any:
        table = _table(self, self.vocab, self.features) if tied_to is None else tied_to
        adapter = adapter_of(self, "table")
        return table if adapter is None else adapter.weight(table)


def with_prompt(module: nn.Module, x: Float[Array, "B T D"], tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """x with the embeddings of virtual tokens (ids below zero: `jaxtune.data.virtual`), where `module` has a prompt.

    They are used as the prompt has them, without the factor of the table's rows.  They are chosen by a product with
    ones and zeros, so that their gradient is a product too, and exact, since but one summand is not zero.
    """
    prompt = adapter_of(module, "prompt")
    if prompt is None:
        return x
    rows = prompt.rows(module.make_rng("dropout") if module.has_rng("dropout") else None)
    hit = (-1 - tokens)[..., None] == jnp.arange(rows.shape[0])[None, None]
    virtual = jnp.einsum("BTP,PD->BTD", hit.astype(jnp.float32), rows, precision="highest").astype(x.dtype)
    if prompt.scale != 1:
        virtual = virtual * jnp.asarray(prompt.scale, x.dtype)
    return jnp.where((tokens < 0)[..., None], virtual, x)


def output_logits(hidden: Float[Array, "*batch D"], table: Any, softcap: float | None) -> Float[Array, "*batch V"]:
    """Float32 logits of a few positions; training never forms them for a whole batch (see `jaxtune.loss`).

    Args:
      table: [V, D], or the box of a quantised one.
    """
    logits = jnp.einsum("...D,VD->...V", hidden, table.astype(hidden.dtype), preferred_element_type=jnp.float32)
    return logits if softcap is None else jnp.tanh(logits / softcap) * softcap


def constrain(x: Array, *axes: str | None) -> Array:
    """Sharding of an activation by its logical axes; does nothing outside `jax.set_mesh`.

    (Linen's own `with_logical_constraint` does nothing on CPUs, so that no test on fake devices would see a wrong one.)
    """
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, spec(mesh, axes, x.shape))


def abstract_params(module: nn.Module, *args: Any, **kwargs: Any) -> Tree:
    """Shapes and logical axes of the parameters: `LogicallyPartitioned` boxes of ShapeDtypeStructs, no memory."""
    return jax.eval_shape(module.init, jax.random.key(0), *args, **kwargs)["params"]
