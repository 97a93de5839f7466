"""From one run to the next: what an adapter was trained over, written beside it, and what is another now.

PEFT's files name the base and no more.  `jaxtune.json`, which PEFT leaves alone, has under `base` the fingerprint of
its files and how it was quantised.  No jax: `torch_gpu` uses it too.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from jaxtune.hf.files import read_json

OURS = "jaxtune.json"  # what PEFT has no key for
LIMIT = 2**20


def trained_over(fingerprint: str, quant: str | None, double_quant: bool, quant_embedding: bool) -> dict[str, Any]:
    """A base as jaxtune.json has it.  fingerprint: of its files (`hf.files.fingerprint`)."""
    return {
        "fingerprint": fingerprint,
        "quant": quant,
        "double_quant": bool(quant == "nf4" and double_quant),
        "quant_embedding": bool(quant and quant_embedding),
    }


def read_ours(directory: Path) -> dict[str, Any]:
    """jaxtune.json of an adapter's directory; empty where there is none."""
    return read_json(directory / OURS, LIMIT) if (directory / OURS).is_file() else {}


def write_ours(directory: Path, values: Mapping[str, Any]) -> None:
    """Writes it, where there is anything to write."""
    if values:
        (directory / OURS).write_text(json.dumps(dict(values), indent=2, sort_keys=True) + "\n")


def differences(was: Mapping[str, Any] | None, now: Mapping[str, Any]) -> list[str]:
    """A line for each way in which an adapter's base is another than that which it was trained over.

    Args:
      was: None where it is not known.  now: without `fingerprint` where that is not to be compared.
    """
    if not was:
        return []
    lines = []
    if "fingerprint" in now and was.get("fingerprint") != now["fingerprint"]:
        lines.append("its base was another: other weights, or the same ones saved in another way")
    if how(was) != how(now):
        lines.append(f"its base was {how(was)}, and is {how(now)} now. Over the same one it computes what was trained")
    return lines


# Keys of a method that say which modules, in ways that may differ and mean the same.
MATCHED = ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern")


def others(
    stored: Any, asked: Mapping[str, Any], stored_targets: Collection[str], asked_targets: Collection[str]
) -> list[str]:
    """A line for each setting in which a config and the adapter that it starts from differ; the adapter's stand.

    Args:
      stored: the adapter's config.  asked: what the config sets.  …_targets: names of the modules that each adapts; of
        a config that names none, the adapter's.
    """
    lines = []
    if set(stored_targets) != set(asked_targets):
        was, now = (", ".join(sorted(names)) for names in (stored_targets, asked_targets))
        lines.append(f"it adapts {was}, and the config asks for {now}: its own targets stand")
    for key, now in asked.items():
        was = getattr(stored, key, now)
        if key not in MATCHED and was != now:
            lines.append(f"its {key} is {was!r}, and `peft.{key}` {now!r}: its own stands")
    return lines


def how(base: Mapping[str, Any]) -> str:
    """How a base is quantised, in the words of the config: 'quantised (quant=nf4, double_quant)'."""
    if not base.get("quant"):
        return "not quantised"
    return f"quantised ({', '.join(['quant=' + base['quant'], *_more(base)])})"


def held_as(base: Mapping[str, Any], dtype: str) -> str:
    """In what a base is held: 'nf4 over bfloat16', 'bfloat16'."""
    return " over ".join(filter(None, [" with ".join(filter(None, [base.get("quant"), *_more(base)])), dtype]))


def in_jaxtune(base: Mapping[str, Any]) -> str:
    """What `jaxtune.load` takes for such a base, after a comma."""
    if not base.get("quant"):
        return ""
    return "".join(f", {setting}" for setting in (f'quant="{base["quant"]}"', *(f"{key}=True" for key in _more(base))))


def in_transformers(base: Mapping[str, Any], dtype: str = "bfloat16") -> str:
    """What transformers' `from_pretrained` takes for such a base, after a comma."""
    if not base.get("quant"):
        return ""
    settings = "load_in_8bit=True"
    if base["quant"] == "nf4":
        settings = f'load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="{dtype}"'
        settings += ", bnb_4bit_use_double_quant=True" * bool(base.get("double_quant"))
    return f", quantization_config=transformers.BitsAndBytesConfig({settings})"


def auto_class(seq2seq: bool) -> str:
    """transformers' class that loads such models."""
    return "AutoModelForSeq2SeqLM" if seq2seq else "AutoModelForCausalLM"


def how_to_load(where: Path, directory: Path, dtype: str, base: Mapping[str, Any], *, seq2seq: bool = False) -> str:
    """What to type to use an adapter in transformers and peft.  directory: of the base.  seq2seq: it has an encoder."""
    return (
        f"The PEFT adapter is in {where}. To load it:\n"
        f"  base = transformers.{auto_class(seq2seq)}.from_pretrained({str(directory)!r}, dtype={dtype!r}"
        f"{in_transformers(base, dtype)})\n"
        f"  model = peft.PeftModel.from_pretrained(base, {str(where)!r})"
    )


def _more(base: Mapping[str, Any]) -> list[str]:
    return [key for key in ("double_quant", "quant_embedding") if base.get("quant") and base.get(key)]
