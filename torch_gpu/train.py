"""Fine-tunes a model on GPUs: `python -m torch_gpu.train --config configs/gemma2_qlora.py --workdir runs/x`.

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

from jaxtune import answers, cli, config, kept, rundir
from jaxtune.console import Console, Progress
from jaxtune.data.batches import eval_batches
from jaxtune.data.splits import fingerprint, read_prompts, read_splits, rows_to_train
from jaxtune.defaults import LEARNING_RATES
from jaxtune.errors import CannotCreateError
from jaxtune.hf import hub
from jaxtune.hf.card import Run, card
from jaxtune.hf.files import fingerprint as weights_of
from jaxtune.hf.files import read_json
from jaxtune.hf.handover import held_as, how_to_load, trained_over
from jaxtune.identity import check_same, identity
from jaxtune.metrics import MetricsLog, StepLog
from jaxtune.rundir import STOPPED
from jaxtune.signals import stop_requests
from jaxtune.tokenizer import load_tokenizer
from torch_gpu import method, model, quiet, settings
from torch_gpu.batches import Micro, to_inputs
from torch_gpu.generate import answer
from torch_gpu.loop import Trainer, make_arguments
from torch_gpu.model import Processes

SHOWN = 8  # answers in the table


def main(argv: Sequence[str]) -> int:
    processes = Processes.read()
    first = processes.index == 0  # alone writes to the run directory
    arguments = cli.parse("torch_gpu.train", argv, __doc__ or "", quiet=not first)
    workdir = rundir.open_workdir(arguments.workdir)
    record = rundir.RunRecord(workdir, arguments.command, quiet=not first)
    with (
        rundir.run_lock(workdir) if first else contextlib.nullcontext(),
        Console(workdir / "log.txt", quiet=not first) as console,
        stop_requests() as stop,
        joined(processes),
    ):
        try:
            code = train(arguments.config, workdir, console, stop, record.start, record.note, arguments.command)
        except BaseException as error:
            console.record(f"error: {str(error) or type(error).__name__}")
            record.fail(error)
            raise
        record.end(code)
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
) -> int:
    """The run, from a checked config to an exported adapter; returns the exit code.

    Args:
      stop: no longer empty when the run is to stop.
      accepted: called with the plain config once nothing of the command is left to refuse.
      note: called with what the finished run took.
      command: what was typed.
    """
    quiet.libraries()
    plain = config.to_json(c)
    settings.check(plain)
    if c.optim.learning_rate is None:
        c.optim.learning_rate = plain["optim"]["learning_rate"] = LEARNING_RATES[c.peft.method]
    name = c.export.base_model_name_or_path or c.model.id
    if c.export.push_to_hub:
        hub.check(c.export.push_to_hub, name)

    # ---------------------------------------------------------------- Data: tokenised before a weight is loaded
    processes = Processes.read()
    base = model.describe(c.model.id, c.model.revision)
    tokenizer = load_tokenizer(base.directory)
    virtual = method.virtual_tokens(plain["peft"])
    rows, held, length = read_splits(c.data, tokenizer, console.say, virtual)
    prompts = read_prompts(c.data, tokenizer, c.evaluate.samples, virtual)
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
    share = {"process_index": processes.index, "process_count": processes.count}

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

    # ---------------------------------------------------------------- Resume
    hashes = {"base": over["fingerprint"], "rows": fingerprint(rows), "backend": "torch_gpu"}
    same = identity(plain, total, **hashes, computes=str(dtype).removeprefix("torch."))
    directory = workdir / "checkpoints"
    start, cursor = settings.together(lambda: find_checkpoint(directory, same, console.say), processes)
    if start and c.checkpoint.resume == "never":
        raise CannotCreateError(f"{workdir} has checkpoints and `checkpoint.resume` is never. Give a new --workdir.")
    accepted(plain)
    with (
        MetricsLog(workdir, start, c.logging.tensorboard, console.say, quiet=processes.index > 0) as log,
        Progress(console, total=total, start=start, log_every=c.train.log_every) as progress,
    ):
        steps = StepLog(log, progress)

        # ------------------------------------------------------------ Before the first step
        if start:
            console.say(f"resumed at step {start} of {total}, row {cursor}")
        elif held:
            steps.evaluation(0, eval_loss())
        there = settings.together(lambda: answers.has_answers(workdir / "samples.jsonl", prompts), processes)
        if prompts and not (start and there):
            before = answer_all()
            if processes.index == 0:
                answers.write_answers(workdir / "samples.jsonl", prompts, before=before)
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
            eval_loss=eval_loss if held else None,
            stop=stop,
            identity=same,
            directory=directory,
            say=console.say,
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
        scores = {"eval_loss": eval_loss()}
    if prompts:
        after = answer_all()
        if processes.index == 0:
            path = workdir / "samples.jsonl"
            before = [row["before"] for row in answers.read_answers(path)]
            table = answers.write_answers(path, prompts, before=before, after=after)
            console.say_answers(table[:SHOWN])
            for when in ("before", "after"):
                scores[f"exact_match_{when}"] = answers.exact_match(table, when)
            console.say(
                f"exact match on {len(table)} rows: {scores['exact_match_before']:.1%} before, "
                f"{scores['exact_match_after']:.1%} after"
            )
    if processes.index == 0:
        note(base_parameters=parameters, trainable_parameters=trained, peak_memory_bytes=peak_memory(device))
        rundir.write_json_atomic(workdir / "eval.json", {"step": n, **scores})
        out = workdir / "adapter"
        readme = card("adapter", name, c.peft.method, Run(plain, scores), c.export.push_to_hub, over=over)
        method.export(adapted, out, name=name, readme=readme, over=over)
        console.say(how_to_load(out, base.directory, str(dtype)[6:], over))
        if c.export.push_to_hub:
            hub.publish(out, c.export.push_to_hub, private=c.export.private, say=console.say)
    return 0


def find_checkpoint(directory: Path, same: dict[str, str], say: Callable[[str], None]) -> tuple[int, int]:
    """(step, row cursor) to go on from; (0, 0) where there is none.

    Raises:
      NoCheckpointError: none is intact.  UserError, DataError: it is of another run.
    """
    kept.open_directory(directory)
    step = kept.choose(directory, say)
    if step is None:
        return 0, 0
    record = read_json(directory / str(step) / kept.RECORD)
    check_same(f"Checkpoint {directory / str(step)}", record["identity"], same)
    return step, record["rows"]


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
