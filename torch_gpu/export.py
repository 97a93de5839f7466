"""Writes the adapter of a run, also of one that was stopped: `python -m torch_gpu.export RUN [--out DIR]`.

A run that ends writes its adapter by itself.  No GPU is needed, and nothing is quantised: an adapter's file does not
hold the base.  To merge it, or to push it: `python -m jaxtune.export RUN/adapter --base MODEL ...`.
"""

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from jaxtune import cli, config, kept
from jaxtune.errors import MissingInputError, UserError
from jaxtune.hf.card import Run, card
from jaxtune.hf.files import check_replaceable, fingerprint
from jaxtune.hf.handover import how_to_load, trained_over
from jaxtune.scoring import goal_of
from jaxtune.tokenizer import load_tokenizer
from torch_gpu import loop, method, model, quiet
from torch_gpu.train import encode_text


def main(argv: Sequence[str]) -> int:
    parser = cli.Parser(
        prog="python -m torch_gpu.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", help="a run directory of torch_gpu.train")
    parser.add_argument("--out", help="where to write; default: adapter (-STEP) in the run directory")
    parser.add_argument("--checkpoint", default="newest", help="newest, best (by checkpoint.metric) or a step")
    parser.add_argument("--base", help="the base model, a directory or Hub id; default: the run's model.id")
    arguments = parser.parse_args(list(argv))
    workdir = Path(arguments.source).expanduser().resolve()
    if not (workdir / "run.json").is_file():
        raise MissingInputError(f"{workdir} is no run directory: it has no run.json.")
    export(workdir, arguments)
    return 0


def export(workdir: Path, arguments: argparse.Namespace) -> None:
    """Writes the adapter of one of a run's checkpoints.

    Raises:
      UserError: and its kinds, for what is missing, damaged, or of another model or program.
    """
    quiet.libraries()
    c: Any = cli.load_config(str(workdir / "config.json"))
    c.model.id = arguments.base or c.model.id
    plain = config.to_json(c)
    step = kept.pick(workdir / "checkpoints", arguments.checkpoint, print, goal_of(plain))
    record = kept.read_record(step)
    if record["identity"].get("backend") != "torch_gpu":
        raise UserError(f"{workdir} is a run of jaxtune: python -m jaxtune.export {workdir}.")
    base = model.describe(c.model.id, c.model.revision)
    over = trained_over(fingerprint(base.directory), c.model.quant, c.model.double_quant, False)
    if record["identity"]["base"] != over["fingerprint"]:
        raise UserError(
            f"{base.directory} is not the model that {workdir} trained on: its files are others. Give that with --base."
        )
    usual = "adapter" if arguments.checkpoint == "newest" else f"adapter-{arguments.checkpoint}"
    out = Path(arguments.out).expanduser() if arguments.out else workdir / usual
    check_replaceable(out, base.directory)
    dtype = getattr(torch, c.model.dtype)
    loaded = model.load(base, plain["model"] | {"quant": None}, dtype, {"": "cpu"})
    encode = functools.partial(encode_text, load_tokenizer(base.directory))
    steps = int(record["identity"].get("train.steps", record["step"]))
    adapted = method.adapt(loaded, plain["peft"], total_steps=steps, quantised=False, encode=encode)
    loop.restore(adapted, step)
    name, seq2seq = c.export.base_model_name_or_path or c.model.id, loaded.config.is_encoder_decoder
    scores = {key: float(value) for key, value in record["metrics"].items()}
    readme = card("adapter", name, c.peft.method, Run(plain, scores), over=over, seq2seq=seq2seq)
    method.export(adapted, out, name=name, readme=readme, over=over)
    print(f"{step} of {workdir}\n{how_to_load(out, base.directory, c.model.dtype, over, seq2seq=seq2seq)}")


if __name__ == "__main__":
    cli.run(main)
