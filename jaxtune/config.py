"""Settings: `get_default` (all of them are in jaxtune/defaults.py), and `check`, which refuses what cannot be meant.

A recipe in `configs/` is data: it takes `get_default()`, changes some values and returns it.  The same file drives
`jaxtune.train` on TPUs and `torch_gpu.train` on GPUs, so nothing here imports jax or torch.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from jaxtune.defaults import ASSETS, get_default
from jaxtune.errors import UserError, did_you_mean

__all__ = ["ASSETS", "check", "flatten", "get_default", "set_value", "to_json"]

CHOICES = {
    "model.dtype": ("float32", "bfloat16", "float16"),
    "model.quant": (None, "nf4", "int8"),
    "data.format": ("messages", "prompt_completion", "text"),
    "data.truncation": ("right", "left", "drop"),
    "data.on_bad_row": ("error", "skip"),
    "optim.name": ("adamw", "adamw8bit", "adafactor", "lion", "sgd"),
    "optim.schedule": ("constant", "linear", "cosine"),
    "train.remat": ("full", "none", "attn_out", "dots", "offload"),
    "train.eval_unit": ("step", "epoch"),
    "train.save_unit": ("step", "epoch"),
    "checkpoint.mode": (None, "min", "max"),
    "export.format": (None, "checkpoint", "adapter"),
}

# Of `checkpoint.resume`, beside paths.
RESUME = ("auto", "last", "best", "never")

# What other libraries call it: (key, a part of the value) to what it is here.
HINTS = {
    ("model.quant", "4"): "QLoRA's four bits are nf4.",
    ("model.quant", "NF"): "It is written nf4.",
    ("train.eval_unit", "steps"): "It is written step.",
    ("train.save_unit", "steps"): "It is written step.",
    ("train.eval_unit", "epochs"): "It is written epoch.",
    ("train.save_unit", "epochs"): "It is written epoch.",
    ("optim.name", "paged"): "A paged optimiser is `optim.offload=True` (docs/quantisation.md).",
}

# Inclusive lower bounds.
MINIMUM = {
    "data.max_length": 2,
    "data.length_buckets": 1,
    "data.max_train_rows": 1,
    "data.max_eval_rows": 1,
    "optim.learning_rate": 0,
    "optim.warmup_steps": 0,
    "optim.end_fraction": 0,
    "optim.weight_decay": 0,
    "optim.b1": 0,
    "optim.b2": 0,
    "optim.eps": 0,
    "optim.momentum": 0,
    "optim.max_grad_norm": 0,
    "train.steps": 1,
    "train.epochs": 0,
    "train.global_batch_size": 1,
    "train.gradient_accumulation_steps": 1,
    "train.seed": 0,
    "train.eval_every": 0,
    "train.save_every": 1,
    "train.log_every": 1,
    "train.unroll_layers": 1,
    "train.z_loss": 0,
    "checkpoint.keep_last_n": 1,
    "checkpoint.keep_best_n": 0,
    "wandb.every": 1,
    "evaluate.samples": 0,
    "evaluate.max_new_tokens": 1,
    "evaluate.batch_size": 1,
}

# Inclusive upper bounds; of integers what devices count with.
MAXIMUM = {"optim.end_fraction": 1}
LARGEST = 2**31 - 1
# Averages that never forget are no averages.
BELOW_1 = ("optim.b1", "optim.b2", "optim.momentum")

# Tokens of Hugging Face, GitHub, AWS and Google, and user:password@ in an address.
SECRETS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20}|gh[pousr]_[A-Za-z0-9]{30}|github_pat_\w{20}|AKIA[0-9A-Z]{16}|ya29\.[\w-]{20})"
    r"|://[^/\s:@]+:[^/\s@]+@"
)


def flatten(config: Any) -> dict[str, Any]:
    """{'model.id': ..., ...}: every leaf by its dotted path (sections are one level deep)."""
    return {f"{section}.{key}": value for section, values in config.items() for key, value in values.items()}


def shown(value: Any) -> str:
    """A value as an error message shows it, cut where it would fill the screen."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def find_secret(where: str, value: Any) -> None:
    """Refuses what looks like a token or a password, without repeating it.

    Raises:
      UserError: `where` it is, and where it belongs.
    """
    found = SECRETS.search(str(value))
    if found:
        raise UserError(
            f"{where} holds what looks like a secret ({found[0][:4]}…), and settings are written to the run directory."
            " Remove it; set HF_TOKEN in the environment, or log in with `hf auth login`."
        )


def listed(names: Sequence[str], most: int = 24) -> str:
    """Names with commas between, cut where they would fill the screen."""
    return ", ".join(names[:most]) + (", … (all are in jaxtune/defaults.py)" if len(names) > most else "")


def set_value(config: Any, path: str, value: Any) -> None:
    """Sets one leaf by its dotted path, as `--config.data.max_length=512` does.

    Raises:
      UserError: no such key (with the nearest one), or a value of the wrong type.
    """
    known = flatten(config)
    if path not in known:
        raise UserError(
            f"No config key `{path}`.{did_you_mean(path, known)}\n"
            f"Keys of `{path.split('.')[0]}`: {listed([k for k in known if k.startswith(path.split('.')[0] + '.')])}."
            if any(k.startswith(path.split(".")[0] + ".") for k in known)
            else f"No config key `{path}`.{did_you_mean(path, known)} Sections: {', '.join(config)}."
        )
    section, key = path.split(".", 1)
    kind = type(known[path]) if known[path] is not None else config[section].get_type(key)
    if value is None and "none" in CHOICES.get(path, ()):
        value = "none"  # a word here, and no absence
    try:
        # To Python, True is a number.
        if isinstance(value, bool) and kind in (int, float):
            raise TypeError
        config[section][key] = value
    except TypeError:
        raise UserError(f"`{path}` is {shown(value)}. It takes a value of type {kind.__name__}.") from None


def check(config: Any) -> None:
    """Refuses values outside their range before anything is loaded.

    Raises:
      UserError: naming the key, its value and what it may be.
    """
    default: Any = get_default()
    usual = flatten(default)
    known = flatten(config) if all(isinstance(values, ConfigDict) for values in config.values()) else {}
    if known.keys() != usual.keys():
        differ = ", ".join(sorted(known.keys() ^ usual.keys())[:5])
        raise UserError(f"The config has not the keys of `get_default()`: {differ}, … Begin with it, change values.")
    for path, value in known.items():
        find_secret(f"`{path}`", value)
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"`{path}` is {value}. It must be a finite number.")
    for path in ("model.id", "data.train"):
        if not known[path]:
            raise UserError(f"`{path}` is not set. Set it in the config file or with --config.{path}=...")
    for path in usual:
        section, key = path.split(".", 1)
        kind = default[section].get_type(key)
        # A ConfigDict takes None for anything, and Python True for 1.
        unset = known[path] is None and usual[path] is not None
        if unset or (isinstance(known[path], bool) and kind in (int, float)):
            raise UserError(f"`{path}` is {known[path]}. It takes a value of type {kind.__name__}.")
    for path, choices in CHOICES.items():
        if known[path] not in choices:
            options = ", ".join(map(str, choices))
            hint = next((h for (key, part), h in HINTS.items() if key == path and part in str(known[path])), "")
            raise UserError(
                f"`{path}` is {shown(known[path])}. It can be: {options}. "
                + (hint or did_you_mean(known[path], map(str, choices)).strip())
            )
    for path, low in MINIMUM.items():
        if known[path] is not None and known[path] < low:
            raise UserError(f"`{path}` is {known[path]}. The least it can be is {low}.")
    for path, value in known.items():
        high = MAXIMUM.get(path, LARGEST if isinstance(value, int) else math.inf)
        if isinstance(value, (int, float)) and value > high:
            raise UserError(f"`{path}` is {shown(value)}. The most it can be is {high}.")
    for path in BELOW_1:
        if known[path] >= 1:
            raise UserError(f"`{path}` is {known[path]}. It must be less than 1.")
    if config.train.steps is None and not config.train.epochs:
        raise UserError("`train.epochs` is 0.0, and `train.steps` is not set. Set one of them.")
    batch, accumulation = config.train.global_batch_size, config.train.gradient_accumulation_steps
    if batch % accumulation:
        raise UserError(
            f"`train.global_batch_size` is {batch} and `train.gradient_accumulation_steps` is {accumulation}. "
            f"The first must be a multiple of the second, e.g. {-(-batch // accumulation) * accumulation}."
        )
    for unit in ("eval", "save"):
        if config.train[f"{unit}_unit"] == "epoch" and config.data.streaming:
            raise UserError(
                f"`train.{unit}_unit` is epoch and `data.streaming` is true: nobody knows how long an epoch is. Set it "
                f"to step, and `train.{unit}_every`."
            )
    if config.train.eval_unit == "epoch" and not config.train.eval_every:
        raise UserError("`train.eval_unit` is epoch and `train.eval_every` is 0. Set the latter to 1, or more.")
    resume = config.checkpoint.resume
    if resume not in RESUME and "/" not in resume:
        raise UserError(
            f"`checkpoint.resume` is {shown(resume)}. It can be: {', '.join(RESUME)}, or the path of a run or of a "
            f"checkpoint, which has a / in it (./{resume}).{did_you_mean(resume, RESUME)}"
        )
    if not config.checkpoint.save_optim and config.peft.method == "adalora":
        raise UserError(
            "`checkpoint.save_optim` is false and `peft.method` is adalora, whose ranks depend on the optimiser's "
            "state. Set it to true."
        )
    for path in ("wandb.tags", "evaluate.metrics"):
        names = [known[path]] if isinstance(known[path], str) else known[path] or ()
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            raise UserError(f"`{path}` is {shown(known[path])}. It takes names: ('a', 'b').")
    axes = dict(config.mesh.items())
    if sum(size == -1 for size in axes.values()) > 1 or any(size < 1 and size != -1 for size in axes.values()):
        raise UserError(f"`mesh` is {axes}. Sizes are 1 or more; one of them may be -1 (what is left).")


def to_json(config: ConfigDict) -> dict[str, Any]:
    """Plain dicts, lists and scalars, as stored in a run directory's config.json."""

    def plain(value: Any) -> Any:
        if isinstance(value, (ConfigDict, dict)):
            return {str(k): plain(v) for k, v in value.items()}
        if isinstance(value, (tuple, list, set)):
            return [plain(v) for v in value]
        return value

    return plain(config)
