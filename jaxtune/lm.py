"""`jaxtune.load`: a model, with or without an adapter, to compute logits, generate and save with."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxtune import mesh as meshes
from jaxtune.data.chat import render_folded
from jaxtune.errors import MissingInputError, UserError
from jaxtune.hf.adapters import PeftAdapter, load_adapter, place_adapters, save_adapter
from jaxtune.hf.base import Base, load_base, open_base
from jaxtune.layers import output_logits
from jaxtune.typing import Tree


@functools.partial(jax.jit, static_argnums=0)
def forward_logits(model: Any, variables: Tree, tokens: Any, segments: Any) -> Any:
    """Float32 logits [B, T, V] of every position, soft-capped: for inspection, never for training."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = model.apply(variables, tokens, positions, segments)
    return output_logits(hidden, model.apply(variables, method="head"), model.config.final_softcap)


@dataclasses.dataclass
class LanguageModel:
    """A base on a mesh and, where `peft` is not None, an adapter over it."""

    base: Base
    mesh: Mesh
    variables: Tree
    peft: PeftAdapter | None
    tokenizer: Any | None

    def logits(self, input_ids: Any, attention_mask: Any = None, labels: Any = None, task_id: Any = None) -> np.ndarray:
        """Logits of every position, equal to transformers' (eager attention).

        Args:
          input_ids: [B, T] integers.  attention_mask: [B, T], 0 where padding, on either side.
          labels, task_id: for encoder-decoders and multitask prompts.

        Returns:
          float32 [B, T, V].
        """
        if labels is not None or task_id is not None:
            raise UserError(
                "`labels` is for encoder-decoders and `task_id` for multitask prompts; this model is neither."
            )
        try:
            tokens = np.asarray(input_ids, np.int32)
        except (TypeError, ValueError):
            raise UserError(
                "input_ids must be integers of shape [B, T]. Rows of different lengths are padded, with attention_mask "
                "0 there; texts go through `lm.tokenizer.encode`."
            ) from None
        if tokens.ndim != 2:
            raise UserError(f"input_ids has shape {tokens.shape}; it must be [B, T].")
        vocabulary = self.base.model.config.vocab_size
        if tokens.size and (tokens.min() < 0 or tokens.max() >= vocabulary):
            raise UserError(
                f"input_ids holds ids from {tokens.min()} to {tokens.max()}; the vocabulary has {vocabulary}."
            )
        segments = np.ones_like(tokens) if attention_mask is None else (np.asarray(attention_mask) > 0).astype(np.int32)
        if segments.shape != tokens.shape:
            raise UserError(f"attention_mask has shape {segments.shape}; it must be input_ids' {tokens.shape}.")
        with jax.set_mesh(self.mesh):
            return np.asarray(forward_logits(self.base.model, self.variables, tokens, segments))

    def generate(
        self,
        prompts: Any,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ) -> list[str]:
        """Answers to a list of texts, or of chats (lists of {role, content}), without the prompt and special tokens."""
        from jaxtune.generate import Sampling, generate

        if self.tokenizer is None:
            raise MissingInputError(f"{self.base.directory} has no tokenizer (tokenizer.json or tokenizer.model).")
        if isinstance(prompts, str) or any(isinstance(prompt, dict) for prompt in prompts):
            raise UserError("`prompts` is a list of texts, or of chats; for one of them write generate([prompt]).")
        ids = [encode_prompt(self.tokenizer, prompt) for prompt in prompts]
        sampling = Sampling(temperature, top_k, top_p)
        with jax.set_mesh(self.mesh):
            out = generate(
                self.base.model,
                self.variables,
                ids,
                max_new_tokens=max_new_tokens,
                stop_ids=self.tokenizer.stop_ids,
                sampling=sampling,
                seed=seed,
            )
        return [self.tokenizer.decode(tokens) for tokens in out]

    def save_adapter(self, directory: str | Path) -> None:
        """Writes the adapter as a PEFT directory."""
        if self.peft is None:
            raise UserError("This model has no adapter to save. Load one with jaxtune.load(..., adapter=DIR).")
        save_adapter(
            Path(directory),
            self.variables,
            self.base.layout,
            self.peft,
            self.peft.base or self.base.id,
            text_prefix=self.base.text_prefix,
        )


def encode_prompt(tokenizer: Any, prompt: str | list[dict[str, str]]) -> list[int]:
    """Token ids of a text (BOS before it) or of a chat, ready for the model's answer.

    Raises:
      UserError: a chat, and the tokenizer has no template; or a chat that the template refuses.
    """
    if isinstance(prompt, str):
        return [tokenizer.bos_id] * (tokenizer.bos_id is not None) + tokenizer.encode(prompt)
    if tokenizer.chat_template is None:
        raise UserError("This checkpoint's tokenizer has no chat template. Give the prompts as texts.")
    special = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
    text, _ = render_folded(tokenizer.chat_template, prompt, add_generation_prompt=True, **special)
    return tokenizer.encode(text)


def load(
    model_id: str | Path,
    adapter: str | Path | None = None,
    dtype: str = "float32",
    quant: str | None = None,
    mesh: Mesh | None = None,
) -> LanguageModel:
    """Loads a Hugging Face checkpoint (directory or Hub id) and, over it, a PEFT adapter directory.

    Args:
      dtype: of weights and activations; adapters are float32.  quant: None.
      mesh: where to put it (`jaxtune.mesh.make_mesh`); None: the first device.

    Raises:
      UserError: what was asked, what exists, what to do.
    """
    if quant is not None:
        raise UserError(f"quant is {quant!r}. It can be: None.")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"dtype is {dtype!r}. It can be: float32, bfloat16, float16.")
    mesh = mesh or meshes.make_mesh(1, 1, 1, jax.devices()[:1])
    base = open_base(str(model_id), dtype=dtype)
    peft = None if adapter is None else load_adapter(Path(adapter), base.layout)
    variables = {"params": load_base(base, mesh, lambda path: jnp.dtype(dtype))}
    if peft is not None:
        variables |= place_adapters(mesh, peft.adapters)
    return LanguageModel(base, mesh, variables, peft, optional_tokenizer(base.directory))


def optional_tokenizer(directory: Path) -> Any | None:
    """The checkpoint's tokenizer, or None where it has none (logits need none)."""
    if not any((directory / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        return None
    from jaxtune.tokenizer import load_tokenizer

    return load_tokenizer(directory)
