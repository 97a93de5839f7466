"""Gemma 2 2b (instruction-tuned) learns Persian chat by P-tuning: 20 virtual tokens before every conversation.

What: an MLP of width 128 makes 20 embeddings, 654,848 parameters of 2.6 billion; the model itself stays as it is.
Data: miladmim/slim-orca-dedup-chat-50k-persian, column `messages` (system, user, assistant), rendered as ChatML; loss
  on the assistant's turns alone.  5 % of the rows are held back.
Hardware: a TPU v5e-8; one GPU of 16 GB; the tiny model on a laptop.
Expect: the least of the three in parameters and in what it learns (configs/gemma2_persian.md).
TPU: python -m jaxtune.train --config configs/gemma2_persian_p_tuning.py --workdir runs/persian_p_tuning
GPU: python -m torch_gpu.train --config configs/gemma2_persian_p_tuning.py --workdir runs/persian_p_tuning
CPU: python -m jaxtune.train --config configs/gemma2_persian_p_tuning.py --workdir runs/tiny_p_tuning \
    --config.model.id=jaxtune/assets/tiny_gemma --config.model.dtype=float32 \
    --config.data.train=train.jsonl --config.data.eval=eval.jsonl --config.train.steps=50
"""

from jaxtune.config import get_default


def get_config():
    c = get_default()
    c.model.id = "google/gemma-2-2b-it"

    c.peft.method = "p_tuning"
    c.peft.num_virtual_tokens = 20
    c.peft.encoder_hidden_size = 128

    c.data.train = c.data.eval = "miladmim/slim-orca-dedup-chat-50k-persian"
    c.data.train_split, c.data.eval_split = "train[:95%]", "train[95%:]"
    c.data.chat_template = "chatml"
    c.data.max_length = 512
    c.data.truncation = "drop"
    c.data.max_eval_rows = 500

    c.optim.warmup_steps = 50
    c.train.epochs = 1
    c.train.global_batch_size = 16
    c.train.eval_every = 500
    c.train.save_every = 250
    c.evaluate.samples = 32
    c.evaluate.metrics = ("chrf", "rouge")
    c.evaluate.max_new_tokens = 128
    c.export.language = "fa"
    return c
