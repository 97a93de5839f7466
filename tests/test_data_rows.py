"""Every row that cannot be used is named or counted, and every setting is checked before the file is opened."""

import dataclasses
import json

import pytest
from test_data_examples import CHAT, GOOD, SYSTEM, small_tokenizer, write

from jaxtune.data.chat import TEMPLATES
from jaxtune.data.formats import make_format
from jaxtune.data.load import load_dataset, stream_examples
from jaxtune.errors import DataError, UserError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


BAD = [
    ({"text": "x"}, "messages: there is no such column. Columns: text."),
    ({"message": []}, "Did you mean `message`?"),
    ({"messages": None}, "messages: it is null"),
    ({"messages": "hi"}, "messages: it is of type str"),
    ({"messages": []}, "messages: the list is empty"),
    ({"messages": ["hi"]}, "messages[0]: it is of type str"),
    ({"messages": [{"from": "user", "value": "x"}]}, "messages[0].role: it is missing. The turn has: from, value."),
    ({"messages": [{"role": "user"}]}, "messages[0].content: it is missing"),
    ({"messages": [CHAT[0], {"role": "assistant", "content": None}]}, "messages[1].content: it is null"),
    (
        {"messages": [CHAT[0], {"role": "assistant", "content": [{"text": "x"}]}]},
        "messages[1].content: it is of type list",
    ),
    ({"messages": [CHAT[0], {"role": "assistent", "content": "x"}]}, "Did you mean `assistant`?"),
    ({"messages": [CHAT[0], SYSTEM, CHAT[1]]}, "messages[1].role: a system turn can only come first"),
    ({"messages": [CHAT[0]]}, "no turn is the assistant's"),
    ({"messages": [SYSTEM]}, "no turn is the assistant's"),
    ({"messages": [CHAT[0], *CHAT[:2]]}, "refuses this conversation: Conversation roles must alternate"),
    ({"messages": [CHAT[1]]}, "refuses this conversation"),
    ({"messages": [CHAT[0], {"role": "assistant", "content": "a\ud800b"}]}, "messages[1].content: character 1 is half"),
]


@pytest.mark.parametrize(("row", "says"), BAD)
def test_bad_rows_are_named(tokenizer, tmp_path, row, says):
    source = write(tmp_path, [GOOD, row])
    with pytest.raises(DataError) as caught:
        load_dataset(source, tokenizer)
    assert f"{source}:2:" in str(caught.value) and says in str(caught.value)
    assert caught.value.exit_code == 65


def test_bad_rows_are_listed_or_counted(tokenizer, tmp_path):
    source = write(tmp_path, [GOOD, *(row for row, _ in BAD), GOOD])
    with pytest.raises(DataError) as caught:
        load_dataset(source, tokenizer)
    assert [f"{source}:{n}:" in str(caught.value) for n in range(1, 8)] == [False] + [True] * 5 + [False]
    assert "`data.on_bad_row` to skip" in str(caught.value) and len(str(caught.value).splitlines()) < 24
    dataset = load_dataset(source, tokenizer, on_bad_row="skip")
    assert dataset.counts.dropped == {"bad row": len(BAD)} and dataset.rows.tolist() == [1, len(BAD) + 2]
    (tmp_path / "cut.jsonl").write_bytes(json.dumps(GOOD).encode() + b'\n{"messages": [\n\xff\n')
    cut = load_dataset(str(tmp_path / "cut.jsonl"), tokenizer, on_bad_row="skip")
    assert cut.counts.dropped == {"bad row": 2} and cut.fingerprint != dataset.fingerprint
    with pytest.raises(DataError, match=r"cut\.jsonl:2:line: not JSON"):
        load_dataset(str(tmp_path / "cut.jsonl"), tokenizer)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "a"}, "completion: there is no such column. Columns: prompt."),
        ({"prompt": "a", "completoin": "b"}, "Did you mean `completoin`?"),
        ({"prompt": "a", "completion": None}, "completion: it is null"),
        ({"prompt": ["a"], "completion": "b"}, "prompt: it is of type list"),
        ({"prompt": True, "completion": "b"}, "prompt: it is of type bool"),
        ({"prompt": float("nan"), "completion": "b"}, "prompt: it is nan"),
        ({"prompt": "\udc00", "completion": "b"}, "prompt: character 0 is half"),
    ],
)
def test_bad_columns_are_named(tokenizer, tmp_path, row, says):
    with pytest.raises(DataError) as caught:
        load_dataset(write(tmp_path, [row]), tokenizer, format="prompt_completion")
    assert "rows.jsonl:1:" in str(caught.value) and says in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([{"messages": [CHAT[0], {"role": "assistant", "content": " "}]}] * 3, "3 rows: no text to learn"),
        ([{"messages": []}] * 7, "7 rows: bad row"),
    ],
)
def test_nothing_to_learn_is_refused(tokenizer, tmp_path, rows, reason):
    with pytest.raises(DataError, match=reason):
        load_dataset(write(tmp_path, rows), tokenizer, on_bad_row="skip")
    with pytest.raises(DataError, match=reason):
        list(stream_examples(write(tmp_path, rows), tokenizer, on_bad_row="skip"))


# --- settings ---


@pytest.mark.parametrize(
    "template",
    ["{a.__class__}", "{a[0]}", "{a!r}", "{a:>10}", "{}", "{0.real}", "{a", "a}", "plain", "", "{a{b}}", "{a:{b}}"],
)
def test_templates_take_columns_and_nothing_else(tokenizer, template):
    with pytest.raises(UserError, match=r"`data\.text` is"):
        make_format(tokenizer, format="text", text=template)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"format": "message"}, "Did you mean `messages`?"),
        ({"chat_template": "gema"}, "Did you mean `gemma`?"),
        ({"format": "text", "chat_template": "gemma"}, "has no turns"),
        ({"truncation": "rigth"}, "Did you mean `right`?"),
        ({"on_bad_row": "ignore"}, "It can be: error, skip."),
        ({"max_length": 1}, "The least it can be is 2."),
    ],
)
def test_settings_are_checked_before_the_file(tokenizer, settings, says):
    for opens in (load_dataset, stream_examples):
        with pytest.raises(UserError) as caught:
            opens("nosuch.jsonl", tokenizer, **settings)
        assert says in str(caught.value) and not isinstance(caught.value, DataError)


def test_a_checkpoint_without_a_template_needs_one_named(tokenizer):
    bare = dataclasses.replace(tokenizer, chat_template=None)
    with pytest.raises(UserError, match="one of: gemma, chatml, llama2"):
        make_format(bare)
    assert make_format(bare, chat_template="chatml").chat_template == TEMPLATES["chatml"]
    assert make_format(bare, format="prompt_completion").chat_template is None
