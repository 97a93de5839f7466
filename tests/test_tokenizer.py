"""Ids and text equal transformers', sentencepiece's and published goldens; bad files are refused by name."""

import io
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece
import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from jaxtune.errors import MissingInputError, UserError
from jaxtune.tokenizer import load_tokenizer

AWKWARD = [
    "hello world",
    "  two  spaces   and\ttabs\t\tand\n\nnewlines \n",
    " leading",
    "trailing ",
    "",
    " ",
    "\n",
    "سلام، می‌روم به خانه‌ها «۱۲۳» ؟",
    "👩‍👩‍👧 emoji 😀é e\u0301 ﷺ ﻻ",
    "a<bos>b <eos> c</s> d<s>e<pad><unk>",
    "<bos><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n",
    "[INST] x [/INST] y </s><s>[INST] z",
    "<extra_id_0> and <extra_id_99>x",
    "nul \x00 bell \x07 rtl \u200f mark",
    "don't , isn't . what ?",
]


def copy(to, *files):
    for file in files:
        shutil.copy(file, to / file.name)
    for file in to.iterdir():
        file.chmod(0o644)
    return to


def agrees(ours, reference, texts=AWKWARD):
    """Ids, batches and decoding are the reference's."""
    for text in texts:
        ids = ours.encode(text)
        assert ids == reference.encode(text, add_special_tokens=False), text
        assert ours.encode_batch([text, "x"])[0] == ids
        assert ours.spans([text])[0].ids.tolist() == ids
        for skip in (True, False):
            assert ours.decode(ids, skip) == reference.decode(ids, skip_special_tokens=skip), text


@pytest.fixture(scope="session")
def small_sentencepiece(tmp_path_factory):
    """Two tiny sentencepiece models, Gemma-like and Llama-like, as checkpoint directories."""
    text = [" ".join(f"word{i * j % 13} سلام {i}" for j in range(8)) + "  the brown fox" for i in range(200)]
    folders = {}
    for kind in ("gemma", "llama"):
        gemma = kind == "gemma"
        folders[kind] = tmp_path_factory.mktemp(kind)
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text),
            model_writer=model,
            vocab_size=420,
            model_type="bpe",
            byte_fallback=True,
            add_dummy_prefix=not gemma,
            remove_extra_whitespaces=False,
            normalization_rule_name="identity",
            pad_id=0 if gemma else -1,
            eos_id=1 if gemma else 2,
            bos_id=2 if gemma else 1,
            unk_id=3 if gemma else 0,
            pad_piece="<pad>",
            eos_piece="<eos>" if gemma else "</s>",
            bos_piece="<bos>" if gemma else "<s>",
            user_defined_symbols=["<start_of_turn>", "<end_of_turn>"] if gemma else [],
            minloglevel=2,
        )
        (folders[kind] / "tokenizer.model").write_bytes(model.getvalue())
    return folders


def test_sentencepiece_without_shared_data(small_sentencepiece):
    plain = [t for t in AWKWARD if "<" not in t and "\x00" not in t]
    for kind, folder in small_sentencepiece.items():
        ours = load_tokenizer(folder)
        reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        for text in [*plain, "word1 word12 the brown  fox"]:
            assert ours.encode(text) == reference.encode(text), (kind, text)
            assert ours.decode(ours.encode(text)) == text
        assert ours.vocab_size == reference.get_piece_size()
        assert ours.bos_id == reference.bos_id() and ours.eos_id == reference.eos_id()
    gemma = load_tokenizer(small_sentencepiece["gemma"])
    turn = [gemma.backend.token_to_id(t) for t in ("<start_of_turn>", "<end_of_turn>")]
    ids = gemma.encode("<bos><start_of_turn>the brown<end_of_turn>")
    assert ids == [gemma.bos_id, turn[0], *gemma.encode("the brown"), turn[1]]
    assert gemma.decode(ids) == "the brown"
    assert gemma.stop_ids == (gemma.eos_id, turn[1]) and gemma.pad_id == 0
    llama = load_tokenizer(small_sentencepiece["llama"])
    assert llama.encode("<s>the brown</s>fox") == [1, *llama.encode("the brown"), 2, *llama.encode("fox")]
    assert llama.stop_ids == (2,) and llama.pad_id == 2


def test_llama2_both_files_agree_with_transformers(shared, tmp_path):
    source = shared / "tokenizers" / "llama2"
    both = [copy(tmp_path, source / "tokenizer.json"), tmp_path / "spm"]
    both[1].mkdir()
    copy(both[1], source / "tokenizer.model")
    reference = PreTrainedTokenizerFast(tokenizer_file=str(source / "tokenizer.json"))
    for folder in both:
        ours = load_tokenizer(folder)
        agrees(ours, reference)
        assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (1, 2, 32000)
    exact = sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    real = [row["messages"][1]["content"] for row in rows(shared, "persian_slimorca/train.jsonl")[:40]]
    assert load_tokenizer(both[1]).encode_batch(real) == exact.encode(real)


def test_llama2_not_legacy_equals_transformers_and_maxtext(shared, tmp_path):
    """`legacy: false` puts the leading space before the text only, in transformers 5 and in MaxText's golden."""
    source = shared / "tokenizers" / "llama2"
    (golden,) = rows(shared, "tokenizers/goldens/maxtext_llama2_chat_sft_tokens.jsonl")
    for name in ("tokenizer.json", "tokenizer.model"):
        folder = tmp_path / name.split(".")[1]
        folder.mkdir()
        copy(folder, source / name)
        shutil.copy(source / "tinyllama_chat_tokenizer_config.json", folder / "tokenizer_config.json")
        ours = load_tokenizer(folder)
        if name == "tokenizer.json":
            agrees(ours, AutoTokenizer.from_pretrained(folder))
        text = "<s>[INST] Hello, what is your name? [/INST] I am a chatbot. How can I help? </s>"
        assert ours.encode(text) == golden["tokens"]
        assert ours.chat_template.startswith("{% for message in messages %}") and ours.bos_token == "<s>"


def test_t5_equals_transformers(shared, tmp_path):
    source = shared / "tokenizers" / "t5"
    folder = copy(tmp_path, source / "tokenizer.json", source / "tokenizer_config.json")
    ours = load_tokenizer(folder)
    agrees(ours, AutoTokenizer.from_pretrained(folder))
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.vocab_size) == (None, 1, 0, 32100)
    assert ours.bos_token == "" and ours.chat_template is None


@pytest.mark.parametrize("said_by", ["tokenizer_config.json", "config.json"])
def test_t5_sentencepiece_equals_its_json(shared, tmp_path, said_by):
    """Its sentinels, which the file does not have, are ids 32000 to 32099; the model has 28 rows more."""
    source = shared / "tokenizers" / "t5"
    folder = copy(tmp_path, source / "spiece.model")
    says = {
        "tokenizer_config.json": {"tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "pad_token": "<pad>"},
        "config.json": {"model_type": "t5", "vocab_size": 32128, "eos_token_id": 1, "pad_token_id": 0},
    }
    (folder / said_by).write_text(json.dumps(says[said_by]))
    ours = load_tokenizer(folder)
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.stop_ids) == (None, 1, 0, (1,)) and ours.vocab_size == 32100
    assert ours.encode("<extra_id_0><extra_id_99>") == [32099, 32000]
    reference = PreTrainedTokenizerFast(tokenizer_file=str(source / "tokenizer.json"))
    for text in AWKWARD:
        if "\x00" not in text:
            assert ours.encode(text) == reference.encode(text, add_special_tokens=False), text
    for row in rows(shared, "dialogsum/eval.jsonl")[:40]:
        assert ours.encode(row["dialogue"]) == reference.encode(row["dialogue"], add_special_tokens=False)


def test_t5_published_texts(shared, tmp_path):
    source, goldens = shared / "tokenizers" / "t5", shared / "tokenizers" / "goldens"
    ours = load_tokenizer(copy(tmp_path, source / "tokenizer.json", source / "tokenizer_config.json"))
    long = json.loads((goldens / "swift_transformers_t5_base_encoded_long.json").read_text())
    assert ours.encode(long["text"]) == long["token_ids"][:-1] and long["token_ids"][-1] == ours.eos_id
    assert ours.decode(long["token_ids"]) == long["decoded_text"].removesuffix("</s>")
    for golden in json.loads((goldens / "transformers_js_t5_decode.json").read_text()):
        assert ours.decode(golden["ids"], skip_special_tokens=False) == golden["decoded"]


def test_gemma_cropped_equals_transformers(shared, tmp_path):
    source = shared / "tokenizers" / "gemma"
    shutil.copy(source / "tokenizer_gemma_cropped.json", tmp_path / "tokenizer.json")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 5, 3]}')
    ours = load_tokenizer(tmp_path)
    agrees(ours, PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json")))
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.stop_ids) == (2, 1, 0, (1, 5, 3))


@pytest.mark.parametrize("name", ["gemma_test", "gemma3_test", "gemma_export", "llama_test", "t5_test"])
def test_toy_sentencepiece_models(shared, tmp_path, name):
    file = shared / "tokenizers" / "tiny" / f"{name}_vocab.spm"
    shutil.copy(file, tmp_path / "tokenizer.model")
    ours, exact = load_tokenizer(tmp_path), sentencepiece.SentencePieceProcessor(model_file=str(file))
    assert ours.vocab_size == exact.get_piece_size() and ours.eos_id == exact.eos_id()
    for text in ("the quick brown fox", "the brown fox is round", "the  earth   is round"):
        assert ours.encode(text) == exact.encode(text), text


@pytest.mark.parametrize("family", ["llama2", "t5-base"])
def test_published_goldens(shared, tmp_path, family):
    folder = shared / "tokenizers" / family.split("-")[0]
    copy(tmp_path, folder / "tokenizer.json")
    if family == "t5-base":
        copy(tmp_path, folder / "tokenizer_config.json")
    ours = load_tokenizer(tmp_path)
    goldens = json.loads((shared / "tokenizers" / "goldens" / f"swift_transformers_{family}.json").read_text())
    assert len(goldens) == 18
    for golden in goldens:
        ids = golden["encoded"]["input_ids"]
        expected = ids[1:] if family == "llama2" else ids[:-1]
        assert ours.encode(golden["input"]) == expected
        assert ours.decode(ids) == golden["decoded_without_special"]


def test_kitoken_goldens(shared, tmp_path):
    ours = load_tokenizer(copy(tmp_path, shared / "tokenizers" / "llama2" / "tokenizer.model"))
    folder = shared / "tokenizers" / "goldens" / "kitoken"
    inputs = (folder / "small_input.txt").read_text().splitlines()
    outputs = (folder / "sentencepiece_small_tokens_llama2.txt").read_text().splitlines()
    assert len(inputs) == len(outputs) > 10
    for text, expected in zip(inputs, outputs, strict=True):
        text = text.replace("\\n", "\n").replace("\\s", " ")
        if "</s>" not in text and "<s>" not in text:
            assert ours.encode(text) == [int(i) for i in expected.split(",") if i.strip()]


def test_spans_are_the_characters(shared, tmp_path):
    """Every character belongs to a token, in order; byte tokens share their character."""
    for name in ("tokenizer.json", "tokenizer.model"):
        folder = tmp_path / name.split(".")[1]
        folder.mkdir()
        ours = load_tokenizer(copy(folder, shared / "tokenizers" / "llama2" / name))
        for text in AWKWARD:
            _, starts, ends = ours.spans([text])[0]
            assert np.all(starts[1:] >= starts[:-1]) and np.all(ends > starts)
            covered = {c for start, end in zip(starts, ends, strict=True) for c in range(start, end)}
            assert covered == set(range(len(text))), text


# --- a small tokenizer.json of our own ---


@pytest.fixture
def small(tmp_path):
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<s>", "</s>", "<|im_end|>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def write(folder, name, value):
    (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))


def test_special_tokens_from_the_files(small):
    ours = load_tokenizer(small)
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.stop_ids, ours.vocab_size) == (3, 4, 4, (4, 5), 6)
    assert ours.encode("a<s> b</s>") == [0, 3, 1, 4]
    write(small, "special_tokens_map.json", {"eos_token": {"content": "<|im_end|>"}, "pad_token": "[UNK]"})
    ours = load_tokenizer(small)
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.stop_ids) == (None, 5, 2, (5,))
    write(small, "tokenizer_config.json", {"eos_token": "</s>", "bos_token": "<s>"})
    write(small, "config.json", {"vocab_size": 6, "eos_token_id": 4})
    write(small, "generation_config.json", {"eos_token_id": [4, 1]})
    ours = load_tokenizer(small)
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.stop_ids) == (3, 4, 2, (4, 1, 5))


def test_saved_truncation_padding_and_post_processing_do_nothing(small):
    backend = tokenizers.Tokenizer.from_file(str(small / "tokenizer.json"))
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 3)])
    backend.save(str(small / "tokenizer.json"))
    assert load_tokenizer(small).encode("a b a b") == [0, 1, 0, 1]
    assert load_tokenizer(small).encode_batch(["a b a b", "a"]) == [[0, 1, 0, 1], [0]]


def test_chat_template_places(small):
    assert load_tokenizer(small).chat_template is None
    write(small, "tokenizer_config.json", {"eos_token": "</s>", "chat_template": "one"})
    assert load_tokenizer(small).chat_template == "one"
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "two"}]
    write(small, "tokenizer_config.json", {"eos_token": "</s>", "chat_template": named})
    assert load_tokenizer(small).chat_template == "two"
    write(small, "chat_template.json", {"chat_template": "three"})
    assert load_tokenizer(small).chat_template == "three"
    write(small, "chat_template.jinja", "four")
    assert load_tokenizer(small).chat_template == "four"


def test_an_added_token_without_a_row_is_text(small):
    """Gemma 3's text models: the shared tokenizer has an image token one past the embedding."""
    backend = tokenizers.Tokenizer.from_file(str(small / "tokenizer.json"))
    backend.add_special_tokens(["<image>"])
    backend.save(str(small / "tokenizer.json"))
    write(small, "config.json", {"vocab_size": 6})
    ours = load_tokenizer(small)
    assert ours.vocab_size == 6 and max(ours.encode("a <image> b")) < 6


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("config.json", {"vocab_size": 4}, "4 rows"),
        ("config.json", {"text_config": {"vocab_size": 2}}, "2 rows"),
        ("generation_config.json", {"eos_token_id": [4, 77]}, "77"),
        ("tokenizer_config.json", {"eos_token": "<nowhere>"}, "end-of-sequence"),
        ("tokenizer_config.json", "{", "not valid JSON"),
        ("tokenizer_config.json", "[" * 100_000, "not valid JSON"),
        ("tokenizer_config.json", "[1]", "not an object"),
        ("tokenizer.json", "{}", "not a tokenizer"),
        ("tokenizer.json", "version https://git-lfs.github.com/spec/v1", "git lfs pull"),
    ],
)
def test_bad_files_are_refused(small, name, content, says):
    write(small, name, content)
    with pytest.raises(UserError, match=says):
        load_tokenizer(small)


def test_duplicate_ids_are_refused(small):
    spec = json.loads((small / "tokenizer.json").read_text())
    spec["model"]["vocab"]["c"] = 0
    write(small, "tokenizer.json", spec)
    with pytest.raises(UserError, match="same id"):
        load_tokenizer(small)


def test_too_large_json_is_refused(small):
    with (small / "tokenizer_config.json").open("wb") as file:
        file.truncate(20 * 1024**2)
    with pytest.raises(UserError, match="is the most"):
        load_tokenizer(small)


def test_nothing_there(tmp_path):
    with pytest.raises(MissingInputError, match="no directory"):
        load_tokenizer(tmp_path / "missing")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(MissingInputError, match=r"It has: model\.safetensors"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x0a", b"\x80\x05\x95pickle", b"<html>", b"\x0a\x05\x0a\x03abc"])
def test_not_a_sentencepiece_model(tmp_path, content):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(UserError, match="sentencepiece model"):
        load_tokenizer(tmp_path)


def test_imports_neither_jax_nor_torch_nor_transformers():
    code = (
        "import sys, jaxtune.tokenizer, jaxtune.data.load, jaxtune.data.batches\n"
        "print([m for m in ('jax', 'torch', 'flax', 'transformers', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def rows(shared, name):
    return [json.loads(line) for line in (shared / name).read_text(encoding="utf-8").splitlines()]
