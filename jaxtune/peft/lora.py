"""LoRA: y = x W + s (dropout(x) A) B, with s = alpha/r, or alpha/sqrt(r) for rsLoRA.

Hu et al. 2021 (arXiv 2106.09685), Kalajdzievski 2023 (arXiv 2312.03732); equals peft's `lora.Linear`, whose config keys
these are.  PEFT stores A as [r, in] and B as [out, r]; here they are a [in, r] and b [r, out], stacked over layers.

Ranks and scales may differ by layer (`rank_pattern`, `alpha_pattern`, `layers_to_transform`).  Inside the layer scan
every layer has the largest rank of its site; the surplus columns of A and rows of B are zero, get a zero gradient from
each other, and so stay zero.
"""

import dataclasses
import math
import re
import zlib
from collections.abc import MutableMapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxtune.errors import UserError
from jaxtune.layers import matmul
from jaxtune.peft.method import Fixed, Site, is_saved, layer_index, names_match, pattern_value, require_match

PEFT_TYPE = "LORA"

# PEFT's default targets for decoder families (TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING).
DEFAULT_TARGETS = ("q_proj", "v_proj")

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
    "loftq_config": (None, {}),
    "lora_bias": (False,),
    "lora_ga_config": (None,),
    "megatron_config": (None,),
    "megatron_core": ("megatron.core", None),
    "monteclora_config": (None,),
    "qalora_group_size": (16,),
    "runtime_config": (None, {}, {"ephemeral_gpu_offload": False}),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "use_bdlora": (None, False),
    "use_dora": (False,),
    "use_qalora": (False,),
    "velora_config": (None,),
}


@dataclasses.dataclass(frozen=True)
class LoraConfig:
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
    layers_to_transform: Any = None
    layers_pattern: Any = None
    rank_pattern: Any = None
    alpha_pattern: Any = None
    bias: Any = "none"
    modules_to_save: Any = None
    init_lora_weights: Any = True

    def __post_init__(self):
        def is_number(value):
            return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

        for key in ("rank_pattern", "alpha_pattern"):
            object.__setattr__(self, key, dict(getattr(self, key) or {}))
        if self.init_lora_weights is None:
            object.__setattr__(self, "init_lora_weights", True)
        if isinstance(self.init_lora_weights, str):
            object.__setattr__(self, "init_lora_weights", self.init_lora_weights.lower())
        for key, ranks in (("r", [self.r]), ("rank_pattern", self.rank_pattern.values())):
            if any(not isinstance(r, int) or isinstance(r, bool) or not 1 <= r <= 65536 for r in ranks):
                raise ValueError(f"{key} is {getattr(self, key)!r}. A rank is an integer from 1 to 65536.")
        for key, alphas in (("lora_alpha", [self.lora_alpha]), ("alpha_pattern", self.alpha_pattern.values())):
            if not all(is_number(a) for a in alphas):
                raise ValueError(f"{key} is {getattr(self, key)!r}. An alpha is a finite number.")
        if not is_number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout is {self.lora_dropout!r}. It is a probability, at least 0 and less than 1.")
        if self.bias not in ("none", "all", "lora_only"):
            raise ValueError(f"bias is {self.bias!r}. It can be: none, all, lora_only.")
        if self.init_lora_weights not in (True, False, "gaussian"):
            raise ValueError(
                f"init_lora_weights is {self.init_lora_weights!r}. jaxtune supports: True, False, 'gaussian'."
            )
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            if self.target_modules.lower() != "all-linear":
                raise ValueError("layers_to_transform needs target_modules as a list of names, as in PEFT.")
        for key in ("target_modules", "exclude_modules"):
            value = getattr(self, key)
            if isinstance(value, str):
                try:
                    re.compile(value)
                except re.error as error:
                    raise ValueError(f"{key} is {value!r}, which is no regular expression: {error}.") from None


@struct.dataclass
class Lora:
    """a [L, in, R], b [L, R, out], scale [L]; inside the layer scan without L.  ranks: one per layer, 0 where none."""

    a: Any
    b: Any
    scale: Fixed
    ranks: tuple[int, ...] = struct.field(pytree_node=False)
    dropout: float = struct.field(pytree_node=False)

    def linear(self, x, y, w, rng):
        if self.dropout and rng is not None:
            keep = jax.random.bernoulli(rng, 1 - self.dropout, x.shape)
            x = jnp.where(keep, x / jnp.asarray(1 - self.dropout, x.dtype), jnp.zeros((), x.dtype))
        return y + matmul(matmul(x, self.a).astype(x.dtype), self.b) * self.scale.value

    def to_peft(self, site: Site, layer: int) -> dict[str, np.ndarray]:
        """The tensors of one layer by PEFT's suffix; empty where the layer has no adapter."""
        r = self.ranks[layer]
        if r == 0:
            return {}
        a, b = np.asarray(self.a[layer]), np.asarray(self.b[layer])
        return {"lora_A.weight": a[:, :r].T, "lora_B.weight": b[:r].T}


def plan(sites: Sequence[Site], config: LoraConfig) -> dict[str, tuple[int, ...]]:
    """{path: rank of each layer} of the sites that get an adapter.

    Raises:
      UserError: nothing matches, or something matches that LoRA cannot adapt here.
    """
    targets = config.target_modules if config.target_modules is not None else DEFAULT_TARGETS
    all_linear = isinstance(targets, str) and targets.lower() == "all-linear"
    layers = config.layers_to_transform
    layers = {layers} if isinstance(layers, int) else set(layers or ())

    def rank(site: Site, module: str) -> int:
        if config.exclude_modules and names_match(config.exclude_modules, module):
            return 0
        if is_saved(config.modules_to_save, module):
            return 0
        if not (site.kind == "linear" if all_linear else names_match(targets, module)):
            return 0
        if layers and layer_index(module, config.layers_pattern) not in layers:
            return 0
        return pattern_value(config.rank_pattern, module, config.r)

    ranks = {site.path: tuple(rank(site, module) for module in site.modules) for site in sites}
    found = {path: rs for path, rs in ranks.items() if any(rs)}
    require_match(list(found), "target_modules", targets, sites)
    for site in sites:
        if site.path in found and site.kind != "linear":
            raise UserError(
                f"target_modules {targets!r} matches {site.modules[0]}, of kind {site.kind}. LoRA here adapts linear "
                "layers; name that module in `modules_to_save` to train it whole."
            )
    if not isinstance(targets, str):
        # PEFT lets a name in a list match nothing as long as another does; a misspelt name would go unnoticed.
        for name in targets:
            require_match(
                [m for s in sites for m in s.modules if names_match([name], m)], "target_modules", [name], sites
            )
    return found


def init(key: jax.Array, sites: Sequence[Site], config: LoraConfig) -> dict[str, Lora]:
    """Adapters by parameter path, float32, boxed with the logical axes of their weight.

    A ~ U(±1/sqrt(in)) (PEFT's Kaiming with a=sqrt(5)) and B = 0; "gaussian": A has standard deviation 1/r; False:
    B ~ U(±1/sqrt(r)) too.
    """
    adapters = {}
    by_path = {site.path: site for site in sites}
    for path, ranks in plan(sites, config).items():
        site = by_path[path]
        size, (rows, columns) = max(ranks), site.shape[1:]
        # A key of its own for each site, whatever else is adapted.
        key_a, key_b = jax.random.split(jax.random.fold_in(key, zlib.crc32(path.encode()) & 0x7FFFFFFF))
        live = jnp.asarray(np.arange(size)[None] < np.array(ranks)[:, None], jnp.float32)  # [L, R]
        per_layer = np.maximum(np.array(ranks, np.float32), 1)[:, None, None]
        if config.init_lora_weights == "gaussian":
            a = jax.random.normal(key_a, (len(ranks), rows, size)) / jnp.asarray(per_layer)
        else:
            a = jax.random.uniform(key_a, (len(ranks), rows, size), minval=-1.0, maxval=1.0) * rows**-0.5
        b = jnp.zeros((len(ranks), size, columns))
        if config.init_lora_weights is False:
            b = jax.random.uniform(key_b, b.shape, minval=-1.0, maxval=1.0) / jnp.sqrt(jnp.asarray(per_layer))
        adapters[path] = Lora(
            a=nn.LogicallyPartitioned(a * live[:, None, :], (site.axes[0], site.axes[1], "rank")),
            b=nn.LogicallyPartitioned(b * live[:, :, None], (site.axes[0], "rank", site.axes[2])),
            scale=Fixed(jnp.asarray(scales(site, ranks, config))),
            ranks=ranks,
            dropout=config.lora_dropout,
        )
    return adapters


def scales(site: Site, ranks: Sequence[int], config: LoraConfig) -> np.ndarray:
    """What multiplies B A in each layer [L]."""
    alphas = [pattern_value(config.alpha_pattern, module, config.lora_alpha) for module in site.modules]
    divisors = [(math.sqrt(r) if config.use_rslora else r) or 1 for r in ranks]
    return np.array([alpha / divisor for alpha, divisor in zip(alphas, divisors, strict=True)], np.float32)


def from_peft(site: Site, ranks: tuple[int, ...], config: LoraConfig, tensors: MutableMapping[str, np.ndarray]) -> Lora:
    """One site's adapter from PEFT's tensors, which are taken out by full module name + suffix.

    Raises:
      KeyError: a tensor is missing.  UserError: one has another shape than rank and weight say.
    """
    size, (rows, columns) = max(ranks), site.shape[1:]
    a = np.zeros((len(ranks), rows, size), np.float32)
    b = np.zeros((len(ranks), size, columns), np.float32)
    for layer, (module, r) in enumerate(zip(site.modules, ranks, strict=True)):
        if r == 0:
            continue
        for name, shape, into in (
            (f"{module}.lora_A.weight", (r, rows), a[layer, :, :r]),
            (f"{module}.lora_B.weight", (columns, r), b[layer, :r]),
        ):
            tensor = tensors.pop(name)
            if tensor.shape != shape:
                raise UserError(
                    f"The adapter's {name} has shape {list(tensor.shape)}; rank {r} on this model needs {list(shape)}."
                )
            into[...] = tensor.T
    box = nn.LogicallyPartitioned
    return Lora(
        a=box(a, (site.axes[0], site.axes[1], "rank")),
        b=box(b, (site.axes[0], "rank", site.axes[2])),
        scale=Fixed(scales(site, ranks, config)),
        ranks=ranks,
        dropout=config.lora_dropout,
    )
