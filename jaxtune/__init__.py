"""jaxtune: fine-tune open language models on TPUs; adapters are Hugging Face PEFT directories, both ways."""

from typing import Any

__version__ = "0.1.0"

# Public names are imported when first used, so that `import jaxtune` loads neither jax nor torch.
_LAZY = {"load": "jaxtune.lm", "LanguageModel": "jaxtune.lm", "UserError": "jaxtune.errors"}
__all__ = ["LanguageModel", "UserError", "__version__", "load"]  # noqa: F822


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'jaxtune' has no attribute {name!r}")
