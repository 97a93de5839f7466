"""Adapter configs that others have published: each fits its base at full size, or is refused with the reason.

No weights: the layout of the base comes from its config.json, and the adapter's leaves from shapes alone.
"""

import json

import flax.linen as nn
import jax
import pytest

from jaxtune.errors import UserError
from jaxtune.hf.adapters import read_method
from jaxtune.hf.base import describe
from jaxtune.peft.method import Start, from_variables, is_trainable, to_variables
from jaxtune.tree import flatten

LLAMA_3B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
TINYLLAMA = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_key_value_heads": 4,
}

# What trains (values), worked out by hand from the methods' formulas, or why it is refused.
Q, V, MLP = (3072, 3072), (3072, 1024), ((3072, 8192),) * 3  # in and out of Llama 3.2 3B's


def lora(r, *linears):
    return 28 * r * sum(i + o for i, o in linears)


OUTCOMES = {
    "gemma-2-9b-bnb4-lora-r64": 42 * 64 * (2 * (3584 + 4096) + 2 * (3584 + 2048) + 3 * (3584 + 14336)),
    "gemma-2-9b-it-lora-r64": 42 * 64 * (2 * (3584 + 4096) + 2 * (3584 + 2048) + 3 * (3584 + 14336)),
    "gemma-7b-it-lora-r8": 28 * 8 * 3 * (3072 + 4096),  # names of another model too: fc_in, fc_out, out_proj
    "tinyllama-lora-r16-automapping": 22 * 16 * ((2048 + 2048) + (2048 + 256)),
    "adalora--llama-3.2-3B-rank32": lora(64, Q, V) + 28 * 2 * 64,
    "adaptionprompt--llama-3.2-3B-lr_0.0005": "peft_type='ADAPTION_PROMPT'",
    "adaptionprompt--llama-3.2-3B-lr_5e-3": "peft_type='ADAPTION_PROMPT'",
    "boft--llama-3.2-3B-default": 28 * (2 * 768 * 16 + 3072 + 1024),
    "ia3--llama-3.2-3B-all-attn-5k-lr0.005": 28 * (3072 + 1024 + 1024 + 3072 + 3072 + 3072 + 8192),
    "ia3--llama-3.2-3B-default": 28 * (1024 + 1024 + 8192),
    "ia3--llama-3.2-3B-lr_0.001": 28 * (1024 + 1024 + 8192),
    "ln_tuning--llama-3.2-3B-default": (2 * 28 + 1) * 3072,
    "loha--llama-3.2-3B-rank32": 2 * lora(32, Q, V),
    # 3072 is 4 * 768, 1024 is 4 * 256.
    "lokr--llama-3.2-3B-rank32-factor4-lr0.003": 28 * (2 * 4 * 4 + 32 * (768 + 768 + 768 + 256)),
    "lora--llama-3.2-3B-rank10-target-mlp": lora(10, *MLP),
    "lora--llama-3.2-3B-rank14-target-mlp-bdlora": "use_bdlora",
    "lora--llama-3.2-3B-rank32-dora": lora(32, Q, V) + 28 * (3072 + 1024),
    "lora--llama-3.2-3B-rank32-kasa": "kasa_config",
    "lora--llama-3.2-3B-rank32-lorafa": lora(32, Q, V),
    "lora--llama-3.2-3B-rank32-mica": lora(32, Q, V),
    "lora--llama-3.2-3B-rank32-riemannian": lora(32, Q, V),
    "lora--llama-3.2-3B-rank32": lora(32, Q, V),
    "lora--llama-3.2-3B-rank64-rslora": lora(64, Q, V),
    "lora--llama-3.2-3B-rank64": lora(64, Q, V),
    "oft--llama-3.2-3B-rank32": 28 * 2 * 32 * (96 * 95 // 2),
    "prefixtuning--llama-3.2-3B-lr_0.001": 200 * 28 * 2 * 1024,
    "prefixtuning--llama-3.2-3B-lr_0.005_zero_init": 200 * 28 * 2 * 1024,
    "prefixtuning--llama-3.2-3B-tokens50-init_prefix-lr_0.005": 50 * 28 * 2 * 1024,
    "prompt_tuning--llama-3.2-3B-default": 200 * 3072,
    "prompt_tuning--llama-3.2-3B-lr_0.001": 200 * 3072,
    "prompt_tuning--llama-3.2-3B-sample_vocab-lr_0.001": 200 * 3072,
    # An embedding and three layers with biases, all of width 3072.
    "ptuning--llama-3.2-3B-default": 20 * 3072 + 3 * (3072 * 3072 + 3072),
    "trainable_tokens--llama-3.2-3B-sos+eos": "LoRA trains such rows too",
    "vera--llama-3.2-3B-default": 28 * (2 * 256 + 3072 + 1024),
}


@pytest.fixture(scope="module")
def bases(shared):
    """file's name -> the base it is for."""
    configs = {
        "llama": LLAMA_3B,
        "tinyllama": TINYLLAMA,
        "gemma-2-9b": json.loads((shared / "configs" / "gemma2-9b.config.json").read_text()),
        "gemma-7b": {"model_type": "gemma"},
    }
    made = {name: describe(name, shared, config, dtype="bfloat16") for name, config in configs.items()}
    return lambda name: made[next((n for n in ("tinyllama", "gemma-2-9b", "gemma-7b") if n in name), "llama")]


def test_every_published_file_is_here(shared):
    files = (shared / "adapters").rglob("*.adapter_config.json")
    assert {path.name.removesuffix(".adapter_config.json") for path in files} == OUTCOMES.keys()


@pytest.mark.parametrize("name", list(OUTCOMES))
def test_published_config(shared, bases, name):
    (path,) = (shared / "adapters").rglob(f"{name}.adapter_config.json")
    base, expected = bases(name), OUTCOMES[name]
    if isinstance(expected, str):
        with pytest.raises(UserError) as refused:
            read_method(path, base.layout)
        assert expected in str(refused.value) and len(str(refused.value).splitlines()) <= 2
        return
    method, config, _ = read_method(path, base.layout)
    params = flatten(nn.unbox(base.abstract))
    adapters = jax.eval_shape(
        lambda key, params: method.init(key, base.layout, config, Start(params, lambda text: [1])),
        jax.random.key(0),
        params,
    )
    variables = nn.unbox(to_variables(adapters))
    assert from_variables(variables).keys() == adapters.keys()
    leaves = flatten(variables["adapters"])
    assert sum(leaf.size for path, leaf in leaves.items() if is_trainable(path)) == expected
