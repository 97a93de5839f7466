"""Conversations as Llama 2, TinyLlama and Llama 3 tokenise them: ids and what is learnt, beside transformers."""

import json
import shutil

import numpy as np
import pytest
import tokenizers
from test_data_chat import by_transformers
from test_data_chat import write as written
from test_data_examples import learnt, slow_mask, write
from transformers import AutoTokenizer

from jaxtune.data.chat import TEMPLATES
from jaxtune.data.load import load_dataset
from jaxtune.tokenizer import load_tokenizer

SYSTEM = {"role": "system", "content": "کوتاه پاسخ بده.\n"}
CHAT = [
    {"role": "user", "content": " پایتخت ایران کجاست؟ "},
    {"role": "assistant", "content": "تهران  😀\n"},
    {"role": "user", "content": "[INST] and <<SYS>>?"},
    {"role": "assistant", "content": " a) b </INST>"},
    {"role": "user", "content": "x"},
    {"role": "assistant", "content": "می‌روم."},
]

# The chat template in the tokenizer_config.json of meta-llama/Meta-Llama-3-8B-Instruct.
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + "
    "'<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def llama2(shared, tmp_path_factory):
    """llama2(file, legacy) -> a directory with that file alone, and `legacy` in its tokenizer_config.json."""
    source = shared / "tokenizers" / "llama2"

    def make(file, legacy):
        folder = tmp_path_factory.mktemp("llama2")
        shutil.copy(source / file, folder)
        config = json.loads((source / "tinyllama_chat_tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"legacy": legacy}))
        return folder

    return make


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize("system", [False, True])
def test_every_turn_of_llama2(llama2, tmp_path, file, legacy, system):
    """BOS before every question, EOS after every answer; the answers and their EOS are learnt, and nothing else."""
    messages = [SYSTEM, *CHAT] if system else CHAT
    folder = llama2(file, legacy)
    dataset = load_dataset(
        write(tmp_path, [{"messages": messages}]), tokenizer := load_tokenizer(folder), chat_template="llama2"
    )
    tokens, mask = dataset.example(0)
    whole, expected = slow_mask(AutoTokenizer.from_pretrained(folder), TEMPLATES["llama2"], messages)
    assert tokens.tolist() == whole
    assert mask.tolist() == expected.tolist()
    assert (tokens == 1).sum() == (tokens == 2).sum() == 3
    assert mask[tokens == 2].all() and not mask[tokens == 1].any()
    assert [text.strip() for text in learnt(tokenizer, dataset)] == [
        "تهران  😀 </s>",
        "a) b </INST> </s>",
        "می‌روم. </s>",
    ]
    start = "<s>[INST] <<SYS>>\nکوتاه پاسخ بده.\n\n<</SYS>>\n\n پایتخت" if system else "<s>[INST] پایتخت"
    assert tokenizer.decode(tokens, skip_special_tokens=False).replace("<s> [", "<s>[").startswith(start)


def test_tinyllamas_own_template(llama2, tmp_path):
    """The checkpoint's, whose turns end with EOS inside a conversation too.  It writes no BOS, which every row has."""
    folder = llama2("tokenizer.json", False)
    tokenizer = load_tokenizer(folder)
    dataset = load_dataset(write(tmp_path, [{"messages": [SYSTEM, *CHAT]}]), tokenizer)
    tokens, mask = dataset.example(0)
    reference = AutoTokenizer.from_pretrained(folder)
    whole, expected = slow_mask(reference, reference.chat_template, [SYSTEM, *CHAT])
    assert tokens.tolist() == [1, *whole] and mask.tolist() == [False, *expected.tolist()]


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("messages", [CHAT[:1], CHAT[:2], [SYSTEM, *CHAT], CHAT[1:2]])
def test_llama3_equals_the_real_template(messages, prompt):
    assert written(TEMPLATES["llama3"], messages, prompt) == by_transformers(LLAMA3, messages, prompt)


@pytest.fixture(scope="module")
def llama3(tmp_path_factory):
    """A tokenizer made as Llama 3's is: bytes, its way to cut words, BOS put first, no token for padding; and a
    generation config with two ends, of a text and of a turn."""
    folder = tmp_path_factory.mktemp("llama3")
    pre = tokenizers.pre_tokenizers
    words = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
        r"\s+(?!\S)|\s+"
    )
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=True))
    backend.pre_tokenizer = pre.Sequence(
        [pre.Split(tokenizers.Regex(words), "isolated"), pre.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(["پایتخت ایران تهران است. user assistant system 1234567 fine\n\n"] * 9, trainer)
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    backend.add_special_tokens(special)
    ids = [backend.token_to_id(token) for token in special]
    backend.post_processor = tokenizers.processors.Sequence(
        [
            tokenizers.processors.ByteLevel(trim_offsets=True),
            tokenizers.processors.TemplateProcessing(
                single=f"{special[0]} $A", special_tokens=[(special[0], ids[0])], pair=f"{special[0]} $A $B"
            ),
        ]
    )
    backend.save(str(folder / "tokenizer.json"))
    names = {"bos_token": special[0], "eos_token": special[4], "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | {"chat_template": LLAMA3}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [ids[1], ids[4]]}))
    return folder


def test_llama3_tokenizer(llama3, tmp_path):
    """Ids equal transformers', one BOS, both ends stop an answer, and the header of a turn is not learnt."""
    reference, ours = AutoTokenizer.from_pretrained(llama3), load_tokenizer(llama3)
    for text in ("", " 12345 it's\n\n تهران", "<|begin_of_text|>a<|eot_id|>\n\nb  <|end_of_text|>", "😀 é\r\n\t x"):
        assert ours.encode(text) == reference.encode(text, add_special_tokens=False)
        assert ours.decode(ours.encode(text), False) == reference.decode(reference.encode(text)[1:])
    end, turn = (reference.convert_tokens_to_ids(t) for t in ("<|end_of_text|>", "<|eot_id|>"))
    assert set(ours.stop_ids) == {end, turn} and ours.bos_id == reference.bos_token_id
    messages = [SYSTEM, *CHAT]
    for template in (None, "llama3"):
        dataset = load_dataset(write(tmp_path, [{"messages": messages}]), ours, chat_template=template)
        tokens, mask = dataset.example(0)
        whole, expected = slow_mask(reference, LLAMA3, messages)
        assert tokens.tolist() == whole and mask.tolist() == expected.tolist()
        assert learnt(ours, dataset) == ["تهران  😀<|eot_id|>", "a) b </INST><|eot_id|>", "می‌روم.<|eot_id|>"]
        assert np.flatnonzero(tokens == ours.bos_id).tolist() == [0]
