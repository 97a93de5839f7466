"""Half precision that Gemma and T5 survive, and the name of the module where numbers stopped being finite.

A T4 has no bfloat16, and Gemma's activations outgrow float16 (65504): Gemma 3 everywhere, Gemma 2 at times.  So only
the products of linear layers are computed in float16, on the tensor cores; what they give is float32 again, and with it
everything between them: the residual stream, norms, rotations, scores, softmax, soft-caps and GeGLU.  Inputs that are
too large for a product's sum are made smaller by a power of two before it and larger after it, which rounds nothing.
T5's `wo`, in which it overflows, transformers loads as float32; with the rest of the above it needs no clamping.

Nothing here is autocast: the same casts happen on a CPU, where they are tested.
"""

from typing import Any

import torch
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from torch import Tensor, nn

# A row whose largest input is beyond this is made smaller.  The sum of 9216 products of 256 with weights of 0.02 is
# 47,000.
LARGEST_INPUT = 256.0


def shrunk(x: Tensor) -> tuple[Tensor, Tensor]:
    """(x / f, f) with f [..., 1] the power of two that brings a row's largest value to LARGEST_INPUT, at least 1."""
    top = x.detach().abs().amax(dim=-1, keepdim=True).float()
    # inf and nan stay as they are: they are to be found, not hidden.
    factor = torch.exp2(torch.ceil(torch.log2((top / LARGEST_INPUT).clamp(min=1.0))))
    factor = torch.where(torch.isfinite(factor), factor, torch.ones_like(factor))
    return x / factor, factor


def compute_dtype(module: nn.Module, dtype: torch.dtype) -> torch.dtype:
    """What a linear layer multiplies in: bitsandbytes' int8 product takes float16, whatever the model's dtype."""
    if isinstance(module, Linear8bitLt):
        return torch.float16
    return dtype if isinstance(module, Linear4bit) else module.weight.dtype  # type: ignore[return-value]


def cast_linear(module: nn.Module, dtype: torch.dtype) -> None:
    """Makes a linear layer take any float dtype, multiply in its own, and give back what it was given."""

    def before(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, inner = args[0], compute_dtype(module, dtype)
        module.outer, module.factor = x.dtype, None
        if inner == torch.float16 and x.dtype != torch.float16:
            x, module.factor = shrunk(x)
        return (x.to(inner), *args[1:])

    def after(module: Any, args: Any, y: Tensor) -> Tensor:
        y = y.to(module.outer)
        return y if module.factor is None else y * module.factor.to(module.outer)

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)


def bias_like_stream(attention: Any) -> None:
    """T5's first attention gives its relative bias, which is added to scores, in the dtype of what it is given."""

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        module.outer = (args[0] if args else kwargs["hidden_states"]).dtype

    attention.register_forward_pre_hook(before, with_kwargs=True)
    attention.relative_attention_bias.register_forward_hook(lambda module, args, rows: rows.to(attention.outer))


def make_safe(model: Any, dtype: torch.dtype) -> None:
    """Prepares a loaded base, before peft wraps it, to compute in `dtype`.

    Norms are float32 in any case.  float16: as said at the head of this file.  bfloat16: linear layers take whatever
    comes (float32 behind a trained embedding) and give the same back.
    """
    for module in model.modules():
        kind = type(module).__name__
        if kind.endswith(("RMSNorm", "T5LayerNorm")):
            module.to(torch.float32)
        if kind.endswith("T5LayerNorm"):  # the others give back the dtype that they take
            module.register_forward_hook(lambda module, args, out: out.to(args[0].dtype))
        if kind.endswith("T5Attention") and module.has_relative_attention_bias:
            bias_like_stream(module)
        if isinstance(module, nn.Embedding) and dtype == torch.float16:
            module.register_forward_hook(lambda module, args, rows: rows.float())
        if isinstance(module, Linear4bit):
            # On CPUs with AVX512-BF16 the first evaluation would round the scales to bfloat16, for good.
            module.support_avx512bf16_for_cpu = False
        int8 = isinstance(module, Linear8bitLt)
        if isinstance(module, nn.Linear) and (int8 or dtype != torch.float32):
            cast_linear(module, dtype)


@torch.no_grad()
def first_not_finite(model: nn.Module, batches: list[dict[str, Tensor]]) -> str | None:
    """The name of the module that first gives out what is not finite where all it takes is; None if all is well."""
    found: list[str] = []
    names = {module: name for name, module in model.named_modules() if not any(module.children())}

    def look(module: nn.Module, args: Any, out: Any) -> None:
        tensors = [t for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, Tensor)]
        if not found and not all(bool(torch.isfinite(t).all()) for t in tensors if t.is_floating_point()):
            given = [float(t.abs().max()) for t in args if isinstance(t, Tensor) and t.is_floating_point()]
            found.append(f"{names[module]}" + (f" (its largest input is {max(given):.3g})" if given else ""))

    handles = [module.register_forward_hook(look) for module in names]
    try:
        for batch in batches:
            model(**batch)
            if found:
                return found[0]
    finally:
        for handle in handles:
            handle.remove()
    return None
