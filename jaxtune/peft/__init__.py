"""The methods by name.  `full` and `partial` are not here: they train the base itself and have no adapter."""

from jaxtune.peft import (
    adalora,
    boft,
    ia3,
    ln_tuning,
    loha,
    lokr,
    lora,
    multitask_prompt_tuning,
    oft,
    p_tuning,
    prefix_tuning,
    prompt_tuning,
    randlora,
    vera,
)

METHODS = {
    "lora": lora,
    "prompt_tuning": prompt_tuning,
    "p_tuning": p_tuning,
    "prefix_tuning": prefix_tuning,
    "multitask_prompt_tuning": multitask_prompt_tuning,
    "adalora": adalora,
    "ia3": ia3,
    "loha": loha,
    "lokr": lokr,
    "ln_tuning": ln_tuning,
    "oft": oft,
    "boft": boft,
    "vera": vera,
    "randlora": randlora,
}
BY_PEFT_TYPE = {module.PEFT_TYPE: module for module in METHODS.values()}
