"""Every method over Llama, Mistral and Qwen 3, beside the installed peft: its files here, ours there, merging."""

import numpy as np
import peft
import pytest
import reference
import torch
import transformers
from safetensors.numpy import load_file

import jaxtune
from jaxtune.hf.adapters import save_adapter
from jaxtune.hf.base import open_base
from jaxtune.peft import METHODS

# peft's own, about sizes, heads and embeddings
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")

CONFIGS = {
    "lora": peft.LoraConfig,
    "adalora": peft.AdaLoraConfig,
    "ia3": peft.IA3Config,
    "loha": peft.LoHaConfig,
    "lokr": peft.LoKrConfig,
    "ln_tuning": peft.LNTuningConfig,
    "oft": peft.OFTConfig,
    "boft": peft.BOFTConfig,
    "vera": peft.VeraConfig,
    "randlora": peft.RandLoraConfig,
    "prompt_tuning": peft.PromptTuningConfig,
    "p_tuning": peft.PromptEncoderConfig,
    "prefix_tuning": peft.PrefixTuningConfig,
    "multitask_prompt_tuning": peft.MultitaskPromptTuningConfig,
}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WITH_TOKENS = ("prompt_tuning", "p_tuning", "prefix_tuning", "multitask_prompt_tuning")
TOKENS = {"num_virtual_tokens": 6}

# case: (model, peft's keys); the method is what stands before the first dot.  llama: one kv head, an untied head.
CASES = {
    "lora.embedding_and_head": ("llama", {"r": 2, "target_modules": ["embed_tokens", "lm_head", "k_proj"]}),
    "lora.saved": ("llama", {"r": 2, "modules_to_save": ["embed_tokens", "lm_head", "norm"]}),
    "lora.token_rows": ("llama", {"r": 2, "trainable_token_indices": [3, 50, 89]}),
    "lora.token_rows_of_tied": ("llama_tied", {"r": 2, "trainable_token_indices": [3, 50, 89]}),
    "lora.head_of_tied": ("llama_tied", {"r": 2, "target_modules": ["lm_head", "v_proj"]}),
    "lora.idle_names": ("llama", {"r": 2, "target_modules": ["q_proj", "fc_in", "out_proj"]}),
    "lora.mica": ("llama", {"r": 2, "init_lora_weights": "mica"}),
    "lora.dora": (
        "qwen3",
        {"r": 3, "use_dora": True, "target_modules": LINEARS, "modules_to_save": ["q_norm", "k_norm"]},
    ),
    "adalora.all": ("llama", {"init_r": 6, "target_r": 4, "total_step": 10, "target_modules": LINEARS}),
    "ia3.default": ("llama", {}),
    "loha.default": ("llama", {"r": 3}),
    "lokr.all": ("qwen3", {"r": 3, "alpha": 5, "target_modules": "all-linear"}),
    "ln_tuning.default": ("llama", {}),
    "ln_tuning.heads": ("qwen3", {"target_modules": r".*layers\.[02]\.self_attn\.[qk]_norm"}),
    "oft.default": ("llama", {}),
    "boft.default": ("mistral", {}),
    "vera.all": ("llama", {"r": 5, "target_modules": "all-linear"}),
    "randlora.default": ("llama", {"r": 7}),
    "prompt_tuning.default": ("llama", TOKENS),
    "p_tuning.mlp": ("llama_tied", TOKENS | {"encoder_hidden_size": 11}),
    "prefix_tuning.one_head": ("llama", TOKENS),
    "prefix_tuning.window": ("mistral", TOKENS),
    "prefix_tuning.head_norms": ("qwen3_windows", TOKENS),
    "multitask_prompt_tuning.default": ("llama", TOKENS | {"num_tasks": 3}),
}
TASKS = [2, 0, 1]
# Where little depends on the family: tested on Gemma in every run, and here with the slow tests.
SLOW = (
    "lora.mica",
    "lora.head_of_tied",
    "adalora.all",
    "loha.default",
    "lokr.all",
    "ln_tuning.heads",
    "oft.default",
    "boft.default",
    "vera.all",
    "randlora.default",
    "p_tuning.mlp",
    "prefix_tuning.head_norms",
    "multitask_prompt_tuning.default",
)
# Cases to merge too: (whether the merged model is tied, whether peft's own merge_and_unload is right).
MERGED = {
    "lora.embedding_and_head": (False, True),
    "lora.token_rows": (False, True),
    "lora.head_of_tied": (False, False),
    "ia3.default": (False, True),
    "ln_tuning.default": (False, True),
}


def logits(case, model, ids, mask):
    """peft's logits of the rows' own tokens, each row by itself where there are virtual ones; 0 where padding."""
    if case.split(".")[0] not in WITH_TOKENS:
        return reference.logits(model, ids, mask) * mask[..., None]
    out = np.zeros((*ids.shape, 97), np.float32)
    for i, row in enumerate(ids):
        task = {"task_ids": torch.tensor([TASKS[i]])} if case.startswith("multitask") else {}
        real = row[mask[i] > 0]
        with torch.no_grad():
            out[i, mask[i] > 0] = model(input_ids=torch.tensor(real[None]), **task).logits[0, -len(real) :].numpy()
    return out


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] * (c in SLOW)) for c in CASES])
def test_files_equal_pefts(checkpoint, tmp_path, case):
    (name, keys), method = CASES[case], case.split(".")[0]
    _, directory = checkpoint(name)
    base = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    model = reference.adapt(base, CONFIGS[method](task_type="CAUSAL_LM", **keys), tmp_path / "theirs")
    ids, mask = reference.batch()
    ids[0, :3] = [3, 50, 89]  # tokens whose rows train
    expected = logits(case, model, ids, mask)
    assert np.abs(expected - reference.logits(checkpoint(name)[0], ids, mask) * mask[..., None]).max() > 1e-2

    lm = jaxtune.load(directory, adapter=tmp_path / "theirs")
    tasks = TASKS if method.startswith("multitask") else None
    reference.close(lm.logits(ids, mask, task_id=tasks) * mask[..., None], expected)

    # As `lm.save_adapter`, without its run of the model, which takes a while to compile.
    assert lm.peft is not None
    save_adapter(tmp_path / "ours", lm.variables, lm.base.layout, lm.peft, str(directory))
    ours, theirs = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("ours", "theirs"))
    # peft adds the base's own weight where an embedding is adapted; nobody needs it.
    theirs = {name: value for name, value in theirs.items() if "base_layer" not in name}
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        np.testing.assert_array_equal(ours[key], value, err_msg=key)
    reference.close(logits(case, reference.with_adapter(directory, tmp_path / "ours"), ids, mask), expected, 1e-6)

    if case in MERGED:
        tied, peft_is_right = MERGED[case]
        lm.save_merged(tmp_path / "merged")
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
        assert merged.config.tie_word_embeddings is tied
        reference.close(reference.logits(merged.eval(), ids, mask) * mask[..., None], expected)
        whole = model.merge_and_unload().state_dict() if peft_is_right else {}
        for key, value in whole.items():
            np.testing.assert_allclose(merged.state_dict()[key].numpy(), value.numpy(), atol=2e-6, err_msg=key)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
def test_default_targets_are_pefts(checkpoint, tmp_path, name):
    """What peft adapts where nothing is named, for this model type, is what jaxtune does; to the module."""
    _, directory = checkpoint(name)
    layout = open_base(str(directory)).layout
    odd = {"adalora": {"total_step": 10}, "boft": {"boft_block_size": 4}, "oft": {"oft_block_size": 4}}
    for method, config in CONFIGS.items():
        if method in WITH_TOKENS or (method, name) == ("adalora", "mistral"):  # for which peft has no default
            continue
        base = transformers.AutoModelForCausalLM.from_pretrained(directory)
        model = peft.get_peft_model(base, config(task_type="CAUSAL_LM", **odd.get(method, {})))
        plan = METHODS[method].plan(layout, METHODS[method].Config())
        chosen = {
            module
            for path, how in plan.items()
            for module, adapted in zip(layout.site(path).modules, getattr(how, "layers", how), strict=True)
            if adapted
        }
        assert chosen == set(model.targeted_module_names), method
        if method == "ia3":
            feedforward = {n for n, m in model.base_model.model.named_modules() if getattr(m, "is_feedforward", False)}
            ours = {m for path, how in plan.items() if how.feedforward for m in layout.site(path).modules}
            assert ours == feedforward
