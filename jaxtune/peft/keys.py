"""PEFT's config keys, read strictly: values from a downloaded file are checked, and none is ignored."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxtune.errors import UserError, did_you_mean


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and bool(np.isfinite(value))


def check_count(key: str, value: Any, low: int = 1, high: int = 65536) -> None:
    """Refuses what is no integer from `low` to `high`.

    Raises:
      ValueError: naming the key.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{key} is {value!r}. It is an integer from {low} to {high}.")


def check_fraction(key: str, value: Any) -> None:
    """Refuses what is no probability below 1.

    Raises:
      ValueError: naming the key.
    """
    if not is_number(value) or not 0 <= value < 1:
        raise ValueError(f"{key} is {value!r}. It is a probability, at least 0 and less than 1.")


def check_number(key: str, value: Any) -> None:
    """Refuses what is no finite number.

    Raises:
      ValueError: naming the key.
    """
    if not is_number(value):
        raise ValueError(f"{key} is {value!r}. It is a finite number.")


def check_choice(key: str, value: Any, choices: Sequence[Any]) -> None:
    """Refuses a value that is none of these.

    Raises:
      ValueError: naming the key and what it can be.
    """
    if not any(value is choice or (value == choice and type(value) is type(choice)) for choice in choices):
        raise ValueError(f"{key} is {value!r}. It can be: {', '.join(map(str, choices))}.")


def check_targets(config: Any) -> None:
    """Refuses patterns that are no regular expressions, and layers asked for of a pattern.

    Raises:
      ValueError: naming the key.
    """
    for key in ("target_modules", "exclude_modules", "feedforward_modules"):
        value = getattr(config, key, None)
        if isinstance(value, str):
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"{key} is {value!r}, which is no regular expression: {error}.") from None
    if getattr(config, "layers_to_transform", None) is not None and isinstance(config.target_modules, str):
        if config.target_modules.lower() != "all-linear":
            raise ValueError("layers_to_transform needs target_modules as a list of names, as in PEFT.")


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
    fields = {f.name: f.default for f in dataclasses.fields(cls)}
    taken = {}
    for key, value in values.items():
        if key in fields:
            # JSON has 0 for 0.0.
            taken[key] = float(value) if isinstance(fields[key], float) and type(value) is int else value
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
