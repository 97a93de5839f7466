"""`full` and `partial` tuning: the base's own weights train, all of them or those that are chosen; there is no adapter.

Chosen are modules, by PEFT's matching rules (`target_modules`), e.g. ("embed_tokens", "lm_head") as the founding run
had.  On a tied model the two are one matrix and stay one.  Where only some layers of a stacked parameter are chosen,
the others' gradients and updates are zero.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from jaxtune.errors import UserError
from jaxtune.peft.keys import check_targets
from jaxtune.peft.method import Layout, Site, check_reached, names_match, require_match
from jaxtune.peft.saved import Saved


@dataclasses.dataclass(frozen=True)
class Config:
    """target_modules: None for everything.

    Raises:
      ValueError: no regular expression.
    """

    target_modules: Any = None
    exclude_modules: Any = None

    def __post_init__(self):
        check_targets(self)


def plan(layout: Layout, config: Config) -> dict[str, tuple[bool, ...]]:
    """{parameter path: whether each layer trains}; a tied head is the embedding.

    Raises:
      UserError: nothing matches, or a name matches nothing.
    """
    if config.target_modules is None and config.exclude_modules is None:
        sites = [site for site in layout.sites if not _tied_head(layout, site)]
        return {site.path: (True,) * len(site.modules) for site in sites}
    targets = config.target_modules
    all_linear = isinstance(targets, str) and targets.lower() == "all-linear"
    if not isinstance(targets, str):
        for name in targets or ():
            found = [m for s in layout.sites for m in s.modules if names_match([name], m)]
            require_match(found, "target_modules", [name], layout.sites)
    chosen: dict[str, tuple[bool, ...]] = {}
    for site in layout.sites:
        path = "embed/table" if _tied_head(layout, site) else site.path
        layers = tuple(
            (targets is None or (site.kind == "linear" if all_linear else names_match(targets, module)))
            and not (config.exclude_modules and names_match(config.exclude_modules, module))
            for module in site.modules
        )
        if any(layers):
            chosen[path] = layers
    require_match(list(chosen), "target_modules", targets, layout.sites)
    return chosen


def _tied_head(layout: Layout, site: Site) -> bool:
    return layout.tied and site.kind == "head"


def optimiser(
    inner: optax.GradientTransformation, layers: Mapping[str, tuple[bool, ...]]
) -> optax.GradientTransformation:
    """`inner` where all trains; else around it what keeps the other layers as they are.

    Args:
      layers: by path of the trainable leaves.
    """
    partly = {path: np.array(which) for path, which in layers.items() if not all(which)}
    if not partly:
        return inner

    def masked(leaves: Any) -> Any:
        return leaves | {path: jnp.where(_wide(which, leaves[path]), leaves[path], 0) for path, which in partly.items()}

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = inner.update(masked(updates), state, params)
        return masked(updates), state

    return optax.GradientTransformation(inner.init, update)


def _wide(which: np.ndarray, like: Any) -> Any:
    return jnp.asarray(which.reshape(-1, *(1,) * (like.ndim - 1)))


def as_adapters(layout: Layout, layers: Mapping[str, tuple[bool, ...]], params: Mapping[str, Any]) -> dict[str, Saved]:
    """The trained modules as PEFT's `modules_to_save`; a tied matrix goes to the embedding and to the head.

    Raises:
      UserError: only some layers of a parameter were trained, which jaxtune saves as a checkpoint alone.
    """
    adapters = {}
    for path, which in layers.items():
        if not all(which):
            raise UserError(f"Only some layers of {path} train. Set `export.format` to checkpoint.")
        check_reached(layout.site(path), "export.format=adapter")
        adapters[path] = Saved(params[path])
    if layout.tied and "embed/table" in adapters:
        adapters["lm_head/table"] = adapters["embed/table"]
    return adapters


def saved_names(layout: Layout, adapters: Mapping[str, Saved]) -> list[str]:
    """`modules_to_save` that matches just these modules."""
    names = []
    for path in adapters:
        modules = layout.site(path).modules
        short = modules[0].rsplit(".", 1)[-1]
        alone = all(m in modules for s in layout.sites for m in s.modules if m.endswith(short))
        names += [short] if alone else [layout.peft_module(module) for module in modules]
    return names
