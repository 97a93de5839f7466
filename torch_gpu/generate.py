"""Greedy answers by transformers' `generate`, over peft's model."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, GenerationConfig

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
    tasks = [int(virtual.task_of(prompt.ids[0])) for prompt in prompts]
    config = model.get_base_model().config
    how = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(tokenizer.stop_ids),
        pad_token_id=tokenizer.pad_id,
        decoder_start_token_id=config.decoder_start_token_id if config.is_encoder_decoder else None,
        use_cache=True,
    )
    model.eval()
    texts = [""] * len(own)
    for length in sorted({len(ids) for ids in own}):
        same = [i for i, ids in enumerate(own) if len(ids) == length]
        for at in range(0, len(same), BATCH):
            chosen = same[at : at + BATCH]
            ids = torch.tensor([own[i] for i in chosen], device=device)
            which = torch.tensor([tasks[i] for i in chosen], device=device)
            if virtual.decoder:
                rows = behind_prompts(model, ids, which, tokenizer.stop_ids, max_new_tokens)
            else:
                more: dict[str, Any] = {"task_ids": which} if virtual.tasks else {}
                if config.is_encoder_decoder and model.active_peft_config.peft_type != "PREFIX_TUNING":
                    # One that grows: transformers makes as many layers as the encoder has.  A prefix brings its own.
                    more["past_key_values"] = EncoderDecoderCache(DynamicCache(), DynamicCache())
                out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=how, **more)
                # A decoder goes on with the prompt; one behind an encoder begins with its start token.
                rows = out[:, 1 if config.is_encoder_decoder else length :].tolist()
            for i, row in zip(chosen, rows, strict=True):
                end = next((k for k, token in enumerate(row) if token in tokenizer.stop_ids), len(row))
                texts[i] = tokenizer.decode(row[:end]).strip()
    return texts


def behind_prompts(
    model: Any, ids: Tensor, tasks: Tensor, stops: Sequence[int], max_new_tokens: int
) -> list[list[int]]:
    """Greedy tokens of an encoder-decoder with multitask prompts, ids [B, S] without padding: `generate` of peft puts
    the encoder's prompts there and forgets the decoder's, behind which it was trained."""
    base, count = model.get_base_model(), model.active_peft_config.num_virtual_tokens
    table = base.get_input_embeddings()
    begin = table(torch.full((len(ids), 1), base.config.decoder_start_token_id, device=ids.device))
    prompts = model.get_prompt(batch_size=len(ids), task_ids=tasks).to(begin)
    read = base.encoder(inputs_embeds=torch.cat([prompts[:, :count], table(ids)], dim=1))
    step, cache, rows = torch.cat([prompts[:, count:], begin], dim=1), None, []
    going = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    for _ in range(max_new_tokens):
        out = base(encoder_outputs=read, decoder_inputs_embeds=step, past_key_values=cache, use_cache=True)
        token, cache = out.logits[:, -1].argmax(dim=-1), out.past_key_values
        rows.append(token)
        going &= ~torch.isin(token, torch.tensor(list(stops), device=ids.device))
        if not going.any():
            break
        step = table(token[:, None])
    return torch.stack(rows, dim=1).tolist()
