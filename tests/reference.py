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
SMALL: dict[str, Any] = {
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


# One wave that the scaling leaves alone, two that it blends, others that it divides; texts are longer (17) than what
# the model was trained on (14).
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 0.5,
    "high_freq_factor": 2.0,
    "original_max_position_embeddings": 14,
}


def llama(**changes: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL | changes))


def mistral(**changes: Any) -> Any:
    sizes = SMALL | changes
    return transformers.MistralForCausalLM(transformers.MistralConfig(**{"sliding_window": 5, **sizes}))


def qwen3(**changes: Any) -> Any:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SMALL | changes))


LLAMAS = {
    "llama": lambda: llama(rope_parameters=LLAMA3_ROPE, rms_norm_eps=1e-5),
    "llama_tied": lambda: llama(tie_word_embeddings=True, rope_parameters={"rope_theta": 5e5, "rope_type": "default"}),
    "llama_mha": lambda: llama(
        num_key_value_heads=None,
        head_dim=None,
        rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
    ),
    "mistral": mistral,
    "mistral_global": lambda: mistral(sliding_window=None, num_key_value_heads=2, head_dim=None),
    "qwen3": lambda: qwen3(num_key_value_heads=2),
    "qwen3_windows": lambda: qwen3(
        use_sliding_window=True, sliding_window=4, max_window_layers=2, tie_word_embeddings=True
    ),
}

# heads * d_kv != d_model, few and odd buckets, a decoder of another depth; texts are longer than the distance at which
# the last bucket begins.
T5_SMALL = {
    "vocab_size": 97,
    "d_model": 40,
    "d_kv": 7,
    "d_ff": 56,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 5,
    "relative_attention_num_buckets": 9,
    "relative_attention_max_distance": 13,
    "decoder_start_token_id": 0,
}


def t5(tied: bool = True, config: Any = transformers.T5Config, **changes: Any) -> Any:
    """tied: whether the head is the embedding, which transformers 5 says of every T5 whatever it is."""
    made = config(**T5_SMALL | changes)
    kind = transformers.MT5ForConditionalGeneration if made.model_type == "mt5" else None
    model = (kind or transformers.T5ForConditionalGeneration)(made)
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(torch.zeros(97, made.d_model))
        model.config.tie_word_embeddings = False
    return model


T5S = {
    "t5": t5,  # v1.0: ReLU, tied, scaled
    "t5_v11": lambda: t5(tied=False, tie_word_embeddings=False, feed_forward_proj="gated-gelu"),
    "t5_deep": lambda: t5(  # as transformers 5 allows: tied and not scaled
        tie_word_embeddings=False,
        feed_forward_proj="gated-silu",
        num_decoder_layers=4,
        relative_attention_num_buckets=4,
    ),
    "t5_quantisable": lambda: t5(  # d_model = heads * d_kv, for prefixes; multiples of 64, for bitsandbytes
        tied=False,
        tie_word_embeddings=False,
        feed_forward_proj="gated-gelu",
        d_model=64,
        num_heads=4,
        d_kv=16,
        d_ff=128,
        num_decoder_layers=3,
    ),
    "t5_even": lambda: t5(d_model=35, num_layers=4, num_decoder_layers=3),
    "mt5": lambda: t5(tied=False, config=transformers.MT5Config, tie_word_embeddings=False),
}

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
    """Weights large enough that every part of the model shows in the logits (norms and soft-caps included).

    Norms go around what transformers starts them with: 0 in Gemma, whose norms add one, 1 elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter + noise * 0.3 if "norm" in name else noise * 0.15)
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


def t5_batch(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids, mask, labels): longer than the models' distances; one row padded on the left, one on the right; labels of
    different lengths."""
    rng = np.random.default_rng(seed)
    ids, labels = rng.integers(3, 90, (3, 29)), rng.integers(3, 90, (3, 19))
    mask = np.ones_like(ids)
    mask[1, :6] = 0
    mask[2, 12:] = 0
    labels[0, 15:] = -100
    labels[2, 4:] = -100
    return ids, mask, labels


def t5_logits(model: Any, ids: np.ndarray, mask: np.ndarray, labels: np.ndarray, **how: Any) -> np.ndarray:
    """Of every position of `labels`.  (With a cache transformers fails where the decoder has more layers.)"""
    tensors = {"input_ids": ids, "attention_mask": mask, "labels": labels} | how
    with torch.no_grad():
        logits = model(**{k: torch.tensor(v) for k, v in tensors.items()}, use_cache=False).logits
    return logits.float().numpy()[:, -labels.shape[1] :]


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
    auto, config = transformers.AutoModelForCausalLM, json.loads((checkpoint / "config.json").read_text())
    if "text_config" in config:
        auto = transformers.AutoModelForImageTextToText
    elif config["model_type"] in ("t5", "mt5"):
        auto = transformers.AutoModelForSeq2SeqLM
    base = auto.from_pretrained(checkpoint, attn_implementation="eager", dtype=torch.float32)
    return PeftModel.from_pretrained(base, adapter).eval()


__all__ = ["load_file", "save_file"]
