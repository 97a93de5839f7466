"""Greedy answers by transformers' `generate`, over peft's model."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from jaxtune.data.examples import Prompt
from jaxtune.data.virtual import Virtual
from jaxtune.tokenizer import Tokenizer

# Prompts generated side by side.
BATCH = 32


@torch.no_grad()
def answer(
    model: Any, tokenizer: Tokenizer, prompts: Sequence[Prompt], virtual: Virtual, *, max_new_tokens: int
) -> list[str]:
    """Answers as text.  Prompts of one length go together: peft puts a prompt's virtual tokens before padding on the
    left, away from its text."""
    device = next(p for p in model.parameters() if p.requires_grad).device
    own = [prompt.ids[virtual.count :] for prompt in prompts]
    tasks = [max((-1 - prompt.ids[0]) // max(virtual.count, 1), 0) for prompt in prompts]
    how = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(tokenizer.stop_ids),
        pad_token_id=tokenizer.pad_id,
        use_cache=True,
    )
    model.eval()
    texts = [""] * len(own)
    for length in sorted({len(ids) for ids in own}):
        same = [i for i, ids in enumerate(own) if len(ids) == length]
        for at in range(0, len(same), BATCH):
            chosen = same[at : at + BATCH]
            ids = torch.tensor([own[i] for i in chosen], device=device)
            more = {"task_ids": torch.tensor([tasks[i] for i in chosen], device=device)} if virtual.tasks else {}
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=how, **more)
            for i, row in zip(chosen, out[:, length:].tolist(), strict=True):
                end = next((k for k, token in enumerate(row) if token in tokenizer.stop_ids), len(row))
                texts[i] = tokenizer.decode(row[:end]).strip()
    return texts
