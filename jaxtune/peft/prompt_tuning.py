"""Prompt tuning: the embeddings of a few virtual tokens before every text are all that trains.

Lester et al. 2021 (arXiv 2104.08691); equals peft's `PromptEmbedding`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from jaxtune.peft import prompt
from jaxtune.peft.keys import check_choice
from jaxtune.peft.method import Layout, Start

PEFT_TYPE = "PROMPT_TUNING"
OWN_NAMES, PREFIX, OUR_KEYS = (prompt.NAME,), prompt.PREFIX, prompt.OUR_KEYS
NEUTRAL: dict[str, tuple[Any, ...]] = {}

STARTS = ("RANDOM", "TEXT", "SAMPLE_VOCAB")


@dataclasses.dataclass(frozen=True)
class Config(prompt.PromptConfig):
    """PEFT's keys and defaults.  A text is cut into tokens by the base's own tokenizer, whatever
    `tokenizer_name_or_path` says."""

    prompt_tuning_init: Any = "RANDOM"
    prompt_tuning_init_text: Any = None
    tokenizer_name_or_path: Any = None
    tokenizer_kwargs: Any = None

    def __post_init__(self):
        super().__post_init__()
        check_start(self, STARTS)


def check_start(config: Any, starts: tuple[str, ...]) -> None:
    """Refuses an unknown start, and a text's without the text.

    Raises:
      ValueError: naming the key.
    """
    check_choice("prompt_tuning_init", config.prompt_tuning_init, starts)
    if config.prompt_tuning_init == "TEXT" and not isinstance(config.prompt_tuning_init_text, str):
        raise ValueError("prompt_tuning_init is TEXT, and prompt_tuning_init_text is not set.")


plan, virtual, from_peft = prompt.plan, prompt.virtual, prompt.from_peft


def init(key: jax.Array, layout: Layout, config: Config, start: Start) -> dict[str, Any]:
    """{"prompt": adapter}, fresh."""
    plan(layout, config)
    return {"prompt": prompt.boxed(layout, config, prompt.draw(key, layout, config, start))}


def to_config(layout: Layout, config: Any, adapters: Mapping[str, Any]) -> dict[str, Any]:
    """adapter_config.json's keys.  peft refuses a config whose text has no tokenizer, or whose source file is not there
    (an adapter that is done needs neither); it is then said to have begun at random."""
    values = prompt.to_config(layout, config, adapters)
    if config.prompt_tuning_init in STARTS and (config.prompt_tuning_init != "TEXT" or config.tokenizer_name_or_path):
        return values
    gone = {"prompt_tuning_init_text", "tokenizer_kwargs", "prompt_tuning_init_state_dict_path"} & values.keys()
    return values | {"prompt_tuning_init": "RANDOM"} | dict.fromkeys(gone)
