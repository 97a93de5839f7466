"""The families: config.json's `model_type` to the module pair that knows it.

This file imports no jax, so that `torch_gpu` can read the Hugging Face tables (`*_hf`).
"""

from typing import Any

from jaxtune.errors import UserError, did_you_mean
from jaxtune.models import gemma_hf

# model_type -> family module: `jaxtune.models.<name>` (Flax) and `jaxtune.models.<name>_hf` (names and config keys).
FAMILIES = dict.fromkeys(gemma_hf.FAMILIES, "gemma")


def family_of(hf_config: dict[str, Any]) -> str:
    """The family module of a parsed config.json.

    Raises:
      UserError: a model type that jaxtune does not have.
    """
    model_type = hf_config.get("model_type")
    if model_type not in FAMILIES:
        raise UserError(
            f"config.json says model_type={model_type!r}. jaxtune has: {', '.join(FAMILIES)}."
            + did_you_mean(str(model_type), FAMILIES)
        )
    return FAMILIES[model_type]


def build(hf_config: dict[str, Any], *, dtype: Any, remat: bool = False) -> Any:
    """The Flax module of a parsed config.json, its activations in `dtype`."""
    family_of(hf_config)
    from jaxtune.models import gemma

    arguments = gemma_hf.config_from_hf(hf_config)
    arguments["ropes"] = tuple(gemma.Rope(*rope) for rope in arguments["ropes"])
    return gemma.Gemma(gemma.GemmaConfig(**arguments), dtype=dtype, remat=remat)
