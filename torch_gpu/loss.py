"""Cross-entropy in chunks of tokens, so that the logits of a batch never exist; as `jaxtune.loss` on GPUs.

With Gemma's 256,000 words the logits of 2 x 1024 tokens are 2.1 GB in float32, and there would be several such arrays.
Here only positions with a target count at all, `CHUNK_TOKENS` of them at a time, and the gradient is computed in the
forward pass, chunk by chunk.

N positions with a target, D width, V vocabulary.
"""

import dataclasses
import functools
import types
from typing import Any

import torch
import torch.nn.functional as F
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.utils.generic import ModelOutput

# Tokens whose logits exist at one time: 1 MB each for Gemma, in float32.
CHUNK_TOKENS = 512
IGNORED = -100


@dataclasses.dataclass
class Loss(ModelOutput):
    """loss: what is trained on; a method may add its penalty to it in place.  token_loss: without that."""

    loss: Tensor | None = None
    token_loss: Tensor | None = None


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [N, I] times b [I, O] in float32, from operands of b's dtype; what comes out is not rounded to that."""
    if b.dtype == torch.float32:
        return a.float() @ b
    if b.is_cuda:
        return torch.mm(a.to(b.dtype), b, out_dtype=torch.float32)
    return a.to(b.dtype).float() @ b.float()


def capped(z: Tensor, softcap: float | None) -> Tensor:
    return z if softcap is None else torch.tanh(z / softcap) * softcap


class ChunkedCrossEntropy(torch.autograd.Function):
    """(hidden [N, D], table [V, D], targets [N], softcap) to the sum of -log p(target), float32.

    The table's gradient, as large as itself, is only made where it trains.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, table: Tensor, targets: Tensor, softcap: float | None) -> Tensor:
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_table = torch.zeros_like(table, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for at in range(0, len(targets), CHUNK_TOKENS):
            h, target = hidden[at : at + CHUNK_TOKENS], targets[at : at + CHUNK_TOKENS, None]
            z = capped(product(h, table.T), softcap)
            total = torch.logsumexp(z, dim=1, keepdim=True)
            loss += (total - z.gather(1, target)).sum()
            if d_hidden is None and d_table is None:
                continue
            g = torch.exp(z - total)
            g.scatter_add_(1, target, torch.full_like(target, -1, dtype=g.dtype))
            if softcap is not None:
                g *= 1 - (z / softcap) ** 2
            if d_hidden is not None:
                d_hidden[at : at + CHUNK_TOKENS] = product(g, table)
            if d_table is not None:
                d_table += product(g.T, h.to(table.dtype))
        ctx.save_for_backward(d_hidden, d_table)
        ctx.dtype = table.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (grad,) = grads
        d_hidden, d_table = ctx.saved_tensors
        of_hidden = None if d_hidden is None else (d_hidden * grad).to(d_hidden.dtype)
        return of_hidden, None if d_table is None else (d_table * grad).to(ctx.dtype), None, None


def summed_loss(hidden: Tensor, labels: Tensor, head: nn.Module, softcap: float | None) -> Tensor:
    """The sum of -log p(label) over all positions that have a label, float32.

    Args:
      hidden: [B, T, D], after the last norm.  labels: [B, T], of what is predicted there, -100 for none.
      head: the output head; of one that peft has wrapped in an adapter of its own the logits are computed by calling
        it, chunk by chunk, and again in the backward pass.
    """
    targets = labels.reshape(-1).to(hidden.device)
    chosen = targets != IGNORED
    hidden, targets = hidden.reshape(-1, hidden.shape[-1])[chosen], targets[chosen]
    if isinstance(head, ModulesToSaveWrapper):
        head = head.modules_to_save[head.active_adapters[0]] if not head.disable_adapters else head.original_module
    if type(head) is nn.Linear and head.bias is None:
        weight = head.weight
        return ChunkedCrossEntropy.apply(hidden.to(weight.device), weight, targets.to(weight.device), softcap)  # type: ignore

    def one(h: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(capped(head(h).float(), softcap), target, reduction="sum")

    total = hidden.sum() * 0.0
    for at in range(0, len(targets), CHUNK_TOKENS):
        part = hidden[at : at + CHUNK_TOKENS], targets[at : at + CHUNK_TOKENS]
        total = total + checkpoint(one, *part, use_reentrant=False)
    return total.float()


def install(model: Any) -> None:
    """Makes a language model of transformers compute its loss so.  Without labels its `forward` is what it was.

    With labels it returns a `Loss`: the sum over `num_items_in_batch` where that is given, as transformers' own, else
    the mean.  peft's prompts call the base with embeddings and labels that fit them, and notice nothing.
    """
    ordinary = model.forward
    softcap = getattr(model.config, "final_logit_softcapping", None)
    predict = predict_targets if model.config.is_encoder_decoder else predict_next

    # `generate` looks at the names of its arguments.
    @functools.wraps(type(model).forward)
    def forward(
        self: Any, *args: Any, labels: Tensor | None = None, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        if labels is None:
            return ordinary(*args, **kwargs)
        kwargs.pop("return_dict", None)
        hidden, targets = predict(self, labels, *args, **kwargs)
        items = (targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        items = torch.as_tensor(items, device=hidden.device).clamp(min=1)
        loss = summed_loss(hidden, targets, self.lm_head, softcap).to(hidden.device) / items
        return Loss(loss=loss + 0.0, token_loss=loss)

    model.forward = types.MethodType(forward, model)


def predict_next(model: Any, labels: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Hidden states and what each predicts: the label of the token after it, labels being of the token itself."""
    return model.model(*args, **kwargs).last_hidden_state[:, :-1], labels[:, 1:]


def predict_targets(
    model: Any,
    labels: Tensor,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    inputs_embeds: Tensor | None = None,
    decoder_input_ids: Tensor | None = None,
    decoder_attention_mask: Tensor | None = None,
    decoder_inputs_embeds: Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Of an encoder-decoder: the decoder's states and the labels, which it reads shifted right.

    The body of transformers' `T5ForConditionalGeneration.forward`, up to its head.
    """
    read: Any = model.encoder(input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs)
    if decoder_input_ids is None and decoder_inputs_embeds is None:
        decoder_input_ids = model._shift_right(labels)
    hidden = model.decoder(
        input_ids=decoder_input_ids,
        attention_mask=decoder_attention_mask,
        inputs_embeds=decoder_inputs_embeds,
        past_key_values=past_key_values,
        encoder_hidden_states=read.last_hidden_state,
        encoder_attention_mask=attention_mask,
        use_cache=use_cache,
        **kwargs,
    ).last_hidden_state
    if getattr(model.config, "scale_decoder_outputs", False):
        hidden = hidden * model.model_dim**-0.5
    return hidden, labels
