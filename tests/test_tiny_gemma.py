"""The embedded tiny Gemma's tokenizer, quickstart and text are what its script makes, and right."""

import datetime
import json
import random
import sys
from pathlib import Path

import pytest
import sentencepiece as spm
import transformers

from jaxtune.config import ASSETS

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import make_tiny_gemma as script
from tiny_gemma import skills, text, words

MODEL = ASSETS / "tiny_gemma"
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "config.json",
    "generation_config.json",
)
AWKWARD = (
    "",
    " ",
    "Hello!",
    "  two  spaces   three" + " " * 21 + "many ",
    "\n\n\n\n\n\n\nlines\r\n\tand tabs \n",
    "می‌شود سی‌ام، به‌علاوهٔ «رؤیا»؟",
    "\u200c\u200c\u200f ي ك ۱۲۳ ١٢٣",
    "12345 and 3:45",
    "😀 👩‍🚀 中文 naïve \u00a0 \ufeff",
    "▁▁ ▁ under",
    "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
    "<mask> <start_of_turn <end_of_turn>> <unused0>",
)


@pytest.fixture(scope="module")
def sp():
    return spm.SentencePieceProcessor(model_file=str(MODEL / "tokenizer.model"))


@pytest.fixture(scope="module")
def fast():
    return transformers.AutoTokenizer.from_pretrained(MODEL)


def rows(name):
    with (ASSETS / "quickstart" / f"{name}.jsonl").open(encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def questions(row):
    return tuple(turn["content"] for turn in row["messages"] if turn["role"] == "user")


def test_sentencepiece_and_transformers_agree(sp, fast):
    rng = random.Random(0)
    mixed = ["".join(rng.choices("".join(AWKWARD), k=12)) for _ in range(2000)]
    for string in (*AWKWARD, *text.tokenizer_lines(3, 200), *mixed):
        ids = fast.encode(string, add_special_tokens=False)
        assert ids == sp.encode(string), string
        if "▁" not in string:  # SentencePiece has no other way to write a space.
            assert fast.decode(ids) == string


def test_special_tokens_are_gemmas(sp, fast):
    assert [sp.id_to_piece(i) for i in range(5)] == ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    assert (fast.pad_token_id, fast.eos_token_id, fast.bos_token_id, fast.unk_token_id) == (0, 1, 2, 3)
    for token in ("<start_of_turn>", "<end_of_turn>", "\n", "user", "model"):
        assert [sp.piece_to_id(token)] == fast.encode(token, add_special_tokens=False) != [3], token
    assert fast("Hi").input_ids[0] == 2
    stops = json.loads((MODEL / "generation_config.json").read_text())["eos_token_id"]
    assert stops == [1, sp.piece_to_id("<end_of_turn>")]


def test_chat_template_is_what_pretraining_shows(fast):
    chat = text.messages(skills.memory(random.Random(0)), "english")
    assert fast.apply_chat_template(chat, tokenize=False) == "<bos>" + text.render(chat)
    with pytest.raises(Exception, match="System role not supported"):
        fast.apply_chat_template([{"role": "system", "content": "x"}], tokenize=False)
    with pytest.raises(Exception, match="must alternate"):
        fast.apply_chat_template([{"role": "assistant", "content": "x"}], tokenize=False)


def test_config_is_a_small_gemma2():
    config = transformers.AutoConfig.from_pretrained(MODEL)
    assert isinstance(config, transformers.Gemma2Config)
    model = transformers.Gemma2ForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == script.parameters()
    assert 2 * script.parameters() <= 8_000_000


def test_script_makes_the_tokenizer_and_the_quickstart_again(tmp_path):
    out = tmp_path / "tiny_gemma"
    out.mkdir()
    script.write_tokenizer(out)
    script.write_quickstart(out)
    for name in TOKENIZER_FILES:
        assert (out / name).read_bytes() == (MODEL / name).read_bytes(), name
    for name in ("train.jsonl", "eval.jsonl"):
        assert (tmp_path / "quickstart" / name).read_bytes() == (ASSETS / "quickstart" / name).read_bytes(), name


def test_quickstart_rows():
    train, held_out = rows("train"), rows("eval")
    assert 1000 <= len(train) <= 2000
    assert 100 <= len(held_out) <= 200
    assert not {questions(r) for r in train} & {questions(r) for r in held_out}
    assert {r["skill"] for r in train} == {r["skill"] for r in held_out} == {s.__name__ for s in text.SKILLS}
    for row in (*train, *held_out):
        for turn in row["messages"]:
            persian = any("\u0600" <= c <= "\u06ff" for c in turn["content"])
            assert persian == (turn["role"] == "assistant"), turn
            assert not set(turn["content"]) & set("يكى"), turn


def test_pretraining_answers_chats_in_english_and_fits(sp):
    def length(piece):
        return len(sp.encode(piece))

    documents = list(text.pretraining_documents(1, 300, length, 126))
    assert documents == list(text.pretraining_documents(1, 300, length, 126))
    assert all(0 < length(document) <= 126 for document in documents)
    chats = [d for d in documents if "<start_of_turn>" in d]
    assert 0.4 < len(chats) / len(documents) < 0.65
    assert all(document.isascii() for document in chats)
    seen = {i for document in text.pretraining_documents(1, 5000, length, 126) for i in sp.encode(document)}
    shown = " ".join(text.phrase(random.Random(i)) for i in range(20_000))
    for row in rows("eval"):
        assert f"{' '.join(questions(row))} : {row['messages'][-1]['content']}" not in shown
    answers = {i for row in rows("eval") for turn in row["messages"] for i in sp.encode(turn["content"])}
    assert answers <= seen


def test_numbers_and_ordinals():
    assert skills.number(347) == "three hundred and forty-seven"
    assert skills.number_fa(347) == "سیصد و چهل و هفت"
    assert skills.number_fa(21) == "بیست و یک"
    assert len({skills.number(n) for n in range(1000)}) == len({skills.number_fa(n) for n in range(1000)}) == 1000
    assert [skills.ordinal_fa(n) for n in (1, 3, 23, 30, 31)] == ["اول", "سوم", "بیست و سوم", "سی‌ام", "سی و یکم"]
    assert [skills.ordinal(n) for n in (1, 12, 20, 22, 30)] == [
        "first",
        "twelfth",
        "twentieth",
        "twenty-second",
        "thirtieth",
    ]


def test_arithmetic_and_calendar_are_right():
    value = {skills.number(n): n for n in range(100)}
    value_fa = {skills.number_fa(n): n for n in range(100)}
    rng = random.Random(0)
    for _ in range(500):
        for skill, sign, plus, plus_fa in ((skills.add, 1, "plus", "به‌علاوهٔ"), (skills.subtract, -1, "minus", "منهای")):
            e = skill(rng)
            a, rest = e.english.lower().rstrip(".").split(f" {plus} ")
            b, c = rest.split(" is ")
            assert value[a] + sign * value[b] == value[c]
            a, rest = e.persian.rstrip(".").split(f" {plus_fa} ")
            b, c = rest.split(" می‌شود ")
            assert value_fa[a] + sign * value_fa[b] == value_fa[c]
    # 2023 is a common year; 7 January 2023 was a Saturday.
    for i, (name, _, days) in enumerate(words.MONTHS):
        last = datetime.date(2023 + i // 11, (i + 1) % 12 + 1, 1) - datetime.timedelta(days=1)
        assert (last.day, last.strftime("%B")) == (days, name)
    for i, (name, _) in enumerate(words.WEEKDAYS):
        assert datetime.date(2023, 1, 7 + i).strftime("%A") == name


def test_card_and_size_of_the_directory(tmp_path):
    script.write_card(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == (MODEL / "README.md").read_bytes()
    assert sum(f.stat().st_size for f in MODEL.iterdir()) < 9_000_000
