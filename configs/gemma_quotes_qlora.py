"""Gemma 2b learns quotations with their authors: QLoRA, from plain text.

What: r 8 on all linear layers (9,805,824 parameters) over an NF4 base; loss on the whole text `Quote: …\\nAuthor: …`.
Data: Abirate/english_quotes, columns `quote`, `author`.
Hardware: one T4 or smaller; a single TPU chip; the tiny model on a laptop.
Expect: as gemma_quotes_lora.py, in a third of the memory.
TPU: python -m jaxtune.train --config configs/gemma_quotes_qlora.py --workdir runs/quotes_qlora
GPU: python -m torch_gpu.train --config configs/gemma_quotes_qlora.py --workdir runs/quotes_qlora
CPU: python -m jaxtune.train --config configs/gemma_quotes_qlora.py --workdir runs/tiny_quotes_qlora \
    --config.model.id=jaxtune/assets/tiny_gemma --config.model.dtype=float32 \
    --config.data.train=train.jsonl --config.data.eval=eval.jsonl --config.train.steps=50
"""

from jaxtune.config import get_default


def get_config():
    c = get_default()
    c.model.id = "google/gemma-2b"
    c.model.quant = "nf4"

    c.peft.method = "lora"
    c.peft.r = 8
    c.peft.lora_alpha = 16.0
    c.peft.target_modules = ("q_proj", "o_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")

    c.data.train = c.data.eval = "Abirate/english_quotes"
    c.data.train_split, c.data.eval_split = "train[:95%]", "train[95%:]"
    c.data.format = "text"
    c.data.text = "Quote: {quote}\nAuthor: {author}"
    c.data.max_length = 256

    c.optim.name = "adamw8bit"
    c.optim.learning_rate = 2e-4
    c.optim.warmup_steps = 10
    c.train.epochs = 3
    c.train.global_batch_size = 8
    c.train.gradient_accumulation_steps = 2
    c.train.eval_every = 100
    c.train.save_every = 100
    return c
