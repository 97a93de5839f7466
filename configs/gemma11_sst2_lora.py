"""Gemma 1.1 2b (instruction-tuned) learns to tell negative from positive sentences: LoRA, with checkpoints by score.

What: r 4, alpha 8 on all linear layers, 4,902,912 parameters, learning rate 6e-5, at most 32 tokens a row.
Data: stanfordnlp/sst2, columns `sentence`, `label` (0 negative, 1 positive); loss on the label's word alone.
Hardware: a TPU v5e-8 or one of its chips; one GPU of 16 GB; the tiny model on a laptop.
Expect: accuracy over 200 sentences before and after; the checkpoint with the best one is kept beside the newest two.
TPU: python -m jaxtune.train --config configs/gemma11_sst2_lora.py --workdir runs/sst2
GPU: python -m torch_gpu.train --config configs/gemma11_sst2_lora.py --workdir runs/sst2
CPU: python -m jaxtune.train --config configs/gemma11_sst2_lora.py --workdir runs/tiny_sst2 \
    --config.model.id=jaxtune/assets/tiny_gemma --config.model.dtype=float32 \
    --config.data.train=train.jsonl --config.data.eval=eval.jsonl --config.train.steps=100 \
    --config.optim.warmup_steps=10
All sentences, by generation and by the labels' probabilities:
  python -m jaxtune.evaluate --workdir runs/sst2 --metric accuracy --labels negative,positive
What the experiment varied is one flag each:
  --config.train.save_unit=step --config.train.save_every=500     --config.checkpoint.keep_last_n=3
  --config.checkpoint.metric=eval_loss --config.checkpoint.mode=min   --config.checkpoint.resume=best
  --config.checkpoint.save_optim=False                            --config.train.deterministic=True
  --config.wandb.project=sst2 --config.wandb.run_name=lora --config.wandb.every=10
  --config.storage.sync_to=gs://bucket/sst2
"""

from jaxtune.config import get_default


def get_config():
    c = get_default()
    c.model.id = "google/gemma-1.1-2b-it"

    c.peft.method = "lora"
    c.peft.r = 4
    c.peft.lora_alpha = 8.0
    c.peft.target_modules = "all-linear"

    c.data.train = c.data.eval = "stanfordnlp/sst2"
    c.data.format = "prompt_completion"
    c.data.prompt = "{sentence}\nSentiment:"
    c.data.completion = " {label}"
    c.data.label_names = ("negative", "positive")
    c.data.max_length = 32
    c.data.truncation = "left"  # a long sentence loses its beginning, not its label

    c.optim.learning_rate = 6e-5
    c.optim.warmup_steps = 100
    c.train.epochs = 3
    c.train.global_batch_size = 32
    c.train.save_unit = c.train.eval_unit = "epoch"
    c.train.save_every = c.train.eval_every = 1
    c.evaluate.samples = 200
    c.evaluate.max_new_tokens = 4
    c.evaluate.metrics = ("accuracy",)

    c.checkpoint.keep_last_n = 2
    c.checkpoint.keep_best_n = 1
    c.checkpoint.metric = "accuracy"
    c.wandb.tags = ("gemma-1.1", "sst2", "lora")
    return c
