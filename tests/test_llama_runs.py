"""One recipe, real Persian questions and Llama 2's tokenizer on a small random Llama, on both stacks."""

import json
import shutil

import numpy as np
import pytest
import reference
import tiny_run
import torch

import jaxtune
import jaxtune.train
import torch_gpu.train

RECIPE = """
from jaxtune.config import get_default


def get_config():
    c = get_default()
    c.model.id = {model!r}
    c.model.dtype = "float32"
    c.peft.r = 4
    c.peft.target_modules = "all-linear"
    c.data.train = {train!r}
    c.data.eval = {eval!r}
    c.data.format = "prompt_completion"
    c.data.prompt = "{{context}}\\n\\n{{question}}"
    c.data.completion = "{{answers}}"
    c.data.no_answer = "بدون پاسخ"
    c.data.chat_template = "llama2"
    c.data.max_length = 256
    c.optim.learning_rate = 5e-3
    c.optim.warmup_steps = 1
    c.train.steps = 6
    c.train.global_batch_size = 8
    c.train.eval_every = 3
    c.train.log_every = 1
    c.train.remat = "none"
    c.evaluate.samples = 3
    c.evaluate.max_new_tokens = 8
    c.logging.tensorboard = False
    return c
"""


@pytest.fixture
def place(shared, tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": 32000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16, "bos_token_id": 1, "eos_token_id": 2}
    model = reference.save(reference.llama(**sizes, **heads, rope_parameters=reference.LLAMA3_ROPE), tmp_path / "model")
    shutil.copy(shared / "tokenizers" / "llama2" / "tokenizer.model", model)
    lines = (shared / "persian_qa" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    paths = {"model": str(model)}
    for name, part in (("train", lines[:48]), ("eval", lines[48:56])):
        rows = [json.loads(line) for line in part]
        paths[name] = str(tmp_path / f"{name}.jsonl")
        with open(paths[name], "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row | {"context": row["context"][:120]}) + "\n" for row in rows)
    (tmp_path / "recipe.py").write_text(RECIPE.format(**paths))
    return tmp_path


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_both_stacks_train_alike(place):
    """jaxtune begins, both go on from its adapter: the same losses and answers, and files that compute the same."""

    def run(name, *words, main=jaxtune.train.main):
        assert main(["--config", str(place / "recipe.py"), "--workdir", str(place / name), *words]) == 0
        return tiny_run.metrics(place / name)

    first = [row["loss"] for row in run("first") if "loss" in row]
    assert first[-1] < first[0]
    begun = f"--config.peft.init_from={place / 'first' / 'adapter'}"
    ours, theirs = run("ours", begun), run("theirs", begun, main=torch_gpu.train.main)
    for key in ("loss", "eval_loss"):
        a, b = ([row[key] for row in rows if key in row] for rows in (ours, theirs))
        assert len(a) > 2 and a == pytest.approx(b, rel=1e-4)
    ids, mask = reference.batch()
    logits = {}
    for name in ("ours", "theirs"):
        adapter = place / name / "adapter"
        logits[name] = jaxtune.load(place / "model", adapter=adapter).logits(ids, mask) * mask[..., None]
        expected = reference.logits(reference.with_adapter(place / "model", adapter), ids, mask) * mask[..., None]
        reference.close(logits[name], expected, 1e-5)
    assert np.abs(logits["ours"] - jaxtune.load(place / "model").logits(ids, mask) * mask[..., None]).max() > 1e-2
    answers = [(place / name / "samples.jsonl").read_text(encoding="utf-8") for name in ("ours", "theirs")]
    after = [[json.loads(line) for line in text.splitlines()] for text in answers]
    assert [row["after"] for row in after[0]] == [row["after"] for row in after[1]] != []
