"""What AdaLoRA needs beside a step: ranks given up as it trains, and a checkpoint that knows which.

peft keeps the importance of ranks in Python objects that no state dict holds, so that a resumed run would begin to
measure anew.
"""

import json
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig
from safetensors.torch import load_file, save_file

TENSORS, PATTERN = "adalora.safetensors", "adalora.json"
KEPT = ("ipt", "exp_avg_ipt", "exp_avg_unc")


def config_of(model: Any) -> Any:
    """peft's config where the method is AdaLoRA, else None."""
    config = model.peft_config["default"]
    return config if isinstance(config, AdaLoraConfig) else None


def allocate(model: Any, step: int) -> None:
    """After the optimiser's step, while gradients are there; `step` counts from 0."""
    if config_of(model) is not None:
        model.base_model.update_and_allocate(step)


def save(model: Any, directory: Path) -> None:
    """Beside a checkpoint's other files."""
    config = config_of(model)
    if config is None:
        return
    allocator = model.base_model.rankallocator
    tensors = {f"{kind}/{name}": t for kind in KEPT for name, t in getattr(allocator, kind).items()}
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, directory / TENSORS)
    (directory / PATTERN).write_text(json.dumps(config.rank_pattern or {}))


def load(model: Any, directory: Path) -> None:
    """As `save` left it."""
    config = config_of(model)
    if config is None:
        return
    allocator = model.base_model.rankallocator
    device = next(p for p in model.parameters() if p.requires_grad).device
    tensors: dict[str, torch.Tensor] = load_file(directory / TENSORS, device=str(device))
    for kind in KEPT:
        found = {name.removeprefix(f"{kind}/"): t for name, t in tensors.items() if name.startswith(f"{kind}/")}
        setattr(allocator, kind, found)
    config.rank_pattern = json.loads((directory / PATTERN).read_text()) or config.rank_pattern
