"""What a run trained, or a PEFT directory, over its base: named on a command line, and opened to be scored."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxtune import adapt, cli, config
from jaxtune import mesh as meshes
from jaxtune.adapt import Adapted
from jaxtune.data.virtual import NONE, Virtual
from jaxtune.errors import MissingInputError, UserError
from jaxtune.hf import handover
from jaxtune.hf.adapters import load_adapter, place_adapters
from jaxtune.hf.base import Base, load_base, open_base
from jaxtune.kept import pick, read_record, steps
from jaxtune.lm import encode_prompt
from jaxtune.peek import read_trainable
from jaxtune.peft import METHODS
from jaxtune.peft.method import virtual_of
from jaxtune.quant import scheme_of
from jaxtune.rundir import read_json_or
from jaxtune.scoring import goal_of
from jaxtune.tokenizer import load_tokenizer
from jaxtune.typing import Tree


class Trained(NamedTuple):
    """A model whose weights are not read yet.

    name: for tables.  config: the settings that it is scored with.  virtual: what the data puts before each row.
    where: the directory of what was trained; the base's id where nothing was.  variables: takes the mesh and what loads
    the base's parameters, and loads.  workdir: of a run.
    """

    name: str
    config: Any
    base: Base
    virtual: Virtual
    where: str
    variables: Callable[[Mesh, Callable[[Base], Tree]], Tree]
    workdir: Path | None = None


def run_config(workdir: Path) -> Any:
    """The settings of a run.

    Raises:
      MissingInputError: there is no run.  UserError: its config.json cannot be read.
    """
    if not (workdir / "run.json").is_file() or not (workdir / "config.json").is_file():
        there = sorted(p.name for p in workdir.iterdir())[:20] if workdir.is_dir() else None
        is_peft = "adapter_config.json" in (there or ())
        hint = " It is a PEFT directory: give it as --adapter, with --model." if is_peft else ""
        raise MissingInputError(
            f"{workdir} is no run directory (with run.json and config.json). "
            + ("There is no such directory." if there is None else f"It holds: {', '.join(there) or 'nothing'}.{hint}")
        )
    return cli.load_config(str(workdir / "config.json"))


def opened(c: Any) -> Base:
    """The base of a config's `model` section.

    Raises:
      MissingInputError, UserError: as `open_base`.
    """
    quant = scheme_of(c.model.quant, c.model.double_quant, c.model.quant_embedding)
    return open_base(c.model.id, revision=c.model.revision, dtype=c.model.dtype, quant=quant)


def bare(name: str, c: Any, workdir: Path | None = None) -> Trained:
    """A model as it stands."""
    base = opened(c)
    return Trained(name, c, base, NONE, c.model.id, lambda mesh, load: {"params": load(base)}, workdir)


def over(name: str, c: Any, adapter: Path, say: Callable[[str], None], workdir: Path | None = None) -> Trained:
    """A PEFT directory over the base of a config.

    Raises:
      MissingInputError, UserError: as `load_adapter`.
    """
    base = opened(c)
    peft = load_adapter(adapter, base.layout, soft_prompt_scale=c.peft.soft_prompt_scale)
    for line in handover.differences(peft.trained_over, base.settings):
        say(f"WARNING: {adapter}: {line}.")

    def variables(mesh: Mesh, load: Callable[[Base], Tree]) -> Tree:
        return {"params": load(base), **place_adapters(mesh, peft.adapters)}

    return Trained(name, c, base, virtual_of(peft.method, base.layout, peft.config), str(adapter), variables, workdir)


def of_run(name: str, c: Any, workdir: Path, which: str | None, say: Callable[[str], None]) -> Trained:
    """What a run left: its adapter or model where it has ended, else its newest checkpoint.

    Args:
      c: its config.  which: newest | best | a step: that checkpoint instead.

    Raises:
      MissingInputError: it has neither.  UserError: its checkpoints are torch_gpu's, or of another base.
    """
    if which is None and read_json_or(workdir / "run.json", {}).get("status") == "finished":
        if (workdir / "adapter" / "adapter_config.json").is_file():
            return over(name, c, workdir / "adapter", say, workdir)
        if (workdir / "model" / "config.json").is_file():
            c.model.id, c.model.revision = str(workdir / "model"), None
            return bare(name, c, workdir)
    if not steps(workdir / "checkpoints"):
        raise MissingInputError(
            f"{workdir} has no checkpoint"
            + (" yet, and it has not ended" if which is None else f", and {which!r} is asked for")
            + ": there is nothing to score. Let it run on until it saves (`train.save_every`)."
        )
    plain = config.to_json(c)
    step = pick(workdir / "checkpoints", which or "newest", say, goal_of(plain))
    base = opened(c)
    check_base(step, base, workdir, "--model")

    def variables(mesh: Mesh, load: Callable[[Base], Tree]) -> Tree:
        # What trains itself is loaded otherwise: in float32, and not quantised.
        params = load(base) if c.peft.method in METHODS else None
        adapted, trainable = at_step(step, c, base, mesh, params)
        return adapted.variables(trainable)

    return Trained(name, c, base, adapt.virtual_tokens(plain["peft"], base), str(step), variables, workdir)


def check_base(step: Path, base: Base, workdir: Path, flag: str) -> None:
    """Refuses a checkpoint that this model cannot go under.

    Args:
      flag: which gives another base.

    Raises:
      UserError: it is torch_gpu's, or was trained over another base.
    """
    identity = read_record(step)["identity"]
    if other := identity.get("backend"):
        raise UserError(
            f"{workdir} is a run of {other}, whose checkpoints jaxtune does not read. Write its adapter by "
            f"python -m {other}.export {workdir}, and give {workdir / 'adapter'} here, with {flag}."
        )
    if identity.get("base", base.fingerprint) != base.fingerprint:
        raise UserError(
            f"{base.directory} is not the model that {workdir} trained on: its files are others. Give that with {flag}."
        )


def at_step(
    step: Path, c: Any, base: Base, mesh: Mesh, params: Tree | None = None
) -> tuple[Adapted, dict[str, jax.Array]]:
    """(what a run's config makes of its base, what had trained of it at a checkpoint).

    Args:
      params: the base's, where they are loaded already.
    """
    record = read_record(step)
    # Ranks' schedules end where the run's do; by then nothing depends on it but the exported number.
    total = int(record["identity"].get("train.steps", record["step"]))
    encode = functools.partial(encode_prompt, load_tokenizer(base.directory), ended=base.encodes)
    how: dict[str, Any] = {"dtype": c.model.dtype, "seed": c.train.seed, "total_steps": total, "encode": encode}
    adapted = adapt.adapt(config.to_json(c)["peft"], base, mesh, **how, params=params)
    return adapted, read_trainable(step, adapted.trainable)


def named(arguments: Any, say: Callable[[str], None]) -> list[Trained]:
    """The models that the command line names, none of their weights read.

    Raises:
      UserError: and its kinds: flags that do not go together; no such run, model or adapter.
    """
    if arguments.compare:
        if other := next((f for f in ("workdir", "adapter", "checkpoint") if getattr(arguments, f)), None):
            raise UserError(f"--compare names what is scored, and --{other} does too. Drop one.")
        names = list(dict.fromkeys(name.strip() for name in arguments.compare.split(",") if name.strip()))
        runs = {name: changed(run_config(path_of(name)), arguments) for name in names if name != "base"}
        if not runs:
            raise UserError("--compare names no run. It takes run directories with commas between, and base.")
        models = [of_run(name, c, path_of(name), None, say) for name, c in runs.items()]
        return (bases_of(runs) if "base" in names else []) + models
    if arguments.workdir:
        if arguments.adapter or arguments.config:
            flag = "adapter" if arguments.adapter else "config"
            raise UserError(f"--workdir is a run, with its own {flag}; --{flag} goes with --model. Drop one.")
        workdir = path_of(arguments.workdir)
        c = changed(run_config(workdir), arguments)
        return [of_run(arguments.workdir, c, workdir, arguments.checkpoint, say)]
    if arguments.checkpoint:
        raise UserError("--checkpoint is of a run; give it as --workdir.")
    c = cli.load_config(arguments.config) if arguments.config else config.get_default()
    c = changed(c, arguments)
    if not c.model.id:
        raise UserError("There is no model. Give --model ID, or a recipe that names one with --config.")
    if not arguments.adapter:
        return [bare(c.model.id, c)]
    adapter = path_of(arguments.adapter)
    held_as_trained(c, adapter, say)
    return [over(arguments.adapter, c, adapter, say)]


def held_as_trained(c: Any, adapter: Path, say: Callable[[str], None]) -> None:
    """Sets that the base is quantised as the adapter's was, where nothing is set."""
    was = handover.read_ours(adapter).get("base") or {}
    if was.get("quant") and not c.model.quant:
        say(f"{adapter} was trained over a base that was {handover.how(was)}, and so is this one")
        c.model.update({key: was[key] for key in ("quant", "double_quant", "quant_embedding")})


def path_of(text: str) -> Path:
    return Path(text).expanduser().resolve()


def bases_of(runs: dict[str, Any]) -> list[Trained]:
    """The runs' bases without what they trained, each once: `base`, or `base of RUN` where they differ."""
    found: dict[Any, tuple[str, Any]] = {}
    for name, c in runs.items():
        found.setdefault(key_of(opened(c)), (name, c))
    many = len(found) > 1
    return [bare(f"base of {name}" if many else "base", c) for name, c in found.values()]


def changed(c: Any, arguments: Any) -> Any:
    """A config with what the command line says otherwise."""
    if arguments.data:
        if arguments.data not in (c.data.train, c.data.eval):
            c.data.name = c.data.revision = None  # of another dataset
        c.data.eval = arguments.data
    given = {
        "model.id": arguments.model,
        "model.quant": arguments.quant,
        "model.dtype": arguments.dtype,
        "data.eval_split": arguments.split,
        "data.max_eval_rows": arguments.max_rows,
        "evaluate.batch_size": arguments.batch_size,
        "evaluate.max_new_tokens": arguments.max_new_tokens,
        **arguments.settings,
    }
    for path, value in given.items():
        if value is not None:
            config.set_value(c, path, value)
    if arguments.split and Path(c.data.eval or "").expanduser().is_file():
        raise UserError(
            f"--split is {arguments.split!r}, and {c.data.eval} is a file, which has no splits. Drop it, or give that "
            "split's file as --data."
        )
    if not c.data.eval:
        raise MissingInputError(
            "There are no rows to score: `data.eval` is not set. Give them with --data FILE, or a Hub dataset's id."
        )
    c.data.train = c.data.train or c.data.eval  # a config needs one
    if c.model.id:
        config.check(c)
    return c


def mesh_of(c: Any, say: Callable[[str], None]) -> Mesh:
    """The run's mesh, or all devices of this machine in `fsdp` where it was for others."""
    try:
        return meshes.make_mesh(c.mesh.data, c.mesh.fsdp, c.mesh.tensor, slices=c.mesh.slice)
    except UserError as error:
        say(f"{error}\n  Here: data=1, fsdp={jax.device_count()}, tensor=1")
        return meshes.make_mesh(1, -1, 1)


def one_at_a_time(mesh: Mesh) -> Callable[[Base], Tree]:
    """A loader of bases' parameters that keeps the last one, for models that share it."""
    held: dict[Any, Tree] = {}

    def load(base: Base) -> Tree:
        if key_of(base) not in held:
            held.clear()
            held[key_of(base)] = load_base(base, mesh, lambda path: jnp.dtype(base.model.dtype))
        return held[key_of(base)]

    return load


def key_of(base: Base) -> tuple[Any, ...]:
    """The same for bases whose parameters are the same."""
    return base.directory.resolve(), base.quant, str(jnp.dtype(base.model.dtype))
