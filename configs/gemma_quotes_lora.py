"""Gemma 2b learns quotations with their authors: LoRA, from plain text.

What: r 8 on all linear layers, 9,805,824 parameters; loss on the whole text `Quote: …\\nAuthor: …`.
Data: Abirate/english_quotes, columns `quote`, `author`.
Hardware: a TPU v5e-8 or one of its chips; one GPU of 16 GB; the tiny model on a laptop.
Expect: after some hundred steps a quotation that it has read is continued with its author:
    jaxtune.load("google/gemma-2b", adapter="runs/quotes/adapter").generate(["Quote: Imagination is more"])
TPU: python -m jaxtune.train --config configs/gemma_quotes_lora.py --workdir runs/quotes
GPU: python -m torch_gpu.train --config configs/gemma_quotes_lora.py --workdir runs/quotes
CPU: python -m jaxtune.train --config configs/gemma_quotes_lora.py --workdir runs/tiny_quotes \
    --config.model.id=jaxtune/assets/tiny_gemma --config.model.dtype=float32 \
    --config.data.train=train.jsonl --config.data.eval=eval.jsonl --config.train.steps=50
"""

from jaxtune.config import get_default


def get_config():
    c = get_default()
    c.model.id = "google/gemma-2b"

    c.peft.method = "lora"
    c.peft.r = 8
    c.peft.lora_alpha = 16.0
    c.peft.target_modules = ("q_proj", "o_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")

    c.data.train = c.data.eval = "Abirate/english_quotes"
    c.data.train_split, c.data.eval_split = "train[:95%]", "train[95%:]"
    c.data.format = "text"
    c.data.text = "Quote: {quote}\nAuthor: {author}"
    c.data.max_length = 256

    c.optim.learning_rate = 2e-4
    c.optim.warmup_steps = 10
    c.train.epochs = 3
    c.train.global_batch_size = 8
    c.train.eval_every = 100
    c.train.save_every = 100
    return c
