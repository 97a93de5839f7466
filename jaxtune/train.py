"""Fine-tunes a model: `python -m jaxtune.train --config configs/gemma_lora.py --workdir runs/x`.

The same command goes on where the run stopped, however it was stopped, and ends in the same bits.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxtune import (
    adapt,
    answers,
    cli,
    compiler,
    config,
    deterministic,
    hosts,
    measure,
    optim,
    profile,
    results,
    rundir,
    scoring,
    steplog,
    storage,
    tree,
    wandb_log,
)
from jaxtune import mesh as meshes
from jaxtune.cadence import cadence
from jaxtune.checkpoint import Checkpoints
from jaxtune.console import Console, Progress
from jaxtune.data.batches import Batch, empty, real_tokens, slots
from jaxtune.data.splits import (
    fingerprint,
    held_batches,
    lengths_ahead,
    plan_course,
    read_prompts,
    read_splits,
    train_batches,
)
from jaxtune.hf import hub
from jaxtune.hf.base import open_base
from jaxtune.hf.card import Run
from jaxtune.hf.handover import held_as
from jaxtune.lm import encode_prompt
from jaxtune.metrics import MetricsLog
from jaxtune.models import decoder_start
from jaxtune.origin import check_path, find_start, inexact
from jaxtune.plan.check import check_memory, speed_of
from jaxtune.quant import scheme_of
from jaxtune.rundir import STOPPED
from jaxtune.signals import stop_requests
from jaxtune.state import identity, make_state, resume, to_save
from jaxtune.step import eval_step, train_step
from jaxtune.tokenizer import load_tokenizer


def main(argv: Sequence[str]) -> int:
    arguments = cli.parse("jaxtune.train", argv, __doc__ or "")
    workdir: Path = arguments.workdir
    c: Any = arguments.config
    deterministic.ask(c.train.deterministic)
    compiler.keep_memory()
    hosts.start()
    compiler.keep_programs()
    first = hosts.first()  # alone writes to the run directory
    record = rundir.RunRecord(workdir, arguments.command, quiet=not first)
    with (
        hosts.together(record.fail),
        rundir.run_lock(rundir.open_workdir(workdir)) if first else contextlib.nullcontext(),
        Console(workdir / "log.txt", quiet=not first) as console,
        stop_requests(several=hosts.several()) as stop,
    ):
        try:
            hosts.check_shared(workdir)
            with storage.synced(c.storage.sync_to if first else None, workdir, console.say) as saved:
                code = train(c, workdir, console, stop, record.start, record.note, saved)
                record.end(code)
        except BaseException as error:
            console.record(f"error: {str(error) or type(error).__name__}")
            record.fail(error)
            raise
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
    saved: Callable[[], None] = lambda: None,
) -> int:
    """The run, from a checked config to an exported adapter; returns the exit code.

    Args:
      stop: no longer empty when the run is to stop.
      accepted: called with the plain config once nothing of the command is left to refuse.
      note: called with facts of the run: what it took, whether it is exact.
      saved: called when a checkpoint is committed.
    """
    plain = config.to_json(c)
    usual = adapt.learning_rate(plain["peft"])  # refuses what it cannot mean before anything is read
    if c.optim.learning_rate is None:
        c.optim.learning_rate = plain["optim"]["learning_rate"] = usual
    goal = scoring.goal_of(plain, console.say)
    scored_by = {"metrics": scoring.names_of(c.evaluate.metrics), "no_answer": c.data.no_answer}
    check_path(c.checkpoint.resume)
    wandb_log.check(plain)
    results.check_push(plain)
    optim.check_offload(c.optim)
    samples, latest = workdir / "samples.jsonl", []  # latest: the answers of the evaluation before
    first, stopping = hosts.first(), hosts.stopping(stop)

    # ---------------------------------------------------------------- Data: tokenised before a weight is loaded
    quant = scheme_of(c.model.quant, c.model.double_quant, c.model.quant_embedding)
    how = {"dtype": c.model.dtype, "remat": c.train.remat, "unroll": c.train.unroll_layers, "quant": quant}
    base = open_base(c.model.id, revision=c.model.revision, **how)
    results.check_quantised(plain, base)
    adapt.check_targets(plain["peft"], base)
    tokenizer = load_tokenizer(base.directory)
    virtual = adapt.virtual_tokens(plain["peft"], base)
    start_id = decoder_start(base.hf_config)
    rows, held, length = splits = read_splits(c.data, tokenizer, console.say, virtual, start_id)
    prompts = read_prompts(c.data, tokenizer, c.evaluate.samples, virtual, start_id)
    size, turns = c.train.global_batch_size, c.train.gradient_accumulation_steps
    course = plan_course(c.data, c.train, splits, console.say)
    total = course.steps
    profile.check(c.logging.profile, total)
    evaluates, saves = (cadence(c.train, what, rows, course.epochs_done) for what in ("eval", "save"))
    if c.optim.warmup_steps >= total:
        console.say(
            f"WARNING: `optim.warmup_steps` is {c.optim.warmup_steps} and the run has {total} steps, so that it never "
            "reaches `optim.learning_rate`"
        )

    # ---------------------------------------------------------------- Devices
    mesh = meshes.make_mesh(c.mesh.data, c.mesh.fsdp, c.mesh.tensor, slices=c.mesh.slice)
    eval_size = c.evaluate.batch_size or size // turns
    meshes.check_batch(mesh, size // turns, "`train.global_batch_size` / `train.gradient_accumulation_steps`")
    meshes.check_batch(mesh, eval_size, "`evaluate.batch_size`")
    check_memory(c, base, length, console.say)
    own_rows = fingerprint(rows)
    if hosts.several():
        read = {"rows": own_rows, "held rows": fingerprint(held) if held else "", "base": base.fingerprint}
        hosts.agree({**config.flatten(plain), **read, "jaxtune": hosts.code(), "jax": jax.__version__})

    def put(batch: Batch, turns: int | None = None) -> dict[str, jax.Array]:
        """A batch on its devices: [B, T] each, or [A, B/A, T] for `turns` = A micro-batches."""
        where = meshes.batch_sharding(mesh, leading=turns is not None)
        cut = {k: v if turns is None else v.reshape(turns, -1, v.shape[1]) for k, v in batch.items()}
        # Every host has made the same batch, and puts on its devices what belongs there: so rows have the same places
        # on any number of hosts.
        return {k: jax.make_array_from_callback(v.shape, where, v.__getitem__) for k, v in cut.items()}

    with jax.set_mesh(mesh):
        # ------------------------------------------------------------ Model, adapters, optimiser
        form = held_as(base.settings, c.model.dtype)
        console.say(
            f"model: {c.model.id}, {tree.count(base.abstract):,} parameters, {form}, on {mesh.size} "
            f"{jax.default_backend()}"
        )
        how = {"dtype": c.model.dtype, "seed": c.train.seed, "total_steps": total}
        encode = functools.partial(encode_prompt, tokenizer, ended=base.encodes)
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

        def optimiser(start: int = 0) -> Any:
            """The config's, counting its steps from `start`."""
            made = adapted.optimiser(optim.make_optimiser(c.optim, optim.later(schedule, start)))
            return optim.offloaded(made) if c.optim.offload else made

        state = make_state(optimiser(), adapted.trainable, mesh, offload=c.optim.offload)
        frozen = adapted.frozen
        parts = {"model": base.model, "structure": adapted.structure}
        score = jax.jit(functools.partial(eval_step, **parts))

        def eval_loss() -> float:
            how = {"widths": course.widths, "packed": c.data.packing}
            batches = held_batches(held, eval_size, length, **how) if held else []
            return answers.mean_loss(lambda batch: score(state.trainable, frozen, put(batch)), batches)

        def answer(trainable: dict[str, jax.Array]) -> list[str]:
            how = {"max_new_tokens": c.evaluate.max_new_tokens, "shards": meshes.batch_shards(mesh)}
            return measure.answer(base.model, adapted.variables(trainable), tokenizer, prompts, **how)

        def evaluation() -> dict[str, float]:
            found = scoring.losses(eval_loss())
            if scoring.needs_answers(goal):
                latest[:] = answer(state.trainable)
                found |= scoring.score_answers(prompts, latest, **scored_by)
            return found

        # ------------------------------------------------------------ Resume
        same = identity(plain, total, base=base.fingerprint, rows=own_rows)
        keep = {"keep_last_n": c.checkpoint.keep_last_n, "keep_best_n": c.checkpoint.keep_best_n, "goal": goal}
        how = {**keep, "identity": same, "say": console.say, "saved": saved}
        with Checkpoints(workdir / "checkpoints", **how) as checkpoints:
            find = functools.partial(find_start, workdir, c.checkpoint.resume, goal, same, console.say)
            state, cursor, fresh_at = resume(checkpoints, state, find)
            start = n = int(state.step)
            earlier = wandb_log.earlier(workdir)
            accepted(plain)
            rule = {"optimiser": optimiser(fresh_at), "schedule": schedule, "seed": c.train.seed}
            rule["z_loss"] = c.train.z_loss
            step = compiler.step_of(functools.partial(train_step, **parts, **rule, penalty=adapted.penalty()))
            with (
                wandb_log.opened(plain, workdir, earlier, note, console.say, quiet=not first) as send,
                MetricsLog(workdir, start, c.logging.tensorboard, console.say, quiet=not first, also=send) as log,
                Progress(console, total=total, start=start, log_every=c.train.log_every) as progress,
                profile.profiled(workdir / "profile", c.logging.profile) as trace,
            ):
                speed = speed_of(base, adapted.trainable, c.model.dtype, length)
                steps = steplog.StepLog(log, progress, speed.chips, speed.peak)

                # ---------------------------------------------------- Before the first step
                if start:
                    console.say(f"resumed at step {start} of {total}, row {cursor}")
                    inexact(start, fresh_at, console.say, note)
                elif held:
                    steps.evaluation(0, evaluation())
                if prompts and not hosts.said_by_first(bool(start) and answers.has_answers(samples, prompts)):
                    before = latest or answer(adapted.trainable)
                    if first:
                        answers.write_answers(samples, prompts, before=before)
                if stopping():
                    return STOPPED

                # ---------------------------------------------------- Loop
                order: dict[str, Any] = {"batch_size": size, "seed": c.train.seed, "shuffle": c.data.shuffle}
                scores: dict[str, float] = {}
                for ahead in lengths_ahead(splits, course, **order, start_row=cursor):
                    # A step's program is found again when it is called; so no step waits for a compiler but the first.
                    step.lower(state, frozen, put(empty(size, ahead), turns)).compile()
                steps.restart_clock()
                order |= {"widths": course.widths, "packed": course.packing or c.data.packing}
                coming = train_batches(rows, **order, start_row=cursor, stop_row=course.stop_row, length=length)
                for batch, cursor in itertools.islice(coming, max(total - n, 0)):
                    n += 1
                    trace(n, state)
                    state, metrics = step(state, frozen, put(batch, turns))
                    counts = {"tokens": real_tokens(batch), "slots": slots(batch), "flop": speed.of(batch)}
                    steps.add(n, metrics, **counts, rows=cursor)
                    evaluating = held and (n == total or evaluates(n))
                    if evaluating or stopping() or n == total or saves(n):
                        steps.flush()
                        scores = evaluation() if evaluating else {}
                        if scores:
                            steps.evaluation(n, scores)
                        kept = to_save(state, optimiser=c.checkpoint.save_optim)
                        checkpoints.save(n, kept, rows=cursor, metrics=scores)
                        steps.restart_clock()
                    if stopping() and n < total:
                        return STOPPED
            checkpoints.wait()

        # ------------------------------------------------------------ After the last
        if held and not scores:  # the run had ended before, and this command only completes it
            scores = scoring.losses(eval_loss())
        scores = {name: value for name, value in scores.items() if name in scoring.LOSSES}
        if prompts:
            after = latest or answer(state.trainable)
            if first:
                scores |= scoring.before_and_after(samples, prompts, after, console, **scored_by)
        took = {"trainable_parameters": tree.count(adapted.trainable), "peak_memory_bytes": steplog.peak_memory()}
        note(base_parameters=tree.count(base.abstract), **took)
        if first:
            rundir.write_json_atomic(workdir / "eval.json", {"step": n, **scores})
        with hosts.place(workdir) as place:
            run = Run(plain, scores)
            where = results.export(place, base, mesh, adapted, state.trainable, run, console.say)
        console.say(results.how_to_load(where, base))
        if c.export.push_to_hub and first:
            hub.publish(where, c.export.push_to_hub, private=c.export.private, say=console.say)
    return 0


if __name__ == "__main__":
    cli.run(main)
