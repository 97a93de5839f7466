"""Gemma 2 2b (instruction-tuned) learns Persian chat by QLoRA: LoRA on seven projections over an NF4 base.

What: r 8, alpha 16, dropout 0.01; NF4 without double quantisation; 10,383,360 parameters train.
Data: miladmim/slim-orca-dedup-chat-50k-persian, column `messages` (system, user, assistant), rendered as ChatML; loss
  on the assistant's turns alone.  5 % of the rows are held back.
Hardware: one T4 (16 GB); two of them with torchrun; a TPU v5e-8; the tiny model on a laptop.
Expect: the lowest loss of the three for its memory (configs/gemma2_persian.md).
TPU: python -m jaxtune.train --config configs/gemma2_persian_qlora.py --workdir runs/persian_qlora
GPU: python -m torch_gpu.train --config configs/gemma2_persian_qlora.py --workdir runs/persian_qlora
CPU: python -m jaxtune.train --config configs/gemma2_persian_qlora.py --workdir runs/tiny_qlora \
    --config.model.id=jaxtune/assets/tiny_gemma --config.model.dtype=float32 \
    --config.data.train=train.jsonl --config.data.eval=eval.jsonl --config.train.steps=50
"""

from jaxtune.config import get_default


def get_config():
    c = get_default()
    c.model.id = "google/gemma-2-2b-it"
    c.model.quant = "nf4"

    c.peft.method = "lora"
    c.peft.r = 8
    c.peft.lora_alpha = 16.0
    c.peft.lora_dropout = 0.01
    c.peft.target_modules = ("q_proj", "o_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")

    c.data.train = c.data.eval = "miladmim/slim-orca-dedup-chat-50k-persian"
    c.data.train_split, c.data.eval_split = "train[:95%]", "train[95%:]"
    c.data.chat_template = "chatml"
    c.data.max_length = 512
    c.data.truncation = "drop"
    c.data.max_eval_rows = 500

    c.optim.name = "adamw8bit"
    c.optim.learning_rate = 2e-4
    c.optim.warmup_steps = 50
    c.train.epochs = 1
    c.train.global_batch_size = 16
    # Two rows at a time on each of eight TPU cores; `=4` or more where a GPU runs out of memory.
    c.train.gradient_accumulation_steps = 1
    c.train.eval_every = 500
    c.train.save_every = 250
    c.evaluate.samples = 32
    c.evaluate.metrics = ("chrf", "rouge")
    c.evaluate.max_new_tokens = 128
    c.export.language = "fa"
    return c
