"""T5, T5 v1.1, Flan-T5 and mT5: an encoder, and a decoder that reads what it made of a text.

Both are stacks of the same block; the decoder's has a second attention, to the encoder's output, between its own and
the MLP.  Positions are a bias on the scores by the distance of two slots, one table for all layers of a stack, so that
padding on either side changes nothing.

B batch, T decoder length, S key length (of the encoder or of the cache), P prefix length, D width, N heads, H head dim,
L layers.

Sources: Raffel et al. 2020 (arXiv 1910.10683); transformers' `T5ForConditionalGeneration`, whose float32 logits these
equal.
"""

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxtune.attention import NO_WINDOW, Cache, Prefix, Source, attend, heads_first, together, visible
from jaxtune.layers import (
    Embedding,
    Head,
    Linear,
    RMSNorm,
    adapter_of,
    constrain,
    dropout,
    gated,
    weight_of,
    with_prompt,
)
from jaxtune.models import decoder
from jaxtune.remat import ATTENTION, entered, rematerialised

ACTIVATIONS = decoder.ACTIVATIONS | {"relu": jax.nn.relu}


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes and switches of one model; built from config.json by `t5_hf.config_from_hf`."""

    family: str  # t5 | mt5
    vocab_size: int
    width: int
    hidden: int
    heads: int
    head_dim: int  # times heads need not be the width
    encoder_layers: int
    layers: int  # of the decoder
    activation: str
    gated: bool
    norm_eps: float
    buckets: int  # of distances, in a relative bias
    max_distance: int  # beyond which they are all one
    scaled: bool  # the decoder's output is divided by sqrt(width)
    tied: bool  # the output head is the embedding table
    dropout: float  # in training: of embeddings, attention, the MLP's inside, what is added to a layer, outputs
    start_id: int  # what a decoder reads first
    pad_id: int

    # What a decoder alone may have.
    embed_scale = 1.0
    final_softcap = None

    @property
    def kv_heads(self) -> int:
        return self.heads


def bucket_of(buckets: int, max_distance: int) -> Int[np.ndarray, "max_distance_and_one"]:
    """The bucket of each distance from 0 to `max_distance`: one each for the first half, then ever wider ones
    (transformers' `_relative_position_bucket`, with its float32)."""
    exact = buckets // 2
    distance = np.arange(max_distance + 1)
    far = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    far = far / np.float32(math.log(max_distance / exact)) * np.float32(buckets - exact)
    return np.where(distance < exact, distance, np.minimum(exact + far.astype(np.int64), buckets - 1)).astype(np.int32)


def drop(module: nn.Module, x: Array) -> Array:
    """The model's own dropout, where there is an rng for it."""
    return dropout(x, module.config.dropout, module.make_rng("dropout") if module.has_rng("dropout") else None)


class RelativeBias(nn.Module):
    """What is added to the scores of a query and a key by how far they are from each other, for each head.

    Looking both ways, half of the buckets are for keys behind the query.
    """

    config: T5Config
    both_ways: bool

    @nn.compact
    def __call__(self, query_slots: Int[Array, "T"], key_slots: Int[Array, "S"]) -> Float[Array, "N T S"]:
        c = self.config
        axes = ("buckets", "heads")
        table = weight_of(self, "table", nn.initializers.normal(0.02), axes, (c.buckets, c.heads))
        adapter = adapter_of(self, "table")
        if adapter is not None:
            table = adapter.weight(table)
        half = c.buckets // 2 if self.both_ways else c.buckets
        behind = key_slots[None] - query_slots[:, None]
        distance = jnp.abs(behind) if self.both_ways else jnp.maximum(-behind, 0)
        bucket = jnp.asarray(bucket_of(half, c.max_distance))[jnp.minimum(distance, c.max_distance)]
        if self.both_ways:
            bucket = bucket + half * (behind > 0).astype(jnp.int32)
        return jnp.moveaxis(table[bucket], -1, 0)


class Attention(nn.Module):
    """Queries of x, keys and values of `source`, or those `made` of it already; behind those kept in a cache."""

    config: T5Config

    @nn.compact
    def __call__(self, x, source, mask, bias, *, made=None, kept=None, prefix=None):
        c = self.config

        def heads(name, y):
            return Linear(c.heads * c.head_dim, ("embed", "heads"), name=name)(y).reshape(
                *y.shape[:2], c.heads, c.head_dim
            )

        q = heads("q", x)
        k, v = new = (heads_first(heads("k", source)), heads_first(heads("v", source))) if made is None else made
        if prefix is not None:
            first_k, first_v = prefix
            prefix = Prefix(first_k, first_v, jnp.ones((*x.shape[:2], first_k.shape[0]), bool))
        more = {"prefix": prefix, "bias": bias, "drop": functools.partial(drop, self), "kept": kept}
        out = checkpoint_name(attend(q, k, v, mask, scale=1.0, softcap=None, **more), ATTENTION)
        out = Linear(c.width, ("heads", "embed"), name="o")(out.reshape(*x.shape[:2], c.heads * c.head_dim))
        return out, new


class MLP(nn.Module):
    config: T5Config

    @nn.compact
    def __call__(self, x):
        c = self.config
        act, up = ACTIVATIONS[c.activation], Linear(c.hidden, ("embed", "mlp"), name="up")(x)
        y = gated(act, Linear(c.hidden, ("embed", "mlp"), name="gate")(x), up) if c.gated else act(up)
        return Linear(c.width, ("mlp", "embed"), name="down")(drop(self, y))


class Block(nn.Module):
    """One layer, in the shape nn.scan wants: (carry, per-layer data) -> (carry, per-layer output).

    layer: `kv` of the cache, `prefix`, `source_kv` where they are made; shared: `mask`, whether to `keep` keys, and of
    a decoder `source_mask`, and `source` where keys are to be made of it.
    """

    config: T5Config

    @nn.compact
    def __call__(self, x, layer, bias, shared):
        c = self.config

        def norm(name, y):
            return RMSNorm(c.norm_eps, 0.0, name=name)(y)

        x = entered(x)
        y, source_kv = norm("pre_attn_norm", x), None
        kept, prefix = layer.get("kv"), layer.get("prefix")
        y, kv = Attention(c, name="attn")(y, y, shared["mask"], bias, kept=kept, prefix=prefix)
        x = x + drop(self, y)
        if "source_mask" in shared:
            source, made, mask = shared.get("source"), layer.get("source_kv"), shared["source_mask"]
            y, source_kv = Attention(c, name="cross")(norm("pre_cross_norm", x), source, mask, None, made=made)
            x = x + drop(self, y)
        x = x + drop(self, MLP(c, name="mlp")(norm("pre_mlp_norm", x)))
        x = constrain(x, "batch", "length", "activation")
        # What goes into the cache, once: without one nothing is to be stacked.
        return x, (kv, source_kv if "source" in shared else None) if "keep" in shared else None


class Stack(nn.Module):
    """The encoder or the decoder: its layers, the bias that they share, the norm behind them."""

    config: T5Config
    length: int
    both_ways: bool
    remat: str
    unroll: int

    def setup(self):
        in_axes: Any = (0, nn.broadcast, nn.broadcast)  # layer data by layer; the rest for all
        self.layers = nn.scan(
            rematerialised(Block, self.remat, self.unroll),
            variable_axes={"params": 0, "adapters": 0},
            variable_broadcast="shared",
            split_rngs={"params": True, "dropout": True},
            in_axes=in_axes,
            length=self.length,
            unroll=self.unroll,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(self.config)
        self.relative_bias = RelativeBias(self.config, self.both_ways)
        self.final_norm = RMSNorm(self.config.norm_eps, 0.0)

    def __call__(self, x, layer, shared, query_slots, key_slots):
        x = constrain(drop(self, x), "batch", "length", "activation")
        out: Any
        x, out = self.layers(x, layer, self.relative_bias(query_slots, key_slots), shared)
        return drop(self, self.final_norm(x)), out


class T5(nn.Module):
    """Token ids of both sides to the decoder's final hidden states; `head` turns those into logits."""

    config: T5Config
    dtype: Any = jnp.float32  # of the activations
    remat: str = "none"  # what of each layer the backward pass computes again (`jaxtune.remat`)
    unroll: int = 1  # layers that one turn of the scan runs

    def setup(self):
        c = self.config
        self.embed = Embedding(c.vocab_size, c.width, c.embed_scale)
        self.lm_head = Head(c.vocab_size, c.width)
        self.encoder = Stack(c, c.encoder_layers, True, self.remat, self.unroll)
        self.decoder = Stack(c, c.layers, False, self.remat, self.unroll)

    def encode(self, tokens: Int[Array, "B S"], segments: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        """What the encoder makes of a text.  segments: 0 is padding."""
        x = with_prompt(self, self.embed(tokens, self.dtype), tokens)
        shared = {"mask": together(segments, segments)}
        slots = jnp.arange(tokens.shape[1])
        return self.encoder(x, {}, shared, slots, slots)[0]

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segments: Int[Array, "B T"],
        cache: Cache | None = None,
        *,
        source_tokens: Int[Array, "B S"] | None = None,
        source_segments: Int[Array, "B S"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """The decoder's hidden states, ready for the head, and the cache with these T slots added.

        Args:
          tokens: what the decoder reads, its start token first.  positions: not used; slots count.  segments: 0 is
            padding; rows see only their own segment, of the source too.
          cache: the decoder's keys and values so far, and from its first use on the source's.
          source_tokens, source_segments: what the encoder reads; None where the cache has what was made of it.
        """
        T, c = tokens.shape[1], self.config
        x, prompt = self.embed(tokens, self.dtype), adapter_of(self, "prompt")
        if getattr(prompt, "decoder_tokens", 0):
            x = with_prompt(self, x, tokens)
        layer: Any = {}
        shared: Any = {}
        slots, keys = jnp.arange(T), segments
        if cache is not None:
            shared["keep"] = True
            slots, keys = cache.beside(segments)
            if cache.written:
                layer["kv"] = cache.k, cache.v
        shared["mask"] = visible(slots[-T:], segments, slots, keys, jnp.int32(NO_WINDOW))
        if source_tokens is not None and source_segments is not None:
            shared["source"] = self.encode(source_tokens, source_segments)
        else:
            assert cache is not None and cache.source is not None, "neither a source nor what was made of it"
            layer["source_kv"], source_segments = (cache.source.k, cache.source.v), cache.source.segments
        shared["source_mask"] = together(segments, source_segments)
        before, prefix = 0, adapter_of(self, "prefix")
        if prefix is not None:
            k, v = prefix.kv()
            layer["prefix"], before = (k.astype(self.dtype), v.astype(self.dtype)), k.shape[1]
        slots = jnp.concatenate([jnp.arange(before), before + slots])
        x, out = self.decoder(x, layer, shared, slots[-T:], slots)
        if not c.tied:
            self.head()  # so that `init` makes its parameter
        if cache is not None:
            (k, v), made = out
            source = cache.source if made is None else Source(made[0], made[1], source_segments)
            cache = dataclasses.replace(cache.grown(k, v, segments), source=source)
        return (x * jnp.asarray(c.width**-0.5, x.dtype) if c.scaled else x), cache

    def head(self) -> Any:
        """The output matrix [V, D], or the box of a quantised one."""
        return self.lm_head(self.embed.tied() if self.config.tied else None)
