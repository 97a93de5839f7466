"""Fine-tunes a model: `python -m jaxtune.train --config configs/gemma_lora.py --workdir runs/x`.

The same command goes on where the run stopped, however it was stopped, and ends in the same bits.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxtune import adapt, cli, config, evaluate, optim, results, rundir, steplog, tree
from jaxtune import mesh as meshes
from jaxtune.checkpoint import Checkpoints
from jaxtune.console import Console, Progress
from jaxtune.data.batches import Batch, eval_batches
from jaxtune.data.splits import fingerprint, read_prompts, read_splits, rows_to_train, train_batches
from jaxtune.errors import CannotCreateError
from jaxtune.hf import hub
from jaxtune.hf.base import open_base
from jaxtune.hf.card import Run
from jaxtune.hf.handover import held_as
from jaxtune.lm import encode_prompt
from jaxtune.metrics import MetricsLog
from jaxtune.quant import scheme_of
from jaxtune.rundir import STOPPED
from jaxtune.signals import stop_requests
from jaxtune.state import identity, make_state, resume, to_save
from jaxtune.step import eval_step, train_step
from jaxtune.tokenizer import load_tokenizer

SHOWN = 8  # answers in the table


def main(argv: Sequence[str]) -> int:
    arguments = cli.parse("jaxtune.train", argv, __doc__ or "")
    workdir = rundir.open_workdir(arguments.workdir)
    first = jax.process_index() == 0  # alone writes to the run directory
    record = rundir.RunRecord(workdir, arguments.command, quiet=not first)
    with (
        rundir.run_lock(workdir) if first else contextlib.nullcontext(),
        Console(workdir / "log.txt", quiet=not first) as console,
        stop_requests() as stop,
    ):
        try:
            code = train(arguments.config, workdir, console, stop, record.start, record.note)
        except BaseException as error:
            console.record(f"error: {str(error) or type(error).__name__}")
            record.fail(error)
            raise
        record.end(code)
        if code == STOPPED:
            console.say(f"Stopped; what was done is saved. To go on:\n  {arguments.command}")
        return code


def train(
    c: Any,
    workdir: Path,
    console: Console,
    stop: Sequence[int] = (),
    accepted: Callable[[dict[str, Any]], None] = lambda config: None,
    note: Callable[..., None] = lambda **facts: None,
) -> int:
    """The run, from a checked config to an exported adapter; returns the exit code.

    Args:
      stop: no longer empty when the run is to stop.
      accepted: called with the plain config once nothing of the command is left to refuse.
      note: called with what the finished run took.
    """
    plain = config.to_json(c)
    usual = adapt.learning_rate(plain["peft"])  # refuses what it cannot mean before anything is read
    if c.optim.learning_rate is None:
        c.optim.learning_rate = plain["optim"]["learning_rate"] = usual
    results.check_push(plain)
    optim.check_offload(c.optim)

    # ---------------------------------------------------------------- Data: tokenised before a weight is loaded
    quant = scheme_of(c.model.quant, c.model.double_quant, c.model.quant_embedding)
    how = {"dtype": c.model.dtype, "remat": c.train.remat == "full", "quant": quant}
    base = open_base(c.model.id, revision=c.model.revision, **how)
    results.check_quantised(plain, base)
    adapt.check_targets(plain["peft"], base)
    tokenizer = load_tokenizer(base.directory)
    virtual = adapt.virtual_tokens(plain["peft"], base)
    rows, held, length = read_splits(c.data, tokenizer, console.say, virtual)
    prompts = read_prompts(c.data, tokenizer, c.evaluate.samples, virtual)
    size, turns = c.train.global_batch_size, c.train.gradient_accumulation_steps
    end = rows_to_train(c.train, rows)
    total = math.ceil(end / size)
    if c.optim.warmup_steps >= total:
        console.say(
            f"WARNING: `optim.warmup_steps` is {c.optim.warmup_steps} and the run has {total} steps, so that it never "
            "reaches `optim.learning_rate`"
        )

    # ---------------------------------------------------------------- Devices
    mesh = meshes.make_mesh(c.mesh.data, c.mesh.fsdp, c.mesh.tensor)
    eval_size = c.evaluate.batch_size or size // turns
    meshes.check_batch(mesh, size // turns, "`train.global_batch_size` / `train.gradient_accumulation_steps`")
    meshes.check_batch(mesh, eval_size, "`evaluate.batch_size`")
    share = {"process_index": jax.process_index(), "process_count": jax.process_count()}

    def put(batch: Batch, turns: int | None = None) -> dict[str, jax.Array]:
        """A batch on its devices: [B, T], or [A, B/A, T] for `turns` = A micro-batches."""
        where = meshes.batch_sharding(mesh, leading=turns is not None)
        cut = {k: v if turns is None else v.reshape(turns, -1, length) for k, v in batch.items()}
        return {k: jax.make_array_from_process_local_data(where, v) for k, v in cut.items()}

    with jax.set_mesh(mesh):
        # ------------------------------------------------------------ Model, adapters, optimiser
        form = held_as(base.settings, c.model.dtype)
        console.say(
            f"model: {c.model.id}, {tree.count(base.abstract):,} parameters, {form}, on {mesh.size} "
            f"{jax.default_backend()}"
        )
        how = {"dtype": c.model.dtype, "seed": c.train.seed, "total_steps": total}
        encode = functools.partial(encode_prompt, tokenizer)
        adapted = adapt.adapt(plain["peft"], base, mesh, **how, encode=encode)
        console.say(
            f"{c.peft.method}: {tree.count(adapted.trainable):,} parameters train, learning rate "
            f"{c.optim.learning_rate:g}"
        )
        if c.peft.init_from and adapted.peft:
            console.say(f"  from {c.peft.init_from}, with its settings: {adapted.peft.config}")
            for line in adapt.handed_over(plain["peft"], base):
                console.say(f"WARNING: {c.peft.init_from}: {line}")
        schedule = optim.make_schedule(c.optim, total)
        optimiser = adapted.optimiser(optim.make_optimiser(c.optim, schedule))
        if c.optim.offload:
            optimiser = optim.offloaded(optimiser)
        state = make_state(optimiser, adapted.trainable, mesh, offload=c.optim.offload)
        frozen = adapted.frozen
        parts = {"model": base.model, "structure": adapted.structure}
        rule = {"optimiser": optimiser, "schedule": schedule, "seed": c.train.seed, "penalty": adapted.penalty()}
        step = jax.jit(functools.partial(train_step, **parts, **rule), donate_argnums=0)
        score = jax.jit(functools.partial(eval_step, **parts))

        def eval_loss() -> float:
            batches = eval_batches(held, eval_size, length, **share) if held else []
            return evaluate.mean_loss(lambda batch: score(state.trainable, frozen, put(batch)), batches)

        def answers(trainable: dict[str, jax.Array]) -> list[str]:
            how = {"max_new_tokens": c.evaluate.max_new_tokens, "shards": meshes.batch_shards(mesh)}
            return evaluate.answer(base.model, adapted.variables(trainable), tokenizer, prompts, **how)

        # ------------------------------------------------------------ Resume
        same = identity(plain, total, base=base.fingerprint, rows=fingerprint(rows))
        keep = {"keep_last_n": c.checkpoint.keep_last_n, "keep_best_n": c.checkpoint.keep_best_n}
        with Checkpoints(workdir / "checkpoints", **keep, identity=same, say=console.say) as checkpoints:
            state, cursor = resume(checkpoints, state)
            start = n = int(state.step)
            if start and c.checkpoint.resume == "never":
                raise CannotCreateError(
                    f"{workdir} has checkpoints and `checkpoint.resume` is never. Give a new --workdir."
                )
            accepted(plain)
            with (
                MetricsLog(workdir, start, c.logging.tensorboard, console.say, quiet=jax.process_index() > 0) as log,
                Progress(console, total=total, start=start, log_every=c.train.log_every) as progress,
            ):
                steps = steplog.StepLog(log, progress)

                # ---------------------------------------------------- Before the first step
                if start:
                    console.say(f"resumed at step {start} of {total}, row {cursor}")
                elif held:
                    steps.evaluation(0, eval_loss())
                if prompts and not (start and evaluate.has_answers(workdir / "samples.jsonl", prompts)):
                    before = answers(adapted.trainable)
                    evaluate.write_answers(workdir / "samples.jsonl", prompts, before=before)
                if stop:
                    return STOPPED

                # ---------------------------------------------------- Loop
                order: dict[str, Any] = {"batch_size": size, "seed": c.train.seed, "shuffle": c.data.shuffle, **share}
                scores: dict[str, float] = {}
                steps.restart_clock()
                coming = train_batches(rows, **order, start_row=cursor, stop_row=end, length=length)
                for batch, cursor in coming:
                    n += 1
                    state, metrics = step(state, frozen, put(batch, turns))
                    steps.add(n, metrics, tokens=int(batch["segment_ids"].sum()), rows=cursor)
                    evaluating = held and (n == total or (c.train.eval_every and n % c.train.eval_every == 0))
                    if evaluating or stop or n == total or n % c.train.save_every == 0:
                        steps.flush()
                        scores = {"eval_loss": eval_loss()} if evaluating else {}
                        if scores:
                            steps.evaluation(n, scores["eval_loss"])
                        checkpoints.save(n, to_save(state), rows=cursor, metrics=scores)
                        steps.restart_clock()
                    if stop and n < total:
                        return STOPPED
            checkpoints.wait()

        # ------------------------------------------------------------ After the last
        if held and not scores:  # the run had ended before, and this command only completes it
            scores = {"eval_loss": eval_loss()}
        if prompts:
            before = [row["before"] for row in evaluate.read_answers(workdir / "samples.jsonl")]
            table = evaluate.write_answers(
                workdir / "samples.jsonl", prompts, before=before, after=answers(state.trainable)
            )
            console.say_answers(table[:SHOWN])
            for when in ("before", "after"):
                scores[f"exact_match_{when}"] = evaluate.exact_match(table, when)
            console.say(
                f"exact match on {len(table)} rows: {scores['exact_match_before']:.1%} before, "
                f"{scores['exact_match_after']:.1%} after"
            )
        took = {"trainable_parameters": tree.count(adapted.trainable), "peak_memory_bytes": steplog.peak_memory()}
        note(base_parameters=tree.count(base.abstract), **took)
        if jax.process_index() == 0:
            rundir.write_json_atomic(workdir / "eval.json", {"step": n, **scores})
        where = results.export(workdir, base, mesh, adapted, state.trainable, Run(plain, scores), console.say)
        console.say(results.how_to_load(where, base))
        if c.export.push_to_hub and jax.process_index() == 0:
            hub.publish(where, c.export.push_to_hub, private=c.export.private, say=console.say)
    return 0


if __name__ == "__main__":
    cli.run(main)
