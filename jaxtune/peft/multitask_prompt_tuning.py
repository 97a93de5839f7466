"""Multitask prompt tuning: one prompt for all tasks, times a matrix of low rank of each task's own.

Wang et al. 2023 (arXiv 2303.02861); equals peft's `MultitaskPromptEmbedding`.  Each row of data names its task
(`data.task_id`), and so does each call (`task_id`).
"""

import dataclasses
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from safetensors import SafetensorError
from safetensors.numpy import load_file

from jaxtune.data.virtual import Virtual
from jaxtune.errors import MissingInputError, UserError
from jaxtune.peft import prompt, prompt_tuning
from jaxtune.peft.keys import check_count
from jaxtune.peft.method import Layout, Start, box, take

PEFT_TYPE = "MULTITASK_PROMPT_TUNING"
COLS, ROWS = "prefix_task_cols", "prefix_task_rows"
OWN_NAMES, PREFIX, OUR_KEYS = (prompt.NAME, COLS, ROWS), prompt.PREFIX, prompt.OUR_KEYS
NEUTRAL: dict[str, tuple[Any, ...]] = {}

SOURCES = ("AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED")


@dataclasses.dataclass(frozen=True)
class Config(prompt.PromptConfig):
    """PEFT's keys and defaults.  prompt_tuning_init_state_dict_path: the adapter_model.safetensors that a start from
    source tasks reads; prompt_tuning_init_task: which of them."""

    prompt_tuning_init: Any = "RANDOM"
    prompt_tuning_init_text: Any = None
    tokenizer_name_or_path: Any = None
    tokenizer_kwargs: Any = None
    prompt_tuning_init_state_dict_path: Any = None
    prompt_tuning_init_task: Any = 0
    num_ranks: Any = 1
    num_tasks: Any = 1

    def __post_init__(self):
        super().__post_init__()
        prompt_tuning.check_start(self, ("RANDOM", "TEXT", *SOURCES))
        check_count("num_tasks", self.num_tasks)
        check_count("num_ranks", self.num_ranks)
        if self.prompt_tuning_init_task is not None:
            check_count("prompt_tuning_init_task", self.prompt_tuning_init_task, low=0)
        if self.prompt_tuning_init in SOURCES and not isinstance(self.prompt_tuning_init_state_dict_path, str):
            raise ValueError(
                f"prompt_tuning_init is {self.prompt_tuning_init}, and prompt_tuning_init_state_dict_path is not set."
            )
        if self.prompt_tuning_init in SOURCES[:2] and self.num_tasks != 1:
            raise ValueError(f"prompt_tuning_init={self.prompt_tuning_init} makes one task; num_tasks must be 1.")


@struct.dataclass
class Multitask:
    """embedding [P, D], cols [tasks, P, R] and ranks [tasks, R, D]: the prompt of task t is embedding * (cols[t] @
    ranks[t]).  decoder_tokens: as `prompt.Prompt`."""

    embedding: Any
    cols: Any
    ranks: Any
    scale: float = struct.field(pytree_node=False)
    decoder_tokens: int = struct.field(pytree_node=False, default=0)

    def rows(self, rng=None):
        """The prompts of all tasks behind each other [tasks * P, D]."""
        own = jnp.einsum("APR,ARD->APD", self.cols, self.ranks, precision="highest")
        return (self.embedding[None] * own).reshape(-1, self.embedding.shape[-1])

    def folded(self):
        return prompt.Prompt(self.rows(), self.scale, self.decoder_tokens)

    def to_peft(self) -> dict[str, np.ndarray]:
        return {prompt.NAME: np.asarray(self.embedding), COLS: np.asarray(self.cols), ROWS: np.asarray(self.ranks)}


def virtual(layout: Layout, config: Config) -> Virtual:
    return Virtual(config.num_virtual_tokens, config.num_tasks, decoder=bool(layout.encoder_layers))


def plan(layout: Layout, config: Config) -> dict[str, int]:
    """{"prompt": how many virtual tokens}.

    Raises:
      MissingInputError, UserError: the sizes are another model's; or there is no such source, or not of this shape.
    """
    if config.prompt_tuning_init in SOURCES:
        _source(layout, config)
    return prompt.plan(layout, config)


def init(key: jax.Array, layout: Layout, config: Config, start: Start) -> dict[str, Any]:
    """{"prompt": adapter}, fresh: the embedding as prompt tuning's, the tasks' factors N(0, 0.02²); or of a source."""
    prompt.plan(layout, config)
    keys = jax.random.split(key, 3)
    tasks, count, rank = config.num_tasks, prompt.count_of(layout, config), config.num_ranks
    values = {
        COLS: jax.random.normal(keys[1], (tasks, count, rank)) * 0.02,
        ROWS: jax.random.normal(keys[2], (tasks, rank, layout.width)) * 0.02,
    }
    if config.prompt_tuning_init in SOURCES:
        values |= _source(layout, config)
    else:
        values[prompt.NAME] = prompt.draw(keys[0], layout, config, start)
    return {"prompt": _boxed(layout, config, values)}


def _source(layout: Layout, config: Config) -> dict[str, Any]:
    """What a start takes from the adapter of other tasks.

    Raises:
      MissingInputError: no such file.  UserError: no safetensors, or of another shape.
    """
    path, key = Path(config.prompt_tuning_init_state_dict_path).expanduser(), "prompt_tuning_init_state_dict_path"
    if not path.is_file():
        raise MissingInputError(f"`peft.{key}` is {str(path)!r}, and there is no such file.")
    try:
        stored = load_file(path)
    except SafetensorError as error:
        raise UserError(f"`peft.{key}` {path} is no safetensors file ({error}). Pickles are never read.") from None
    count, rank = prompt.count_of(layout, config), config.num_ranks
    tasks = len(stored.get(COLS, ()))
    shapes = {prompt.NAME: (count, layout.width), COLS: (tasks, count, rank), ROWS: (tasks, rank, layout.width)}
    try:
        taken = {name: take(stored, name, shape).astype(np.float32) for name, shape in shapes.items()}
    except KeyError as error:
        raise UserError(f"`peft.{key}` {path} has no tensor {error.args[0]!r}.") from None
    if config.prompt_tuning_init == "ONLY_SOURCE_SHARED":
        return {prompt.NAME: taken[prompt.NAME]}
    task = config.prompt_tuning_init_task or 0
    if config.prompt_tuning_init == "EXACT_SOURCE_TASK" and task >= tasks:
        raise UserError(f"prompt_tuning_init_task is {task}; {path} has the tasks 0 to {tasks - 1}.")
    which = slice(task, task + 1) if config.prompt_tuning_init == "EXACT_SOURCE_TASK" else slice(None)
    return taken | {name: taken[name][which].mean(0, keepdims=True) for name in (COLS, ROWS)}


def _boxed(layout: Layout, config: Config, values: Mapping[str, Any]) -> Multitask:
    return Multitask(
        box(values[prompt.NAME], None, "embed"),
        box(values[COLS], None, None, "rank"),
        box(values[ROWS], None, "rank", "embed"),
        prompt.scale_of(layout, config),
        config.num_virtual_tokens if layout.encoder_layers else 0,
    )


def from_peft(layout: Layout, config: Config, tensors: MutableMapping[str, np.ndarray]) -> dict[str, Any]:
    """{"prompt": adapter} of a PEFT file.

    Raises:
      KeyError: a tensor is missing.  UserError: of another shape, or the sizes are another model's.
    """
    prompt.plan(layout, config)
    tasks, count, rank = config.num_tasks, prompt.count_of(layout, config), config.num_ranks
    shapes = {prompt.NAME: (count, layout.width), COLS: (tasks, count, rank), ROWS: (tasks, rank, layout.width)}
    return {"prompt": _boxed(layout, config, {name: take(tensors, name, shape) for name, shape in shapes.items()})}


to_config = prompt_tuning.to_config
