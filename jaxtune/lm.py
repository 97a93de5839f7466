"""`jaxtune.load`: a model, with or without an adapter, to compute logits, generate and save with."""

import dataclasses
import functools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxtune import mesh as meshes
from jaxtune.data import seq2seq
from jaxtune.data.chat import render_folded
from jaxtune.data.virtual import NONE, Virtual, insert, tasks_of
from jaxtune.errors import MissingInputError, UserError
from jaxtune.hf.adapters import PeftAdapter, load_adapter, place_adapters
from jaxtune.hf.base import Base, load_base, open_base
from jaxtune.hf.handover import differences, held_as, in_jaxtune
from jaxtune.layers import output_logits
from jaxtune.peft.method import virtual_of
from jaxtune.quant import scheme_of
from jaxtune.tree import count
from jaxtune.typing import Tree


@functools.partial(jax.jit, static_argnums=0)
def forward_logits(model: Any, variables: Tree, tokens: Any, segments: Any, source: Any = None) -> Any:
    """Float32 logits [B, T, V] of every position, soft-capped: for inspection, never for training.

    Args:
      source: (tokens, segments) that an encoder reads; then the others are the decoder's.
    """
    # Counted from each row's first token: what stands before all texts (a prefix) is as near to every one of them.
    first = jnp.argmax(segments > 0, axis=1)[:, None]
    positions = jnp.maximum(jnp.arange(tokens.shape[1])[None] - first, 0)
    read = {} if source is None else {"source_tokens": source[0], "source_segments": source[1]}
    hidden, _ = model.apply(variables, tokens, positions, segments, **read)
    return output_logits(hidden, model.apply(variables, method="head"), model.config.final_softcap)


@dataclasses.dataclass(repr=False)
class LanguageModel:
    """A base on a mesh and, where `peft` is not None, an adapter over it."""

    base: Base
    mesh: Mesh
    variables: Tree
    peft: PeftAdapter | None
    tokenizer: Any | None

    def __repr__(self) -> str:
        over = f", with an adapter of type {self.peft.method.PEFT_TYPE}" if self.peft else ""
        held = held_as(self.base.settings, str(jnp.dtype(self.base.model.dtype)))
        return f"<jaxtune.LanguageModel {self.base.id}: {count(self.base.abstract):,} parameters, {held}{over}>"

    def logits(self, input_ids: Any, attention_mask: Any = None, labels: Any = None, task_id: Any = None) -> np.ndarray:
        """Logits of every position, equal to transformers' (eager attention); with a prompt or a prefix, to peft's of
        each row without padding.

        Args:
          input_ids: [B, T] integers.  attention_mask: [B, T], 0 where padding, on either side.
          labels: [B, T] of an encoder-decoder, whose encoder reads input_ids: what its decoder is to say, which reads
            them shifted right.  -100 is padding.
          task_id: for multitask prompts, an integer or one for each row.

        Returns:
          float32 [B, T, V]: of the given tokens (of `labels`, where there are any), not of virtual ones.
        """
        c, two = self.base.model.config, self.base.encodes
        if (labels is not None) != two:
            raise UserError(
                "This model is an encoder and a decoder: give `labels`, what the decoder is to say to input_ids."
                if two
                else "`labels` is for encoder-decoders; this model is none."
            )
        tokens = check_ids(input_ids, "input_ids", c.vocab_size)
        segments = np.ones_like(tokens) if attention_mask is None else (np.asarray(attention_mask) > 0).astype(np.int32)
        if segments.shape != tokens.shape:
            raise UserError(f"attention_mask has shape {segments.shape}; it must be input_ids' {tokens.shape}.")
        virtual, source = self.virtual, None
        tasks = tasks_of(virtual, task_id, len(tokens))
        tokens, segments, slots = insert(tokens, segments, virtual, tasks)
        if two:
            labels = np.asarray(labels)
            given = np.where(labels == -100, c.pad_id, labels) if labels.dtype.kind in "iu" else labels
            given = check_ids(given, "labels", c.vocab_size)
            if len(given) != len(tokens):
                raise UserError(f"labels has {len(given)} rows, and input_ids {len(tokens)}.")
            source, tokens = (tokens, segments), decoder_reads(given, c.start_id, virtual, tasks)
            segments = np.ones_like(tokens)  # as in transformers: what is padding comes last
        with jax.set_mesh(self.mesh):
            logits = np.asarray(forward_logits(self.base.model, self.variables, tokens, segments, source))
        if two:
            return logits[:, tokens.shape[1] - given.shape[1] :]
        return np.take_along_axis(logits, slots[..., None], axis=1) if virtual.count else logits

    @property
    def virtual(self) -> Virtual:
        """The virtual tokens before every text."""
        return virtual_of(self.peft.method, self.base.layout, self.peft.config) if self.peft else NONE

    def generate(
        self,
        prompts: Any,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        task_id: Any = None,
    ) -> list[str]:
        """Answers to a list of texts, or of chats (lists of {role, content}), without the prompt and special tokens.

        Args:
          task_id: for multitask prompts, an integer or one for each text.
        """
        from jaxtune.generate import Sampling, generate

        if self.tokenizer is None:
            raise MissingInputError(f"{self.base.directory} has no tokenizer (tokenizer.json or tokenizer.model).")
        if isinstance(prompts, str) or any(isinstance(prompt, dict) for prompt in prompts):
            raise UserError("`prompts` is a list of texts, or of chats; for one of them write generate([prompt]).")
        before = [self.virtual.ids(task).tolist() for task in tasks_of(self.virtual, task_id, len(prompts))]
        encode = functools.partial(encode_prompt, self.tokenizer, ended=self.base.encodes)
        ids = [own + encode(prompt) for own, prompt in zip(before, prompts, strict=True)]
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
        """Writes the adapter as a PEFT directory, and reads it back to see that it is the same.

        Raises:
          UserError: there is none, or it cannot be written.  ExportError: what was written computes something else.
        """
        from jaxtune.hf.card import card
        from jaxtune.probe import write_adapter

        if self.peft is None:
            raise UserError("This model has no adapter to save. Load one with jaxtune.load(..., adapter=DIR).")
        name = self.peft.base or self.base.id
        about = {"over": self.peft.trained_over, "seq2seq": self.base.encodes}
        readme = card("adapter", name, self.peft.method.PEFT_TYPE.lower(), **about)
        place = (self.base, self.mesh, self.variables, self.peft, name)
        write_adapter(
            Path(directory), *place, readme=readme, say=functools.partial(warnings.warn, stacklevel=2), changes=False
        )

    def save_merged(
        self,
        directory: str | Path,
        dtype: str | None = None,
        max_shard_size: str | int = "4GB",
        onto: str | None = None,
    ) -> float:
        """Writes the model with the adapter folded into its weights, as a Hugging Face checkpoint; returns by how much
        its logits differ from the adapter's, to the largest.

        Args:
          dtype: float32 | bfloat16 | float16; None: as the model was loaded.
          onto: of a quantised base: dequantised (the merged model is what was trained) | original (the weights as they
            were before, which the adapter was not trained over).

        Raises:
          UserError: the adapter is no part of any weight (prompts, prefixes), or it cannot be written.
          ExportError: the merged model's logits are not the adapter's; nothing was written.
        """
        from jaxtune.hf.card import card
        from jaxtune.hf.merge import save_merged
        from jaxtune.hf.weights import size_of
        from jaxtune.probe import logits_of

        check_dtype(dtype or "float32")
        if self.peft is None:
            raise UserError("This model has no adapter to merge. Load one with jaxtune.load(..., adapter=DIR).")
        method = self.peft.method.PEFT_TYPE.lower()
        about = {"over": self.peft.trained_over or self.base.settings, "onto": onto, "seq2seq": self.base.encodes}
        return save_merged(
            Path(directory),
            self.base,
            self.variables,
            peft_type=method,
            logits=logits_of(self.base, self.mesh, self.variables, self.peft),
            dtype=dtype or self.base.model.dtype,
            shard_bytes=size_of(max_shard_size),
            readme=card("merged", self.base.id, method, **about),
            onto=onto,
        )


def check_dtype(dtype: str) -> None:
    """Refuses what weights cannot be.

    Raises:
      UserError: naming what they can be.
    """
    if dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"dtype is {dtype!r}. It can be: float32, bfloat16, float16.")


def check_ids(values: Any, name: str, vocabulary: int) -> np.ndarray:
    """Token ids as an array.

    Raises:
      UserError: they are no integers [B, T] of that vocabulary.
    """
    try:
        ids = np.asarray(values, np.int32)
    except (TypeError, ValueError):
        raise UserError(
            f"{name} must be integers of shape [B, T]. Rows of different lengths are padded, with attention_mask 0 "
            "there (-100 in labels); texts go through `lm.tokenizer.encode`."
        ) from None
    if ids.ndim != 2:
        raise UserError(f"{name} has shape {ids.shape}; it must be [B, T].")
    if ids.size and (ids.min() < 0 or ids.max() >= vocabulary):
        raise UserError(f"{name} holds ids from {ids.min()} to {ids.max()}; the vocabulary has {vocabulary}.")
    return ids


def decoder_reads(labels: np.ndarray, start_id: int, virtual: Virtual, tasks: Sequence[int]) -> np.ndarray:
    """What a decoder reads to say `labels` [B, T]: its own virtual tokens, the start token, all labels but the last."""
    own = np.stack([virtual.decoder_ids(task) for task in tasks])
    return np.concatenate([own, np.full_like(labels[:, :1], start_id), labels[:, :-1]], axis=1)


def encode_prompt(tokenizer: Any, prompt: str | list[dict[str, str]], *, ended: bool = False) -> list[int]:
    """Token ids of a text (BOS before it) or of a chat, ready for the model's answer.

    Args:
      ended: EOS behind a text, as encoders have read it.

    Raises:
      UserError: a chat, and the tokenizer has no template; or a chat that the template refuses.
    """
    if isinstance(prompt, str):
        ids = [tokenizer.bos_id] * (tokenizer.bos_id is not None) + tokenizer.encode(prompt)
        return seq2seq.ended(ids, tokenizer) if ended else ids
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
    double_quant: bool = False,
    quant_embedding: bool = False,
    mesh: Mesh | None = None,
    soft_prompt_scale: str | None = None,
) -> LanguageModel:
    """Loads a Hugging Face checkpoint (directory or Hub id) and, over it, a PEFT adapter directory.

    Args:
      dtype: of weights and activations; adapters are float32.
      quant: nf4 | int8, of all linear layers but the head; None: as they are stored, which may be bitsandbytes' 4 or 8
        bits.  double_quant: NF4's scales in 8 bits.  quant_embedding: the embedding too, and a head tied to it.
      mesh: where to put it (`jaxtune.mesh.make_mesh`); None: the first device.
      soft_prompt_scale: pre, for a prompt that was trained over Gemma 1 or 2 with transformers before 5.4, which
        multiplied it by √width; post, for others; None: what jaxtune.json says, where we wrote one, else post.

    Raises:
      UserError: what was asked, what exists, what to do.
    """
    check_dtype(dtype)
    mesh = mesh or meshes.make_mesh(1, 1, 1, jax.devices()[:1])
    base = open_base(str(model_id), dtype=dtype, quant=scheme_of(quant, double_quant, quant_embedding))
    peft = None if adapter is None else load_adapter(Path(adapter), base.layout, soft_prompt_scale=soft_prompt_scale)
    over = peft.trained_over if peft else None
    for line in differences(over, base.settings):
        warnings.warn(f"{adapter}: {line}: jaxtune.load(…{in_jaxtune(over or {})}).", stacklevel=2)
    variables = {"params": load_base(base, mesh, lambda path: jnp.dtype(dtype))}
    if peft is not None:
        variables |= place_adapters(mesh, peft.adapters)
    return LanguageModel(base, mesh, variables, peft, optional_tokenizer(base.directory))


def optional_tokenizer(directory: Path) -> Any | None:
    """The checkpoint's tokenizer, or None where it has none (logits need none)."""
    if not any((directory / name).exists() for name in ("tokenizer.json", "tokenizer.model", "spiece.model")):
        return None
    from jaxtune.tokenizer import load_tokenizer

    return load_tokenizer(directory)
