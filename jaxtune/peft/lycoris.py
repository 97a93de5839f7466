"""What LoHa and LoKr have in common: ranks by layer, dropout of what is added, and initial values (peft's
`lycoris_utils`)."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.peft.keys import check_choice, check_count, check_fraction, check_number, check_targets
from jaxtune.peft.method import QUERY_VALUE, Fixed, Layout, Site, pattern_value, select


def check(config: Any) -> None:
    """Checks the keys that both have, and turns absent patterns into empty ones.

    Raises:
      ValueError: a value out of range, naming the key.
    """
    for key in ("rank_pattern", "alpha_pattern"):
        object.__setattr__(config, key, dict(getattr(config, key) or {}))
    for rank in (config.r, *config.rank_pattern.values()):
        check_count("r", rank)
    for alpha in (config.alpha, *config.alpha_pattern.values()):
        check_number("alpha", alpha)
    for key in ("rank_dropout", "module_dropout"):
        check_fraction(key, getattr(config, key))
    check_choice("use_effective_conv2d", config.use_effective_conv2d, (True, False))  # there are no convolutions
    check_targets(config)


def ranks_by_site(layout: Layout, config: Any) -> dict[str, tuple[int, ...]]:
    """{path: rank of each layer, 0 where it has no adapter}.

    Raises:
      UserError: nothing matches, or something matches that is not linear.
    """
    return {
        path: tuple(
            pattern_value(config.rank_pattern, module, config.r) if adapted else 0
            for module, adapted in zip(layout.site(path).modules, layers, strict=True)
        )
        for path, layers in select(layout, config, QUERY_VALUE).items()
    }


def scales(site: Site, ranks: tuple[int, ...], config: Any) -> Fixed:
    """alpha / r of each layer [L]."""
    alphas = [pattern_value(config.alpha_pattern, module, config.alpha) for module in site.modules]
    return Fixed(jnp.asarray(np.array([a / (r or 1) for a, r in zip(alphas, ranks, strict=True)], np.float32)))


def live_ranks(ranks: tuple[int, ...]) -> Any:
    """1 where a layer has that rank, 0 beyond [L, R]."""
    return jnp.asarray(np.arange(max(ranks))[None] < np.array(ranks)[:, None], jnp.float32)


def kaiming(key: jax.Array, shape: tuple[int, ...], fan_in: Any) -> Any:
    """U(±1/sqrt(fan_in)), torch's `kaiming_uniform_` with a = sqrt(5).  fan_in: one, or one per layer [L]."""
    bound = 1 / jnp.sqrt(jnp.asarray(np.maximum(fan_in, 1), jnp.float32))
    return jax.random.uniform(key, shape, minval=-1.0, maxval=1.0) * bound.reshape(bound.shape + (1, 1) * bound.ndim)


def drop(added: Any, rng: Any, rank_dropout: float, module_dropout: float, rescale: bool = True) -> Any:
    """Dropout of what an adapter adds [N, O]: single outputs, for all rows alike, and all of it; `rng` None: none.

    rescale: by the share of outputs that are left.
    """
    if rng is None:
        return added
    by_output, whole = jax.random.split(rng)
    if rank_dropout:
        keep = jax.random.bernoulli(by_output, 1 - rank_dropout, added.shape[1:]).astype(jnp.float32)
        if rescale:
            keep = keep / jnp.maximum(jnp.mean(keep), 1 / math.prod(keep.shape))
        added = added * keep[None]
    if module_dropout:
        added = jnp.where(jax.random.bernoulli(whole, 1 - module_dropout), added, jnp.zeros_like(added))
    return added
