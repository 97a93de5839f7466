"""Gemma 2 2b (instruction-tuned) learns a chat dataset with LoRA on all linear layers: where to start with your own.

What: r 8, alpha 16, 10,383,360 parameters; loss on the assistant's turns alone.
Data: miladmim/slim-orca-dedup-chat-50k-persian, column `messages` ({"role", "content"} turns), by the model's own chat
  template; any file or Hub id with `--config.data.train=...`.
Hardware: a TPU v5e-8 (or any mesh: weights are split over all devices); one GPU of 16 GB; the tiny model on a laptop.
Expect: the loss of Persian answers falls from the first steps on; configs/gemma2_persian.md compares ways to go on.
TPU: python -m jaxtune.train --config configs/gemma_lora.py --workdir runs/gemma_lora
GPU: python -m torch_gpu.train --config configs/gemma_lora.py --workdir runs/gemma_lora
CPU: python -m jaxtune.train --config configs/gemma_lora.py --workdir runs/tiny_lora \
    --config.model.id=jaxtune/assets/tiny_gemma --config.model.dtype=float32 \
    --config.data.train=train.jsonl --config.data.eval=eval.jsonl --config.train.steps=50
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
