"""Text to ids and back, exactly as the checkpoint's own tokenizer does it.

`load_tokenizer` reads `tokenizer.json`, or a sentencepiece model, and the JSON beside it.  Everything in these files is
data: nothing they name is imported or run, and the chat template waits, inert, for `jaxtune.data.chat`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from jaxtyping import Int
from tokenizers import AddedToken, normalizers, pre_tokenizers

from jaxtune import spm
from jaxtune.data.chat import MAX_TEMPLATE_CHARS, TEMPLATES, render
from jaxtune.errors import MissingInputError, UserError

__all__ = ["TEMPLATES", "Spans", "Tokenizer", "load_tokenizer", "render"]

MAX_VOCABULARY_BYTES = 256 * 1024**2
MAX_JSON_BYTES = 16 * 1024**2

# Tokens that end a turn.  Generation stops at them wherever a vocabulary has them.
END_OF_TURN = ("<end_of_turn>", "<|im_end|>", "<|eot_id|>")
# What a bare vocabulary, without tokenizer_config.json, calls its special tokens.
USUAL = {
    "bos_token": ("<bos>", "<s>", "<|begin_of_text|>"),
    "eos_token": ("<eos>", "</s>", "<|end_of_text|>"),
    "pad_token": ("<pad>",),
}
SENTENCEPIECE = ("tokenizer.model", "spiece.model")


class Spans(NamedTuple):
    """A text's ids, and for each the characters [start, end) it stands for (end > start)."""

    ids: Int[np.ndarray, "T"]
    starts: Int[np.ndarray, "T"]
    ends: Int[np.ndarray, "T"]


@dataclass(frozen=True)
class Tokenizer:
    """A checkpoint's vocabulary with its special tokens."""

    bos_id: int | None
    eos_id: int
    pad_id: int
    # EOS, end-of-turn tokens of the vocabulary, and those of generation_config.json.
    stop_ids: tuple[int, ...]
    # One more than the largest id.
    vocab_size: int
    chat_template: str | None
    # transformers' `clean_up_tokenization_spaces`, which T5 sets.
    clean_up_spaces: bool = False
    backend: Any = field(repr=False, compare=False, default=None)

    @property
    def bos_token(self) -> str:
        return "" if self.bos_id is None else self.backend.id_to_token(self.bos_id)

    @property
    def eos_token(self) -> str:
        return self.backend.id_to_token(self.eos_id)

    def encode(self, text: str) -> list[int]:
        """The ids of a text; special tokens written in it count as such, and none is added."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each, faster."""
        return [encoding.ids for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def spans(self, texts: Sequence[str]) -> list[Spans]:
        """`encode` of each, with the characters that each id stands for."""
        found = []
        for encoding in self.backend.encode_batch(list(texts), add_special_tokens=False):
            offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
            starts = offsets[:, 0]
            # A byte of a character, or a space the tokenizer put in, may be zero characters wide.
            found.append(Spans(np.array(encoding.ids, np.int32), starts, np.maximum(offsets[:, 1], starts + 1)))
        return found

    def decode(self, ids: Sequence[int] | Int[np.ndarray, "T"], skip_special_tokens: bool = True) -> str:
        text = self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)
        if self.clean_up_spaces:
            for spaced in (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"):
                text = text.replace(spaced, spaced.strip())
        return text


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a checkpoint directory.

    `tokenizer.json` is taken as it stands, with one exception that transformers 5 makes too: where
    tokenizer_config.json says `legacy: false`, Llama's leading space goes before the text and not after special tokens.

    Raises:
      MissingInputError: no such directory, or no tokenizer in it.
      UserError: a file in it cannot be used; the message says which and why.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise MissingInputError(f"There is no directory {directory}. Give one with tokenizer.json or tokenizer.model.")
    config, special_map = _json(directory / "tokenizer_config.json"), _json(directory / "special_tokens_map.json")
    model, generation = _json(directory / "config.json"), _json(directory / "generation_config.json")

    if (directory / "tokenizer.json").is_file():
        name, backend = "tokenizer.json", _from_json(directory / "tokenizer.json", config, _vocab_size(model))
    else:
        name = next((name for name in SENTENCEPIECE if (directory / name).is_file()), None)
        if name is None:
            names = sorted(path.name for path in directory.iterdir())
            raise MissingInputError(
                f"{directory} has no tokenizer.json and no tokenizer.model. "
                f"It has: {', '.join(names[:20]) or 'nothing'}. "
                "Copy the checkpoint's tokenizer files there."
            )
        backend = _from_sentencepiece(directory / name, config, model)
    vocabulary = backend.get_vocab(with_added_tokens=True)
    vocab_size = max(vocabulary.values()) + 1
    if len(set(vocabulary.values())) != len(vocabulary):
        raise UserError(f"{directory / name} gives two tokens the same id. Download it again.")
    rows = _vocab_size(model)
    if 0 < rows < vocab_size:
        raise UserError(
            f"{directory / name} has ids up to {vocab_size - 1}; config.json says the model has {rows} rows. "
            "The tokenizer is not this model's. Copy the one it was trained with."
        )

    named = {key: _special(key, config, special_map, vocabulary) for key in USUAL}
    eos_ids = [named["eos_token"], *_ids(generation.get("eos_token_id")), *_ids(model.get("eos_token_id"))]
    eos_ids = [i for i in eos_ids if i is not None]
    if not eos_ids:
        raise UserError(
            f"The tokenizer in {directory} has no end-of-sequence token. Set `eos_token` in tokenizer_config.json."
        )
    stops = dict.fromkeys([*eos_ids, *(vocabulary[token] for token in END_OF_TURN if token in vocabulary)])
    if outside := [i for i in stops if not 0 <= i < vocab_size]:
        raise UserError(
            f"{directory} stops at token {outside[0]}; its tokenizer has ids 0 to {vocab_size - 1}. "
            "Correct `eos_token_id` in generation_config.json or config.json."
        )
    pad = named["pad_token"]
    return Tokenizer(
        bos_id=named["bos_token"],
        eos_id=eos_ids[0],
        pad_id=eos_ids[0] if pad is None else pad,
        stop_ids=tuple(stops),
        vocab_size=vocab_size,
        chat_template=_chat_template(directory, config),
        # transformers ignores the setting for BPE, where it would eat real spaces.
        clean_up_spaces=config.get("clean_up_tokenization_spaces") is True
        and type(backend.model).__name__ not in ("BPE",),
        backend=backend,
    )


# --- files ---


def _bytes(path: Path, limit: int) -> bytes:
    if path.stat().st_size > limit:
        raise UserError(f"{path} has {path.stat().st_size} bytes; {limit} is the most a file of this kind may have.")
    data = path.read_bytes()
    if data.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a Git LFS pointer, not the file itself. Run `git lfs pull`.")
    return data


def _json(path: Path) -> dict[str, Any]:
    """A JSON object, {} where there is no file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_bytes(path, MAX_VOCABULARY_BYTES if path.name == "tokenizer.json" else MAX_JSON_BYTES))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}). Download it again.") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, not an object. Download it again.")
    return value


def _from_json(path: Path, config: dict[str, Any], vocab_size: int) -> Any:
    text = _bytes(path, MAX_VOCABULARY_BYTES).decode("utf-8", errors="replace")
    try:
        backend: Any = tokenizers.Tokenizer.from_str(text)
        added = backend.get_added_tokens_decoder()
        beyond = [i for i, token in added.items() if 0 < vocab_size <= i and token.content not in END_OF_TURN]
        if beyond:
            # Gemma 3's text models share a tokenizer that has an image token they have no row for: to them it is text.
            spec = json.loads(text)
            spec["added_tokens"] = [token for token in spec["added_tokens"] if token["id"] not in beyond]
            backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
    except Exception as error:  # The library raises nothing narrower.
        raise UserError(f"{path} is not a tokenizer ({error}). Download it again.") from None
    # Saved settings of somebody's session: they would cut, fill or shift our rows.
    backend.no_truncation()
    backend.no_padding()
    backend.post_processor = None
    if config.get("legacy") is False and "Prepend" in str(backend.normalizer):
        _space_before_text_only(backend)
    return backend


def _from_sentencepiece(path: Path, config: dict[str, Any], model: dict[str, Any]) -> Any:
    backend, space_first = spm.load(_bytes(path, MAX_VOCABULARY_BYTES), str(path))
    size = backend.get_vocab_size()
    more = {
        int(i): token["content"]
        for i, token in config.get("added_tokens_decoder", {}).items()
        if str(i).isdigit() and isinstance(token, dict) and isinstance(token.get("content"), str)
    }
    t5 = "T5" in str(config.get("tokenizer_class", "")) if config else model.get("model_type") == "t5"
    if t5 and not more:
        # T5's sentinels lie behind the vocabulary in reverse.  (mT5 has none, and says so in its config.)
        count = config.get("extra_ids", 100)
        more = {size + i: f"<extra_id_{count - 1 - i}>" for i in range(count if isinstance(count, int) else 100)}
    for i, content in sorted(more.items()):
        backend.add_special_tokens([AddedToken(content, normalized=False, special=True)])
        if i >= size and backend.token_to_id(content) != i:
            raise UserError(
                f"tokenizer_config.json gives {content!r} the id {i}, but {path} has {size} pieces and leaves a gap. "
                "Copy the checkpoint's tokenizer.json there."
            )
    if space_first and config.get("legacy") is False:
        _space_before_text_only(backend)
    return backend


def _space_before_text_only(backend: Any) -> None:
    backend.normalizer = normalizers.Sequence([])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)


# --- what the files say ---


def _vocab_size(model: dict[str, Any]) -> int:
    """The rows of the embedding by config.json, 0 where it does not say."""
    inner = model.get("text_config")
    size = model.get("vocab_size", inner.get("vocab_size") if isinstance(inner, dict) else None)
    return size if isinstance(size, int) else 0


def _special(key: str, config: dict, special_map: dict, vocabulary: dict[str, int]) -> int | None:
    for source in (config, special_map):
        token = source.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return vocabulary.get(token)
    if config or special_map:
        return None  # They name their special tokens, and this is not among them.
    return next((vocabulary[token] for token in USUAL[key] if token in vocabulary), None)


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [i for i in values if isinstance(i, int) and not isinstance(i, bool)]


def _chat_template(directory: Path, config: dict[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    if path.is_file():
        return _bytes(path, 4 * MAX_TEMPLATE_CHARS).decode("utf-8", errors="replace")
    template = _json(directory / "chat_template.json").get("chat_template", config.get("chat_template"))
    if isinstance(template, list):  # Several by name.
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default", next(iter(named.values()), None))
    return template if isinstance(template, str) else None
