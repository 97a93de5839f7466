"""Llama 2 7b (chat) learns to answer Persian questions about a text: QLoRA with double quantisation, bfloat16 compute.

What: LoRA r 16 on all linear layers (39,976,960 parameters) over an NF4 base whose scales are quantised too: 4.127 bits
  a weight, 3.9 GB for the model.  The rest is llama2_persian_qa_lora.py's.
Data: SajjadAyoubi/persian_qa, columns `context`, `question`, `answers`; loss on the answer alone.
Hardware: one T4 (16 GB; it computes in float16 there), any larger GPU, a TPU v5e-8 or a single v5e chip.
Expect: as LoRA's, within what 4 bits lose; SQuAD v2's exact match and F1 before and after.
TPU: python -m jaxtune.train --config configs/llama2_persian_qa_qlora.py --workdir runs/persian_qa_qlora
GPU: python -m torch_gpu.train --config configs/llama2_persian_qa_qlora.py --workdir runs/persian_qa_qlora
CPU: python -m jaxtune.train --config configs/llama2_persian_qa_qlora.py --workdir runs/small_qa_qlora \
    --config.model.id=TinyLlama/TinyLlama-1.1B-Chat-v1.0 --config.train.global_batch_size=2 --config.train.steps=20
Scores of every question: python -m jaxtune.evaluate --workdir runs/persian_qa_qlora --metric squad_v2
"""

from jaxtune.config import get_default


def get_config():
    c = get_default()
    c.model.id = "meta-llama/Llama-2-7b-chat-hf"
    c.model.dtype = "bfloat16"
    c.model.quant = "nf4"
    c.model.double_quant = True

    c.peft.method = "lora"
    c.peft.r = 16
    c.peft.lora_alpha = 32.0
    c.peft.lora_dropout = 0.05
    c.peft.target_modules = "all-linear"

    c.data.train = c.data.eval = "SajjadAyoubi/persian_qa"
    c.data.format = "prompt_completion"
    c.data.prompt = "متن: {context}\n\nپرسش: {question}\n\nپاسخ را از متن بنویس. اگر در متن نیست، بنویس: بدون پاسخ"
    c.data.completion = "{answers}"
    c.data.no_answer = "بدون پاسخ"
    c.data.chat_template = "llama2"
    # Llama's vocabulary spells Persian letter by letter: a paragraph is about 800 tokens.
    c.data.max_length = 1536
    c.data.truncation = "drop"

    c.optim.name = "adamw8bit"
    c.optim.learning_rate = 2e-4
    c.optim.warmup_steps = 20
    c.train.epochs = 2
    c.train.global_batch_size = 16
    # One row at a time on each of two GPUs or eight TPU cores.
    c.train.gradient_accumulation_steps = 2
    c.train.eval_every = 250
    c.train.save_every = 250
    c.evaluate.samples = 64
    c.evaluate.metrics = ("squad_v2",)
    c.evaluate.max_new_tokens = 96
    c.export.language = "fa"
    return c
