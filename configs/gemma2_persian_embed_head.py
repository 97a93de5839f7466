"""Gemma 2 2b (instruction-tuned) learns Persian chat by its embeddings and output head alone, on 20 % of the data.

What: one [256000, 2304] matrix, which Gemma 2 uses for both: 589,824,000 parameters train, the layers do not.
Data: the first 7,282 rows, 20 % of the 36,412 that fit, of miladmim/slim-orca-dedup-chat-50k-persian, column `messages`
  (system, user, assistant), rendered as ChatML; loss on the assistant's turns alone.
Hardware: a TPU v5e-8, its 16 GB a chip shared by weights, gradient and optimiser; the tiny model on a laptop.  Not on
  GPUs: torch_gpu trains adapters.
Expect: more memory than QLoRA and a higher loss (configs/gemma2_persian.md).  The result is a whole checkpoint
  (`model/`), or with `--config.export.format=adapter` a PEFT directory of `modules_to_save`.
TPU: python -m jaxtune.train --config configs/gemma2_persian_embed_head.py --workdir runs/persian_embed_head
CPU: python -m jaxtune.train --config configs/gemma2_persian_embed_head.py --workdir runs/tiny_embed_head \
    --config.model.id=jaxtune/assets/tiny_gemma --config.model.dtype=float32 \
    --config.data.train=train.jsonl --config.data.eval=eval.jsonl --config.train.steps=50
"""

from jaxtune.config import get_default


def get_config():
    c = get_default()
    c.model.id = "google/gemma-2-2b-it"

    c.peft.method = "partial"
    c.peft.target_modules = ("embed_tokens", "lm_head")

    c.data.train = c.data.eval = "miladmim/slim-orca-dedup-chat-50k-persian"
    c.data.train_split, c.data.eval_split = "train[:95%]", "train[95%:]"
    c.data.chat_template = "chatml"
    c.data.max_length = 512
    c.data.truncation = "drop"
    c.data.max_train_rows = 7_282
    c.data.max_eval_rows = 500

    c.optim.name = "adafactor"
    c.optim.learning_rate = 1e-4
    c.optim.warmup_steps = 50
    c.train.epochs = 1
    c.train.global_batch_size = 16
    c.train.eval_every = 200
    c.train.save_every = 200
    c.evaluate.samples = 32
    c.evaluate.metrics = ("chrf", "rouge")
    c.evaluate.max_new_tokens = 128
    c.export.language = "fa"
    return c
