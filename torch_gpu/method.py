"""The `peft` section as peft's own config classes, and the adapter that they make over a base; and back into a file."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from jaxtune.config import get_default
from jaxtune.data.virtual import NONE, Virtual
from jaxtune.defaults import LEARNING_RATES
from jaxtune.errors import ExportError, MissingInputError, UserError, did_you_mean
from jaxtune.hf import handover
from jaxtune.hf.files import open_safetensors, read_json, replaced_directory

CONFIGS: dict[str, Any] = {
    "lora": peft.LoraConfig,
    "adalora": peft.AdaLoraConfig,
    "ia3": peft.IA3Config,
    "loha": peft.LoHaConfig,
    "lokr": peft.LoKrConfig,
    "vera": peft.VeraConfig,
    "randlora": peft.RandLoraConfig,
    "oft": peft.OFTConfig,
    "boft": peft.BOFTConfig,
    "ln_tuning": peft.LNTuningConfig,
    "prompt_tuning": peft.PromptTuningConfig,
    "p_tuning": peft.PromptEncoderConfig,
    "prefix_tuning": peft.PrefixTuningConfig,
    "multitask_prompt_tuning": peft.MultitaskPromptTuningConfig,
}
PROMPTS = ("prompt_tuning", "p_tuning", "multitask_prompt_tuning")
WITH_TOKENS = (*PROMPTS, "prefix_tuning")
# What a file of these types lacks: the network that made what is in it.
CONTINUES_AS = {"p_tuning": "prompt_tuning"}
OWN = ("method", "init_from", "soft_prompt_scale")  # keys of the section that are not peft's
TOKENS = 20  # of `num_virtual_tokens`, which peft leaves to the user
# Of `init_lora_weights`: the others alter the base, so that the file would need that base.
STARTS = (True, False, "gaussian", "orthogonal")


def settings_of(name: str) -> list[str]:
    """The keys of the `peft` section that a method has.

    Raises:
      UserError: a method that this backend does not have.
    """
    if name in ("full", "partial"):
        raise UserError(
            f"`peft.method` is {name}, which trains the base itself. torch_gpu trains adapters; take jaxtune.train, "
            "with `model.quant` None. "
            f"Here it can be: {', '.join(CONFIGS)}."
        )
    if name not in CONFIGS:
        known = list(LEARNING_RATES)
        raise UserError(f"`peft.method` is {name!r}. It can be: {', '.join(known)}.{did_you_mean(name, known)}")
    usual: Any = get_default()
    return [f.name for f in dataclasses.fields(CONFIGS[name]) if f.name in usual.peft]


def given(section: dict[str, Any]) -> dict[str, Any]:
    """The keys that a section sets, as peft takes them.

    Raises:
      UserError: a key that the method does not have, or that means another file than a plain one.
    """
    name = section["method"]
    fields = settings_of(name)
    values = {k: v for k, v in section.items() if k not in OWN and v is not None}
    for pattern in ("rank_pattern", "alpha_pattern"):
        if isinstance(values.get(pattern), (list, tuple)):
            values[pattern] = dict(values[pattern])
    for key in values:
        if key not in fields:
            raise UserError(
                f"`peft.{key}` is set, and {name} has no such key.{did_you_mean(key, fields)} "
                f"It has: {', '.join(fields)}."
            )
    scale = section.get("soft_prompt_scale")
    if scale is not None and name not in PROMPTS:
        raise UserError(
            f"`peft.soft_prompt_scale` is set, and {name} has no such key. It is for: {', '.join(PROMPTS)}."
        )
    if scale not in (None, "post"):
        raise UserError(
            f"`peft.soft_prompt_scale` is {scale!r}. Here it can only be post: transformers "
            "uses prompts as they are since 5.4. jaxtune.train has both."
        )
    if values.get("init_lora_weights", True) not in STARTS:
        raise UserError(
            f"`peft.init_lora_weights` is {values['init_lora_weights']!r}, which would alter the base. Here it can be: "
            f"{', '.join(map(str, STARTS))}. jaxtune.train has it, and exports plain LoRA."
        )
    if values.get("save_projection") is False:
        raise UserError("`peft.save_projection` is false: the file could not be read without torch's random numbers.")
    if name in WITH_TOKENS:
        values = {"num_virtual_tokens": TOKENS, **values}
    return values


def virtual_tokens(section: dict[str, Any], seq2seq: bool = False) -> Virtual:
    """What the data puts before each row, as jaxtune does; peft puts its own there, and `batches` takes them off.

    Args:
      seq2seq: the model has an encoder; multitask prompts then have a part before the decoder's tokens, too.

    Raises:
      MissingInputError, UserError: as `given` and `read_first`.
    """
    values = dataclasses.asdict(read_first(section)[0]) if section["init_from"] else given(section)
    if section["method"] not in PROMPTS:
        return NONE
    if section["method"] != "multitask_prompt_tuning":
        return Virtual(values["num_virtual_tokens"])
    both = seq2seq and values.get("num_transformer_submodules") in (None, 2)
    return Virtual(values["num_virtual_tokens"], values.get("num_tasks") or 1, decoder=both)


def task_of(model: Any) -> str:
    """peft's word for what a model does."""
    return "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"


def make_config(section: dict[str, Any], total_steps: int, task: str = "CAUSAL_LM") -> Any:
    """peft's config of a fresh adapter.

    Raises:
      UserError: a value that peft refuses.
    """
    values = given(section)
    if section["method"] == "adalora":
        values.setdefault("total_step", total_steps)
    if section["method"] in PROMPTS and values.get("prompt_tuning_init") == "TEXT":
        # The text's tokens are jaxtune's own (`start_from_text`): peft would load a tokenizer of transformers'.
        values["prompt_tuning_init"] = "RANDOM"
        if not isinstance(values.pop("prompt_tuning_init_text", None), str):
            raise UserError("`config.peft`: prompt_tuning_init is TEXT, and prompt_tuning_init_text is not set.")
    source = values.get("prompt_tuning_init_state_dict_path")
    if source is not None and not str(source).endswith(".safetensors"):
        raise UserError(f"`peft.prompt_tuning_init_state_dict_path` is {source!r}. It takes a .safetensors file.")
    try:
        return CONFIGS[section["method"]](task_type=task, **values)
    except (TypeError, ValueError) as error:
        raise UserError(f"`config.peft`: {error}") from None


def read_first(section: dict[str, Any], task: str = "CAUSAL_LM") -> tuple[Any, dict[str, torch.Tensor]]:
    """(config, tensors) of the adapter that training starts from; its own settings stand.

    Raises:
      MissingInputError: it is not there.  UserError: another method is asked for, or a file that needs another base.
    """
    directory = Path(section["init_from"]).expanduser()
    if not (directory / "adapter_config.json").is_file():
        raise MissingInputError(f"{directory} is no PEFT directory: it has no adapter_config.json.")
    values = read_json(directory / "adapter_config.json")
    types = {config().peft_type.value if name != "adalora" else "ADALORA": name for name, config in CONFIGS.items()}
    stored = types.get(str(values.get("peft_type")))
    if stored is None:
        raise UserError(f"{directory} is of type {values.get('peft_type')!r}. torch_gpu has: {', '.join(types)}.")
    name = CONTINUES_AS.get(stored, stored)
    if name != section["method"]:
        raise UserError(
            f"`peft.init_from` {section['init_from']} is of type {values['peft_type']}, and `peft.method` is "
            f"{section['method']}. Set it to {name}"
            + ("." if name == stored else f", as which it trains on: the file holds no more than {name} needs.")
        )
    if values.get("init_lora_weights", True) not in STARTS:
        raise UserError(
            f"{directory} has init_lora_weights={values['init_lora_weights']!r}: it is for an altered base."
        )
    fields = {f.name for f in dataclasses.fields(CONFIGS[name])}
    # Neither code nor places that a file names: auto_mapping imports, a tokenizer's path is followed.
    dropped = {"auto_mapping", "tokenizer_kwargs", "tokenizer_name_or_path", "base_model_name_or_path", "peft_version"}
    kept = {k: v for k, v in values.items() if k in fields - dropped}
    changed = {"inference_mode": False, "task_type": task}
    if "prompt_tuning_init" in fields:
        changed |= {"prompt_tuning_init": "RANDOM"}
        kept = {k: v for k, v in kept.items() if not k.startswith("prompt_tuning_init_")}
    if name == "prefix_tuning":
        changed |= {"prefix_projection": False}
    if stored == "p_tuning":
        kept = {k: v for k, v in kept.items() if k != "peft_type"}
    try:
        config = CONFIGS[name](**kept | changed)
    except (TypeError, ValueError) as error:
        raise UserError(f"{directory / 'adapter_config.json'}: {error}") from None
    path = directory / "adapter_model.safetensors"
    if not path.is_file():
        raise MissingInputError(f"{directory} has no adapter_model.safetensors; pickles run code when read.")
    open_safetensors(path)
    return config, load_file(path)


def adapt(
    model: Any, section: dict[str, Any], *, total_steps: int, quantised: bool, encode: Callable[[str], Sequence[int]]
) -> Any:
    """peft's model over the base, every trainable parameter float32.

    Args:
      section: `config.peft` as plain values.  encode: text to ids, for prompts that start from a text.

    Raises:
      UserError: targets that match nothing, a method that cannot train over a quantised base, or an adapter that does
        not fit.
    """
    task = task_of(model)
    first = read_first(section, task) if section["init_from"] else None
    config = first[0] if first else make_config(section, total_steps, task)
    if section["method"] == "prefix_tuning" and task == "SEQ_2_SEQ_LM":
        fit_prefix(config, model.config)
    if quantised and section["method"] == "boft":
        raise UserError("`peft.method` is boft, which multiplies the weights themselves: unset `model.quant`.")
    targets = getattr(config, "target_modules", None)
    linear = linear_layers(model)
    if isinstance(targets, str) and targets.lower() == "all-linear":
        config.target_modules = {name.rsplit(".", 1)[-1] for name in linear}
    elif targets is not None and not isinstance(targets, str):
        modules = [name for name, _ in model.named_modules()]
        for name in targets:
            if not any(module == name or module.endswith(f".{name}") for module in modules):
                raise UserError(
                    f"target_modules has {name!r}, and the model has no such module."
                    f"{did_you_mean(name, sorted({module.rsplit('.', 1)[-1] for module in linear}))}"
                )
    try:
        adapted = peft.get_peft_model(model, config)
    except (ValueError, TypeError) as error:
        raise UserError(f"`config.peft`: {error}") from None
    if first:
        fill(adapted, first[1], Path(section["init_from"]))
    elif section["method"] in PROMPTS and section.get("prompt_tuning_init") == "TEXT":
        start_from_text(adapted, encode(section["prompt_tuning_init_text"]))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def fit_prefix(config: Any, model_config: Any) -> None:
    """The sizes of a prefix, which only T5's decoder gets: peft would take d_model for that of all heads together, and
    the encoder's number of layers."""
    sizes = {
        "token_dim": model_config.num_heads * model_config.d_kv,
        "num_attention_heads": model_config.num_heads,
        "num_layers": model_config.num_decoder_layers,
    }
    for key, size in sizes.items():
        setattr(config, key, getattr(config, key) or size)


def linear_layers(model: Any) -> list[str]:
    """What "all-linear" means: every linear layer but the head."""
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]


def fill(adapted: Any, tensors: dict[str, torch.Tensor], directory: Path) -> None:
    """Puts a file's tensors into a fresh adapter, every one of both.

    Raises:
      UserError: one is missing, unexpected, of another shape or not finite.
    """
    wanted = {
        name: tuple(t.shape) for name, t in get_peft_model_state_dict(adapted, save_embedding_layers=False).items()
    }
    shapes = {name: tuple(t.shape) for name, t in tensors.items() if not name.endswith("base_layer.weight")}
    wrong = sorted(name for name in wanted.keys() | shapes.keys() if wanted.get(name) != shapes.get(name))
    wrong += [name for name, t in tensors.items() if not torch.isfinite(t).all()]
    if wrong:
        name = wrong[0]
        raise UserError(
            f"{directory} does not fit this model: {len(wrong)} tensors differ, {name} first (in the file "
            f"{shapes.get(name, 'absent')}, needed {wanted.get(name, 'none')}). Is it for another base?"
        )
    set_peft_model_state_dict(adapted, {name: t.float() for name, t in tensors.items() if name in wanted})


@torch.no_grad()
def start_from_text(adapted: Any, ids: Sequence[int]) -> None:
    """The rows of a text's tokens, repeated or cut, as peft has it.

    Raises:
      UserError: the text has no tokens.
    """
    if not len(ids):
        raise UserError("prompt_tuning_init_text has no tokens.")
    weight = adapted.prompt_encoder["default"].embedding.weight
    chosen = torch.as_tensor(np.resize(np.asarray(ids), len(weight)), device=weight.device)
    weight.copy_(adapted.get_input_embeddings()(chosen).float())


def trainable(adapted: Any) -> dict[str, nn.Parameter]:
    """What trains, by name: also an encoder that no PEFT file holds."""
    return {name: p for name, p in adapted.named_parameters() if p.requires_grad}


def handed_over(section: dict[str, Any], adapted: Any, linear: Sequence[str], over: Mapping[str, Any]) -> list[str]:
    """In what the adapter that training starts from was made for something else: a line each.

    Args:
      linear: of the base (`linear_layers`).  over: the base, as `handover.trained_over` has it.
    """
    if not section["init_from"]:
        return []
    asked, config = {k: v for k, v in given(section).items() if section[k] is not None}, adapted.peft_config["default"]
    stored, wanted = getattr(config, "target_modules", None), asked.get("target_modules")
    if isinstance(wanted, str) and wanted.lower() == "all-linear":
        wanted = {name.rsplit(".", 1)[-1] for name in linear}
    if wanted is None or isinstance(wanted, str) or isinstance(stored, str):
        wanted = stored = ()  # regular expressions are not compared
    names = [{name.rsplit(".", 1)[-1] for name in targets or ()} for targets in (stored, wanted)]
    lines = handover.differences(handover.read_ours(Path(section["init_from"]).expanduser()).get("base"), over)
    return lines + handover.others(config, asked, *names)


def changed(adapted: Any) -> dict[str, Any]:
    """An adapter's settings that are not peft's defaults."""
    config = adapted.peft_config["default"]
    usual = {f.name: f.default for f in dataclasses.fields(config)}
    own = {name: getattr(config, name) for name in usual if getattr(config, name) is not None}
    return {n: v for n, v in own.items() if v != usual[n] and v and n not in ("peft_type", "task_type", "peft_version")}


def export(adapted: Any, where: Path, *, name: str, readme: str, over: Mapping[str, Any]) -> None:
    """Writes a PEFT directory in one piece, and reads it back.

    Args:
      name: `base_model_name_or_path`.  over: the base, as `handover.trained_over` has it.

    Raises:
      UserError: a value that is not finite.  ExportError: other tensors come back.
    """
    adapted.eval()  # an encoder's dropout would be in the file
    adapted.peft_config["default"].base_model_name_or_path = name
    tensors = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    bad = [name for name, t in tensors.items() if not torch.isfinite(t).all()]
    if bad or not tensors:
        raise UserError(f"The adapter is not written: {bad[0] + ' is not finite' if bad else 'it has no tensors'}.")
    with replaced_directory(where) as new:
        adapted.save_pretrained(new, save_embedding_layers=False)
        (new / "README.md").write_text(readme, encoding="utf-8")
        handover.write_ours(new, {"base": over})
        again = load_file(new / "adapter_model.safetensors")
        if again.keys() != tensors.keys() or any(not torch.equal(again[k], t.cpu()) for k, t in tensors.items()):
            raise ExportError(
                f"The adapter in {where} is not what was trained: other tensors come back. It was removed."
            )
