"""LoRA: y = x W + s (dropout(x) A) B, with s = alpha/r, or alpha/sqrt(r) for rsLoRA; and DoRA, which then gives every
column of W + s A B the length of a trained magnitude.

Hu et al. 2021 (arXiv 2106.09685), Kalajdzievski 2023 (2312.03732), Liu et al. 2024 (2402.09353); equals peft's
`lora.Linear`, `lora.Embedding` and `DoraLinearLayer`, whose config keys these are.  PEFT stores A as [r, in] and B as
[out, r]; here they are a [in, r] and b [r, out], stacked over layers.

Ranks and scales may differ by layer (`rank_pattern`, `alpha_pattern`, `layers_to_transform`).  Inside the layer scan
every layer has the largest rank of its site; the surplus columns of A and rows of B are zero, get a zero gradient from
each other, and so stay zero.
"""

import dataclasses
import math
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxtune.errors import UserError
from jaxtune.layers import dropout, matmul, take_rows, with_low_rank
from jaxtune.peft import lora_init, token_rows
from jaxtune.peft.keys import check_choice, check_count, check_fraction, check_number, check_targets
from jaxtune.peft.method import QUERY_VALUE, Fixed, Layout, Site, Start, box, pattern_value, select, site_key, take

PEFT_TYPE = "LORA"

# PEFT's other keys, and the values that mean they are not used.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "corda_config": (None,),
    "ensure_weight_tying": (False,),
    "eva_config": (None,),
    "fan_in_fan_out": (False,),
    "kasa_config": (None,),
    "layer_replication": (None,),
    "lora_bias": (False,),
    "lora_ga_config": (None,),
    "megatron_config": (None,),
    "megatron_core": ("megatron.core", None),
    "monteclora_config": (None,),
    "qalora_group_size": (16,),
    "runtime_config": (None, {}, {"ephemeral_gpu_offload": False}),
    "target_parameters": (None, []),
    "use_bdlora": (None, False),
    "use_qalora": (False,),
    "velora_config": (None,),
}


# MiCA starts B at singular vectors, over an unaltered base, and trains A alone; what comes out is plain LoRA.
BEGUN = {("init_lora_weights", "mica"): True}


@dataclasses.dataclass(frozen=True)
class Config:
    """PEFT's keys and defaults.  Values may come from a downloaded file, so their types are checked, not declared.

    Raises:
      ValueError: a value out of range, naming the key.
    """

    r: Any = 8
    lora_alpha: Any = 8
    lora_dropout: Any = 0.0
    target_modules: Any = None
    exclude_modules: Any = None
    use_rslora: Any = False
    use_dora: Any = False
    layers_to_transform: Any = None
    layers_pattern: Any = None
    rank_pattern: Any = None
    alpha_pattern: Any = None
    bias: Any = "none"
    modules_to_save: Any = None
    trainable_token_indices: Any = None
    init_lora_weights: Any = True
    loftq_config: Any = None

    def __post_init__(self):
        for key in ("rank_pattern", "alpha_pattern"):
            object.__setattr__(self, key, dict(getattr(self, key) or {}))
        start = True if self.init_lora_weights is None else self.init_lora_weights
        object.__setattr__(self, "init_lora_weights", start.lower() if isinstance(start, str) else start)
        check_count("r", self.r)
        for rank in self.rank_pattern.values():
            check_count("rank_pattern", rank)
        for alpha in (self.lora_alpha, *self.alpha_pattern.values()):
            check_number("lora_alpha", alpha)
        check_fraction("lora_dropout", self.lora_dropout)
        check_choice("bias", self.bias, ("none", "all", "lora_only"))
        for key in ("use_rslora", "use_dora"):
            check_choice(key, getattr(self, key), (True, False))
        lora_init.check(self.init_lora_weights)
        object.__setattr__(self, "loftq_config", dict(self.loftq_config or {}))
        if self.loftq_config and (
            self.init_lora_weights != "loftq" or self.loftq_config.get("loftq_bits", 4) != 4 or self.loftq_rounds() < 1
        ):
            raise ValueError(
                f"loftq_config is {self.loftq_config!r}. It goes with init_lora_weights='loftq', and is "
                "{'loftq_bits': 4, 'loftq_iter': 1 or more}."
            )
        check_targets(self)
        token_rows.check(self.trainable_token_indices)
        if self.use_dora and lora_init.alters_base(self.init_lora_weights):
            raise ValueError(
                f"use_dora and init_lora_weights={self.init_lora_weights!r} exclude each other: exported magnitudes "
                "would be those of an altered base."
            )

    def loftq_rounds(self) -> int:
        return int(self.loftq_config.get("loftq_iter", 1))


@struct.dataclass
class Lora:
    """a [L, in, R], b [L, R, out], scale [L]; inside the layer scan without L.  ranks: one per layer, 0 where none.

    a0, b0: what A and B were at the start where that was taken off the base (PiSSA, OLoRA), else None; the base itself
    stays as it is.  magnitude [L, out], live [L]: of DoRA, and which layers have one.
    """

    a: Any
    b: Any
    scale: Fixed
    ranks: tuple[int, ...] = struct.field(pytree_node=False)
    dropout: float = struct.field(pytree_node=False)
    a0: Any = None
    b0: Any = None
    magnitude: Any = None
    live: Any = None

    def linear(self, x, y, w, rng):
        dropped = dropout(x, self.dropout, rng)
        low = narrowed(dropped, self.a, self.scale.value)
        if self.a0 is None and self.magnitude is None:
            return with_low_rank(y, x, w, low, self.b)
        delta = matmul(low, self.b)
        if self.a0 is not None and self.b0 is not None:
            y = y - low_rank(x, self.a0.value, self.b0.value, self.scale.value)
        if self.magnitude is None:
            return y + delta
        gain = self.gain(w)[None]
        return y + (gain - 1) * (y if dropped is x else matmul(dropped, w)) + gain * delta

    def gain(self, w: Any) -> Any:
        """DoRA's factor of each column [out].  The length of a column of W + s A B needs no matrix of W's size, and is
        a constant to the gradient, as the paper has it."""
        w, a, b, s = (jax.lax.stop_gradient(v) for v in (w.astype(jnp.float32), self.a, self.b, self.scale.value))
        square = jnp.sum(w * w, axis=0) + 2 * s * jnp.sum(b * (a.T @ w), axis=0)
        square += s * s * jnp.sum(b * ((a.T @ a) @ b), axis=0)
        gain = self.magnitude / jnp.sqrt(jnp.maximum(square, jnp.finfo(jnp.float32).tiny))
        return gain if self.live is None else jnp.where(self.live.value, gain, jnp.ones_like(gain))

    def merged(self, w):
        if self.a0 is not None and self.b0 is not None:
            w = w - self.scale.value * (self.a0.value @ self.b0.value)
        whole = w + self.scale.value * (self.a @ self.b)
        return whole if self.magnitude is None else whole * self.gain(w)[None]

    def to_peft(self, site: Site, layer: int) -> dict[str, np.ndarray]:
        """What was taken off the base is put back as further ranks: plain LoRA over the base as it was."""
        r = self.ranks[layer]
        if r == 0:
            return {}
        a, b = np.asarray(self.a[layer])[:, :r], np.asarray(self.b[layer])[:r]
        if self.a0 is not None and self.b0 is not None:
            a = np.concatenate([a, np.asarray(self.a0.value[layer])[:, :r]], axis=1)
            b = np.concatenate([b, -np.asarray(self.b0.value[layer])[:r]])
        tensors = {"lora_A.weight": a.T, "lora_B.weight": b.T}
        if self.magnitude is not None:
            tensors["lora_magnitude_vector"] = np.asarray(self.magnitude[layer])
        return tensors


@struct.dataclass
class LoraTable:
    """LoRA of the embedding or of the head, whose weight is a [V, D] table: a [V, R], b [R, D], scale [].

    On a tied model the embedding's does not reach the head nor the other way round, as in PEFT.
    """

    a: Any
    b: Any
    scale: Fixed
    dropout: float = struct.field(pytree_node=False)

    def embed(self, table, tokens):
        rows = take_rows(table, tokens).astype(jnp.float32)
        low = jnp.take(self.a, tokens, axis=0, mode="clip")
        return rows + jnp.einsum("BTR,RD->BTD", low, self.b) * self.scale.value

    def weight(self, w):
        """The head is given whole to the loss, so that this costs a float32 copy of it."""
        return self.merged(w.astype(jnp.float32))

    def merged(self, w):
        return w + self.scale.value * (self.a @ self.b)

    def to_peft(self, site: Site, layer: int) -> dict[str, np.ndarray]:
        a, b = np.asarray(self.a), np.asarray(self.b)
        if site.kind == "embedding":
            return {"lora_embedding_A": a.T, "lora_embedding_B": b.T}
        return {"lora_A.weight": b, "lora_B.weight": a}


def narrowed(x, a, scale):
    """s x A.  Scaled here, so that the gradient of what B makes of it serves W and B as it is."""
    return (matmul(x, a) * scale).astype(x.dtype)


def low_rank(x, a, b, scale):
    """s x A B"""
    return matmul(narrowed(x, a, scale), b)


def plan(layout: Layout, config: Config) -> dict[str, tuple[int, ...]]:
    """{path: rank of each layer} of the sites that get an adapter.

    Raises:
      UserError: nothing matches, or something matches that LoRA cannot adapt here.
    """
    found = select(layout, config, QUERY_VALUE, ("linear", "embedding", "head"))
    ranks = {}
    for path, layers in found.items():
        site = layout.site(path)
        ranks[path] = tuple(
            pattern_value(config.rank_pattern, module, config.r) if adapted else 0
            for module, adapted in zip(site.modules, layers, strict=True)
        )
        if site.kind != "linear" and (config.use_dora or config.init_lora_weights not in (True, False, "gaussian")):
            raise UserError(
                f"target_modules matches {site.modules[0]}. On embeddings and heads jaxtune has plain LoRA: neither "
                f"use_dora nor init_lora_weights={config.init_lora_weights!r}."
            )
        if site.kind == "head" and config.lora_dropout:
            raise UserError("target_modules matches lm_head, where jaxtune has no dropout. Set lora_dropout=0.")
        if lora_init.needs_even(config.init_lora_weights) and any(r % 2 for r in ranks[path]):
            raise UserError("init_lora_weights='orthogonal' needs even ranks (r, rank_pattern).")
        lora_init.check_base(config.init_lora_weights, config.loftq_rounds(), layout.quant)
        if lora_init.alters_base(config.init_lora_weights) and max(ranks[path]) > min(site.shape[1:]):
            raise UserError(
                f"init_lora_weights={config.init_lora_weights!r} takes the rank from {path}, which has at most "
                f"{min(site.shape[1:])}; r is {max(ranks[path])}."
            )
    token_rows.plan(layout, config.trainable_token_indices, ranks, config.modules_to_save)
    return ranks


def lost(layout: Layout, config: Config) -> dict[str, int]:
    """LoftQ over a quantised base: its A B are the largest part of what was lost, and the base stays as it is."""
    if layout.quant is None or config.init_lora_weights != "loftq":
        return {}
    return {path: max(ranks) for path, ranks in plan(layout, config).items()}


def init(key: jax.Array, layout: Layout, config: Config, start: Start) -> dict[str, Any]:
    """Adapters by parameter path, float32; the distributions are PEFT's (`jaxtune.peft.lora_init`)."""
    adapters: dict[str, Any] = {}
    for path, ranks in plan(layout, config).items():
        site, scale = layout.site(path), scales(layout.site(path), ranks, config)
        if site.kind != "linear":
            adapters[path] = _new_table(site_key(key, path), site, ranks[0], scale[0], config)
            continue
        how, w, rounds = config.init_lora_weights, start.params[path], config.loftq_rounds()
        values = lora_init.draw(site_key(key, path), site, ranks, scale, how, w, rounds, start.lost.get(path))
        a0, b0 = (values.a, values.b) if values.taken else (None, None)
        magnitude = None
        if config.use_dora:
            columns = jnp.linalg.norm(start.params[path].astype(jnp.float32), axis=1)
            magnitude = columns if config.init_lora_weights is not False else _norms(start.params[path], values, scale)
        adapters[path] = _boxed(site, ranks, config, values.a, values.b, magnitude, a0, b0)
    return adapters | token_rows.init(layout, config.trainable_token_indices, start)


def _norms(w: Any, values: Any, scale: np.ndarray) -> Any:
    whole = w.astype(jnp.float32) + jnp.asarray(scale)[:, None, None] * (values.a @ values.b)
    return jnp.linalg.norm(whole, axis=1)


def _new_table(key: jax.Array, site: Site, rank: int, scale: Any, config: Config) -> LoraTable:
    """PEFT starts an embedding with A = 0 and B ~ N(0, 1), and a head as a linear layer."""
    (vocab, width), (key_a, key_b) = site.shape, jax.random.split(key)
    random = config.init_lora_weights is False
    if site.kind == "embedding":
        a = jax.random.normal(key_a, (vocab, rank)) if random else jnp.zeros((vocab, rank))
        return _boxed_table(site, a, jax.random.normal(key_b, (rank, width)), scale, config)
    if config.init_lora_weights == "gaussian":
        b = jax.random.normal(key_b, (rank, width)) / rank
    else:
        b = jax.random.uniform(key_b, (rank, width), minval=-1.0, maxval=1.0) * width**-0.5
    a = jnp.zeros((vocab, rank))
    if random:
        a = jax.random.uniform(key_a, (vocab, rank), minval=-1.0, maxval=1.0) * rank**-0.5
    return _boxed_table(site, a, b, scale, config)


def _boxed_table(site: Site, a: Any, b: Any, scale: Any, config: Config) -> LoraTable:
    """The head reads no dropout, and PEFT gives an embedding none."""
    return LoraTable(box(a, site.axes[0], "rank"), box(b, "rank", site.axes[1]), Fixed(jnp.asarray(scale)), 0.0)


def _boxed(
    site: Site, ranks: tuple[int, ...], config: Config, a: Any, b: Any, magnitude: Any, a0: Any = None, b0: Any = None
) -> Lora:
    layers, rows, columns = site.axes
    dead = magnitude is not None and 0 in ranks
    return Lora(
        a=box(a, layers, rows, "rank"),
        b=box(b, layers, "rank", columns),
        scale=Fixed(jnp.asarray(scales(site, ranks, config))),
        a0=None if a0 is None else Fixed(box(a0, layers, rows, "rank")),
        b0=None if b0 is None else Fixed(box(b0, layers, "rank", columns)),
        magnitude=None if magnitude is None else box(magnitude, layers, columns),
        live=Fixed(jnp.asarray(np.array(ranks) > 0)) if dead else None,
        ranks=ranks,
        dropout=config.lora_dropout,
    )


def scales(site: Site, ranks: Sequence[int], config: Config) -> np.ndarray:
    """What multiplies B A in each layer [L]."""
    alphas = [pattern_value(config.alpha_pattern, module, config.lora_alpha) for module in site.modules]
    divisors = [(math.sqrt(r) if config.use_rslora else r) or 1 for r in ranks]
    return np.array([alpha / divisor for alpha, divisor in zip(alphas, divisors, strict=True)], np.float32)


def from_peft(layout: Layout, config: Config, tensors: MutableMapping[str, np.ndarray]) -> dict[str, Any]:
    """{path: adapter} from PEFT's tensors.

    Raises:
      KeyError: a tensor is missing.  UserError: one has another shape; or the file means an altered base.
    """
    if lora_init.alters_base(config.init_lora_weights):
        raise UserError(
            f"The adapter has init_lora_weights={config.init_lora_weights!r}: its numbers belong to a base that PEFT "
            "altered when training began, and PEFT itself may not find that base again. Save it in PEFT with "
            "`path_initial_model_for_weight_conversion`, which writes plain LoRA of twice the rank."
        )
    adapters: dict[str, Any] = {}
    for path, ranks in plan(layout, config).items():
        site = layout.site(path)
        if site.kind != "linear":
            adapters[path] = _table_from_peft(site, ranks[0], config, tensors)
            continue
        size, (rows, columns) = max(ranks), site.shape[1:]
        a = np.zeros((len(ranks), rows, size), np.float32)
        b = np.zeros((len(ranks), size, columns), np.float32)
        magnitude = np.ones((len(ranks), columns), np.float32) if config.use_dora else None
        for layer, (module, r) in enumerate(zip(site.modules, ranks, strict=True)):
            if r == 0:
                continue
            a[layer, :, :r] = take(tensors, f"{module}.lora_A.weight", (r, rows), f"rank {r}").T
            b[layer, :r] = take(tensors, f"{module}.lora_B.weight", (columns, r), f"rank {r}").T
            if magnitude is not None:
                magnitude[layer] = take(tensors, f"{module}.lora_magnitude_vector", (columns,))
        adapters[path] = _boxed(site, ranks, config, a, b, magnitude)
    return adapters | token_rows.from_peft(layout, config.trainable_token_indices, tensors)


def _table_from_peft(site: Site, r: int, config: Config, tensors: MutableMapping[str, np.ndarray]) -> LoraTable:
    (module,), (vocab, width), why = site.modules, site.shape, f"rank {r}"
    # PEFT adds the whole base weight to the file, and reads it without need.
    tensors.pop(f"{module}.base_layer.weight", None)
    if site.kind == "embedding":
        a = take(tensors, f"{module}.lora_embedding_A", (r, vocab), why).T
        b = take(tensors, f"{module}.lora_embedding_B", (width, r), why).T
    else:
        b = take(tensors, f"{module}.lora_A.weight", (r, width), why)
        a = take(tensors, f"{module}.lora_B.weight", (vocab, r), why)
    return _boxed_table(site, a, b, scales(site, (r,), config)[0], config)


def to_config(layout: Layout, config: Config, adapters: Mapping[str, Any]) -> dict[str, Any]:
    """adapter_config.json's keys.  Where the base was altered, ranks are doubled and alphas with them."""
    values = dict(vars(config))
    if not lora_init.alters_base(config.init_lora_weights):
        return values
    if lost(layout, config):
        return values | {"init_lora_weights": True, "loftq_config": {}}
    more = math.sqrt(2) if config.use_rslora else 2
    return values | {
        "r": 2 * config.r,
        "lora_alpha": config.lora_alpha * more,
        "rank_pattern": {key: 2 * r for key, r in config.rank_pattern.items()},
        "alpha_pattern": {key: alpha * more for key, alpha in config.alpha_pattern.items()},
        "init_lora_weights": True,
        "loftq_config": {},
    }
