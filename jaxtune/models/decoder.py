"""Decoders: Gemma 1, 1.1, 2 and 3 (text), Llama and its kin as one module.

Families differ in the values of one config, which `gemma_hf` and `llama_hf` read off config.json; what differs between
layers is scanned data, not structure.

B batch, T query length, S key length, D width, F hidden, N query heads, K kv heads, H head dim, V vocabulary, L layers.

Sources: transformers' `GemmaModel`, `Gemma2Model`, `Gemma3TextModel`, `LlamaModel`, whose float32 logits these equal.
"""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxtune.attention import (
    Cache,
    Prefix,
    attend,
    causal,
    heads_first,
    prefix_visible,
    rotate,
    visible,
    window_of,
)
from jaxtune.layers import Embedding, Head, Linear, RMSNorm, adapter_of, constrain, gated, with_prompt
from jaxtune.remat import entered, rematerialised

ACTIVATIONS = {
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "silu": jax.nn.silu,
}


class Rope(NamedTuple):
    """Rotary positions of a layer: angle = position * inverse_frequency.

    llama3: (low_freq_factor, high_freq_factor, original_max_position_embeddings), where `factor` divides long waves
    alone: those that do not fit low_freq_factor times into the text once trained on.  Waves that fit
    high_freq_factor times stay, and between the two it goes over smoothly.
    """

    theta: float
    factor: float = 1.0
    llama3: tuple[float, float, float] | None = None

    def inverse_frequency(self, head_dim: int) -> np.ndarray:
        """Float32 [H/2]: 1 / (factor * theta ** (2i/H)); transformers' `_compute_llama3_parameters` with `llama3`."""
        exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        frequency = np.float32(1.0) / np.float32(self.theta) ** exponent
        divided = frequency / np.float32(self.factor)
        if self.llama3 is None:
            return divided
        low, high, length = self.llama3
        fits = np.float32(length) * frequency / np.float32(2 * np.pi)
        share = np.clip((fits - np.float32(low)) / np.float32(high - low), 0, 1).astype(np.float32)
        return (1 - share) * divided + share * frequency


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and switches of one model; built from config.json by a family's `config_from_hf`."""

    family: str  # gemma | gemma2 | gemma3 | llama | mistral | qwen3
    vocab_size: int
    width: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    query_scale: float  # scores are multiplied by this
    activation: str
    norm_eps: float
    norm_offset: float  # norms multiply by this plus their scale: 1 in Gemma, 0 elsewhere
    embed_scale: float  # rows of the embedding are multiplied by this: sqrt(width) in Gemma, 1 elsewhere
    windows: tuple[int | None, ...]  # one per layer; None: global
    ropes: tuple[Rope, ...]  # one per layer
    attention_softcap: float | None
    final_softcap: float | None
    post_norms: bool  # Gemma 2 and 3: a norm after attention and after the MLP too
    qk_norm: bool  # Gemma 3
    tied: bool  # the output head is the embedding table

    @property
    def layers(self) -> int:
        return len(self.windows)

    @property
    def kinds(self) -> tuple[int | None, ...]:
        """The windows that there are, each once."""
        return tuple(dict.fromkeys(self.windows))

    def layer_data(self) -> dict[str, np.ndarray]:
        """What differs between layers: `kind` [L], the index of its window in `kinds`; `inverse_frequency` [L, H/2]."""
        return {
            "kind": np.array([self.kinds.index(w) for w in self.windows], np.int32),
            "inverse_frequency": np.stack([rope.inverse_frequency(self.head_dim) for rope in self.ropes]),
        }


class Attention(nn.Module):
    config: DecoderConfig

    @nn.compact
    def __call__(self, x, positions, segments, layer, cache):
        c = self.config
        B, T, _ = x.shape
        q = Linear(c.heads * c.head_dim, ("embed", "heads"), name="q")(x).reshape(B, T, c.heads, c.head_dim)
        k = Linear(c.kv_heads * c.head_dim, ("embed", "kv_heads"), name="k")(x).reshape(B, T, c.kv_heads, c.head_dim)
        v = Linear(c.kv_heads * c.head_dim, ("embed", "kv_heads"), name="v")(x).reshape(B, T, c.kv_heads, c.head_dim)
        if c.qk_norm:
            q, k = (RMSNorm(c.norm_eps, c.norm_offset, name=f"{name}_norm")(y) for name, y in (("q", q), ("k", k)))
        q = rotate(q, positions, layer["inverse_frequency"])
        k = rotate(k, positions, layer["inverse_frequency"])
        k, v = heads_first(k), heads_first(v)
        window = window_of(c.kinds, layer["kind"])
        how = {"scale": c.query_scale, "softcap": c.attention_softcap, "prefix": None}
        if "prefix" in layer:
            first_k, first_v = layer["prefix"]
            how["prefix"] = Prefix(first_k, first_v, prefix_visible(positions, first_k.shape[0], window))
        if cache is None or cache["kv"] is None:
            out = causal(q, k, v, segments, windows=c.kinds, kind=layer["kind"], **how)
        else:
            mask = visible(cache["slots"][-T:], segments, cache["slots"], cache["segments"], window)
            out = attend(q, k, v, mask, kept=cache["kv"], **how)
        out = Linear(c.width, ("heads", "embed"), name="o")(out.reshape(B, T, c.heads * c.head_dim))
        return out, (None if cache is None else (k, v))


class MLP(nn.Module):
    config: DecoderConfig

    @nn.compact
    def __call__(self, x):
        c = self.config
        gate = Linear(c.hidden, ("embed", "mlp"), name="gate")(x)
        up = Linear(c.hidden, ("embed", "mlp"), name="up")(x)
        return Linear(c.width, ("mlp", "embed"), name="down")(gated(ACTIVATIONS[c.activation], gate, up))


class Block(nn.Module):
    """One layer, in the shape nn.scan wants: (carry, per-layer data) -> (carry, per-layer output)."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x, layer, positions, segments, shared_cache):
        c = self.config

        def norm(name, y):
            return RMSNorm(c.norm_eps, c.norm_offset, name=name)(y)

        def post_norm(name, y):
            return norm(name, y) if c.post_norms else y

        x = entered(x)
        cache = None if shared_cache is None else {**shared_cache, "kv": layer.get("kv")}
        y, kv = Attention(c, name="attn")(norm("pre_attn_norm", x), positions, segments, layer, cache)
        x = x + post_norm("post_attn_norm", y)
        x = x + post_norm("post_mlp_norm", MLP(c, name="mlp")(norm("pre_mlp_norm", x)))
        return constrain(x, "batch", "length", "activation"), kv


class Decoder(nn.Module):
    """Token ids to the final hidden states; `head` and `softcap` turn those into logits."""

    config: DecoderConfig
    dtype: Any = jnp.float32  # of the activations
    remat: str = "none"  # what of each layer the backward pass computes again (`jaxtune.remat`)
    unroll: int = 1  # layers that one turn of the scan runs

    def setup(self):
        c = self.config
        self.embed = Embedding(c.vocab_size, c.width, c.embed_scale)
        self.lm_head = Head(c.vocab_size, c.width)
        in_axes: Any = (0, nn.broadcast, nn.broadcast, nn.broadcast)  # layer data by layer; the rest for all
        self.layers = nn.scan(
            rematerialised(Block, self.remat, self.unroll),
            variable_axes={"params": 0, "adapters": 0},
            variable_broadcast="shared",
            split_rngs={"params": True, "dropout": True},
            in_axes=in_axes,
            length=c.layers,
            unroll=self.unroll,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c)
        self.final_norm = RMSNorm(c.norm_eps, c.norm_offset)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segments: Int[Array, "B T"],
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Hidden states after the final norm, and the cache with these T slots added.

        Args:
          tokens: ids.  positions: for rotation.  segments: 0 is padding; rows see only their own segment.
          cache: keys and values so far; the new ones go to slots [length, length + T).
        """
        x = with_prompt(self, self.embed(tokens, self.dtype), tokens)
        x = constrain(x, "batch", "length", "activation")
        layer: Any = {k: jnp.asarray(v) for k, v in self.config.layer_data().items()}
        prefix = adapter_of(self, "prefix")
        if prefix is not None:
            k, v = prefix.kv()
            layer["prefix"] = k.astype(self.dtype), v.astype(self.dtype)
            positions = positions + k.shape[1]
        shared = None
        if cache is not None:
            shared = dict(zip(("slots", "segments"), cache.beside(segments), strict=True))
            if cache.written:
                layer["kv"] = cache.k, cache.v
        kv: Any
        x, kv = self.layers(x, layer, positions, segments, shared)
        if not self.config.tied:
            self.head()  # so that `init` makes its parameter
        if cache is not None:
            cache = cache.grown(kv[0], kv[1], segments)
        return self.final_norm(x), cache

    def head(self) -> Any:
        """The output matrix [V, D], or the box of a quantised one."""
        return self.lm_head(self.embed.tied() if self.config.tied else None)
