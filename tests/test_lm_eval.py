"""The harness gives a jaxtune model the numbers that it gives its own `hf` model of the same checkpoint.

Needs lm-eval (`pip install 'jaxtune[eval]'`); it is no part of the tests' own requirements, for its size."""

import json

import numpy as np
import pytest

from jaxtune.config import ASSETS
from jaxtune.errors import UserError

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'jaxtune[eval]'")
# Warnings of the harness and of what it imports are not ours.
pytestmark = pytest.mark.filterwarnings("ignore")

TINY = ASSETS / "tiny_gemma"
LENGTH = 96  # of windows and truncation, so that both happen
TASKS = {
    "made_up_choice": """
task: made_up_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}, cache_dir: {cache}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: ["red", "green as grass", "a square"]
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
""",
    "made_up_answer": """
task: made_up_answer
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}, cache_dir: {cache}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n", " is"], max_gen_toks: 12, do_sample: false}}
metric_list: [{{metric: exact_match}}]
""",
    "made_up_text": """
task: made_up_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}, cache_dir: {cache}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
""",
}


@pytest.fixture(scope="module")
def rows():
    """Questions of the quickstart; the text of the last is longer than the window."""
    lines = (ASSETS / "quickstart" / "eval.jsonl").read_text(encoding="utf-8").splitlines()[:10]
    turns = [json.loads(line)["messages"] for line in lines]
    found = [{"question": q["content"], "answer": a["content"], "label": i % 3} for i, (q, a) in enumerate(turns)]
    for i, row in enumerate(found):
        row["text"] = " ".join(other["question"] for other in found[: i + 1])
    return found


@pytest.fixture(scope="module")
def models():
    """(ours, the harness's own) of one checkpoint, in float32."""
    from lm_eval.models.huggingface import HFLM

    from jaxtune.lm_eval import JaxtuneLM

    theirs = HFLM(pretrained=str(TINY), dtype="float32", device="cpu", batch_size=1, max_length=LENGTH)
    return JaxtuneLM(model=str(TINY), batch_size=4, max_length=LENGTH), theirs


def instances(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=args, idx=i) for i, args in enumerate(arguments)]


def test_loglikelihood(models, rows):
    """Of several continuations of one context, of none, of one longer than the model takes; one is greedy."""
    ours, theirs = models
    said = theirs.generate_until(instances("generate_until", [(rows[0]["question"], {"max_gen_toks": 3})]))[0]
    pairs = [(row["question"], " " + text) for row in rows for text in (row["answer"], "red", "green as grass")]
    pairs += [(rows[0]["question"], said), ("", "The sky"), (rows[9]["text"], " red"), ("A space at the end ", "blue")]
    found = [model.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True) for model in models]
    np.testing.assert_allclose([a[0] for a in found[0]], [b[0] for b in found[1]], atol=1e-4)
    assert [a[1] for a in found[0]] == [b[1] for b in found[1]]
    assert {a[1] for a in found[0]} == {True, False}
    assert len(ours.tok_encode(rows[9]["text"])) > LENGTH


def test_rolling(models, rows):
    found = [m.loglikelihood_rolling(instances("loglikelihood_rolling", [(r["text"],) for r in rows])) for m in models]
    np.testing.assert_allclose(*found, rtol=1e-6, atol=1e-4)


def test_generate_until(models, rows):
    """Stop strings of one token, of several, inside of one; none; different ones in one call; a context too long."""
    kinds = [{"until": ["\n", "e"], "max_gen_toks": 12}, {"until": " is", "max_gen_toks": 7}, {"max_gen_toks": 5}]
    requests = [(row["question"], dict(kinds[i % 3])) for i, row in enumerate(rows)]
    requests.append((rows[9]["text"], dict(kinds[0])))
    found = [model.generate_until(instances("generate_until", requests), disable_tqdm=True) for model in models]
    assert found[0] == found[1]
    assert len(set(found[0])) > 3


def test_tasks(models, rows, tmp_path):
    """Whole tasks of a file: each number that the harness reports."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    for name, text in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(text.format(file=tmp_path / "rows.jsonl", cache=tmp_path))
    how = {"tasks": list(TASKS), "task_manager": TaskManager(include_path=str(tmp_path), include_defaults=False)}
    ours, theirs = (lm_eval.simple_evaluate(model=model, **how, bootstrap_iters=0)["results"] for model in models)
    assert ours.keys() == theirs.keys() == TASKS.keys()
    for name, scores in theirs.items():
        numbers = {key: value for key, value in scores.items() if isinstance(value, float)}
        assert numbers
        for key, value in numbers.items():
            assert ours[name][key] == pytest.approx(value, rel=1e-5), (name, key)


def test_chats(models):
    """The template's text is transformers', also of a turn that goes on."""
    ours, theirs = models
    chat = [{"role": "user", "content": "Hello!"}]
    assert ours.apply_chat_template(chat) == theirs.apply_chat_template(chat)
    chat.append({"role": "assistant", "content": "I am"})
    assert ours.apply_chat_template(chat, False) == theirs.apply_chat_template(chat, False)
    assert ours.tok_encode(ours.apply_chat_template(chat)) == theirs.tok_encode(theirs.apply_chat_template(chat))


def test_adapter(tmp_path, rows):
    """By the arguments of the command line; the harness's own model has the same adapter."""
    import peft
    import torch
    import transformers
    from lm_eval.models.huggingface import HFLM

    from jaxtune.lm_eval import JaxtuneLM

    base = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    config = peft.LoraConfig(r=3, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(base, config)
    model.save_pretrained(tmp_path)
    ours = JaxtuneLM.create_from_arg_string(f"model={TINY},adapter={tmp_path}", {"batch_size": 3})
    theirs = HFLM(pretrained=model.eval(), tokenizer=str(TINY), device="cpu")
    pairs = [(row["question"], " " + row["answer"]) for row in rows[:3]]
    found = [model.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True) for model in (ours, theirs)]
    np.testing.assert_allclose([a[0] for a in found[0]], [b[0] for b in found[1]], rtol=1e-5, atol=1e-4)


def test_registered_under_its_name_and_refuses(models):
    from lm_eval.api.registry import get_model

    assert get_model("jaxtune") is type(models[0])
    with pytest.raises(UserError, match="'pretrained'"):
        get_model("jaxtune").create_from_arg_string(f"model={TINY},pretrained=x")
    with pytest.raises(UserError, match="'auto'"):
        get_model("jaxtune").create_from_arg_string(f"model={TINY}", {"batch_size": "auto", "device": None})
