"""Compiles the grid that predictions are held against, and stores what the compiler reserves: `compiled.json`.

    python -m jaxtune.plan.refresh                     # cases that are not stored yet
    python -m jaxtune.plan.refresh --again NAME …      # these anew; --again alone: all

Each is a minute to ten of a CPU core, and what is done is stored at once.  Needs `pip install "libtpu==0.0.42.*"`.
"""

import argparse
import importlib.metadata
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxtune import cli
from jaxtune.config import get_default, set_value
from jaxtune.errors import UserError
from jaxtune.plan.abstract import open_config
from jaxtune.plan.chips import CHIPS, GIB
from jaxtune.plan.compile import Compiled, DoesNotFit, compile_config
from jaxtune.rundir import write_json_atomic

STORED = Path(__file__).with_name("compiled.json")

# What differs from the family's own default sizes, which for Gemma 2 are the 2b's and for Llama the 7b's.
MODELS: dict[str, dict[str, Any]] = {
    "gemma-2-2b": {"model_type": "gemma2"},
    "gemma-2-9b": {
        "model_type": "gemma2",
        "hidden_size": 3584,
        "intermediate_size": 14336,
        "num_hidden_layers": 42,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
    },
    "gemma-2-27b": {
        "model_type": "gemma2",
        "hidden_size": 4608,
        "intermediate_size": 36864,
        "num_hidden_layers": 46,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "query_pre_attn_scalar": 144,
    },
    "llama-2-7b": {"model_type": "llama"},
}


class Case(NamedTuple):
    """rows: a chip, at a time.  settings: of the config, besides."""

    model: str
    method: str
    chip: str
    chips: int
    rows: int
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        more = "".join(f" {key.split('.')[-1]}={value}" for key, value in self.settings.items())
        return f"{self.model} {self.method} {self.chip}-{self.chips} rows={self.rows}{more}"


NF4 = {"model.quant": "nf4"}

GRID = [
    *(Case("gemma-2-2b", "lora", "v5e", 8, rows, {}) for rows in (1, 2, 4, 8)),
    Case("gemma-2-2b", "lora", "v5e", 8, 1, {"data.max_length": 8192}),
    Case("gemma-2-2b", "lora", "v5e", 8, 2, NF4),
    Case("gemma-2-2b", "lora", "v5e", 8, 4, {"model.quant": "int8"}),
    Case("gemma-2-2b", "lora", "v5e", 8, 1, {"train.remat": "none"}),
    Case("gemma-2-2b", "lora", "v5e", 8, 4, {"mesh.tensor": 2}),
    Case("gemma-2-2b", "lora", "v5e", 1, 1, {}),
    Case("gemma-2-2b", "lora", "v5e", 1, 1, NF4),
    Case("gemma-2-2b", "p_tuning", "v5e", 8, 2, {}),
    Case("gemma-2-2b", "full", "v5e", 8, 1, {}),
    Case("gemma-2-9b", "lora", "v5e", 8, 1, {}),
    Case("gemma-2-9b", "lora", "v5e", 8, 1, NF4),
    Case("gemma-2-27b", "lora", "v5e", 8, 1, NF4),
    Case("gemma-2-27b", "lora", "v6e", 16, 1, {}),
    Case("gemma-2-2b", "lora", "v5p", 8, 2, {}),
    Case("gemma-2-2b", "lora", "v5e", 16, 2, {"mesh.slice": 2}),
    Case("llama-2-7b", "lora", "v5e", 8, 1, {}),
    Case("llama-2-7b", "full", "v6e", 16, 1, {}),
]


@contextmanager
def config_of(case: Case) -> Iterator[Any]:
    """The case's config, over a directory that has a config.json and no more."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "config.json").write_text(json.dumps(MODELS[case.model]))
        c: Any = get_default()
        c.model.id = directory
        c.peft.method = case.method
        if case.method == "lora":
            c.peft.r, c.peft.target_modules = 8, "all-linear"
        if case.method == "p_tuning":
            c.peft.num_virtual_tokens, c.peft.encoder_hidden_size = 20, 128
        c.data.max_length = 2048
        for key, value in case.settings.items():
            set_value(c, key, value)
        c.train.global_batch_size = case.rows * case.chips // c.mesh.tensor
        yield c


def stored() -> dict[str, dict[str, Any]]:
    return json.loads(STORED.read_text()) if STORED.is_file() else {}


def main(argv: Sequence[str]) -> int:
    parser = cli.Parser(prog="python -m jaxtune.plan.refresh", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("names", nargs="*", help="of cases; default: all")
    parser.add_argument("--again", action="store_true", help="also those that are stored")
    known = parser.parse_args(list(argv))
    cases = {case.name: case for case in GRID}
    if bad := [name for name in known.names if name not in cases]:
        raise UserError(f"There is no case {bad[0]!r}. There are:\n" + "\n".join(cases))
    jax.config.update("jax_platforms", "cpu")  # what is attached is of no concern
    for name in known.names or cases:
        if known.again or name not in stored():
            found = measure(cases[name])
            write_json_atomic(STORED, stored() | {name: found})
            print(
                f"{name}: {found.get('total', found.get('needs') or 0) / GIB:.2f} GiB, {found['seconds']} s", flush=True
            )
    return 0


def measure(case: Case) -> dict[str, Any]:
    """What the compiler says of a case."""
    with config_of(case) as c:
        found = compile_config(c, open_config(c), CHIPS[case.chip], case.chips)
    with_what = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    common = {"seconds": round(found.seconds), "with": with_what}
    if isinstance(found, DoesNotFit):
        return {"fits": False, "needs": found.needs, "message": found.message, **common}
    assert isinstance(found, Compiled)
    sizes = ("argument", "temp", "output", "alias", "code", "peak", "total", "collectives")
    return {"fits": True, **{name: getattr(found, name) for name in sizes}, "complaints": found.complaints, **common}


if __name__ == "__main__":
    cli.run(main)
