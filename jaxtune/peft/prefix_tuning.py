"""Prefix tuning: keys and values of a few virtual tokens, before those of every text, in every layer.

Li and Liang 2021 (arXiv 2101.00190); equals peft's `PrefixEncoder`.  The keys are used as they are, neither normalised
nor rotated; the text's own tokens have the positions after them.  With `prefix_projection` a small network makes them,
which stays in the run's checkpoints; a PEFT file has only what came out of it, and trains on without one.

Behind an encoder it stands before the decoder's own tokens, and PEFT deals the rows out in an order of its own
(`order_of`).
"""

import dataclasses
from collections.abc import Mapping, MutableMapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxtune.peft import prompt
from jaxtune.peft.keys import check_choice, check_count
from jaxtune.peft.method import Layout, Start, box, take
from jaxtune.peft.p_tuning import Affine, affine

PEFT_TYPE = "PREFIX_TUNING"
OWN_NAMES, PREFIX = (prompt.NAME,), prompt.PREFIX
NEUTRAL: dict[str, tuple[Any, ...]] = {}


@dataclasses.dataclass(frozen=True)
class Config(prompt.Sizes):
    """PEFT's keys and defaults.  init_weights "zero": keys and values of 0 at first.  encoder_hidden_size: None is
    `token_dim`, which here is the size of all kv heads together."""

    init_weights: Any = None
    encoder_hidden_size: Any = None
    prefix_projection: Any = False

    def __post_init__(self):
        super().__post_init__()
        check_choice("init_weights", self.init_weights, (None, "zero"))
        check_choice("prefix_projection", self.prefix_projection, (True, False))
        if self.encoder_hidden_size is not None:
            check_count("encoder_hidden_size", self.encoder_hidden_size)


@struct.dataclass
class Prefix:
    """value [P, 2 L K H]: each layer's key, then its value, layer by layer; kv_heads: K, head_dim: H.  order: which of
    the L pairs each layer of a decoder behind an encoder has; None: its own."""

    value: Any
    kv_heads: int = struct.field(pytree_node=False)
    head_dim: int = struct.field(pytree_node=False)
    order: tuple[int, ...] | None = struct.field(pytree_node=False, default=None)

    def kv(self):
        both = self.value.reshape(self.value.shape[0], -1, 2, self.kv_heads, self.head_dim)
        k, v = jnp.moveaxis(both, (1, 2), (1, 0))
        return (k, v) if self.order is None else (k[np.array(self.order)], v[np.array(self.order)])

    def to_peft(self) -> dict[str, np.ndarray]:
        return {prompt.NAME: np.asarray(self.value)}


@struct.dataclass
class Projected:
    """Such a prefix as Tanh(embedding W1 + b1) W2 + b2, embedding [P, K H]."""

    embedding: Any
    first: Affine
    last: Affine
    kv_heads: int = struct.field(pytree_node=False)
    head_dim: int = struct.field(pytree_node=False)
    order: tuple[int, ...] | None = struct.field(pytree_node=False, default=None)

    def folded(self):
        return Prefix(self.last(jnp.tanh(self.first(self.embedding))), self.kv_heads, self.head_dim, self.order)

    def kv(self):
        return self.folded().kv()

    def to_peft(self) -> dict[str, np.ndarray]:
        return self.folded().to_peft()


def sizes_of(layout: Layout, config: Config) -> dict[str, int]:
    """As peft rewrites them for grouped queries: a token's width and heads are those of its keys.

    For encoder-decoders it does not rewrite them, and fails where heads * d_kv is not the width, or where the decoder
    is deeper than the encoder, whose layers it counts; with the right ones in adapter_config.json it does not.
    """
    own = {"token_dim": layout.kv_heads * layout.head_dim, "num_attention_heads": layout.kv_heads}
    # More layers than the decoder has do no harm: peft's own number, where the encoder is deeper.
    stored = config.num_layers if isinstance(config.num_layers, int) and layout.encoder_layers else 0
    return prompt.sizes_of(layout) | own | {"num_layers": max(layout.layers, stored)}


def order_of(layout: Layout, config: Config) -> tuple[int, ...] | None:
    """Behind an encoder PEFT lays the keys and values of its L layers out twice and deals four of them to each decoder
    layer, whose attention to the encoder does not use its two.  So layer l has the pair 2 l mod L; where L is even,
    half of the pairs are read by two layers and the others by none."""
    pairs = sizes_of(layout, config)["num_layers"]
    return tuple(2 * layer % pairs for layer in range(layout.layers)) if layout.encoder_layers else None


def size_of(layout: Layout, config: Config) -> int:
    """Numbers of one virtual token: keys and values of all layers."""
    sizes = sizes_of(layout, config)
    return 2 * sizes["num_layers"] * sizes["token_dim"]


def plan(layout: Layout, config: Config) -> dict[str, int]:
    """{"prefix": how many virtual tokens}.

    Raises:
      UserError: the sizes are another model's, or PEFT's own for an encoder-decoder where they do not fit its decoder.
    """
    # A config that was written before peft saw the model has the sizes of its queries.
    unwritten = (config.token_dim, config.num_attention_heads) == (layout.width, layout.heads)
    usual = unwritten and not layout.encoder_layers
    prompt.check_sizes(config, prompt.sizes_of(layout) if usual else sizes_of(layout, config))
    return {"prefix": config.num_virtual_tokens}


def continues_as(config: Config) -> tuple[str, Any]:
    """The same without the network, which the file does not have."""
    return "prefix_tuning", dataclasses.replace(config, prefix_projection=False)


def init(key: jax.Array, layout: Layout, config: Config, start: Start) -> dict[str, Any]:
    """{"prefix": adapter}, fresh: N(0, 1) for the embedding, torch's `Linear` for the layers of the network."""
    plan(layout, config)
    width, zero = layout.kv_heads * layout.head_dim, config.init_weights == "zero"
    heads, everything = (layout.kv_heads, layout.head_dim, order_of(layout, config)), size_of(layout, config)
    if not config.prefix_projection:
        value = jax.random.normal(key, (config.num_virtual_tokens, everything))
        return {"prefix": Prefix(box(jnp.zeros_like(value) if zero else value, None, "embed"), *heads)}
    keys, hidden = jax.random.split(key, 3), config.encoder_hidden_size or width
    last = affine(keys[2], hidden, everything)
    embedding = jax.random.normal(keys[0], (config.num_virtual_tokens, width))
    last = jax.tree.map(jnp.zeros_like, last) if zero else last
    return {"prefix": Projected(box(embedding, None, "embed"), affine(keys[1], width, hidden), last, *heads)}


def from_peft(layout: Layout, config: Config, tensors: MutableMapping[str, np.ndarray]) -> dict[str, Any]:
    """{"prefix": adapter} of a PEFT file, which has no network.

    Raises:
      KeyError: no `prompt_embeddings`.  UserError: of another shape, or the sizes are another model's.
    """
    plan(layout, config)
    value = take(tensors, prompt.NAME, (config.num_virtual_tokens, size_of(layout, config)), "num_virtual_tokens")
    return {"prefix": Prefix(box(value, None, "embed"), layout.kv_heads, layout.head_dim, order_of(layout, config))}


def to_config(layout: Layout, config: Config, adapters: Mapping[str, Any]) -> dict[str, Any]:
    """adapter_config.json's keys, with the sizes that PEFT fills in."""
    sizes = sizes_of(layout, config)
    return vars(config) | sizes | {"encoder_hidden_size": config.encoder_hidden_size or sizes["token_dim"]}
