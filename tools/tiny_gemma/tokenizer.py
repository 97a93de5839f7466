"""The tiny Gemma's tokenizer: a SentencePiece BPE set up as Gemma's, and its Hugging Face form."""

import io
import json
from collections.abc import Iterable
from pathlib import Path

import sentencepiece as spm
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

PAD, EOS, BOS, UNK = "<pad>", "<eos>", "<bos>", "<unk>"
MASK, START_OF_TURN, END_OF_TURN = "<mask>", "<start_of_turn>", "<end_of_turn>"
SPACE = "▁"
# Gemma has runs of up to 31; these are enough here.
NEWLINES = tuple("\n" * n for n in range(1, 5))
SPACES = tuple(SPACE * n for n in range(2, 9))

# Gemma 2's own template, word for word.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif"
    " %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception("
    "'Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if (message['role'] == "
    "'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' "
    "+ role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{"
    "'<start_of_turn>model\n'}}{% endif %}"
)


def train(lines: Iterable[str], vocab_size: int) -> bytes:
    """The bytes of tokenizer.model.  One thread and a fixed order of lines: the same lines give the same bytes."""
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        num_threads=1,
        shuffle_input_sentence=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece=PAD,
        eos_piece=EOS,
        bos_piece=BOS,
        unk_piece=UNK,
        user_defined_symbols=[MASK, START_OF_TURN, END_OF_TURN, *NEWLINES, *SPACES],
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    return model.getvalue()


def merges(vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, in the order in which SentencePiece prefers the thirds.

    It takes runs of spaces first and whole: longest first here makes a run grow from its left, up to the longest.
    """
    joined = [
        (-len(piece) if piece in SPACES else rank, piece[:i], piece[i:])
        for piece, rank in vocab.items()
        for i in range(1, len(piece))
        if piece[:i] in vocab and piece[i:] in vocab
    ]
    return [(left, right) for _, left, right in sorted(joined, key=lambda m: (m[0], len(m[1])))]


def to_fast(model: bytes) -> Tokenizer:
    """The SentencePiece model as a `tokenizers` BPE with the same ids."""
    sp = spm.SentencePieceProcessor(model_proto=model)
    vocab = {sp.id_to_piece(i): i for i in range(sp.get_piece_size())}
    # Matched as they stand or spelt in bytes; nothing merges into them.
    whole = {PAD, EOS, BOS, UNK, MASK, START_OF_TURN, END_OF_TURN, *NEWLINES}
    learnt = {piece: i for piece, i in vocab.items() if piece not in whole and not sp.is_byte(i)}
    fast = Tokenizer(models.BPE(vocab=vocab, merges=merges(learnt), unk_token=UNK, fuse_unk=True, byte_fallback=True))
    fast.normalizer = normalizers.Replace(" ", SPACE)
    fast.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    fast.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    fast.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, vocab[BOS])]
    )
    special = (PAD, EOS, BOS, UNK, MASK, START_OF_TURN, END_OF_TURN)
    fast.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    fast.add_tokens([AddedToken(t, normalized=False, special=False) for t in NEWLINES])
    return fast


def write(model: bytes, out: Path) -> None:
    """tokenizer.model, tokenizer.json, tokenizer_config.json and special_tokens_map.json."""
    named = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "unk_token": UNK}
    extra = [START_OF_TURN, END_OF_TURN]
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "additional_special_tokens": extra,
        **named,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1000000000000000019884624838656,
        "sp_model_kwargs": {},
        "spaces_between_special_tokens": False,
        "tokenizer_class": "GemmaTokenizer",
        "use_default_system_prompt": False,
    }
    (out / "tokenizer.model").write_bytes(model)
    to_fast(model).save(str(out / "tokenizer.json"))
    write_json(out / "tokenizer_config.json", config)
    write_json(out / "special_tokens_map.json", {"additional_special_tokens": extra, **named})


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
