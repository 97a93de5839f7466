"""What every method is made of: sites, PEFT's matching rules, values that do not train, and strict config keys.

A method is one file.  It has a frozen dataclass with PEFT's own keys, `init(key, sites, config)` that returns
{parameter path: adapter}, and an adapter class with the door function (`linear` or `weight`) and its PEFT names.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from jaxtune.errors import UserError, did_you_mean


class Site(NamedTuple):
    """A parameter an adapter can be put on.

    path: `layers/attn/q/kernel`; modules: PEFT's module paths, one per layer; shape and axes: with the layer axis.
    """

    path: str
    modules: tuple[str, ...]
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    kind: str  # linear | embedding | head | norm

    @property
    def stacked(self) -> bool:
        return self.axes[0] == "layers"


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class Fixed:
    """An array inside an adapter that is data, not a parameter: it has no gradient and no optimiser state."""

    value: Any

    def tree_flatten_with_keys(self):
        return ((jax.tree_util.GetAttrKey("fixed"), self.value),), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


def is_trainable(path: str) -> bool:
    """Whether a leaf of the adapters, by its path, is trained."""
    return not path.endswith("/fixed")


# ---------------------------------------------------------------- which modules (peft/tuners/tuners_utils.py)


def spellings(module: str) -> tuple[str, ...]:
    """A module path as text-only and as multimodal checkpoints have it (before and since transformers 4.52), since an
    adapter made on one fits the text tower of the other."""
    if not module.startswith("model."):
        return (module,)
    return (module, module.replace("model.", "model.language_model.", 1), "language_model." + module)


def names_match(names: Any, module: str) -> bool:
    """PEFT's rule: a string is a regular expression for the whole path, a list holds names or their dotted ends."""
    if isinstance(names, str):
        return any(re.fullmatch(names, spelling) for spelling in spellings(module))
    return any(s == name or s.endswith("." + name) for name in names for s in spellings(module))


def layer_index(module: str, layers_pattern: Any = None) -> int | None:
    """The first integer component of a module path, optionally only right after a given name."""
    patterns = [layers_pattern] if isinstance(layers_pattern, str) else list(layers_pattern or [])
    if not patterns:
        found = re.match(r".*?\.[^.]*\.(?P<index>\d+)\.", module)
        return int(found["index"]) if found else None
    for pattern in patterns:
        found = re.match(rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\.", module)
        if found:
            return int(found["index"])
    return None


def pattern_value(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first key, in order, that matches the end of the module path (PEFT's `get_pattern_key`)."""
    for key, value in pattern.items():
        if any(re.match(rf"(.*\.)?({key})$", spelling) for spelling in spellings(module)):
            return value
    return default


def is_saved(modules_to_save: Sequence[str] | None, module: str) -> bool:
    """Whether a module, or one that contains it, is trained whole: PEFT compares the ends of paths."""
    parts = module.split(".")
    ancestors = [".".join(parts[: n + 1]) for n in range(len(parts))]
    return any(a.endswith(name) for a in ancestors for name in modules_to_save or ())


def require_match(found: Sequence[Any], asked_by: str, asked: Any, sites: Iterable[Site]) -> None:
    """Refuses a target that matches nothing, naming what exists."""
    if found:
        return
    names = list(dict.fromkeys(module.rsplit(".", 1)[-1] for s in sites for module in s.modules))
    if isinstance(asked, str):
        hint = (
            " A string is a regular expression for whole module paths, e.g. '.*q_proj'; names go in a list: "
            f"--config.peft.{asked_by}=\"['q_proj','v_proj']\"."
        )
    else:
        hint = did_you_mean(next(iter(asked), ""), names)
    raise UserError(
        f"No module matches {asked_by} {asked!r}.{hint}\n"
        f"The model has: {', '.join(names)}. Set `config.peft.{asked_by}`."
    )


# ---------------------------------------------------------------- PEFT's config keys, read strictly

# Written by peft beside a method's own keys; they say nothing about the mathematics.
BOOKKEEPING = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
    "task_type",
}


def read_config(cls: Any, values: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...]], where: str) -> Any:
    """An adapter_config.json (or our `peft` section) as the method's dataclass.

    Args:
      cls: the method's dataclass.  values: keys and values as PEFT writes them.
      neutral: keys of PEFT that the method does not have, with the values that mean "not used".
      where: named in errors.

    Raises:
      UserError: a key that is unknown, or known and used but not supported: refused by name, never ignored.
    """
    fields = {f.name for f in dataclasses.fields(cls)}
    taken = {}
    for key, value in values.items():
        if key in fields:
            taken[key] = value
        elif key in BOOKKEEPING:
            continue
        elif key not in neutral:
            raise UserError(
                f"{where} has the key {key!r}, which jaxtune does not know.{did_you_mean(key, fields)}\n"
                f"Supported: {', '.join(sorted(fields))}."
            )
        elif value not in neutral[key]:
            raise UserError(
                f"{where} sets {key}={value!r}, which jaxtune does not support yet."
                f"\nSupported keys: {', '.join(sorted(fields))}."
            )
    try:
        return cls(**taken)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {error}") from None
