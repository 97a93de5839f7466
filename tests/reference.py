"""Reference models: small random transformers checkpoints of awkward shapes, and peft adapters over them."""

import json
import pathlib
from typing import Any

import numpy as np
import torch
import transformers
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

# head_dim * heads != width, one kv head, more layers than one period of the window pattern.
SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 20,
    "max_position_embeddings": 512,
    "attn_implementation": "eager",
}


def gemma1(**changes: Any) -> Any:
    return transformers.GemmaForCausalLM(transformers.GemmaConfig(**SMALL | {"hidden_act": "gelu"} | changes))


def gemma2(**changes: Any) -> Any:
    odd = {"sliding_window": 5, "query_pre_attn_scalar": 13, "num_key_value_heads": 2}
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SMALL | odd | changes))


GEMMA3 = {
    "num_hidden_layers": 7,
    "sliding_window": 4,
    "query_pre_attn_scalar": 13,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}


def gemma3(**changes: Any) -> Any:
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**SMALL | GEMMA3 | changes))


def gemma3_multimodal() -> Any:
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    text = {k: v for k, v in (SMALL | GEMMA3).items() if k != "attn_implementation"}
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=4,
        boi_token_index=90,
        eoi_token_index=91,
        image_token_index=92,
        attn_implementation="eager",
    )
    return transformers.Gemma3ForConditionalGeneration(config)


MODELS = {
    "gemma": gemma1,
    "gemma_mha": lambda: gemma1(num_key_value_heads=4, head_dim=12),
    "gemma2": gemma2,
    "gemma2_untied": lambda: gemma2(tie_word_embeddings=False, final_logit_softcapping=None, num_key_value_heads=4),
    "gemma2_gelu": lambda: gemma2(hidden_activation="gelu", num_hidden_layers=3, num_key_value_heads=1),
    "gemma3": gemma3,
    "gemma3_layer_types": lambda: gemma3(layer_types=["full_attention", "sliding_attention"] * 3 + ["full_attention"]),
    "gemma3_multimodal": gemma3_multimodal,
}


def randomise(model: Any, seed: int = 0) -> Any:
    """Weights large enough that every part of the model shows in the logits (norms and soft-caps included)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if "norm" in name else 0.15
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.eval()


def save(model: Any, directory: pathlib.Path, **how: Any) -> pathlib.Path:
    model.save_pretrained(directory, **how)
    return directory


def logits(model: Any, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    with torch.no_grad():
        mask_ = None if mask is None else torch.tensor(mask)
        return model(input_ids=torch.tensor(ids), attention_mask=mask_).logits.float().numpy()


def batch(seed: int = 0, rows: int = 3, length: int = 17) -> tuple[np.ndarray, np.ndarray]:
    """Ids longer than the models' windows; one row padded on the left, one on the right."""
    ids = np.random.default_rng(seed).integers(3, 90, (rows, length))
    mask = np.ones_like(ids)
    mask[1, :6] = 0
    mask[2, 12:] = 0
    return ids, mask


def close(actual: np.ndarray, expected: np.ndarray, tolerance: float = 1e-4) -> None:
    """max |Δ| ≤ tolerance * max |expected|."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    assert error <= tolerance, f"relative error {error:.2e} > {tolerance:.0e}"


def adapt(model: Any, config: Any, directory: pathlib.Path, seed: int = 1) -> Any:
    """A peft model whose every adapter tensor is random, saved to `directory` by peft."""
    model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(directory)
    return model.eval()


def with_adapter(checkpoint: pathlib.Path, adapter: pathlib.Path) -> Any:
    """The checkpoint under `adapter`, as a user of peft would load it."""
    auto = transformers.AutoModelForCausalLM
    if "text_config" in json.loads((checkpoint / "config.json").read_text()):
        auto = transformers.AutoModelForImageTextToText
    base = auto.from_pretrained(checkpoint, attn_implementation="eager", dtype=torch.float32)
    return PeftModel.from_pretrained(base, adapter).eval()


__all__ = ["load_file", "save_file"]
