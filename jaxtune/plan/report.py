"""A plan on the screen."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import rich.box
import rich.console
import rich.table

from jaxtune.plan.chips import GIB, Chip
from jaxtune.plan.compile import Compiled, DoesNotFit
from jaxtune.plan.search import MARGIN, Plan

BAR = 30
WORDS = {
    "weights": "frozen weights",
    "trained": "what trains",
    "optimiser": "optimiser",
    "batch": "batch",
    "gradients": "gradients",
    "activations": "activations kept (remat {remat})",
    "layer": "a layer at work",
    "gathers": "weights gathered for it",
    "loss": "the loss at work",
}


@contextlib.contextmanager
def screen(stream: Any) -> Iterator[rich.console.Console]:
    yield rich.console.Console(file=stream, highlight=False, soft_wrap=True)


def show(to: rich.console.Console, one: Plan, why: str, facts: Mapping[str, Any]) -> None:
    """The setting, where its memory goes, the verdict, the bound, and what else would fit."""
    c, mesh = one.config, {k: v for k, v in one.laid.mesh.shape.items() if v > 1 or k == "fsdp"}
    turns = c.train.gradient_accumulation_steps
    to.print(
        f"{c.model.id}: {facts['parameters']:,} parameters; {c.peft.method} trains {facts['trainable_parameters']:,}\n"
        f"{one.flops.per_token / 1e9:,.2f} GFLOP a token in rows of {one.flops.tokens:,}"
        + (f" ({facts['hardware_flops_per_token'] / 1e9:,.2f} with remat={c.train.remat})" if one.flops.again else "")
        + f"; {c.train.global_batch_size} rows a step"
        + (f" in {turns} turns" if turns > 1 else "")
    )
    axes = " ".join(f"{axis}={size}" for axis, size in mesh.items())
    to.print(
        f"\nOn {one.chips} {one.chip.name}{shape_of(one.chip, one.chips)}{f' ({why})' if why else ''}, mesh {axes}"
    )
    table = rich.table.Table(box=None, pad_edge=False, show_header=False)
    most = max(one.memory.parts().values())
    for name, size in one.memory.parts().items():
        words = WORDS[name].format(remat=c.train.remat)
        table.add_row(f"  {words}", f"{size / GIB:.2f}", "█" * round(BAR * size / most))
    verdict = "fits" if one.fits else "does not fit"
    table.add_row("  GiB a chip", f"{one.memory.total / GIB:.2f}", f"of {one.chip.hbm / GIB:.2f}: {verdict}")
    to.print(table)
    if not one.fits and one.memory.total <= one.chip.hbm:
        to.print(f"  (predictions can be {MARGIN:.0%} off: --compile knows)")
    if not one.fits:
        to.print(remedy(facts["nearest_that_fits"]))
    if facts["largest_batch"] is not None:
        to.print(f"  the most rows at a time that fit: {facts['largest_batch']}")
    to.print(
        "  at least "
        + ", ".join(f"{name} {seconds:.3f} s" for name, seconds in one.bound.seconds.items() if seconds)
        + f" a step: no more than {one.bound.tokens_per_second / one.chips:,.0f} tokens/s a chip "
        f"({one.bound.binds} binds; a bound, not a promise)"
    )


def remedy(change: Mapping[str, Any] | None) -> str:
    """The nearest setting that fits, as words of a command line."""
    if change is None:
        return "  Nothing here makes it fit: take more chips or larger ones (below), or shorter rows (data.max_length)."
    words = " ".join(f"--config.{key}={value}" for key, value in change.items())
    return f"  nearest that fits: {words}"


def shape_of(chip: Chip, chips: int) -> str:
    return f" ({chip.slices[chips]})" if chip.slices and chips in chip.slices else ""


def show_compiled(to: rich.console.Console, one: Plan, found: Compiled | DoesNotFit) -> None:
    """The prediction beside what the compiler reserves."""
    if isinstance(found, DoesNotFit):
        needs = f"{found.needs / GIB:.2f} of {(found.has or 0) / GIB:.2f} GiB. " if found.needs else ""
        to.print(f"\nCompiled ({found.seconds:.0f} s): does not fit. {needs}{'' if needs else found.message}")
        return
    held = one.memory.weights + one.memory.trained + one.memory.optimiser + one.memory.batch
    table = rich.table.Table("GiB a chip", "predicted", "compiled", box=rich.box.SIMPLE_HEAD)
    rows = {
        "arguments": (held, found.argument),
        "temporary": (one.memory.total - held, found.total - found.argument),
        "in all": (one.memory.total, found.total),
    }
    for name, (predicted, compiled) in rows.items():
        table.add_row(name, f"{predicted / GIB:.2f}", f"{compiled / GIB:.2f}")
    to.print(f"\nCompiled for {one.chips} {one.chip.name} in {found.seconds:.0f} s; nothing ran")
    to.print(table)
    moved = [f"{kind} {entry['count']} ({entry['bytes'] / 1e9:.2f} GB)" for kind, entry in found.collectives.items()]
    to.print(f"  exchanged in a step, on one chip: {', '.join(moved) or 'nothing'}")
    for line in found.complaints:
        to.print(f"  WARNING of the compiler: {line}")


def show_search(to: rich.console.Console, best: Sequence[Plan]) -> None:
    """The best settings, one a line."""
    if not best:
        to.print("\nNo setting that was tried fits on these chips.")
        return
    names = ("mesh", "remat", "quant", "turns", "GiB a chip", "s a step, at least", "binds")
    table = rich.table.Table(*names, box=rich.box.SIMPLE_HEAD)
    for one in best:
        axes = " ".join(f"{axis}={size}" for axis, size in one.laid.mesh.shape.items() if size > 1) or "one chip"
        c = one.config
        table.add_row(
            *(axes, c.train.remat, str(c.model.quant), str(c.train.gradient_accumulation_steps)),
            *(f"{one.memory.total / GIB:.2f}", f"{one.bound.step:.3f}", one.bound.binds),
        )
    to.print("\nThe best of what was tried, by these bounds:")
    to.print(table)


def show_chips(to: rich.console.Console, slices: Mapping[str, Plan | None]) -> None:
    """The smallest slice of every chip."""
    names = ("chip", "fewest", "GiB a chip", "of", "s a step, at least", "tokens/s a chip, at most", "binds")
    table = rich.table.Table(*names, box=rich.box.SIMPLE_HEAD)
    for name, one in slices.items():
        if one is None:
            table.add_row(name, "none", "", "", "", "", "")
            continue
        speed = f"{one.bound.tokens_per_second / one.chips:,.0f}"
        table.add_row(
            *(name, str(one.chips), f"{one.memory.total / GIB:.2f}", f"{one.chip.hbm / GIB:.2f}"),
            *(f"{one.bound.step:.3f}", speed, one.bound.binds),
        )
    to.print("\nThe fewest chips on which it fits:")
    to.print(table)
