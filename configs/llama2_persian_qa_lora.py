"""Llama 2 7b (chat) learns to answer Persian questions about a text, and to say when the text has no answer: LoRA.

What: LoRA r 16 on all linear layers, 39,976,960 parameters; `[INST] … [/INST]` around text and question.
Data: SajjadAyoubi/persian_qa, columns `context`, `question`, `answers` ({"text": […], "answer_start": […]}), of which
  about 30 % are empty; loss on the answer alone.
Hardware: a TPU v5e-8; one GPU of 24 GB (of 16 GB: llama2_persian_qa_qlora.py).
Expect: SQuAD v2's exact match and F1 before and after, over the answers to 64 questions that are held back.
TPU: python -m jaxtune.train --config configs/llama2_persian_qa_lora.py --workdir runs/persian_qa
GPU: python -m torch_gpu.train --config configs/llama2_persian_qa_lora.py --workdir runs/persian_qa
CPU: python -m jaxtune.train --config configs/llama2_persian_qa_lora.py --workdir runs/small_qa \
    --config.model.id=TinyLlama/TinyLlama-1.1B-Chat-v1.0 --config.train.global_batch_size=2 --config.train.steps=20
Scores of every question: python -m jaxtune.evaluate --workdir runs/persian_qa --metric squad_v2
"""

from jaxtune.config import get_default


def get_config():
    c = get_default()
    c.model.id = "meta-llama/Llama-2-7b-chat-hf"

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

    c.optim.learning_rate = 2e-4
    c.optim.warmup_steps = 20
    c.train.epochs = 2
    c.train.global_batch_size = 16
    c.train.eval_every = 250
    c.train.save_every = 250
    c.evaluate.samples = 64
    c.evaluate.metrics = ("squad_v2",)
    c.evaluate.max_new_tokens = 96
    c.export.language = "fa"
    return c
