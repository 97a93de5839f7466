"""Gemma 2 2b (instruction-tuned) learns a chat dataset with QLoRA: NF4 linear layers, LoRA on all of them.

What: rows of {"messages": [{"role": "user", ...}, {"role": "assistant", ...}]}; loss on the assistant's turns alone.
Data: Persian chats translated from SlimOrca by default; any file or Hub id with `--config.data.train=...`.
Hardware: one T4 (16 GB), two of them, or any larger GPU; a TPU; the tiny model runs on a laptop.
Command: python -m torch_gpu.train --config configs/gemma2_qlora.py --workdir runs/gemma2_qlora
Two GPUs: torchrun --nproc_per_node=2 -m torch_gpu.train --config configs/gemma2_qlora.py --workdir runs/gemma2_qlora
A TPU: python -m jaxtune.train --config configs/gemma2_qlora.py --workdir runs/gemma2_qlora
A file of your own: add --config.data.train=train.jsonl --config.data.eval=eval.jsonl
Without either: add --config.model.id=jaxtune/assets/tiny_gemma --config.model.dtype=float32
"""

from jaxtune.config import get_default


def get_config():
    c = get_default()
    c.model.id = "google/gemma-2-2b-it"
    # On a T4, which has no bfloat16, torch_gpu computes products in float16 and the rest in float32.
    c.model.dtype = "bfloat16"
    c.model.quant = "nf4"

    c.peft.method = "lora"
    c.peft.r = 8
    c.peft.lora_alpha = 16.0
    c.peft.lora_dropout = 0.01
    c.peft.target_modules = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

    c.data.train = "miladmim/slim-orca-dedup-chat-50k-persian"
    c.data.max_length = 1024

    c.optim.name = "adamw8bit"
    c.optim.learning_rate = 2e-4
    c.optim.warmup_steps = 20
    c.train.epochs = 1
    # Eight rows at a time over all GPUs, or one on each of eight TPU cores.
    c.train.global_batch_size = 16
    c.train.gradient_accumulation_steps = 2
    c.train.save_every = 200
    return c
