"""The `optim` section: jaxtune's schedule, and the optimisers of torch, transformers and bitsandbytes."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import transformers
from bitsandbytes.optim.adamw import AdamW8bit, AdamW32bit
from bitsandbytes.optim.lion import Lion32bit

from jaxtune.errors import UserError

# With `optim.offload`: bitsandbytes' optimisers that keep their state in memory that the host pages.
PAGED = ("adamw", "adamw8bit", "lion")


def make_schedule(c: Any, total_steps: int) -> Callable[[int], float]:
    """Learning rate by step, as `jaxtune.optim.make_schedule`: linear warm-up from 0, then constant, linear or cosine
    to `end_fraction` at the last step."""
    steps = max(total_steps - c.warmup_steps, 1)

    def rate(step: int) -> float:
        if step < c.warmup_steps:
            return c.learning_rate * step / c.warmup_steps
        done = min(step - c.warmup_steps, steps) / steps
        left = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[c.schedule]
        end = 1.0 if c.schedule == "constant" else c.end_fraction
        return c.learning_rate * (end + (1 - end) * left)

    return rate


def check(c: Any) -> None:
    """Refuses what has no paged form.

    Raises:
      UserError: naming the key.
    """
    if c["offload"] and c["name"] not in PAGED:
        raise UserError(
            f"`optim.offload` is true, and {c['name']} has no paged form in bitsandbytes. These have: "
            f"{', '.join(PAGED)}."
        )


def make_optimiser(c: Any, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser, its rate 1: `make_schedule` gives what it is multiplied with."""
    # On a CPU there is nothing to page, and bitsandbytes would warn of it.
    paged = c.offload and torch.cuda.is_available()
    moments = {"betas": (c.b1, c.b2), "weight_decay": c.weight_decay}
    if c.name == "adamw8bit":
        return AdamW8bit(parameters, lr=1.0, eps=c.eps, is_paged=paged, **moments)
    if c.name == "adamw" and paged:
        return AdamW32bit(parameters, lr=1.0, eps=c.eps, is_paged=True, **moments)
    if c.name == "adamw":
        return torch.optim.AdamW(parameters, lr=1.0, eps=c.eps, **moments)
    if c.name == "lion":
        return Lion32bit(parameters, lr=1.0, is_paged=paged, **moments)
    if c.name == "sgd":
        return torch.optim.SGD(parameters, lr=1.0, momentum=c.momentum, weight_decay=c.weight_decay)
    fixed = {"scale_parameter": True, "relative_step": False, "warmup_init": False}
    return transformers.Adafactor(parameters, lr=1.0, weight_decay=c.weight_decay, **fixed)
