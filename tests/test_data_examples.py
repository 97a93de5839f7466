"""What is learnt is exactly what the assistant says; every row that is not learnt from is counted or refused."""

import dataclasses
import json

import numpy as np
import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from jaxtune.data import load
from jaxtune.data.chat import TEMPLATES
from jaxtune.data.examples import find_turns, prompt_and_reference
from jaxtune.data.formats import make_format
from jaxtune.data.load import load_dataset, load_prompts, report, stream_examples
from jaxtune.data.sources import Row
from jaxtune.errors import DataError, UserError
from jaxtune.tokenizer import load_tokenizer

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", "<|im_start|>", "<|im_end|>"]
SYSTEM = {"role": "system", "content": "Be brief."}
CHAT = [
    {"role": "user", "content": "How are you?"},
    {"role": "assistant", "content": " I am\n\nfine. "},
    {"role": "user", "content": "سلام"},
    {"role": "assistant", "content": "درود، می‌روم 😀"},
]
GOOD = {"messages": CHAT}


def small_tokenizer(folder):
    """Saves a byte-level BPE tokenizer with Gemma's special tokens, trained on a few lines."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["I am fine. How are you? user model assistant system سلام درود"] * 9, trainer)
    backend.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**names, "chat_template": TEMPLATES["gemma"]}))
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizer")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return small_tokenizer(folder)


def write(folder, rows, name="rows.jsonl"):
    path = folder / name
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def learnt(tokenizer, dataset, i=0):
    """The runs of learnt tokens of a row, as text."""
    tokens, mask = dataset.example(i)
    edges = np.flatnonzero(np.diff(np.r_[0, mask, 0]))
    return [
        tokenizer.decode(tokens[a:b], skip_special_tokens=False) for a, b in zip(edges[::2], edges[1::2], strict=True)
    ]


# --- the mask ---


@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("gemma", ["I am\n\nfine.<end_of_turn>", "درود، می‌روم 😀<end_of_turn>"]),
        ("chatml", [" I am\n\nfine. <|im_end|>", "درود، می‌روم 😀<|im_end|>"]),
        ("llama2", [" I am\n\nfine. <eos>", " درود، می‌روم 😀 <eos>"]),
    ],
)
def test_learnt_is_what_the_assistant_says(tokenizer, tmp_path, template, expected, system):
    source = write(tmp_path, [{"messages": [SYSTEM, *CHAT] if system else CHAT, "extra": None}])
    dataset = load_dataset(source, tokenizer, chat_template=template)
    assert learnt(tokenizer, dataset) == expected
    tokens, mask = dataset.example(0)
    assert tokens[0] == tokenizer.bos_id and not mask[0]
    assert dataset.counts.unstopped == dataset.counts.shifted == dataset.counts.truncated == 0
    assert tokenizer.decode(tokens).count("Be brief.") == system


def slow_mask(hf, template, messages):
    """Independent reference: transformers' template, and the conversation tokenised anew up to each border."""

    def ids(part, prompt):
        text = hf.apply_chat_template(part, chat_template=template, tokenize=False, add_generation_prompt=prompt)
        return hf(text, add_special_tokens=False).input_ids

    whole = ids(messages, False)
    mask = np.zeros(len(whole), bool)
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before, through = ids(messages[:i], True), ids(messages[: i + 1], False)
            shared = next((k for k in range(len(through)) if through[k] != whole[k]), len(through))
            assert whole[: len(before)] == before
            last = max(k for k in range(shared) if hf.decode([whole[k]]).strip())  # Not the newline behind the turn.
            mask[len(before) : last + 1] = True
    return whole, mask


@pytest.mark.parametrize("template", ["gemma", "llama2"])
def test_mask_equals_prefix_tokenisation(tokenizer, folder, tmp_path, template):
    hf = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), bos_token="<bos>", eos_token="<eos>")
    rng = np.random.default_rng(0)
    words = ["hi", "fine.", "  ", "\n", "سلام", "می‌روم", "😀", "<end_of_turn>", "model", "a", "[/INST]", "é"]
    rows = []
    for _ in range(40):
        turns = int(rng.integers(1, 4))
        said = ["x" + "".join(rng.choice(words, rng.integers(1, 9))) + "y" for _ in range(2 * turns)]
        rows.append([{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)])
    source = write(tmp_path, [{"messages": row} for row in rows])
    dataset = load_dataset(source, tokenizer, chat_template=template)
    assert dataset.counts.shifted == 0
    for i, row in enumerate(rows):
        whole, expected = slow_mask(hf, TEMPLATES[template], row)
        tokens, mask = dataset.example(i)
        assert tokens.tolist() == whole
        assert mask.tolist() == expected.tolist(), row


def test_a_token_across_the_border_is_learnt_and_counted(tokenizer, tmp_path):
    """ "I am f" + "ine." may become a token "fine": it has some of the answer."""
    rows = [{"prompt": "I am f", "completion": "ine."}, {"prompt": "I am ", "completion": "fine."}]
    dataset = load_dataset(write(tmp_path, rows), tokenizer, format="prompt_completion")
    assert dataset.counts.shifted == 2
    for i, row in enumerate(rows):
        (text,) = learnt(tokenizer, dataset, i)
        assert text.endswith(row["completion"] + "<eos>") and len(text) > len(row["completion"] + "<eos>")
        assert tokenizer.decode(dataset.example(i)[0]) == "I am fine."
    assert any("straddles" in line for line in report(dataset.counts))


def test_prompt_completion_and_text(tokenizer, tmp_path):
    rows = [{"q": "How are you?", "n": 3, "a": " I am"}, {"q": "{q}", "n": 2.5, "a": "<bos>fine.<eos>"}]
    source = write(tmp_path, rows)
    shape = {"format": "prompt_completion", "prompt": "{{Q}} {q} {n}:", "completion": "{a}"}
    dataset = load_dataset(source, tokenizer, **shape)
    assert learnt(tokenizer, dataset) == [" I am<eos>"]
    assert learnt(tokenizer, dataset, 1) == ["<bos>fine.<eos>"]
    assert tokenizer.decode(dataset.example(0)[0]) == "{Q} How are you? 3: I am"
    assert tokenizer.decode(dataset.example(1)[0], False).startswith("<bos>{Q} {q} 2.5:<bos>fine.")

    chat = load_dataset(source, tokenizer, **{**shape, "prompt": "{q}", "chat_template": "tokenizer"})
    same = [{"messages": [{"role": "user", "content": r["q"]}, {"role": "assistant", "content": r["a"]}]} for r in rows]
    assert chat.fingerprint == load_dataset(write(tmp_path, same, "same.jsonl"), tokenizer).fingerprint

    plain = load_dataset(source, tokenizer, format="text", text="{q}{a}")
    assert learnt(tokenizer, plain) == ["How are you? I am<eos>"]
    tokens, mask = plain.example(0)
    assert tokens[0] == tokenizer.bos_id and mask.tolist() == [False] + [True] * (len(tokens) - 1)


def test_exactly_one_bos(tokenizer, tmp_path):
    rows = [{"text": "I am"}, {"text": "<bos>I am"}]
    dataset = load_dataset(write(tmp_path, rows), tokenizer, format="text")
    for ours, written in zip(dataset.example(0), dataset.example(1), strict=True):
        assert ours.tolist() == written.tolist()
    bare = dataclasses.replace(tokenizer, bos_id=None)
    tokens, mask = load_dataset(write(tmp_path, rows[:1]), bare, format="text").example(0)
    assert tokens[0] != tokenizer.bos_id and mask.tolist() == [False] + [True] * (len(tokens) - 1)
    # A template without BOS gets one.
    silent = dataclasses.replace(tokenizer, chat_template="{% for m in messages %}{{ m.content }}<eos>{% endfor %}")
    tokens, _ = load_dataset(write(tmp_path, [{"messages": CHAT[:2]}]), silent).example(0)
    assert tokens[0] == tokenizer.bos_id and tokens[1] != tokenizer.bos_id


def test_an_answer_without_a_stop_token_is_reported(tokenizer, tmp_path):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    silent = dataclasses.replace(tokenizer, chat_template=template)
    dataset = load_dataset(write(tmp_path, [{"messages": CHAT}]), silent)
    assert dataset.counts.unstopped == 1 and any("without a stop token" in line for line in report(dataset.counts))
    assert [text.strip() for text in learnt(tokenizer, dataset)] == ["I am\n\nfine.", "درود، می‌روم 😀"]


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.content if loop.last else '-' }}<eos>{% endfor %}",
        "{{ messages | length }}{% for m in messages %}{{ m.content }}<eos>{% endfor %}",
        "{% for m in messages %}{{ m.content | upper }}<eos>{% endfor %}",
        "{% for m in messages | reverse %}{{ m.content }}<eos>{% endfor %}",
    ],
)
def test_templates_that_rewrite_the_past_are_noticed(tokenizer, tmp_path, template):
    odd = dataclasses.replace(tokenizer, chat_template=template)
    with pytest.raises(DataError, match=r"rows\.jsonl:1:messages: The chat template renders turn \d differently"):
        load_dataset(write(tmp_path, [{"messages": CHAT}]), odd)


def test_an_answer_that_does_not_follow_the_generation_prompt_is_noticed(tokenizer, tmp_path):
    template = "{% for m in messages %}{{ m.content }}<eos>{% endfor %}{% if add_generation_prompt %}X{% endif %}"
    odd = dataclasses.replace(tokenizer, chat_template=template)
    with pytest.raises(DataError, match="renders turn 1 differently"):
        load_dataset(write(tmp_path, [{"messages": CHAT[:2]}]), odd)


def test_turns_without_text_are_not_learnt(tokenizer, tmp_path):
    empty = {"role": "assistant", "content": " \n"}
    dataset = load_dataset(write(tmp_path, [{"messages": [CHAT[0], empty, *CHAT[2:]]}]), tokenizer)
    assert learnt(tokenizer, dataset) == ["درود، می‌روم 😀<end_of_turn>"]


# --- length ---


def test_truncation_policies(tokenizer, tmp_path):
    rows = [{"text": "I am fine. " * 3}, {"text": "I am fine. " * 50}]
    source = write(tmp_path, rows)
    full = load_dataset(source, tokenizer, format="text", max_length=10_000)
    long = full.example(1)[0].tolist()
    right = load_dataset(source, tokenizer, format="text", max_length=30)
    left = load_dataset(source, tokenizer, format="text", max_length=30, truncation="left")
    drop = load_dataset(source, tokenizer, format="text", max_length=30, truncation="drop")
    assert right.example(1)[0].tolist() == long[:30]
    assert left.example(1)[0].tolist() == [long[0], *long[-29:]]
    assert not left.example(1)[1][0] and left.example(1)[1][1:].all()
    assert right.counts.truncated == left.counts.truncated == 1 and right.counts.longest == 30
    assert len(drop) == 1 and drop.counts.dropped == {"longer than data.max_length": 1}
    bare = dataclasses.replace(tokenizer, bos_id=None)
    assert (
        load_dataset(source, bare, format="text", max_length=30, truncation="left").example(1)[0].tolist() == long[-30:]
    )
    assert full.example(0)[0].tolist() == right.example(0)[0].tolist()


def test_a_very_long_row_is_cut_like_any_other(tokenizer, tmp_path):
    chat = [{"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "I am fine. " * 120_000}]
    dataset = load_dataset(write(tmp_path, [{"messages": chat}, GOOD]), tokenizer, max_length=128)
    assert np.diff(dataset.offsets)[0] == 128 and dataset.counts.truncated == 1 and len(dataset) == 2


def test_answers_cut_away_are_dropped_with_the_reason(tokenizer, tmp_path):
    rows = [{"prompt": "How are you? " * 50, "completion": "fine."}] + [{"prompt": "I", "completion": " am"}] * 9
    source = write(tmp_path, rows)
    dataset = load_dataset(source, tokenizer, format="prompt_completion", max_length=20)
    assert dataset.rows.tolist() == list(range(2, 11))
    assert dataset.counts.dropped == {"the answer lies beyond data.max_length": 1}
    assert any(line.startswith("warning: 1 of 10 rows dropped") for line in report(dataset.counts))
    with pytest.raises(DataError, match=r"1 rows: the answer lies beyond data\.max_length\. Raise `data\.max_length`"):
        load_dataset(source, tokenizer, format="prompt_completion", max_length=20, max_rows=1)
    kept = load_dataset(source, tokenizer, format="prompt_completion", max_length=20, truncation="left")
    assert len(kept) == 10 and learnt(tokenizer, kept)[0].endswith("fine.<eos>")


# --- streams, prompts, fingerprints ---


def test_a_stream_gives_the_same_examples(tokenizer, tmp_path):
    rows = [{"messages": [*CHAT[:1], {"role": "assistant", "content": f"I am {i}" * (i % 7)}]} for i in range(150)]
    source = write(tmp_path, rows)
    dataset, stream = load_dataset(source, tokenizer), list(stream_examples(source, tokenizer))
    assert [example.row for example in stream] == dataset.rows.tolist() and len(dataset) == 150 - 22
    for i, example in enumerate(stream):
        assert all(np.array_equal(a, b) for a, b in zip(dataset.example(i), example[1:3], strict=True))
    with pytest.raises(DataError, match=":2:messages"):
        list(stream_examples(write(tmp_path, [GOOD, {"x": 1}]), tokenizer))


def test_a_stream_that_gives_nothing_is_given_up(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(load, "PATIENCE", 10)
    source = write(tmp_path, [{"x": 1}] * 300 + [GOOD])
    with pytest.raises(DataError, match="10 were read"):
        list(stream_examples(source, tokenizer, on_bad_row="skip"))


def test_fingerprint_sees_every_change(tokenizer, tmp_path):
    def fingerprint(rows, **settings):
        return load_dataset(write(tmp_path, rows), tokenizer, format="text", **settings).fingerprint

    rows = [{"text": "I am"}, {"text": "fine."}]
    base = fingerprint(rows)
    assert base == fingerprint([{**row, "other": 1} for row in rows]) and len(base) == 64
    changed = [fingerprint(rows[::-1]), fingerprint(rows[:1]), fingerprint([rows[0], {"text": "fine"}])]
    changed += [fingerprint([{"text": "I"}, {"text": " amfine."}]), fingerprint(rows, max_length=2)]
    assert len({base, *changed}) == 6


def test_prompts_and_references(tokenizer, tmp_path):
    form = make_format(tokenizer)
    asked = prompt_and_reference(Row(7, {"messages": [SYSTEM, *CHAT]}), tokenizer, form)
    assert asked.reference == CHAT[3]["content"] and asked.question == "سلام" and asked.row == 7
    assert asked.text.endswith("fine.<end_of_turn>\n<start_of_turn>user\nسلام<end_of_turn>\n<start_of_turn>model\n")
    assert asked.text.startswith("<bos><start_of_turn>user\nBe brief.\n\nHow are you?<end_of_turn>")
    # The prompt is the beginning of what was learnt, and what is learnt begins where it ends.
    dataset = load_dataset(write(tmp_path, [{"messages": [SYSTEM, *CHAT]}]), tokenizer)
    tokens, mask = dataset.example(0)
    assert tokens[: len(asked.ids)].tolist() == asked.ids and mask[len(asked.ids)] and not mask[len(asked.ids) - 1]

    plain = make_format(tokenizer, format="prompt_completion", prompt="Q: {q}\nA:", completion=" {a}")
    asked = prompt_and_reference(Row(1, {"q": "x", "a": 4}), tokenizer, plain)
    assert (asked.text, asked.question, asked.reference) == ("Q: x\nA:", "Q: x\nA:", " 4")
    assert asked.ids == [tokenizer.bos_id, *tokenizer.encode("Q: x\nA:")]
    with pytest.raises(UserError, match=r"`evaluate\.samples` to 0"):
        prompt_and_reference(Row(1, {"text": "x"}), tokenizer, make_format(tokenizer, format="text"))

    long = {"messages": [{"role": "user", "content": "How " * 99}, CHAT[1]]}
    source = write(tmp_path, [GOOD, long, {"x": 1}, GOOD, GOOD])
    assert [p.row for p in load_prompts(source, tokenizer, count=2, max_length=64)] == [1, 4]
    # Rows cut on the left are asked as they are learnt: BOS and the end of the prompt.
    whole = load_prompts(source, tokenizer, count=2, max_length=999)[1].ids
    cut = load_prompts(source, tokenizer, count=2, max_length=64, truncation="left")[1]
    assert (cut.row, len(cut.ids)) == (2, 64) and cut.ids == [whole[0], *whole[-63:]]


# --- real rows ---


@pytest.mark.parametrize("template", ["gemma", "chatml", "llama2"])
def test_persian_slimorca(shared, tmp_path, template):
    """Real conversations through the real Llama 2 tokenizer: what is learnt is the answer, whatever the template."""
    (tmp_path / "tokenizer.json").write_bytes((shared / "tokenizers/llama2/tokenizer.json").read_bytes())
    tokenizer = load_tokenizer(tmp_path)
    source = shared / "persian_slimorca" / "train.jsonl"
    rows = [json.loads(line)["messages"] for line in source.read_text(encoding="utf-8").splitlines()[:120]]
    dataset = load_dataset(str(source), tokenizer, chat_template=template, max_length=4096, max_rows=120)
    end = {"gemma": "<end_of_turn>", "chatml": "<|im_end|>\n</s>", "llama2": " </s>"}[template]
    assert len(dataset) == 120 and dataset.counts.dropped == {}
    for i, row in enumerate(rows):
        (text,) = learnt(tokenizer, dataset, i)
        answer = row[-1]["content"]
        assert text.strip() == ((answer if template == "chatml" else answer.strip()) + end).strip()
        whole, turns = find_turns(TEMPLATES[template], row, tokenizer)
        assert whole[turns[0].start : turns[0].text_end].strip() == answer.strip()


def test_dialogsum(shared, tmp_path):
    """T5: no BOS, its own EOS, spaces that tokenise away at the border."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((shared / "tokenizers/t5" / name).read_bytes())
    tokenizer = load_tokenizer(tmp_path)
    source = shared / "dialogsum" / "train.jsonl"
    shape = {"format": "prompt_completion", "prompt": "summarize: {dialogue}\n", "completion": "{summary}"}
    dataset = load_dataset(str(source), tokenizer, max_rows=100, **shape)
    assert len(dataset) == 100 and dataset.counts.shifted == 0
    for i, line in enumerate(source.read_text(encoding="utf-8").splitlines()[:100]):
        row = json.loads(line)
        tokens, mask = dataset.example(i)
        assert tokens[mask].tolist() == [*tokenizer.encode(row["summary"]), tokenizer.eos_id]
        assert tokens[~mask].tolist() == tokenizer.encode(f"summarize: {row['dialogue']}\n")
