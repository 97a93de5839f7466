"""Scores of a model on rows held back: the loss, and answers by generation."""

from collections.abc import Sequence
from typing import Any

from jaxtune.answers import exact_match, has_answers, mean_loss, read_answers, write_answers
from jaxtune.data.examples import Prompt
from jaxtune.generate import generate
from jaxtune.tokenizer import Tokenizer
from jaxtune.typing import Tree

__all__ = ["answer", "exact_match", "has_answers", "mean_loss", "read_answers", "write_answers"]

# Prompts generated side by side.
BATCH = 32


def answer(
    model: Any, variables: Tree, tokenizer: Tokenizer, prompts: Sequence[Prompt], *, max_new_tokens: int, shards: int
) -> list[str]:
    """Greedy answers as text; batches are filled up to a multiple of `shards`."""
    size = -(-min(len(prompts), BATCH) // shards) * shards
    ids = [prompt.ids for prompt in prompts]
    stop = tokenizer.stop_ids
    out = generate(model, variables, ids, max_new_tokens=max_new_tokens, stop_ids=stop, batch_size=size)
    return [tokenizer.decode(tokens).strip() for tokens in out]
