"""Fine-tunes a model on GPUs: `python -m torch_gpu.train --config configs/gemma2_persian_qlora.py --workdir runs/x`.

The same configs, data, run directory and PEFT output as jaxtune.train; transformers, peft and bitsandbytes compute. On
several GPUs: `torchrun --nproc_per_node=2 -m torch_gpu.train ...`. The same command goes on where the run stopped.
"""

import contextlib
import datetime
import functools
import math
import resource
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from jaxtune import answers, cli, config, kept, rundir, scoring, storage, wandb_log
from jaxtune.cadence import cadence
from jaxtune.console import Console, Progress
from jaxtune.data.batches import eval_batches
from jaxtune.data.splits import fingerprint, read_prompts, read_splits, rows_to_train
from jaxtune.defaults import LEARNING_RATES
from jaxtune.hf import hub
from jaxtune.hf.card import Run, card
from jaxtune.hf.files import fingerprint as weights_of
from jaxtune.hf.handover import held_as, how_to_load, trained_over
from jaxtune.identity import check_same, identity
from jaxtune.metrics import MetricsLog, StepLog
from jaxtune.models import decoder_start
from jaxtune.origin import check_path, find_start, inexact
from jaxtune.rundir import STOPPED
from jaxtune.signals import stop_requests
from jaxtune.tokenizer import load_tokenizer
from torch_gpu import method, model, quiet, settings
from torch_gpu.batches import Micro, to_inputs
from torch_gpu.generate import answer
from torch_gpu.loop import Trainer, has_optimiser, make_arguments
from torch_gpu.model import Processes


def main(argv: Sequence[str]) -> int:
    processes = Processes.read()
    first = processes.index == 0  # alone writes to the run directory
    arguments = cli.parse("torch_gpu.train", argv, __doc__ or "", quiet=not first)
    c: Any = arguments.config
    workdir = rundir.open_workdir(arguments.workdir)
    record = rundir.RunRecord(workdir, arguments.command, quiet=not first)
    with (
        rundir.run_lock(workdir) if first else contextlib.nullcontext(),
        Console(workdir / "log.txt", quiet=not first) as console,
        stop_requests() as stop,
        joined(processes),
    ):
        how = record.start, record.note, arguments.command
        try:
            with storage.synced(c.storage.sync_to if first else None, workdir, console.say) as saved:
                code = train(c, workdir, console, stop, *how, saved)
                record.end(code)
        except BaseException as error:
            console.record(f"error: {str(error) or type(error).__name__}")
            record.fail(error)
            raise
        if code == STOPPED:
            console.say(f"Stopped; what was done is saved. To go on:\n  {arguments.command}")
        return code


@contextlib.contextmanager
def joined(processes: Processes) -> Any:
    """The processes of torchrun know each other."""
    if processes.count > 1:
        # Tokenising, and answers before training, may take the first process longer than the others.
        wait = datetime.timedelta(hours=2)
        torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=wait)
    try:
        yield
    finally:
        if processes.count > 1:
            torch.distributed.destroy_process_group()


def train(
    c: Any,
    workdir: Path,
    console: Console,
    stop: Sequence[int] = (),
    accepted: Callable[[dict[str, Any]], None] = lambda config: None,
    note: Callable[..., None] = lambda **facts: None,
    command: str = "",
    saved: Callable[[], None] = lambda: None,
) -> int:
    """The run, from a checked config to an exported adapter; returns the exit code.

    Args:
      stop: no longer empty when the run is to stop.
      accepted: called with the plain config once nothing of the command is left to refuse.
      note: called with facts of the run: what it took, whether it is exact.
      command: what was typed.
      saved: called when a checkpoint is committed.
    """
    quiet.libraries()
    plain = config.to_json(c)
    settings.check(plain)
    settings.deterministic(c.train.deterministic)
    goal = scoring.goal_of(plain, console.say)
    scored_by = {"metrics": scoring.names_of(c.evaluate.metrics), "no_answer": c.data.no_answer}
    check_path(c.checkpoint.resume)
    wandb_log.check(plain)
    samples, latest = workdir / "samples.jsonl", []  # latest: the answers of the evaluation before
    if c.optim.learning_rate is None:
        c.optim.learning_rate = plain["optim"]["learning_rate"] = LEARNING_RATES[c.peft.method]
    name = c.export.base_model_name_or_path or c.model.id
    if c.export.push_to_hub:
        hub.check(c.export.push_to_hub, name)

    # ---------------------------------------------------------------- Data: tokenised before a weight is loaded
    processes = Processes.read()
    base = model.describe(c.model.id, c.model.revision)
    tokenizer = load_tokenizer(base.directory)
    start_id = decoder_start(base.hf_config)
    virtual = method.virtual_tokens(plain["peft"], seq2seq=start_id is not None)
    rows, held, length = read_splits(c.data, tokenizer, console.say, virtual, start_id)
    prompts = read_prompts(c.data, tokenizer, c.evaluate.samples, virtual, start_id)
    size, turns = c.train.global_batch_size, c.train.gradient_accumulation_steps
    eval_size = c.evaluate.batch_size or size // turns
    settings.check_batch(
        size // turns, processes.count, "`train.global_batch_size` / `train.gradient_accumulation_steps`"
    )
    settings.check_batch(eval_size, processes.count, "`evaluate.batch_size`")
    end = rows_to_train(c.train, rows)
    total = math.ceil(end / size)
    if c.optim.warmup_steps >= total:
        console.say(
            f"WARNING: `optim.warmup_steps` is {c.optim.warmup_steps} and the run has {total} steps, so that it never "
            "reaches `optim.learning_rate`"
        )

    # ---------------------------------------------------------------- Device and model
    device = model.device_of(processes, console.say, command)
    dtype = model.precision(c.model.dtype, device, console.say)
    needed = base.bytes(dtype, c.model.quant, c.model.double_quant)
    where = model.placement(needed, device, processes, console.say)
    transformers.set_seed(c.train.seed)
    over = trained_over(weights_of(base.directory), c.model.quant, c.model.double_quant, False)
    loaded = model.load(base, plain["model"], dtype, where)
    parameters = sum(math.prod(shape) for shape in base.shapes.values())
    form = held_as(plain["model"], str(dtype)[6:])
    console.say(f"model: {c.model.id}, {parameters:,} parameters, {form}, on {processes.count} {device.type}")
    encode, linear = functools.partial(encode_text, tokenizer), method.linear_layers(loaded)
    adapted = method.adapt(loaded, plain["peft"], total_steps=total, quantised=c.model.quant is not None, encode=encode)
    trained = sum(p.numel() for p in method.trainable(adapted).values())
    console.say(f"{c.peft.method}: {trained:,} parameters train, learning rate {c.optim.learning_rate:g}")
    if c.peft.init_from:
        console.say(f"  from {c.peft.init_from}, with its settings: {method.changed(adapted)}")
        for line in method.handed_over(plain["peft"], adapted, linear, over):
            console.say(f"WARNING: {c.peft.init_from}: {line}")
    remat = settings.remat(c, console.say)
    share: dict[str, Any] = {"process_index": processes.index, "process_count": processes.count}

    @torch.no_grad()
    def score(batch: Any) -> tuple[float, float]:
        inputs = {name: value.to(device) for name, value in to_inputs(batch, virtual).items()}
        summed = adapted(**inputs, num_items_in_batch=1).token_loss
        sums = torch.stack([summed.double(), (inputs["labels"] != -100).sum().double()])
        if processes.count > 1:
            torch.distributed.all_reduce(sums)
        return float(sums[0]), float(sums[1])

    def eval_loss() -> float:
        adapted.eval()
        return answers.mean_loss(score, eval_batches(held, eval_size, length, **share) if held else [])

    def answer_all() -> list[str]:
        return answer(adapted, tokenizer, prompts, virtual, max_new_tokens=c.evaluate.max_new_tokens)

    def evaluation() -> dict[str, float]:
        found = scoring.losses(eval_loss())
        if scoring.needs_answers(goal):
            latest[:] = answer_all()
            found |= scoring.score_answers(prompts, latest, **scored_by)
        return found

    # ---------------------------------------------------------------- Resume
    hashes = {"base": over["fingerprint"], "rows": fingerprint(rows), "backend": "torch_gpu"}
    same = identity(plain, total, **hashes, computes=str(dtype).removeprefix("torch."))
    directory = workdir / "checkpoints"
    find = functools.partial(find_start, workdir, c.checkpoint.resume, goal, same, console.say)
    start, cursor, fresh_at = settings.together(lambda: find_checkpoint(directory, same, find), processes)
    earlier, quiet_log = wandb_log.earlier(workdir), processes.index > 0
    accepted(plain)
    with (
        wandb_log.opened(plain, workdir, earlier, note, console.say, quiet=quiet_log) as send,
        MetricsLog(workdir, start, c.logging.tensorboard, console.say, quiet=quiet_log, also=send) as log,
        Progress(console, total=total, start=start, log_every=c.train.log_every) as progress,
    ):
        steps = StepLog(log, progress)

        # ------------------------------------------------------------ Before the first step
        if start:
            console.say(f"resumed at step {start} of {total}, row {cursor}")
            inexact(start, fresh_at, console.say, note)
        elif held:
            steps.evaluation(0, evaluation())
        there = settings.together(lambda: answers.has_answers(samples, prompts), processes)
        if prompts and not (start and there):
            before = latest or answer_all()
            if processes.index == 0:
                answers.write_answers(samples, prompts, before=before)
        if settings.together(lambda: bool(stop), processes):
            return STOPPED

        # ------------------------------------------------------------ Loop
        order: dict[str, Any] = {"batch_size": size, "seed": c.train.seed, "shuffle": c.data.shuffle, **share}
        batches = Micro(
            rows, virtual=virtual, turns=turns, steps=total, start_row=cursor, stop_row=end, length=length, **order
        )
        trainer = Trainer(
            adapted,
            make_arguments(c, directory / "tmp", dtype, total=total, processes=processes.count, remat=remat),
            c,
            batches,
            steps,
            total=total,
            evaluates=cadence(c.train, "eval", rows),
            saves=cadence(c.train, "save", rows),
            evaluation=evaluation if held else None,
            stop=stop,
            identity=same,
            goal=goal,
            fresh_at=fresh_at,
            directory=directory,
            say=console.say,
            saved=saved,
        )
        steps.restart_clock()
        if start < total:
            trainer.train(resume_from_checkpoint=str(directory / str(start)) if start else None)
        else:
            trainer._load_from_checkpoint(str(directory / str(start)))
        n = max(trainer.state.global_step, start)
        if n < total:
            return STOPPED

    # ---------------------------------------------------------------- After the last
    if trainer.skipped:
        console.say(f"{trainer.skipped} of {total - start} steps were left out, because gradients overflowed float16")
    scores = dict(trainer.scores)
    if held and not scores:  # the run had ended before, and this command only completes it
        scores = scoring.losses(eval_loss())
    scores = {name: value for name, value in scores.items() if name in scoring.LOSSES}
    if prompts:
        after = latest or answer_all()
        if processes.index == 0:
            scores |= scoring.before_and_after(samples, prompts, after, console, **scored_by)
    if processes.index == 0:
        note(base_parameters=parameters, trainable_parameters=trained, peak_memory_bytes=peak_memory(device))
        rundir.write_json_atomic(workdir / "eval.json", {"step": n, **scores})
        out, seq2seq = workdir / "adapter", start_id is not None
        about = {"repo_id": c.export.push_to_hub, "over": over, "seq2seq": seq2seq}
        readme = card("adapter", name, c.peft.method, Run(plain, scores), **about)
        method.export(adapted, out, name=name, readme=readme, over=over)
        console.say(how_to_load(out, base.directory, str(dtype)[6:], over, seq2seq=seq2seq))
        if c.export.push_to_hub:
            hub.publish(out, c.export.push_to_hub, private=c.export.private, say=console.say)
    return 0


def find_checkpoint(directory: Path, same: dict[str, str], find: Callable[[], int | None]) -> tuple[int, int, int]:
    """(step, row cursor) to go on from, and the step at which its optimiser started fresh; zeros where there is none.

    Raises:
      UserError: and its kinds, as `jaxtune.origin.find_start`, or it is of another run.
    """
    kept.open_directory(directory)
    step = find()
    if step is None:
        return 0, 0, 0
    where = directory / str(step)
    record = kept.read_record(where)
    check_same(f"Checkpoint {where}", record["identity"], same)
    return step, record["rows"], record.get("optimiser_from", 0) if has_optimiser(where) else step


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """A prompt's first text as tokens, BOS before it, as in jaxtune."""
    return [tokenizer.bos_id] * (tokenizer.bos_id is not None) + tokenizer.encode(text)


def peak_memory(device: torch.device) -> int:
    """The most bytes that a card held; on a CPU, the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Kilobytes on Linux, bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    cli.run(main)
