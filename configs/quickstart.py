"""The quickstart: the embedded tiny Gemma 2 learns to answer in Persian.

What: LoRA on all linear layers of a 3.5 million parameter model that answers in English; the questions stay English.
Data: 1,526 generated chats beside the model, 176 held back.
Hardware: 2 CPU cores, two minutes.
Expect: exact match on the held-back questions 0 % before, about 70 % after.
Command: python -m jaxtune.train --config configs/quickstart.py
"""

from jaxtune.config import ASSETS, get_default


def get_config():
    c = get_default()
    c.model.id = str(ASSETS / "tiny_gemma")
    c.model.dtype = "float32"

    c.peft.r = 16
    c.peft.lora_alpha = 32.0
    c.peft.target_modules = "all-linear"

    c.data.train = str(ASSETS / "quickstart" / "train.jsonl")
    c.data.eval = str(ASSETS / "quickstart" / "eval.jsonl")
    c.data.max_length = 64

    c.optim.learning_rate = 2e-3
    c.optim.warmup_steps = 10
    c.train.epochs = 4
    c.train.global_batch_size = 16
    c.train.remat = "none"
    c.evaluate.samples = 176
    c.evaluate.max_new_tokens = 32
    return c
