"""Writes what was trained, and sends it to the Hub: `python -m jaxtune.export SOURCE [--merged] [--out DIR]`.

SOURCE is a run directory, also of a run that was stopped or goes on, or a PEFT directory.  The result is a PEFT
directory or, with --merged, a Hugging Face checkpoint with the adapter folded into its weights.  Before it is there it
is held against the adapted model.

--push_to_hub ID sends the result in one commit.  An export that is there already is sent as it is:

  python -m jaxtune.export runs/mine/adapter --push_to_hub me/my-adapter
"""

import argparse
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from jaxtune import cli, config, hosts, results, trained
from jaxtune import mesh as meshes
from jaxtune.errors import MissingInputError, UserError
from jaxtune.hf import handover, hub
from jaxtune.hf.base import Base, open_base
from jaxtune.hf.card import Run, card
from jaxtune.hf.files import check_replaceable, read_json
from jaxtune.hf.merge import SAY_ONTO, originals
from jaxtune.hf.weights import size_of, stored_dtype
from jaxtune.kept import pick, read_record
from jaxtune.lm import check_dtype, load
from jaxtune.probe import write_adapter
from jaxtune.quant import scheme_of
from jaxtune.scoring import goal_of


def main(argv: Sequence[str]) -> int:
    arguments = parse(argv)
    hosts.alone("python -m jaxtune.export")
    source = Path(arguments.source).expanduser().resolve()
    if arguments.push_to_hub:
        hub.check(arguments.push_to_hub)
    has_adapter = (source / "adapter_config.json").is_file()
    if (source / "run.json").is_file():
        where = export_run(source, arguments)
    elif not has_adapter and not (source / "config.json").is_file():
        there = sorted(p.name for p in source.iterdir())[:20] if source.is_dir() else None
        raise MissingInputError(
            f"{source} is neither a run directory (with run.json) nor a PEFT directory (with adapter_config.json). "
            + ("There is no such directory." if there is None else f"It holds: {', '.join(there) or 'nothing'}.")
        )
    elif arguments.merged or arguments.out or not arguments.push_to_hub:
        where = export_adapter(source, arguments)
    else:
        where = source
    if arguments.push_to_hub:
        try:
            print(f"pushed: {hub.push(where, arguments.push_to_hub, private=arguments.private)}")
        except UserError as error:
            again = hub.again(where, arguments.push_to_hub, arguments.private)
            raise type(error)(f"{error}\nTo push it:\n  {again}") from None
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Reads the command line.

    Raises:
      UserError: an unknown flag, or a value that cannot be meant.
    """
    for word in argv:
        config.find_secret("The command line", word)
    parser = cli.Parser(
        prog="python -m jaxtune.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("source", help="a run directory or a PEFT directory")
    add("--out", help="where to write; default: adapter, merged or model (-STEP) in the run directory")
    add("--merged", action="store_true", help="fold the adapter into the weights and write a whole checkpoint")
    add("--checkpoint", default="newest", help="of a run: newest, best (checkpoint.metric) or a step; default: newest")
    add("--base", help="the base model, a directory or Hub id; default: the run's model.id")
    add("--base_model_name_or_path", help="what the export calls its base; default: the run's, or the adapter's")
    add(
        "--onto", help="with --merged over a quantised base: dequantised (what was trained) or original (before it was)"
    )
    add(
        "--dtype",
        help="of a checkpoint: float32, bfloat16, float16; default: the run's, else that of the files",
    )
    add("--max_shard_size", help="of a checkpoint's files; default: 4GB")
    add("--push_to_hub", metavar="ID", help="send it to this repository, in one commit; HF_TOKEN or `hf auth login`")
    add("--private", action="store_true", help="where --push_to_hub creates the repository, make it private")
    arguments = parser.parse_args(list(argv))
    check_dtype(arguments.dtype or "float32")
    size_of(arguments.max_shard_size or "4GB")
    return arguments


def export_run(workdir: Path, arguments: argparse.Namespace) -> Path:
    """Exports a step of a run; returns the export's directory.

    Raises:
      UserError: and its kinds, for what is missing, damaged, or of another model.
    """
    c: Any = cli.load_config(str(workdir / "config.json"))
    c.model.id = arguments.base or c.model.id
    c.export.base_model_name_or_path = arguments.base_model_name_or_path or c.export.base_model_name_or_path
    c.export.push_to_hub = arguments.push_to_hub
    config.check(c)
    plain = config.to_json(c)
    results.check_push(plain, arguments.merged)
    kind = results.export_kind(plain, arguments.merged)
    refuse_flags(kind, arguments)
    step = pick(workdir / "checkpoints", arguments.checkpoint, print, goal_of(plain))
    quant = scheme_of(c.model.quant, c.model.double_quant, c.model.quant_embedding)
    base = open_base(c.model.id, revision=c.model.revision, dtype=c.model.dtype, quant=quant)
    results.check_quantised(plain, base, arguments.merged)
    if kind == "merged":
        originals(base, arguments.onto)
    usual = kind if arguments.checkpoint == "newest" else f"{kind}-{arguments.checkpoint}"
    out = Path(arguments.out).expanduser() if arguments.out else workdir / usual
    check_replaceable(out, base.directory)
    trained.check_base(step, base, workdir, "--base")
    mesh = meshes.make_mesh(1, -1, 1)
    print(f"{step} of {workdir}, over {c.model.id}")
    with jax.set_mesh(mesh):
        adapted, found = trained.at_step(step, c, base, mesh)
        more = {"dtype": arguments.dtype, "shard_bytes": size_of(arguments.max_shard_size or "4GB")}
        more["onto"] = arguments.onto
        run = Run(plain, scores_of(workdir, read_record(step)))
        results.export(workdir, base, mesh, adapted, found, run, print, out=out, merged=arguments.merged, **more)
    return said(out, base)


def export_adapter(source: Path, arguments: argparse.Namespace) -> Path:
    """Exports a PEFT directory over its base; returns the export's directory.

    Raises:
      UserError: and its kinds, for what is missing or does not fit.
    """
    named = read_json(source / "adapter_config.json").get("base_model_name_or_path")
    if not arguments.base:
        raise UserError(
            f"{source} is an adapter: give its base model with --base. It names {named!r}, and jaxtune follows no name "
            "in a file by itself."
        )
    if not arguments.out:
        raise UserError("--out is missing: where to write. (With --push_to_hub alone an export is sent as it is.)")
    out = Path(arguments.out).expanduser()
    refuse_flags("merged" if arguments.merged else "adapter", arguments)
    base = open_base(arguments.base)
    check_replaceable(out, base.directory, source)
    dtype = stored_dtype(base.directory)
    over = handover.read_ours(source).get("base") or {}
    if arguments.merged and over.get("quant") and arguments.onto is None:
        raise UserError(f"{source} was trained over a base that was {handover.how(over)}. {SAY_ONTO}")
    quant: dict[str, Any] = {key: over[key] for key in ("quant", "double_quant", "quant_embedding") if over}
    how: dict[str, Any] = {"dtype": dtype, "mesh": meshes.make_mesh(1, -1, 1)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the base is not quantised: --onto has said so
        lm = load(arguments.base, adapter=source, **how, **(quant if arguments.onto == "dequantised" else {}))
    if lm.peft is None:
        raise AssertionError("an adapter was loaded")
    name = arguments.base_model_name_or_path or named or arguments.base
    lm.peft = lm.peft._replace(base=name)
    if arguments.merged:
        found = lm.save_merged(out, arguments.dtype or dtype, arguments.max_shard_size or "4GB", arguments.onto)
        print(results.merge_report(arguments.dtype or dtype, found, over.get("quant"), arguments.onto))
    else:
        about = {"repo_id": arguments.push_to_hub, "over": over, "seq2seq": lm.base.encodes}
        readme = card("adapter", name, lm.peft.method.PEFT_TYPE.lower(), **about)
        write_adapter(out, lm.base, lm.mesh, lm.variables, lm.peft, name, readme=readme, say=print)
    return said(out, base)


def refuse_flags(kind: str, arguments: argparse.Namespace) -> None:
    """Refuses what would be ignored.

    Raises:
      UserError: naming the flag.
    """
    for flag in ("dtype", "max_shard_size", "onto"):
        if kind == "adapter" and getattr(arguments, flag):
            raise UserError(f"--{flag} is for checkpoints; an adapter is one float32 file. Did you mean --merged?")


def scores_of(workdir: Path, record: dict[str, Any]) -> dict[str, float]:
    """The run's final scores where this is its last step, else those of the checkpoint."""
    path = workdir / "eval.json"
    final = json.loads(path.read_text()) if path.is_file() else {}
    found = final if final.get("step") == record["step"] else record["metrics"]
    return {name: float(value) for name, value in found.items() if name != "step"}


def said(where: Path, base: Base) -> Path:
    print(results.how_to_load(where, base))
    return where


if __name__ == "__main__":
    cli.run(main)
