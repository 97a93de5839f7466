"""What the prompt methods have in common: config keys, sizes, and how embeddings of virtual tokens begin.

Their rows are used as stored.  transformers before 5.4 multiplied them by the factor of the table's rows in Gemma 1 and
2, and the file does not say which of the two it was trained for: `soft_prompt_scale` is "post" for today's convention
and "pre" for that one.
"""

import dataclasses
from collections.abc import Mapping, MutableMapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxtune.data.virtual import Virtual
from jaxtune.errors import UserError
from jaxtune.layers import take_rows
from jaxtune.peft.keys import check_choice, check_count
from jaxtune.peft.method import Layout, Start, box, is_saved, take

NAME = "prompt_embeddings"
# PEFT wraps no model around the base here, so that names of modules lack one level.
PREFIX = "base_model."
OUR_KEYS = ("soft_prompt_scale",)
# The families whose models scaled whatever embeddings they were given.
SCALED_ALL = ("gemma", "gemma2")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """PEFT's keys of every method with virtual tokens.  All but the first are the model's own, and None unless a file
    says them.

    Raises:
      ValueError: a value out of range, naming the key.
    """

    num_virtual_tokens: Any = 20  # PEFT has no default
    token_dim: Any = None
    num_transformer_submodules: Any = None
    num_attention_heads: Any = None
    num_layers: Any = None
    modules_to_save: Any = None

    def __post_init__(self):
        check_count("num_virtual_tokens", self.num_virtual_tokens)


@dataclasses.dataclass(frozen=True)
class PromptConfig(Sizes):
    """And of those that train embeddings.  soft_prompt_scale: post | pre."""

    soft_prompt_scale: Any = "post"

    def __post_init__(self):
        super().__post_init__()
        check_choice("soft_prompt_scale", self.soft_prompt_scale, ("post", "pre"))


@struct.dataclass
class Prompt:
    """value [P, D] as PEFT stores it; the model multiplies it by `scale`.  decoder_tokens: how many virtual tokens of a
    task are the decoder's, behind an encoder."""

    value: Any
    scale: float = struct.field(pytree_node=False)
    decoder_tokens: int = struct.field(pytree_node=False, default=0)

    def rows(self, rng=None):
        return self.value

    def to_peft(self) -> dict[str, np.ndarray]:
        return {NAME: np.asarray(self.value)}


def sizes_of(layout: Layout) -> dict[str, int]:
    """The model's sizes by PEFT's keys."""
    return {
        "token_dim": layout.width,
        "num_transformer_submodules": submodules_of(layout),
        "num_attention_heads": layout.heads,
        "num_layers": layout.encoder_layers or layout.layers,
    }


def submodules_of(layout: Layout) -> int:
    """2 for an encoder-decoder: PEFT has rows for both, whether or not the decoder's are read."""
    return 2 if layout.encoder_layers else 1


def check_sizes(config: Sizes, sizes: Mapping[str, int]) -> None:
    """Refuses sizes of another model.

    Raises:
      UserError: naming the key.
    """
    for key, size in sizes.items():
        if getattr(config, key) not in (None, size):
            raise UserError(
                f"The adapter's config has {key}={getattr(config, key)!r}, and this model needs {size}. Is it for "
                "another base model?"
            )


def plan(layout: Layout, config: Sizes) -> dict[str, int]:
    """{"prompt": how many virtual tokens}.

    Raises:
      UserError: the sizes are another model's; or the embedding is to train, of which PEFT would use the original.
    """
    check_sizes(config, sizes_of(layout))
    (module,) = layout.site("embed/table").modules
    if is_saved(config.modules_to_save, module):
        raise UserError(
            f"modules_to_save names {module}. Where there is a prompt, PEFT looks tokens up in the original and never "
            "trains the copy; so jaxtune has none. Leave it out, or take prefix_tuning."
        )
    return {"prompt": config.num_virtual_tokens}


def virtual(layout: Layout, config: Sizes) -> Virtual:
    return Virtual(config.num_virtual_tokens)


def count_of(layout: Layout, config: Sizes) -> int:
    """Rows of `prompt_embeddings`.  Of an encoder-decoder's the first half stands before the encoder's tokens; the
    other half is before the decoder's in multitask prompts, and read by nobody in others."""
    return config.num_virtual_tokens * submodules_of(layout)


def scale_of(layout: Layout, config: PromptConfig) -> float:
    """What the model multiplies stored rows by."""
    pre = config.soft_prompt_scale == "pre" and layout.family in SCALED_ALL
    return layout.embed_scale if pre else 1.0


def boxed(layout: Layout, config: PromptConfig, value: Any) -> Prompt:
    return Prompt(box(value, None, "embed"), scale_of(layout, config))


def draw(key: jax.Array, layout: Layout, config: Any, start: Start) -> jax.Array:
    """First rows [P, D], as peft's `PromptEmbedding` has them: N(0, 1); or the embeddings of a text's tokens, repeated
    or cut; or those of random tokens.

    Raises:
      UserError: the text has no tokens.
    """
    count, how = count_of(layout, config), config.prompt_tuning_init
    if how == "TEXT":
        assert start.encode is not None
        ids = np.asarray(start.encode(config.prompt_tuning_init_text), np.int32)
        if not len(ids):
            raise UserError(f"prompt_tuning_init_text {config.prompt_tuning_init_text!r} has no tokens.")
        ids = jnp.asarray(np.resize(ids, count))
    elif how == "SAMPLE_VOCAB":
        ids = jax.random.randint(key, (count,), 0, layout.vocab)
    else:
        return jax.random.normal(key, (count, layout.width))
    rows = take_rows(start.table(), ids)
    if scale_of(layout, config) == 1:
        rows = rows * jnp.asarray(layout.embed_scale, rows.dtype)
    return rows.astype(jnp.float32)


def from_peft(layout: Layout, config: PromptConfig, tensors: MutableMapping[str, np.ndarray]) -> dict[str, Any]:
    """{"prompt": adapter} of a PEFT file.

    Raises:
      KeyError: no `prompt_embeddings`.  UserError: of another shape, or the sizes are another model's.
    """
    plan(layout, config)
    rows = take(tensors, NAME, (count_of(layout, config), layout.width), "num_virtual_tokens")
    return {"prompt": boxed(layout, config, rows)}


def to_config(layout: Layout, config: PromptConfig, adapters: Mapping[str, Any]) -> dict[str, Any]:
    """adapter_config.json's keys, with the sizes that PEFT fills in."""
    return vars(config) | sizes_of(layout)
