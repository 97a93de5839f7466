"""The loop: transformers' Trainer, with jaxtune's batches, loss, schedule, metrics and checkpoints.

Two of its habits are changed.  There is no autocast: `torch_gpu.half` says what computes in what.  And dropout is a
function of (seed, step, process), so that a checkpoint needs no generator's state.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import AutocastKwargs
from safetensors.torch import load_file, save_file
from torch import Tensor

from jaxtune import kept
from jaxtune.errors import DivergedError
from jaxtune.identity import check_same
from jaxtune.metrics import StepLog
from torch_gpu import adalora, half, method
from torch_gpu.batches import Micro
from torch_gpu.optim import make_optimiser, make_schedule

TRAINABLE = "trainable.safetensors"
# A loss scale below this means that gradients overflow whatever it is.
LEAST_SCALE = 2.0**-10


def make_arguments(c: Any, directory: Path, dtype: torch.dtype, *, total: int, processes: int, remat: bool) -> Any:
    """transformers' settings: nearly all of what it could do by itself is turned off.

    Args:
      directory: of checkpoints under way.
    """
    turns = c.train.gradient_accumulation_steps
    return transformers.TrainingArguments(
        output_dir=str(directory),
        max_steps=total,
        per_device_train_batch_size=c.train.global_batch_size // turns // processes,
        gradient_accumulation_steps=turns,
        max_grad_norm=c.optim.max_grad_norm,
        seed=c.train.seed,
        fp16=dtype == torch.float16,
        activation_checkpointing=remat,
        activation_checkpointing_kwargs={"use_reentrant": False} if remat else None,
        # A line a step, ours; evaluations and saves as the callback says.
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="no",
        save_strategy="no",
        save_only_model=not c.checkpoint.save_optim,
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        log_level_replica="error",
        # Batches begin at the row cursor by themselves.
        ignore_data_skip=True,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        use_cpu=not torch.cuda.is_available(),
        ddp_backend="gloo" if processes > 1 and not torch.cuda.is_available() else None,
    )


class Trainer(transformers.Trainer):
    """Args:
    c: the config.  batches: this process's.
    evaluates, saves: whether that is due after a step.
    evaluation: the numbers of one; None: there are none.
    identity: as `jaxtune.identity.identity` gives it.  goal: what the best checkpoint is best by.
    fresh_at: the step at which the optimiser last started fresh.
    saved: called when a checkpoint is committed.
    """

    # The loss is over the targets of the whole global batch.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Any,
        args: Any,
        c: Any,
        batches: Micro,
        steps: StepLog,
        *,
        total: int,
        evaluates: Callable[[int], bool],
        saves: Callable[[int], bool],
        evaluation: Callable[[], dict[str, float]] | None,
        stop: Sequence[int],
        identity: dict[str, str],
        goal: kept.Goal,
        fresh_at: int,
        directory: Path,
        say: Callable[[str], None],
        saved: Callable[[], None],
    ):
        self.network: Any = model
        self.c, self.batches, self.steps, self.total = c, batches, steps, total
        self.evaluates, self.saves, self.evaluation, self.stop = evaluates, saves, evaluation, stop
        self.same, self.goal, self.fresh_at, self.directory = identity, goal, fresh_at, directory
        self.say, self.saved = say, saved
        self.schedule = make_schedule(c.optim, total)
        self.scores: dict[str, float] = {}
        self.skipped, self.stopping = 0, False
        self.begin_step()
        super().__init__(model=model, args=args, train_dataset=batches, callbacks=[Rules(self)])  # type: ignore[arg-type]
        # A multi-card process has one model on one card (or, spread, on all): never nn.DataParallel.
        self.args._n_gpu = min(self.args.n_gpu, 1)
        self.remove_callback(transformers.PrinterCallback)

    # ---------------------------------------------------------------- What Trainer asks for

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        arguments = super()._build_accelerator_args(**kwargs)
        arguments["kwargs_handlers"].append(AutocastKwargs(enabled=False))
        return arguments

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.fp16 and self.accelerator.scaler is None:  # on a CPU, where accelerate makes none
            self.accelerator.scaler = torch.amp.GradScaler("cpu")
            self.accelerator.native_amp = True

    def get_train_dataloader(self) -> Any:
        return self.batches

    def num_examples(self, dataloader: Any) -> int:
        return len(dataloader) * self.args.per_device_train_batch_size

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = make_optimiser(self.c.optim, list(method.trainable(self.model).values()))
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, self.schedule)
        return self.lr_scheduler

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This micro-batch's part of the mean over the global batch, times the processes that DDP will divide by.

        A method's penalty counts once a step, and is not in the loss that is reported.
        """
        count, turns = self.args.world_size, self.args.gradient_accumulation_steps
        out = model(**inputs, num_items_in_batch=num_items_in_batch)
        self.inputs.append(inputs)
        self.targets = num_items_in_batch
        self.local_loss = self.local_loss + out.token_loss.detach().float()
        loss = (out.token_loss + (out.loss - out.token_loss) / (turns * count)) * count
        return (loss, out) if return_outputs else loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        self.grad_norm: Any = super()._get_grad_norm(model, grad_norm)
        return self.grad_norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """A step's line; what Trainer says at the end is not wanted."""
        if "grad_norm" in logs:
            self.steps.flush()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        assert self.evaluation is not None
        self.scores = self.evaluation()
        self.steps.evaluation(self.state.global_step, self.scores)
        return self.scores

    # ---------------------------------------------------------------- A step, as the callback tells it

    def begin_step(self) -> None:
        self.inputs: list[dict[str, Any]] = []
        self.local_loss, self.targets = torch.zeros(()), 0

    def together(self, values: Sequence[float]) -> list[float]:
        """Sums over the processes."""
        total = torch.tensor(values, dtype=torch.float64, device=self.args.device)
        if self.args.world_size > 1:
            torch.distributed.all_reduce(total)
        return total.tolist()

    def measure(self) -> None:
        """Before the optimiser: the numbers of the step, of all processes.

        Raises:
          DivergedError: the loss is not finite, with the module where that began.
        """
        local = [float(self.local_loss), self.batches.tokens, self.batches.slots, bool(self.stop)]
        loss, tokens, slots, stopping = self.together(local)
        self.stopping = stopping > 0
        metrics = {
            "loss": loss,
            "grad_norm": float(self.grad_norm),
            "learning_rate": self._get_learning_rate(),
            "target_tokens": float(self.targets),
        }
        self.steps.add(
            self.state.global_step + 1, metrics, tokens=int(tokens), slots=int(slots), rows=self.batches.cursor
        )
        if not math.isfinite(loss):
            where = half.first_not_finite(self.network, self.inputs)
            try:
                self.steps.flush()
            except DivergedError as error:
                named = (
                    f"The first module to give out what is not finite: {where}." if where else "It came up in the loss."
                )
                raise DivergedError(f"{error}\n{named}") from None

    def count_skipped(self) -> None:
        """After the optimiser: a step that the scaler left out.

        Raises:
          DivergedError: gradients overflow at whatever scale.
        """
        if not self.accelerator.optimizer_step_was_skipped:
            return
        self.skipped += 1
        scaler = self.accelerator.scaler
        if self.skipped == 1:
            self.say(
                f"step {self.state.global_step}: gradients overflowed float16; the step is left out and the loss scale "
                "halved. A few such steps are usual."
            )
        if scaler is not None and scaler.get_scale() < LEAST_SCALE:
            raise DivergedError(
                f"Gradients are not finite at any loss scale: {self.skipped} steps were left out, up to step "
                f"{self.state.global_step}. Lower `optim.learning_rate`, or take a card with bfloat16."
            )

    def plan(self, control: Any) -> None:
        """After a step: what follows it, as in jaxtune.train."""
        n = self.state.global_step
        last = n >= self.total
        control.should_evaluate = bool(self.evaluation and (last or self.evaluates(n)))
        control.should_save = control.should_evaluate or self.stopping or last or self.saves(n)
        control.should_training_stop = self.stopping or last
        self.scores = {}

    # ---------------------------------------------------------------- Checkpoints

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Written by transformers beside, hashed, and renamed into place."""
        step = self.state.global_step
        work = self.directory / "tmp" / f"checkpoint-{step}"
        found = method.trainable(self.model)
        bad = [name for name, p in found.items() if not torch.isfinite(p).all()]
        if bad:
            raise DivergedError(kept.diverged(self.directory, step, bad))
        first = self.args.should_save
        with kept.whole_or_not(self.directory, step, work if first else None):
            super()._save_checkpoint(model, trial)  # in every process: it counts operations together
            if first:
                adalora.save(self.model, work)
                record = {"step": step, "rows": self.batches.cursor, "metrics": self.scores, "identity": self.same}
                record |= {"optimiser_from": self.fresh_at} if self.fresh_at else {}
                kept.commit(self.directory, work, record | {"leaves": spec_of(found)})
        if first:
            keep = self.c.checkpoint.keep_last_n, self.c.checkpoint.keep_best_n
            kept.delete_old(self.directory, *keep, self.say, self.goal)
            self.saved()
        self.accelerator.wait_for_everyone()
        self.steps.restart_clock()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Every parameter that trains: a PEFT file lacks the network of P-tuning.  No pickled arguments."""
        if output_dir is None or not self.args.should_save:
            return
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        tensors = {name: p.detach().cpu().contiguous() for name, p in method.trainable(self.model).items()}
        save_file(tensors, Path(output_dir) / TRAINABLE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        restore(self.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Of a checkpoint without the optimiser's state, the schedule alone goes on."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and not has_optimiser(Path(checkpoint)):
            step, groups, scheduler = int(Path(checkpoint).name), self.optimizer.param_groups, self.lr_scheduler
            rate = self.schedule(step)
            there = {"last_epoch": step, "_step_count": step + 1, "_last_lr": [rate] * len(groups)}
            scheduler.load_state_dict(scheduler.state_dict() | there)
            for group in groups:
                group["lr"] = rate

    def _save_rng_state(self, output_dir: str) -> None: ...

    def _load_rng_state(self, checkpoint: str | None) -> None: ...


class Rules(transformers.TrainerCallback):
    """Tells the trainer of the moments of a step."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.begin_step()
        seed = (args.seed * 1_000_003 + state.global_step) * 1_009 + args.process_index
        torch.manual_seed(seed % 2**63)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.measure()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.trainer.accelerator.optimizer_step_was_skipped:
            adalora.allocate(self.trainer.model, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        self.trainer.count_skipped()
        self.trainer.plan(control)
        return control

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        # To Trainer the run is one epoch, and what was due after its last step would be done again.
        control.should_evaluate = control.should_save = False
        return control


@torch.no_grad()
def restore(adapted: Any, step: Path) -> None:
    """Puts what a checkpoint has trained into peft's model.

    Raises:
      UserError: the checkpoint holds other tensors.
    """
    stored, found = load_file(step / TRAINABLE), method.trainable(adapted)
    check_same(f"Checkpoint {step}", spec_of(stored), spec_of(found))
    for name, parameter in found.items():
        parameter.copy_(stored[name])
    adalora.load(adapted, step)


def has_optimiser(step: Path) -> bool:
    """Whether a checkpoint holds the optimiser's state."""
    return (step / "optimizer.pt").is_file()


def spec_of(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """{name: 'float32[64,8]', ...}."""
    return {
        name: f"{str(t.dtype).removeprefix('torch.')}[{','.join(map(str, t.shape))}]" for name, t in tensors.items()
    }
