"""The methods by name.  `full` is not here: it trains the base itself and has no adapter."""

from jaxtune.peft import lora

METHODS = {"lora": lora}
BY_PEFT_TYPE = {module.PEFT_TYPE: module for module in METHODS.values()}
