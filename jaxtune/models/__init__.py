"""The families: config.json's `model_type` to the files that know it.

This file imports no jax, so that `torch_gpu` can read the Hugging Face tables (`*_hf`).  Each has FAMILIES (the
model types it reads), `rows(hf_config)` (one row a weight) and `config_from_hf(hf_config)`.
"""

from typing import Any

from jaxtune.errors import UserError, did_you_mean
from jaxtune.models import gemma_hf, llama_hf, t5_hf

TABLES = {model_type: table for table in (gemma_hf, llama_hf, t5_hf) for model_type in table.FAMILIES}

# What multimodal checkpoints hold besides the text tower (transformers < 4.52, and since).
OTHER_TOWERS = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


def canonical(name: str) -> str | None:
    """The table's name for a tensor of a checkpoint; None for a tensor of another tower, which text does without.

    `language_model.model.layers.0.…` and `model.language_model.layers.0.…` are both `model.layers.0.…`.
    """
    if name.startswith(OTHER_TOWERS):
        return None
    if name.startswith("model.language_model."):
        return "model." + name.removeprefix("model.language_model.")
    return name.removeprefix("language_model.")


def table_of(hf_config: dict[str, Any]) -> Any:
    """The table module of a parsed config.json.

    Raises:
      UserError: a model type that jaxtune does not have.
    """
    model_type = hf_config.get("model_type")
    if model_type not in TABLES:
        reason = llama_hf.NOT_HERE.get(str(model_type))
        raise UserError(
            f"config.json says model_type={model_type!r}. jaxtune has: {', '.join(TABLES)}."
            + (f" {model_type} is none of them: {reason}." if reason else did_you_mean(str(model_type), TABLES))
        )
    return TABLES[model_type]


def is_encoder_decoder(hf_config: dict[str, Any]) -> bool:
    """Whether prompts go to an encoder and answers come from a decoder of its own."""
    return hf_config.get("model_type") in t5_hf.FAMILIES


def decoder_start(hf_config: dict[str, Any]) -> int | None:
    """What the decoder of an encoder-decoder reads first; None for a decoder alone."""
    return (hf_config.get("decoder_start_token_id") or 0) if is_encoder_decoder(hf_config) else None


def build(hf_config: dict[str, Any], *, dtype: Any, remat: str = "none", unroll: int = 1) -> Any:
    """The Flax module of a parsed config.json, its activations in `dtype`."""
    arguments = table_of(hf_config).config_from_hf(hf_config)
    if is_encoder_decoder(hf_config):
        from jaxtune.models import t5

        return t5.T5(t5.T5Config(**arguments), dtype=dtype, remat=remat, unroll=unroll)
    from jaxtune.models import decoder

    arguments["ropes"] = tuple(decoder.Rope(*rope) for rope in arguments["ropes"])
    return decoder.Decoder(decoder.DecoderConfig(**arguments), dtype=dtype, remat=remat, unroll=unroll)
