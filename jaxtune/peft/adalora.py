"""AdaLoRA: y = x W + s (dropout(x) A diag(E)) B, with s = alpha/init_r; the ranks that matter least lose their E while
it trains, so that every layer ends with as many as it deserves.

Zhang et al. 2023 (arXiv 2303.10512); equals peft's `AdaLoraModel` and `RankAllocator`, called after every optimiser
step with the number of steps done before it, as peft's examples do.  PEFT stores A [r, in], E [r, 1], B [out, r]; here
they are a [in, r], e [r], b [r, out].

A rank is worth the importance of its E plus the mean importances of its row of A and column of B; importance is the
smoothed sensitivity |w dL/dw| times how much that varies.  From step `tinit` on, every `deltaT` steps, the least worth
are set to zero until `target_r` ranks a module are left on average, by a cubic schedule that ends `tfinal` steps before
the last; after that the choice stands.  All of it is an optimiser around the optimiser, whose state checkpoints keep.

A rank with E = 0 adds nothing, so the export leaves it out: ragged ranks, and tensors without rows where none is left.
"""

import dataclasses
from collections.abc import Mapping, MutableMapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jaxtyping import Array, Bool, Float

from jaxtune.errors import UserError
from jaxtune.layers import matmul
from jaxtune.peft import lora
from jaxtune.peft.keys import check_choice, check_count, check_fraction, check_number, check_targets
from jaxtune.peft.method import QUERY_VALUE, Fixed, Layout, Site, Start, box, select, site_key, spellings, take

PEFT_TYPE = "ADALORA"

NEUTRAL: dict[str, tuple[Any, ...]] = {
    **lora.NEUTRAL,
    "r": (8, None),  # peft's own: init_r stands for it
    "alpha_pattern": (None, {}),
    "loftq_config": (None, {}),
    "trainable_token_indices": (None,),
    "use_dora": (False,),
    "use_rslora": (False,),
}


# PEFT's TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING: with T5 it means all linear layers, of which v1.1's have
# other names.
TARGETS = QUERY_VALUE | {"t5": ("q", "k", "v", "o", "wi", "wo"), "mt5": ("q", "k", "v", "o", "wi_0", "wi_1", "wo")}


@dataclasses.dataclass(frozen=True)
class Config:
    """PEFT's keys and defaults; total_step None: the steps of the run.

    Raises:
      ValueError: a value out of range, naming the key.
    """

    init_r: Any = 12
    target_r: Any = 8
    tinit: Any = 0
    tfinal: Any = 0
    deltaT: Any = 1
    beta1: Any = 0.85
    beta2: Any = 0.85
    orth_reg_weight: Any = 0.5
    total_step: Any = None
    rank_pattern: Any = None
    lora_alpha: Any = 8
    lora_dropout: Any = 0.0
    target_modules: Any = None
    exclude_modules: Any = None
    layers_to_transform: Any = None
    layers_pattern: Any = None
    bias: Any = "none"
    modules_to_save: Any = None
    init_lora_weights: Any = True

    def __post_init__(self):
        check_count("init_r", self.init_r)
        check_count("target_r", self.target_r, high=self.init_r)
        for key in ("tinit", "tfinal"):
            check_count(key, getattr(self, key), low=0, high=2**31 - 1)
        check_count("deltaT", self.deltaT, high=2**31 - 1)
        for key in ("beta1", "beta2", "lora_dropout"):
            check_fraction(key, getattr(self, key))
        check_number("lora_alpha", self.lora_alpha)
        check_number("orth_reg_weight", self.orth_reg_weight)
        check_choice("bias", self.bias, ("none", "all", "lora_only"))
        check_choice("init_lora_weights", self.init_lora_weights, (True, False))
        check_targets(self)
        if self.total_step is not None:
            check_count("total_step", self.total_step, high=2**31 - 1)
            if self.tinit >= self.total_step - self.tfinal:
                raise ValueError(
                    f"tinit={self.tinit} and tfinal={self.tfinal} leave no step of {self.total_step} (total_step, or "
                    "the run's) to give ranks up in. Decrease them, or train longer."
                )


@struct.dataclass
class AdaLora:
    """a [L, in, R], e [L, R], b [L, R, out], live [L, R]: the ranks that are there; inside the layer scan without L.
    layers: which have an adapter, if only one without ranks."""

    a: Any
    e: Any
    b: Any
    live: Fixed
    layers: tuple[bool, ...] = struct.field(pytree_node=False)
    scale: float = struct.field(pytree_node=False)
    dropout: float = struct.field(pytree_node=False)

    def linear(self, x, y, w, rng):
        low = matmul(lora.dropout(x, self.dropout, rng), self.a * self.e[None])
        return y + matmul(low.astype(x.dtype), self.b) * self.scale

    def merged(self, w):
        return w + self.scale * ((self.a * self.e[None]) @ self.b)

    def kept(self) -> np.ndarray:
        """[L, R]: the ranks that are left; all that are there where the site has not begun (every E is zero)."""
        live, e = np.asarray(self.live.value), np.asarray(self.e)
        return live & (e != 0) if e.any() else live

    def to_peft(self, site: Site, layer: int) -> dict[str, np.ndarray]:
        if not self.layers[layer]:
            return {}
        kept = self.kept()[layer]
        a, e, b = (np.asarray(v[layer]) for v in (self.a, self.e, self.b))
        return {"lora_A": a[:, kept].T, "lora_E": e[kept][:, None], "lora_B": b[kept].T}


def plan(layout: Layout, config: Config) -> dict[str, tuple[bool, ...]]:
    """{path: whether each layer has an adapter}.

    Raises:
      UserError: as `method.select`.
    """
    return select(layout, config, TARGETS)


def init(key: jax.Array, layout: Layout, config: Config, start: Start) -> dict[str, AdaLora]:
    """A, B ~ N(0, 0.02²) and E = 0; init_lora_weights False: all ~ N(0, 1)."""
    std = 0.02 if config.init_lora_weights else 1.0
    adapters = {}
    for path, layers in plan(layout, config).items():
        site = layout.site(path)
        (L, rows, columns), R = site.shape, config.init_r
        live = np.repeat(np.array(layers)[:, None], R, axis=1)
        mask = jnp.asarray(live, jnp.float32)
        keys = jax.random.split(site_key(key, path), 3)
        e = jnp.zeros((L, R)) if config.init_lora_weights else jax.random.normal(keys[1], (L, R)) * mask
        a = jax.random.normal(keys[0], (L, rows, R)) * std * mask[:, None]
        b = jax.random.normal(keys[2], (L, R, columns)) * std * mask[:, :, None]
        adapters[path] = _boxed(site, config, layers, a, e, b, live)
    return adapters


def _boxed(site: Site, config: Config, adapted: tuple[bool, ...], a: Any, e: Any, b: Any, live: np.ndarray) -> AdaLora:
    layers, rows, columns = site.axes
    alpha = config.lora_alpha if config.lora_alpha > 0 else config.init_r
    return AdaLora(
        a=box(a, layers, rows, "rank"),
        e=box(e, layers, "rank"),
        b=box(b, layers, "rank", columns),
        live=Fixed(jnp.asarray(live)),
        layers=adapted,
        scale=alpha / (config.init_r + 1e-5),
        dropout=config.lora_dropout,
    )


def from_peft(layout: Layout, config: Config, tensors: MutableMapping[str, np.ndarray]) -> dict[str, AdaLora]:
    """{path: adapter} from PEFT's tensors; ranks that were given up stay empty.

    Raises:
      KeyError: a tensor is missing.  UserError: one has another shape than `rank_pattern` or `init_r` says.
    """
    adapters = {}
    for path, layers in plan(layout, config).items():
        site = layout.site(path)
        (L, rows, columns), R = site.shape, config.init_r
        a, e, b = (np.zeros(shape, np.float32) for shape in ((L, rows, R), (L, R), (L, R, columns)))
        live = np.zeros((L, R), bool)
        for layer, module in enumerate(site.modules):
            if not layers[layer]:
                continue
            kept = live[layer] = _kept(config, module)
            r, why = int(kept.sum()), "its rank_pattern" if config.rank_pattern else f"init_r {R}"
            a[layer][:, kept] = take(tensors, f"{module}.lora_A", (r, rows), why).T
            e[layer][kept] = take(tensors, f"{module}.lora_E", (r, 1), why)[:, 0]
            b[layer][kept] = take(tensors, f"{module}.lora_B", (columns, r), why).T
        adapters[path] = _boxed(site, config, layers, a, e, b, live)
    return adapters


def _kept(config: Config, module: str) -> np.ndarray:
    for name in spellings(module):
        found = (config.rank_pattern or {}).get(f"{name}.lora_E")
        if found is not None:
            if len(found) != config.init_r:
                raise UserError(f"rank_pattern has {len(found)} values for {name}; init_r is {config.init_r}.")
            return np.array(found, bool)
    return np.ones(config.init_r, bool)


def to_config(layout: Layout, config: Config, adapters: Mapping[str, Any]) -> dict[str, Any]:
    """adapter_config.json's keys, with the ranks that are left as `rank_pattern`."""
    pattern = {}
    for path, adapter in adapters.items():
        if not isinstance(adapter, AdaLora) or not np.asarray(adapter.e).any():
            continue
        for layer, module in enumerate(layout.site(path).modules):
            if adapter.layers[layer]:
                pattern[f"{layout.peft_module(module)}.lora_E"] = adapter.kept()[layer].tolist()
    return {**vars(config), "rank_pattern": pattern or None}


# ---------------------------------------------------------------- while it trains

Leaves = Mapping[str, Any]


def penalty(config: Config, trainable: Leaves, frozen: Leaves) -> Float[Array, ""]:
    """orth_reg_weight times the mean over all A and B of |A Aᵀ - I|, which keeps ranks from doing each other's work."""
    total, count = jnp.zeros(()), jnp.zeros(())
    for path in _sites(trainable):
        a, b, live = trainable[f"{path}/a"], trainable[f"{path}/b"], frozen[f"{path}/live/fixed"]
        layers = jnp.any(live, axis=1)
        eye = jnp.eye(live.shape[1])[None] * live[:, :, None].astype(jnp.float32)
        for gram in (jnp.einsum("LIR,LIS->LRS", a, a), jnp.einsum("LRO,LSO->LRS", b, b)):
            square = jnp.sum(jnp.square(gram - eye), axis=(1, 2))
            total += jnp.sum(jnp.where(layers, jnp.sqrt(jnp.maximum(square, 1e-30)), 0.0))
            count += jnp.sum(layers.astype(jnp.float32))
    return config.orth_reg_weight * total / count


class Allocation(NamedTuple):
    """inner: the wrapped optimiser's state.  step: steps done.  importance, uncertainty: {path: smoothed}.  kept: {path
    of an E: whether each rank is left}."""

    inner: Any
    step: Any
    importance: dict[str, Any]
    uncertainty: dict[str, Any]
    kept: dict[str, Any]


def optimiser(inner: optax.GradientTransformation, config: Config, frozen: Leaves) -> optax.GradientTransformation:
    """`inner`, and after each of its steps the allocation of ranks."""
    lives = {p.removesuffix("/live/fixed"): np.asarray(v) for p, v in frozen.items() if p.endswith("/live/fixed")}
    budgets, masking = schedule(config, sum(int(live.sum()) for live in lives.values()), lives)
    last = config.total_step - config.tfinal

    def init(params: Any) -> Any:
        ours = [f"{path}/{name}" for path in lives for name in "aeb"]
        return Allocation(
            inner.init(params),
            jnp.zeros((), jnp.int32),
            {path: jnp.zeros_like(params[path]) for path in ours},
            {path: jnp.zeros_like(params[path]) for path in ours},
            {f"{path}/e": jnp.asarray(live) for path, live in lives.items()},
        )

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        grads: Any = updates
        new, inner_state = inner.update(grads, state.inner, params)
        updates = new
        step, growing = state.step, state.step < last
        importance, uncertainty = {}, {}
        for path, before in state.importance.items():
            now = jnp.abs((params[path] + updates[path]) * grads[path])
            smooth = config.beta1 * before + (1 - config.beta1) * now
            spread = config.beta2 * state.uncertainty[path] + (1 - config.beta2) * jnp.abs(now - smooth)
            importance[path] = jnp.where(growing, smooth, before)
            uncertainty[path] = jnp.where(growing, spread, state.uncertainty[path])
        scores = {p: _scores(p, live, importance, uncertainty) for p, live in lives.items()}
        order = jnp.sort(jnp.concatenate([score.reshape(-1) for score in scores.values()]))
        # The first places are those of ranks that are not there.
        at = jnp.minimum(step, len(budgets) - 1)
        threshold = order[order.size - jnp.asarray(budgets)[at] - 1]
        now_masking = jnp.asarray(masking)[at]
        kept = {}
        for path, live in lives.items():
            name = f"{path}/e"
            chosen = (scores[path] > threshold) & jnp.asarray(live)
            kept[name] = jnp.where(now_masking, chosen, state.kept[name])
            e = params[name] + updates[name]
            stays = jnp.where(now_masking | (step > last), kept[name], jnp.asarray(live))
            updates = {**updates, name: jnp.where(stays, e, jnp.zeros_like(e)) - params[name]}
        return updates, Allocation(inner_state, step + 1, importance, uncertainty, kept)

    return optax.GradientTransformation(init, update)


def schedule(
    config: Config, ranks: int, lives: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, Bool[np.ndarray, "steps"]]:
    """(ranks that may stay after each step, whether they are chosen anew at it), for steps 0 to total_step."""
    modules = sum(int(live.any(axis=1).sum()) for live in lives.values())
    target, last = min(config.target_r * modules, ranks), config.total_step - config.tfinal
    budgets, masking = np.full(config.total_step + 1, ranks, np.int32), np.zeros(config.total_step + 1, bool)
    for step in range(config.tinit + 1, last + 1):
        left = 1 - (step - config.tinit) / (last - config.tinit)
        budgets[step] = int((ranks - target) * left**3 + target)
        masking[step] = step == last or step % config.deltaT == 0
    # As many as there are cannot be more than a threshold among them: then nothing is given up.
    return budgets, masking & (budgets < ranks)


def _scores(path: str, live: np.ndarray, importance: Leaves, uncertainty: Leaves) -> Any:
    a, e, b = (importance[f"{path}/{name}"] * uncertainty[f"{path}/{name}"] for name in "aeb")
    return jnp.where(jnp.asarray(live), e + jnp.mean(a, axis=1) + jnp.mean(b, axis=2), -jnp.inf)


def _sites(trainable: Leaves) -> list[str]:
    return [path.removesuffix("/e") for path in trainable if path.endswith("/e")]
