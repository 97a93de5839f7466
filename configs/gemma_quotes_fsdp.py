"""Gemma 7b learns quotations with their authors, split over all chips: LoRA, FSDP, Adafactor, global batch 64.

What: r 8 on the keys and values of every layer, 3,211,264 parameters; weights, adapters and optimiser lie in parts on
  all chips of the axis `fsdp`; every layer is computed again in the backward pass (remat).
Data: Abirate/english_quotes, columns `quote`, `author`; loss on the whole text `Quote: …\\nAuthor: …`.
Hardware: a TPU v5e-8 (or any slice: `mesh.fsdp` takes what is there); eight fake devices on a laptop with the tiny
  model.  Not on GPUs: torch_gpu holds the whole model on each card.
Expect: as gemma_quotes_lora.py; the batch is 64 rows whatever the number of chips that divides it.
TPU: python -m jaxtune.train --config configs/gemma_quotes_fsdp.py --workdir runs/quotes_fsdp
CPU: XLA_FLAGS=--xla_force_host_platform_device_count=8 \
    python -m jaxtune.train --config configs/gemma_quotes_fsdp.py --workdir runs/tiny_quotes_fsdp \
    --config.model.id=jaxtune/assets/tiny_gemma --config.model.dtype=float32 \
    --config.data.train=train.jsonl --config.data.eval=eval.jsonl --config.train.steps=20
"""

from jaxtune.config import get_default


def get_config():
    c = get_default()
    c.model.id = "google/gemma-7b"

    c.peft.method = "lora"
    c.peft.r = 8
    c.peft.lora_alpha = 16.0
    c.peft.target_modules = ("k_proj", "v_proj")

    c.data.train = c.data.eval = "Abirate/english_quotes"
    c.data.train_split, c.data.eval_split = "train[:95%]", "train[95%:]"
    c.data.format = "text"
    c.data.text = "Quote: {quote}\nAuthor: {author}"
    c.data.max_length = 256

    c.optim.name = "adafactor"
    c.optim.learning_rate = 1e-3
    c.optim.warmup_steps = 10
    c.train.epochs = 10
    c.train.global_batch_size = 64
    c.train.remat = "full"
    c.train.eval_every = 100
    c.train.save_every = 100
    c.mesh.data = 1
    c.mesh.fsdp = -1
    return c
