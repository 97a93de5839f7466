"""Scores of models: the losses of training, the tokens of one-by-one generation, transformers' probabilities."""

import json
import shutil

import jax
import numpy as np
import peft
import pytest
import tiny_run
import torch
import transformers
from safetensors.numpy import load_file, save_file

import jaxtune
from jaxtune import evaluate, likelihood, measure, trained
from jaxtune import mesh as meshes
from jaxtune.config import ASSETS, get_default
from jaxtune.data.examples import Prompt
from jaxtune.data.load import load_dataset
from jaxtune.errors import DataError, MissingInputError, UserError
from jaxtune.generate import generate
from jaxtune.tokenizer import load_tokenizer

STOPS = (5, 9)


def prompt(ids):
    return Prompt(1, ids, "", "", "", [], None)


# --- tokens and probabilities ---


def test_lengths_are_few_and_fit():
    lengths = np.arange(1, 5000)
    fitted = np.array([likelihood.bucket(n) for n in lengths.tolist()])
    assert np.all(fitted >= lengths) and np.all(fitted[31:] < 2 * lengths[31:])
    assert len(set(fitted.tolist())) == 15
    assert likelihood.bucket(5, unit=4) == 8


@pytest.mark.parametrize("name", ["gemma3", "t5_v11"])
def test_continuations_equal_transformers(checkpoint, name, monkeypatch):
    """Prompts and continuations of different lengths and numbers, a greedy one among them, logits in chunks."""
    monkeypatch.setattr("jaxtune.loss.how.CHUNK_TOKENS_CPU", 16)
    model, directory = checkpoint(name)
    lm = jaxtune.load(directory)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(10, 97, n).tolist() for n in (3, 40, 7, 1, 33)]
    answers = [[rng.integers(10, 97, n).tolist() for n in ns] for ns in ((1, 2), (5, 1, 3), (1,), (9,), (2, 2))]

    def of(context, text):
        """[M, V] log-probabilities that transformers has of what comes at each token of the text."""
        with torch.no_grad():
            if name.startswith("t5"):
                logits = model(input_ids=torch.tensor([context]), labels=torch.tensor([text])).logits[0]
            else:
                logits = model(torch.tensor([context + text])).logits[0, len(context) - 1 : -1]
        return torch.log_softmax(logits.float(), -1).numpy()

    answers[2].append([int(of(prompts[2], [1])[0].argmax())])
    how = {"batch_size": 12, "shards": 1}
    found = likelihood.continuations(lm.base.model, lm.variables, prompts, answers, **how)
    for context, texts, scores in zip(prompts, answers, found, strict=True):
        for text, score in zip(texts, scores, strict=True):
            expected = of(context, text)
            assert score.tokens == len(text)
            assert score.greedy == (expected.argmax(-1).tolist() == text)
            assert score.logprob == pytest.approx(expected[np.arange(len(text)), text].sum(), abs=1e-4)
    assert any(score.greedy for scores in found for score in scores)
    with pytest.raises(UserError, match="Prompt 0"):
        likelihood.continuations(lm.base.model, lm.variables, [[3]], [[[]]], **how)


@pytest.mark.parametrize("name", ["gemma2", "t5"])
def test_batches_equal_one_by_one(checkpoint, name):
    """Sorted, padded to common lengths, split over eight devices and filled up: the same tokens, in the rows' order."""
    directory = checkpoint(name)[1]
    lm = jaxtune.load(directory, mesh=meshes.make_mesh(2, 4, 1))
    rng = np.random.default_rng(0)
    ids = [rng.integers(10, 97, n).tolist() for n in (3, 41, 7, 1, 30, 70, 3, 12, 5)]
    done = []
    how = {"max_new_tokens": 7, "stop_ids": STOPS}
    with jax.set_mesh(lm.mesh):
        out = measure.batched(lm.base.model, lm.variables, ids, **how, shards=8, batch_size=5, advance=done.append)
    one = jaxtune.load(directory)
    assert out == [generate(one.base.model, one.variables, [row], **how, slots=96)[0] for row in ids]
    assert done == [8, 1]
    assert len({tuple(row) for row in out}) > 4


def test_equal_prompts_are_answered_once():
    """With the embedded model: in order, as text."""
    lm = jaxtune.load(ASSETS / "tiny_gemma")
    texts = ["What is the colour of a carrot?", "Hello", "What is the colour of a carrot?"]
    prompts = [prompt([2, *lm.tokenizer.encode(text)]) for text in texts]
    done = []
    how = {"max_new_tokens": 6, "shards": 1, "advance": done.append}
    found = measure.answer(lm.base.model, lm.variables, lm.tokenizer, prompts, **how)
    assert found == [text.strip() for text in lm.generate(texts, max_new_tokens=6)]
    assert sum(done) == 2


def test_labels_begin_where_the_prompt_is_left():
    tokenizer = load_tokenizer(ASSETS / "tiny_gemma")

    def of(text, reference, names, apart=False):
        before = [-1, 2]  # a virtual token, BOS
        asked = Prompt(1, before + tokenizer.encode(text), text, text, reference, [reference], None)
        context, found = likelihood.label_ids(tokenizer, asked, names, apart)
        assert context[:2] == before
        return context[2:], found

    context, found = of("What is it? Say", " good\n", ["good", "bad thing"])
    assert context == tokenizer.encode("What is it? Say")
    assert [tokenizer.decode(ids) for ids in found] == [" good", " bad thing"]
    # "whe" and "re" are one token together: it is the labels', and so is what is left of the prompt.
    context, found = of("It is whe", "re", ["re", "n"])
    assert [tokenizer.decode(context + ids) for ids in found] == ["It is where", "It is when"]
    assert len(context) < len(tokenizer.encode("It is whe")) and all(found)
    assert of("A text", "yes", ["yes"], apart=True) == (tokenizer.encode("A text"), [tokenizer.encode("yes")])


# --- runs ---


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A finished run, `one`, of 12 steps with evaluations at 8 and 12; and `two`, whose adapter is three times that."""
    place = tiny_run.make(tmp_path_factory.mktemp("measure"), steps=12)
    one, two = place.root / "one", place.root / "two"
    process = tiny_run.start(place, one, "train.save_every=4", devices=1)
    assert process.wait() == 0, (place.root / "one.screen").read_text()
    shutil.copytree(one, two)
    tensors = load_file(two / "adapter" / "adapter_model.safetensors")
    more = {name: x * 3 if "lora_B" in name else x for name, x in tensors.items()}
    save_file(more, two / "adapter" / "adapter_model.safetensors")
    return place


@pytest.fixture
def scores(capsys):
    """The command with `--json`: what it prints last."""

    def run(*words):
        assert evaluate.main([*map(str, words), "--json"]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


def losses(run):
    return {line["step"]: line["eval_loss"] for line in tiny_run.metrics(run) if "eval_loss" in line}


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_run_and_its_checkpoints(place, scores, tmp_path):
    """The loss is the one that training logged: of the adapter, of a checkpoint, of a run that broke off.  Answers go
    to a file that scores alike; rows with one prompt are one question."""
    one = place.root / "one"
    rows = read(place.eval)
    twice = json.loads(json.dumps(rows[0]))
    twice["messages"][-1]["content"] = "another answer"
    both = write(tmp_path / "rows.jsonl", [*rows, twice, rows[1]])
    out = tmp_path / "answers.jsonl"
    command = ("--workdir", one, "--metric", "rouge,chrf,exact_match", "--max-new-tokens", 6)
    found = scores(*command, "--data", both, "--out", out)
    assert (found["rows"], found["asked"], found["questions"]) == (12, 12, 10)
    answers = read(out)
    assert [len(row["references"]) for row in answers] == [2] + [1] * 9
    assert answers[0]["references"][1] == "another answer"
    again = scores("--predictions", out, "--metric", "rouge,chrf,exact_match")
    assert again == {name: found[name] for name in ("rouge", "chrf", "exact_match")}
    assert json.loads((one / "scores.json").read_text()) == found

    assert scores("--workdir", one)["eval_loss"] == pytest.approx(losses(one)[12], rel=1e-6)
    assert scores("--workdir", one, "--checkpoint", 8)["eval_loss"] == pytest.approx(losses(one)[8], rel=1e-6)
    record = json.loads((one / "run.json").read_text())
    (one / "run.json").write_text(json.dumps(record | {"status": "failed"}))
    try:
        broken = scores("--workdir", one)
    finally:
        (one / "run.json").write_text(json.dumps(record))
    assert broken["adapter"].endswith("checkpoints/12")
    assert broken["eval_loss"] == pytest.approx(losses(one)[12], rel=1e-6)
    assert broken["perplexity"] == pytest.approx(np.exp(broken["eval_loss"]))


def test_side_by_side(place, scores, monkeypatch, capsys):
    """Each column is what the model scores alone, and the base that they share is read once."""
    names = [str(place.root / name) for name in ("one", "two")]
    rest = ("--metric", "chrf", "--max-new-tokens", 6)
    loaded = []
    monkeypatch.setattr(trained, "load_base", lambda *args: loaded.append(1) or original(*args))
    original = jaxtune.hf.base.load_base
    found = scores("--compare", ",".join(["base", *names]), *rest)
    assert len(loaded) == 1 and not found["warnings"]
    assert list(found["models"]) == ["base", *names]
    for name in names:
        assert scores("--workdir", name, *rest) == found["models"][name]
    assert scores("--model", place.model, "--data", place.eval, "--dtype", "float32", *rest) == found["models"]["base"]
    assert len({row["eval_loss"] for row in found["models"].values()}) == 3

    half = ("--config.data.max_length=20", "--compare", ",".join(names))
    with pytest.raises(UserError, match="other rows"):
        models = trained.named(evaluate.parse([*half, "--data", str(place.eval)]), print)
        models[1].config.data.eval = str(place.train)
        measure.compared(models, {model.name: measure.read(model, [], None, print) for model in models})
    capsys.readouterr()


def test_an_adapter_of_peft(place, scores, tmp_path):
    """A prompt that peft trained: the loss over the rows' targets is peft's own."""
    base = transformers.AutoModelForCausalLM.from_pretrained(place.model, dtype=torch.float32)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.normal_(generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path)
    rows = load_dataset(str(place.eval), load_tokenizer(place.model), max_length=64)
    total = 0.0
    for i in range(len(rows)):
        tokens, mask = (torch.tensor(x) for x in rows.example(i))
        labels = torch.where(mask, tokens, -100)[None].long()
        with torch.no_grad():
            total += model(input_ids=tokens[None].long(), labels=labels).loss.item() * int(mask.sum())
    words = ("--model", place.model, "--adapter", tmp_path, "--data", place.eval, "--dtype", "float32")
    assert scores(*words)["eval_loss"] == pytest.approx(total / rows.counts.target_tokens, rel=1e-5)


REVIEWS = [("a fine film", "positive"), ("dull", "negative"), ("I slept well all through it", "negative")]
SENTIMENT = (
    "--config.data.format=prompt_completion",
    "--config.data.prompt=Is this good? {text}\nIt is",
    "--config.data.completion= {label}",
)


@pytest.mark.parametrize("normalise", [False, True])
def test_labels_by_probability(place, scores, tmp_path, normalise):
    """Transformers' log-probabilities of the labels' tokens, summed or a token's; accuracy of the likelier label."""
    rows = write(tmp_path / "rows.jsonl", [{"text": text, "label": label} for text, label in REVIEWS * 3])
    model = transformers.AutoModelForCausalLM.from_pretrained(place.model, dtype=torch.float32)
    tokenizer = load_tokenizer(place.model)
    words = ["--model", place.model, "--data", rows, "--dtype", "float32", *SENTIMENT, "--out", tmp_path / "out.jsonl"]
    names = ("negative", "positive")
    found = scores(*words, "--labels", ",".join(names), *["--normalise"] * normalise)
    out = read(tmp_path / "out.jsonl")
    assert len(out) == found["questions"] == 3
    right = []
    for (text, label), row in zip(REVIEWS, out, strict=True):
        asked = f"Is this good? {text}\nIt is"
        for name in names:
            whole = [2, *tokenizer.encode(f"{asked} {name}")]
            start = 1 + len(tokenizer.encode(asked))
            with torch.no_grad():
                logprobs = torch.log_softmax(model(torch.tensor([whole])).logits[0].float(), -1)
            each = [logprobs[i - 1, whole[i]].item() for i in range(start, len(whole))]
            assert len(each) > 1
            expected = sum(each) / (len(each) if normalise else 1)
            assert row["label_scores"][name] == pytest.approx(expected, abs=1e-4)
        assert row["prediction"] == max(row["label_scores"], key=row["label_scores"].get)
        right.append(row["prediction"] == label)
    assert found["accuracy_logprob"]["accuracy"] == sum(right) / 3
    assert found["accuracy_logprob"] == scores("--predictions", tmp_path / "out.jsonl", "--metric", "accuracy")


def test_squad(place, scores, tmp_path, monkeypatch):
    """What the model is trained to say where there is no answer counts as none; questions keep their ids."""
    rows = [
        {"id": "a", "context": "It is red.", "question": "What?", "answers": {"text": ["red", "is red"]}},
        {"id": "b", "context": "It is red.", "question": "Why?", "answers": {"text": []}},
        {"id": "c", "context": "It is red.", "question": "What?", "answers": {"text": ["red"]}},
        {"id": "d", "context": "It is red.", "question": "Who?", "answers": {"text": []}},
    ]
    says = {"What?": "is red", "Why?": " unanswerable", "Who?": "Tom"}

    def answer(model, variables, tokenizer, prompts, **how):
        return [next(text for asked, text in says.items() if asked in prompt.text) for prompt in prompts]

    monkeypatch.setattr(measure, "answer", answer)
    path, out = write(tmp_path / "rows.jsonl", rows), tmp_path / "out.jsonl"
    words = ["--config.data.format=prompt_completion", "--config.data.prompt={context} {question}\n"]
    words += ["--config.data.completion={answers}", "--config.data.no_answer=unanswerable"]
    words += ["--model", place.model, "--data", path, "--dtype", "float32", "--metric", "squad_v2,exact_match"]
    found = scores(*words, "--out", out)
    assert found["questions"] == 4
    squad = found["squad_v2"]
    assert (squad["exact"], squad["HasAns_exact"], squad["NoAns_exact"]) == (50.0, 50.0, 50.0)
    assert found["exact_match"]["exact_match"] == 0.5
    assert squad == scores("--predictions", out, "--metric", "squad_v2")
    assert [row["prediction"] for row in read(out)] == ["is red", "", "is red", "Tom"]


WRONG = {
    "no such run": (("--workdir", "{root}/nowhere"), MissingInputError, "no such directory"),
    "no run": (("--workdir", "{model}"), MissingInputError, "It holds: .*config.json"),
    "an adapter": (("--workdir", "{root}/one/adapter"), MissingInputError, "as --adapter, with --model"),
    "no such step": (("--workdir", "{root}/one", "--checkpoint", "7"), UserError, "newest, best, 8, 12"),
    "no rows": (("--model", "{model}"), MissingInputError, "--data FILE"),
    "no such rows": (("--model", "{model}", "--data", "{root}/evl.jsonl"), MissingInputError, "eval.jsonl"),
    "no such metric": (("--workdir", "{root}/one", "--metric", "roge"), UserError, "Did you mean `rouge`"),
    "no answers": (
        ("--workdir", "{root}/one", "--metric", "rouge", "--config.data.format=text"),
        UserError,
        "--metric scores answers",
    ),
    "no ids": (("--workdir", "{root}/one", "--metric", "squad_v2"), DataError, "row 1 has no `id`"),
    "other labels": (("--workdir", "{root}/one", "--labels", "a,b"), DataError, "none of --labels a,b"),
    "two models": (("--workdir", "{root}/one", "--adapter", "{root}/two/adapter"), UserError, "Drop one"),
    "compare alone": (("--compare", "base"), UserError, "names no run"),
    "compare and run": (("--compare", "base,{root}/one", "--workdir", "{root}/two"), UserError, "Drop one"),
    "of the file": (("--workdir", "{root}/one", "--references", "mean"), UserError, "--predictions"),
    "no labels": (("--workdir", "{root}/one", "--normalise"), UserError, "needs --labels"),
    "no model": (("--config", "{recipe}", "--config.model.id="), UserError, "no model"),
    "other base": (
        ("--workdir", "{root}/one", "--checkpoint", "newest", "--model", str(ASSETS / "tiny_gemma")),
        UserError,
        "not the model that",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_refused(place, name):
    words, kind, said = WRONG[name]
    values = {"root": place.root, "model": place.model, "recipe": place.recipe}
    with pytest.raises(UserError, match=said) as caught:
        evaluate.main([word.format(**values) if "{" in word else word for word in words])
    assert type(caught.value) is kind
    assert len(str(caught.value).splitlines()) < 12


def test_a_run_without_a_checkpoint(place, tmp_path):
    (tmp_path / "config.json").write_text((place.root / "one" / "config.json").read_text())
    (tmp_path / "run.json").write_text('{"status": "running"}')
    with pytest.raises(MissingInputError, match="no checkpoint yet, and it has not ended"):
        evaluate.main(["--workdir", str(tmp_path)])


def test_another_machine(monkeypatch):
    """A mesh for more devices than there are gives way to what is here, and says so."""
    c, said = get_default(), []
    c.mesh.fsdp = 64
    assert trained.mesh_of(c, said.append).size == len(jax.devices())
    assert "fsdp=64" in said[0]
