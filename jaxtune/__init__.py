"""jaxtune: fine-tune open language models on TPUs; adapters are Hugging Face PEFT directories, both ways."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtune.errors import UserError
    from jaxtune.lm import LanguageModel, load

__version__ = "0.1.0"
__all__ = ["LanguageModel", "UserError", "__version__", "load"]

# Public names are imported when first used, so that `import jaxtune` loads neither jax nor torch.
_HOMES = {"load": "jaxtune.lm", "LanguageModel": "jaxtune.lm", "UserError": "jaxtune.errors"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'jaxtune' has no attribute {name!r}")
