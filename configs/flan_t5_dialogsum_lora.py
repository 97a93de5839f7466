"""Flan-T5 base learns to summarise dialogues: LoRA on the q and v of every attention.

What: r 32, alpha 32, dropout 0.05; 3,538,944 parameters of 251 million, in encoder, decoder and cross-attention.
Data: knkarthick/dialogsum, columns `dialogue`, `summary`; up to 512 tokens go to the encoder, up to 128 are learnt.
Hardware: a TPU v5e-8 or one of its chips; one T4; a CPU in hours.
Expect: ROUGE of 64 summaries before and after on the screen.  Flan-T5 has seen dialogue summaries before, so that it
  starts far above zero; what changes first is the style ("#Person1# …").
TPU: python -m jaxtune.train --config configs/flan_t5_dialogsum_lora.py --workdir runs/dialogsum
GPU: python -m torch_gpu.train --config configs/flan_t5_dialogsum_lora.py --workdir runs/dialogsum
CPU: python -m jaxtune.train --config configs/flan_t5_dialogsum_lora.py --workdir runs/dialogsum_small \
    --config.model.id=google/flan-t5-small --config.model.dtype=float32 --config.train.steps=100
ROUGE on the test set, three references a dialogue:
  python -m jaxtune.evaluate --compare base,runs/dialogsum --split test --metric rouge
"""

from jaxtune.config import get_default


def get_config():
    c = get_default()
    c.model.id = "google/flan-t5-base"

    c.peft.method = "lora"
    c.peft.r = 32
    c.peft.lora_alpha = 32.0
    c.peft.lora_dropout = 0.05
    c.peft.target_modules = ("q", "v")

    c.data.train = c.data.eval = "knkarthick/dialogsum"
    c.data.format = "prompt_completion"
    c.data.prompt = "Summarize the following conversation.\n\n{dialogue}\n\nSummary: "
    c.data.completion = "{summary}"
    c.data.max_length = 512
    c.data.max_target_length = 128

    c.optim.learning_rate = 1e-3
    c.optim.warmup_steps = 50
    c.train.epochs = 3
    c.train.global_batch_size = 32
    c.train.eval_every = 200
    c.train.save_every = 200
    c.evaluate.samples = 64
    c.evaluate.metrics = ("rouge",)
    c.evaluate.max_new_tokens = 128
    return c
