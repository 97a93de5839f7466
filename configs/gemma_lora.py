"""Gemma 2 2b (instruction-tuned) learns a chat dataset with LoRA on all linear layers.

What: rows of {"messages": [{"role": "user", ...}, {"role": "assistant", ...}]}; loss on the assistant's turns alone.
Data: Persian chats translated from SlimOrca by default; any file or Hub id with `--config.data.train=...`.
Hardware: one TPU v5e-8 (or any mesh: weights are split over all devices); the tiny model runs on a laptop.
Command: python -m jaxtune.train --config configs/gemma_lora.py --workdir runs/gemma_lora
A file of your own: add --config.data.train=train.jsonl --config.data.eval=eval.jsonl
Without a TPU: add --config.model.id=jaxtune/assets/tiny_gemma --config.model.dtype=float32
"""

from jaxtune.config import get_default


def get_config():
    c = get_default()
    c.model.id = "google/gemma-2-2b-it"

    c.peft.method = "lora"
    c.peft.r = 8
    c.peft.lora_alpha = 16.0
    c.peft.lora_dropout = 0.05
    c.peft.target_modules = "all-linear"

    c.data.train = "miladmim/slim-orca-dedup-chat-50k-persian"
    c.data.max_length = 1024

    c.optim.learning_rate = 2e-4
    c.optim.warmup_steps = 20
    c.train.epochs = 1
    c.train.global_batch_size = 16
    c.train.save_every = 200
    return c
