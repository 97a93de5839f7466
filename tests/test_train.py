"""The training command end to end, on the embedded model: rows in, a falling loss, an adapter that peft runs out."""

import json
import runpy

import numpy as np
import pytest
import reference
import transformers

import jaxtune
from jaxtune import train
from jaxtune.config import ASSETS
from jaxtune.errors import UserError

BASE = ASSETS / "tiny_gemma"
ONE_DEVICE = ["--config.mesh.data=8", "--config.mesh.fsdp=1"]


def run(workdir, config, *words):
    settings = ["--config.model.dtype=float32", f"--config.model.id={BASE}", *words]
    assert train.main(["--config", config, "--workdir", str(workdir), *settings]) == 0
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line["eval_loss"] for line in lines if "eval_loss" in line], [line for line in lines if "loss" in line]


def check_adapter(adapter, rows):
    """jaxtune and peft compute the same logits with what was exported, and it is no longer the base."""
    lm = jaxtune.load(BASE, adapter=adapter)
    ids = np.array([lm.tokenizer.encode("<bos>" + text)[:40] for text in rows])
    ours = lm.logits(ids)
    reference.close(ours, reference.logits(reference.with_adapter(BASE, adapter), ids))
    assert np.abs(ours - jaxtune.load(BASE).logits(ids)).max() > 0.1


TEXTS = [
    "<start_of_turn>user\nWhat day comes after Monday?<end_of_turn>\n<start_of_turn>model\nسه‌شنبه. " * 3,
    "<start_of_turn>user\nسلام! حال شما چطور است؟<end_of_turn>\n<start_of_turn>model\nخوبم، ممنون. " * 3,
]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("persian_slimorca", []),
        (
            "dialogsum",
            [
                "--config.data.format=prompt_completion",
                "--config.data.prompt=Summarize the conversation:\n{dialogue}\n",
                "--config.data.completion={summary}",
                "--config.data.chat_template=tokenizer",
            ],
        ),
    ],
)
def test_recipe_on_real_rows(shared, tmp_path, rows, words):
    """configs/gemma_lora.py over rows that people wrote: the held-back loss falls, peft agrees with the adapter."""
    data = [f"--config.data.train={shared}/{rows}/train.jsonl", f"--config.data.eval={shared}/{rows}/eval.jsonl"]
    short = ["--config.data.max_length=192", "--config.data.truncation=left", "--config.data.max_eval_rows=48"]
    how = ["--config.train.steps=24", "--config.optim.learning_rate=5e-3", "--config.optim.warmup_steps=4"]
    evals, steps = run(tmp_path / "run", "configs/gemma_lora.py", *data, *short, *how, *words)
    assert len(steps) == 24 and evals[-1] < evals[0] - 0.3
    check_adapter(tmp_path / "run" / "adapter", TEXTS)


def test_embedded_model_is_a_language_model():
    """It answers English questions in English, through transformers as through jaxtune, and knows when to stop."""
    lm = jaxtune.load(BASE)
    questions = ["What day comes after Monday?", "What is two plus three?", "What colour is snow?"]
    chats = [[{"role": "user", "content": question}] for question in questions]
    answers = lm.generate(chats, max_new_tokens=24)
    for answer, word in zip(answers, ("Tuesday", "five", "white"), strict=True):
        assert word in answer and len(answer) < 60

    tokenizer = transformers.AutoTokenizer.from_pretrained(BASE)
    model = transformers.AutoModelForCausalLM.from_pretrained(BASE, attn_implementation="eager", dtype="float32")
    for chat, answer in zip(chats, answers, strict=True):
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        out = model.generate(**ids, max_new_tokens=24, do_sample=False)
        assert tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip() == answer
    total = sum(path.stat().st_size for path in BASE.iterdir())
    assert total < 8.5e6 and (BASE / "model.safetensors").stat().st_size <= 8e6


@pytest.mark.slow
def test_quickstart_teaches_persian(tmp_path):
    """The main job as a newcomer runs it: no Persian answer before, most of the held-back ones after."""
    evals, _ = run(tmp_path / "run", "configs/quickstart.py", *ONE_DEVICE)
    scores = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert scores["exact_match_before"] == 0
    assert scores["exact_match_after"] >= 0.6
    assert evals[-1] < 0.5 * evals[0]
    check_adapter(tmp_path / "run" / "adapter", TEXTS)


def test_streamed_rows(tmp_path):
    """Rows as they come, over the end of the file; stopping in between changes nothing."""
    words = ["--config.data.streaming=true", "--config.train.steps=3", "--config.train.global_batch_size=8"]
    words += ["--config.optim.schedule=constant", "--config.data.eval=none", "--config.evaluate.samples=0", *ONE_DEVICE]
    train_file = tmp_path / "train.jsonl"
    lines = (ASSETS / "quickstart" / "train.jsonl").read_text().splitlines()[:20]
    train_file.write_text("\n".join(lines) + "\n")
    words.append(f"--config.data.train={train_file}")
    _, whole = run(tmp_path / "whole", "configs/quickstart.py", *words, "--config.logging.profile=(2,3)")
    assert [step["rows"] for step in whole] == [8, 16, 24]
    assert list((tmp_path / "whole" / "profile").rglob("*.xplane.pb"))  # a trace, which ends with the run
    run(tmp_path / "parts", "configs/quickstart.py", *words, "--config.train.steps=1")
    _, parts = run(tmp_path / "parts", "configs/quickstart.py", *words)
    assert [step["loss"] for step in parts] == [step["loss"] for step in whole]
    with pytest.raises(UserError, match=r"Set `train\.steps`"):
        run(tmp_path / "x", "configs/quickstart.py", *words, "--config.train.steps=none")
    with pytest.raises(UserError, match=r"`logging\.profile` is \(3, 9\)"):
        run(tmp_path / "y", "configs/quickstart.py", *words, "--config.logging.profile=(3,9)")


def test_full_training_writes_a_checkpoint(tmp_path):
    """method=full: the run's model directory loads in transformers, with the logits that jaxtune computes."""
    words = ["--config.peft.method=full", "--config.train.steps=2", "--config.optim.learning_rate=1e-3", *ONE_DEVICE]
    run(
        tmp_path / "run",
        "configs/quickstart.py",
        *words,
        "--config.evaluate.samples=0",
        "--config.data.max_eval_rows=8",
    )
    ours = jaxtune.load(tmp_path / "run" / "model")
    ids = np.array([ours.tokenizer.encode(text)[:30] for text in TEXTS])
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", attn_implementation="eager")
    reference.close(ours.logits(ids), reference.logits(model, ids))
    assert np.abs(ours.logits(ids) - jaxtune.load(BASE).logits(ids)).max() > 0.01


@pytest.mark.parametrize("path", sorted(p.name for p in (ASSETS.parents[1] / "configs").glob("*.py")))
def test_configs_are_data(path):
    """Every recipe is accepted, has a docstring with its command, and builds at full size without weights."""
    from jaxtune.config import check

    module = runpy.run_path(f"configs/{path}")
    config = module["get_config"]()
    check(config)
    assert f"python -m jaxtune.train --config configs/{path}" in module["__doc__"]
