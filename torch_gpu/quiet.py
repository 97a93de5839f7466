"""What the libraries say while they work, left out where it is not for the user."""

import logging
import os
import warnings

import transformers


def libraries() -> None:
    """Progress bars, advice and warnings of transformers, peft, accelerate and bitsandbytes; errors stay."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in ("accelerate", "bitsandbytes", "peft", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in ("transformers", "peft", "accelerate", "bitsandbytes", "torch"):
        warnings.filterwarnings("ignore", module=rf"{name}(\.|$)")
