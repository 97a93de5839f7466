"""A sentencepiece model read into the same engine as a tokenizer.json.

One engine means one set of rules for special tokens, offsets and decoding.  The file is a protocol buffer of which five
fields matter, so it is read here without generated code.

Source: sentencepiece's `sentencepiece_model.proto`; transformers' `convert_slow_tokenizer.py` (SpmConverter).
"""

import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from jaxtune.errors import UserError

# sentencepiece_model.proto, SentencePiece.Type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
UNIGRAM, BPE, WORD = 1, 2, 3
# Marked special by transformers though sentencepiece calls them user-defined.
TURNS = ("<start_of_turn>", "<end_of_turn>")


class Piece(NamedTuple):
    text: str
    score: float
    kind: int


class Model(NamedTuple):
    pieces: tuple[Piece, ...]
    algorithm: int
    byte_fallback: bool
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool


def fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a protocol-buffer message: int for varints, bytes for the rest."""
    at = 0
    while at < len(data):
        key, at = varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = varint(data, at)
            yield key >> 3, value
            continue
        size = {1: 8, 5: 4}.get(wire)
        if size is None:
            if wire != 2:
                raise ValueError(f"wire type {wire}")
            size, at = varint(data, at)
        if at + size > len(data):
            raise ValueError("cut short")
        yield key >> 3, data[at : at + size]
        at += size


def varint(data: bytes, at: int) -> tuple[int, int]:
    """The number that begins at `at`, seven bits a byte; and where it ends."""
    value = shift = 0
    while shift < 64:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at
    raise ValueError("number too long")


def parse(data: bytes) -> Model:
    """The parts of a serialised ModelProto that decide how text is cut.

    Raises:
      ValueError, IndexError, struct.error: the bytes are not such a model.
    """
    pieces, trainer, normalizer = [], {}, {}
    for number, value in fields(data):
        if number == 1:
            piece = dict(fields(value))
            (score,) = struct.unpack("<f", piece.get(2, bytes(4)))
            pieces.append(Piece(piece[1].decode("utf-8"), score, piece.get(3, NORMAL)))
        elif number == 2:
            trainer = dict(fields(value))
        elif number == 3:
            normalizer = dict(fields(value))
    if not pieces:
        raise ValueError("no pieces")
    return Model(
        tuple(pieces),
        algorithm=trainer.get(3, UNIGRAM),
        byte_fallback=bool(trainer.get(35, 0)),
        charsmap=normalizer.get(2, b""),
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
    )


def merges(pieces: tuple[Piece, ...]) -> list[tuple[str, str]]:
    """The BPE merges in the order sentencepiece makes them: the best-scoring result first."""
    joinable = {piece.text: piece.score for piece in pieces if piece.kind in (NORMAL, USER_DEFINED)}
    found = [
        (score, text[:cut], text[cut:])
        for text, score in joinable.items()
        for cut in range(1, len(text))
        if text[:cut] in joinable and text[cut:] in joinable
    ]
    found.sort(key=lambda merge: (-merge[0], -len(merge[1])))
    return [(left, right) for _, left, right in found]


def load(data: bytes, name: str) -> tuple[Tokenizer, bool]:
    """A `tokenizers.Tokenizer` that cuts text as the sentencepiece model does; and whether it puts a space first.

    Raises:
      UserError: not a unigram, BPE or word sentencepiece model.
    """
    try:
        model = parse(data)
    except (ValueError, IndexError, KeyError, AttributeError, TypeError, struct.error) as error:
        raise UserError(f"{name} is not a sentencepiece model ({error}). Download it again.") from None
    unknown = next((i for i, piece in enumerate(model.pieces) if piece.kind == UNKNOWN), None)
    if model.algorithm not in (UNIGRAM, BPE, WORD) or unknown is None:
        raise UserError(f"{name} is a sentencepiece model of a kind not known here. It must be BPE, unigram or word.")
    if model.algorithm == BPE:
        engine = models.BPE(
            {piece.text: i for i, piece in enumerate(model.pieces)},
            merges(model.pieces),
            unk_token=model.pieces[unknown].text,
            fuse_unk=True,
            byte_fallback=model.byte_fallback,
        )
    elif model.algorithm == WORD:
        vocabulary = {piece.text: i for i, piece in enumerate(model.pieces)}
        engine = models.WordLevel(vocabulary, unk_token=model.pieces[unknown].text)
    else:
        vocabulary = [(piece.text, piece.score) for piece in model.pieces]
        engine = models.Unigram(vocabulary, unk_id=unknown, byte_fallback=model.byte_fallback)
    tokenizer: Any = Tokenizer(engine)
    if model.algorithm == WORD:
        tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")

    steps = []
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    undo = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(undo + [decoders.Strip(" ", 1, 0)] * model.add_dummy_prefix)
    tokenizer.add_tokens(
        [
            AddedToken(piece.text, normalized=False, special=piece.kind != USER_DEFINED or piece.text in TURNS)
            for piece in model.pieces
            if piece.kind in (UNKNOWN, CONTROL, USER_DEFINED)
        ]
    )
    return tokenizer, model.add_dummy_prefix
