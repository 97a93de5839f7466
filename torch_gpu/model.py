"""The base model: where it goes, what computes in what, and its quantised linear layers.

What a file of the model says is read as data: the class is chosen here, and nothing is named to transformers by the
checkpoint.
"""

import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from jaxtune.errors import UserError
from jaxtune.hf.files import model_directory, open_safetensors, read_json, weight_files
from jaxtune.models import table_of
from torch_gpu import half, loss

CLASSES = {
    "gemma": (transformers.GemmaConfig, transformers.GemmaForCausalLM),
    "gemma2": (transformers.Gemma2Config, transformers.Gemma2ForCausalLM),
    "gemma3_text": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM),
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "t5": (transformers.T5Config, transformers.T5ForConditionalGeneration),
    "mt5": (transformers.MT5Config, transformers.MT5ForConditionalGeneration),
}
# Bits a weight of a quantised layer takes, scales included.
BITS = {None: None, "nf4": 4.5, "double nf4": 4.127, "int8": 8.0}
# Beside the weights: logits and gradient of a chunk of the loss, activations at the layers' borders, CUDA itself.
WORK_BYTES = 2 * 2**30
LINEAR = re.compile(r"(layers\.\d+\..*_proj|block\.\d+\..*\.(q|k|v|o|wi|wi_0|wi_1))\.weight$")
# What transformers keeps in float32 where the rest is float16, and never quantises: T5 overflows there.
FLOAT32 = re.compile(r"block\.\d+\..*\.wo\.weight$")


class Processes(NamedTuple):
    """As torchrun says in the environment; one process without it."""

    index: int
    count: int
    local: int

    @classmethod
    def read(cls) -> "Processes":
        get = os.environ.get
        return cls(int(get("RANK", 0)), int(get("WORLD_SIZE", 1)), int(get("LOCAL_RANK", 0)))


class Described(NamedTuple):
    """A base before a weight is read.  shapes: of its tensors, by name."""

    id: str
    directory: Path
    hf_config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]

    @property
    def softcapped(self) -> bool:
        return bool(table_of(self.hf_config).config_from_hf(self.hf_config).get("attention_softcap"))

    def bytes(self, dtype: torch.dtype, quant: str | None, double: bool) -> int:
        """What the weights take on a card."""
        bits = BITS["double nf4" if quant == "nf4" and double else quant] or 8 * dtype.itemsize
        wide = 4 if dtype == torch.float16 else dtype.itemsize
        sizes = {name: math.prod(shape) for name, shape in self.shapes.items()}
        linear = sum(size for name, size in sizes.items() if LINEAR.search(name))
        kept = sum(size for name, size in sizes.items() if FLOAT32.search(name))
        return int(linear * bits / 8) + kept * wide + (sum(sizes.values()) - linear - kept) * dtype.itemsize


def describe(model_id: str, revision: str | None = None) -> Described:
    """Reads config.json and the names and shapes of the weights.

    Raises:
      MissingInputError, NetworkError, UserError: no such model, or one that this backend does not have.
    """
    directory = model_directory(model_id, revision)
    hf_config = read_json(directory / "config.json")
    table_of(hf_config).config_from_hf(hf_config)
    if hf_config["model_type"] not in CLASSES:
        raise UserError(
            f"{directory} is a multimodal checkpoint (model_type={hf_config['model_type']!r}). torch_gpu has the text "
            f"models: {', '.join(CLASSES)}. Take jaxtune.train, which reads the text part."
        )
    if hf_config.get("quantization_config"):
        raise UserError(f"{directory} is quantised already. Give the original model, and `model.quant`.")
    shapes = {}
    for path in weight_files(directory):
        file = open_safetensors(path)
        shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return Described(model_id, directory, hf_config, shapes)


def precision(asked: str, device: torch.device, say: Callable[[str], None]) -> torch.dtype:
    """What computes: `model.dtype`, but float16 for bfloat16 on a card that has none in hardware.

    The compute capability decides: `torch.cuda.is_bf16_supported` counts emulation, and a T4 then says yes.
    """
    if device.type == "cuda" and asked == "bfloat16" and torch.cuda.get_device_capability(device) < (8, 0):
        name = torch.cuda.get_device_name(device)
        say(f"{name} has no bfloat16: products are float16, everything between them float32 (docs/torch_gpu.md)")
        return torch.float16
    return getattr(torch, asked)


def device_of(processes: Processes, say: Callable[[str], None], command: str = "") -> torch.device:
    """This process's device; of several cards a single process takes one, and says how to use all."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    cards = torch.cuda.device_count()
    if processes.local >= cards:
        raise UserError(f"torchrun started {processes.local + 1} or more processes here, and there are {cards} GPUs.")
    torch.cuda.set_device(processes.local)
    if processes.count == 1 and cards > 1:
        again = command.replace("python -m", f"torchrun --nproc_per_node={cards} -m", 1)
        say(f"{cards} GPUs are here and one is used. To use all:\n  {again}")
    return torch.device("cuda", processes.local)


def placement(needed: int, device: torch.device, processes: Processes, say: Callable[[str], None]) -> Any:
    """transformers' `device_map`: the whole model on one device, or its layers over all cards where one is too small.

    Raises:
      UserError: one is too small, and torchrun has started a copy for each.
    """
    if device.type != "cuda":
        return {"": "cpu"}
    card = torch.cuda.get_device_properties(device).total_memory
    if needed + WORK_BYTES <= card:
        return {"": device.index}
    short = (
        f"the base takes about {needed / 1e9:.1f} GB and {WORK_BYTES / 1e9:.1f} beside it, a card has {card / 1e9:.1f}"
    )
    if processes.count > 1:
        raise UserError(f"A copy on each GPU does not fit: {short}. Run it without torchrun, or set `model.quant`.")
    if torch.cuda.device_count() > 1:
        say(f"{short}: its layers are spread over {torch.cuda.device_count()} cards, of which one works at a time")
        return "balanced"
    say(f"WARNING: {short}. Set `model.quant`, or lower `data.max_length`, if memory runs out.")
    return {"": device.index}


def quantisation(c: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """bitsandbytes' settings of a `model` section; None where nothing is quantised."""
    if c["quant"] == "nf4":
        return transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=c["double_quant"],
        )
    return transformers.BitsAndBytesConfig(load_in_8bit=True) if c["quant"] == "int8" else None


def load(base: Described, c: Mapping[str, Any], dtype: torch.dtype, where: Any) -> Any:
    """The frozen base, ready for peft: quantised, safe in half precision, and with its loss in chunks.

    Args:
      c: `config.model`.  where: as `placement` gives it.

    Raises:
      UserError: the checkpoint lacks tensors, or NF4 on a CPU of a width that bitsandbytes computes wrongly.
    """
    config_class, model_class = CLASSES[base.hf_config["model_type"]]
    # Keys that would choose code: https://nvd.nist.gov/vuln/detail/CVE-2026-4372 was one.
    named = {
        k: v for k, v in base.hf_config.items() if not k.startswith("_") and "attn_impl" not in k and k != "auto_map"
    }
    if named.get("rope_scaling") and "rope_theta" in (named.get("rope_parameters") or {}):
        # Of the two transformers takes the first alone, and a theta of its own; here they are read together.
        named["rope_parameters"] = named["rope_parameters"] | named.pop("rope_scaling")
    if where == {"": "cpu"} and c["quant"] == "nf4":
        check_widths(base)
    model, info = model_class.from_pretrained(
        str(base.directory),
        config=config_class.from_dict(named),
        dtype=dtype,
        quantization_config=quantisation(c, dtype),
        device_map=where,
        # The others drop the soft-cap of the scores.
        attn_implementation="eager" if base.softcapped else "sdpa",
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
    )
    wrong = [*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])]
    if wrong:
        raise UserError(f"{base.directory} lacks {len(wrong)} tensors that its config.json asks for, {wrong[0]} first.")
    model.requires_grad_(False)
    half.make_safe(model, dtype)
    loss.install(model)
    return model


def check_widths(base: Described) -> None:
    """bitsandbytes 0.50 dequantises wrongly on a CPU where rows do not end with a block of 64.

    Raises:
      UserError: naming a weight.
    """
    for name, shape in base.shapes.items():
        if LINEAR.search(name) and shape[-1] % 64:
            raise UserError(
                f"`model.quant` is nf4, and {name} has rows of {shape[-1]}: on a CPU bitsandbytes computes NF4 rightly "
                "only where they are multiples of 64. Use a GPU, or set `model.quant` to int8 or None."
            )
