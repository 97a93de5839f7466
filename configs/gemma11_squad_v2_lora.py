"""Gemma 1.1 2b (instruction-tuned) learns to answer from a text, and to say that it cannot: LoRA, checkpoints by score.

What: r 4, alpha 8 on all linear layers, 4,902,912 parameters, learning rate 6e-5.
Data: rajpurkar/squad_v2, columns `context`, `question`, `answers` ({"text": […], "answer_start": […]}), half of them
  empty and learnt as "unanswerable"; loss on the answer alone.
Hardware: a TPU v5e-8 or one of its chips; one GPU of 16 GB; the tiny model on a laptop.
Expect: SQuAD v2's exact match and F1 over 200 questions before and after; the checkpoint with the best F1 is kept.
TPU: python -m jaxtune.train --config configs/gemma11_squad_v2_lora.py --workdir runs/squad
GPU: python -m torch_gpu.train --config configs/gemma11_squad_v2_lora.py --workdir runs/squad
CPU: python -m jaxtune.train --config configs/gemma11_squad_v2_lora.py --workdir runs/tiny_squad \
    --config.model.id=jaxtune/assets/tiny_gemma --config.model.dtype=float32 \
    --config.data.train=train.jsonl --config.data.eval=eval.jsonl --config.train.steps=100 \
    --config.optim.warmup_steps=10
All questions, with the official script's numbers: python -m jaxtune.evaluate --workdir runs/squad --metric squad_v2
The experiment itself had max_length 32, in which few of these texts fit: --config.data.max_length=32
What it varied is listed in gemma11_sst2_lora.py.
"""

from jaxtune.config import get_default


def get_config():
    c = get_default()
    c.model.id = "google/gemma-1.1-2b-it"

    c.peft.method = "lora"
    c.peft.r = 4
    c.peft.lora_alpha = 8.0
    c.peft.target_modules = "all-linear"

    c.data.train = c.data.eval = "rajpurkar/squad_v2"
    c.data.format = "prompt_completion"
    c.data.prompt = "{context}\n\nQuestion: {question}\nAnswer:"
    c.data.completion = " {answers}"
    c.data.no_answer = "unanswerable"
    c.data.max_length = 384
    c.data.truncation = "left"
    c.data.max_eval_rows = 2000

    c.optim.learning_rate = 6e-5
    c.optim.warmup_steps = 100
    c.train.epochs = 2
    c.train.global_batch_size = 32
    c.train.save_unit = c.train.eval_unit = "epoch"
    c.train.save_every = c.train.eval_every = 1
    c.evaluate.samples = 200
    c.evaluate.max_new_tokens = 24
    c.evaluate.metrics = ("squad_v2",)

    c.checkpoint.keep_last_n = 2
    c.checkpoint.keep_best_n = 1
    c.checkpoint.metric = "f1"
    c.wandb.tags = ("gemma-1.1", "squad_v2", "lora")
    return c
