"""Says before a run whether it fits, on which chips, and how fast it can be at most: of config.json alone, in seconds.

    python -m jaxtune.plan --config configs/gemma_lora.py                         # for what is attached, and every chip
    python -m jaxtune.plan --config configs/gemma_lora.py --chip v5e --chips 8 --compile
    python -m jaxtune.plan --config configs/gemma_lora.py --chip v6e --search --json

--compile asks the compiler of the chip, which for TPUs need not be here; --search tries meshes, remat policies, rows at
a time and NF4.  A local directory with nothing but config.json is enough as model.id.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import jax

from jaxtune import cli, tree
from jaxtune.errors import UserError
from jaxtune.hf.base import Base
from jaxtune.plan import report, search
from jaxtune.plan.abstract import open_config
from jaxtune.plan.chips import CHIPS, Chip, check_count, chip_named, chip_of_kind
from jaxtune.plan.compile import Compiled, DoesNotFit, compile_config

# What is planned for where nothing is attached and nothing named: what Kaggle and Colab lend.
USUAL = "v5e"


def main(argv: Sequence[str]) -> int:
    known, rest = parser().parse_known_args(list(argv))
    if known.help:
        print(parser().format_help())
        return 0
    c = cli.parse("jaxtune.plan", rest, __doc__ or "", quiet=known.json).config
    with report.screen(sys.stderr if known.json else sys.stdout) as screen:
        base = open_config(c)
        chip, chips, why = hardware(c, base, known.chip, known.chips)
        one = search.plan(c, base, chip, chips)
        facts = facts_of(one)
        report.show(screen, one, why, facts)
        if known.compile:
            screen.print("\nCompiling, which takes minutes …")
            screen.file.flush()
            compiled = compile_config(c, base, chip, chips)
            facts["compiled"] = facts_compiled(compiled, chip)
            report.show_compiled(screen, one, compiled)
        if known.search:
            best = search.best(c, base, chip, chips)
            facts["search"] = [short(found) for found in best]
            report.show_search(screen, best)
        slices = {name: search.smallest_slice(c, base, CHIPS[name]) for name in CHIPS}
        facts["smallest_slice"] = {name: found and short(found) for name, found in slices.items()}
        report.show_chips(screen, slices)
    if known.json:
        print(json.dumps(facts), flush=True)
    return 0


def parser() -> argparse.ArgumentParser:
    made = cli.Parser(prog="python -m jaxtune.plan", description=__doc__, allow_abbrev=False, add_help=False)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.add_argument("--chip", help=f"{', '.join(CHIPS)}; default: what is attached, else {USUAL}")
    made.add_argument("--chips", type=int, help="how many; default: those attached, or the fewest that are enough")
    made.add_argument("--compile", action="store_true", help="ask the chip's compiler, too (minutes)")
    made.add_argument("--search", action="store_true", help="the best of many settings")
    made.add_argument("--json", action="store_true", help="one JSON object on stdout, and the tables on stderr")
    made.add_argument("-h", "--help", action="store_true", help="this text")
    made.add_argument_group("and as in training", "--config RECIPE, --config.section.key=value")
    return made


def hardware(c: Any, base: Base, name: str | None, count: int | None) -> tuple[Chip, int, str]:
    """(chip, how many, why these) of the two flags.

    Raises:
      UserError: a chip that is not known, or a number of them that is not to be had.
    """
    device = jax.devices()[0]
    attached = chip_of_kind(device.device_kind)
    if name is None and attached is None and device.platform != "cpu":
        raise UserError(
            f"{device.device_kind} is attached, which is not in the table. Give --chip: {', '.join(CHIPS)}."
        )
    chip = chip_named(name) if name is not None else attached or CHIPS[USUAL]
    why = "" if name is not None else "attached"
    if count is not None:
        check_count(chip, count)
    if chip == attached and count in (None, jax.device_count()):
        return chip, jax.device_count(), "attached"
    if name is None and attached is None:
        why = f"no accelerator is attached, so for {USUAL}; --chip and --chips say otherwise"
    if count is None:
        found = search.smallest_slice(c, base, chip)
        count = found.chips if found else chip.counts()[-1]
        why = (f"{why}; " if why else "") + ("the fewest that are enough" if found else "not even these are enough")
    return chip, count, why


def facts_of(one: search.Plan) -> dict[str, Any]:
    """What --json prints.  `hbm_bytes_per_chip` is the prediction; the compiler's is in `compiled`."""
    c, base, laid = one.config, one.laid.base, one.laid
    most = search.largest_batch(c, base, one.chip, one.chips)
    near = None if one.fits else search.nearest(c, base, one.chip, one.chips)
    return {
        "model": c.model.id,
        "method": c.peft.method,
        "parameters": tree.count(base.abstract),
        "trainable_parameters": tree.count(laid.state.trainable),
        "flops_per_token": one.flops.per_token,
        "hardware_flops_per_token": one.flops.hardware / one.flops.tokens,
        "tokens_per_row": one.flops.tokens,
        **short(one),
        "fits": one.fits,
        "hbm_bytes_available": int(one.chip.hbm),
        "parts": one.memory.parts(),
        "seconds": one.bound.seconds,
        "largest_batch": most and most.config.train.global_batch_size,
        "nearest_that_fits": near and near[0],
    }


def facts_compiled(found: Compiled | DoesNotFit, chip: Chip) -> dict[str, Any]:
    fits = isinstance(found, Compiled) and found.total <= chip.hbm
    return {k: v for k, v in found._asdict().items() if k != "text"} | {"fits": fits}


def short(one: search.Plan) -> dict[str, Any]:
    """One setting in a line."""
    c = one.config
    return {
        "chip": one.chip.name,
        "chips": one.chips,
        "mesh": dict(one.laid.mesh.shape),
        "remat": c.train.remat,
        "quant": c.model.quant,
        "global_batch_size": c.train.global_batch_size,
        "gradient_accumulation_steps": c.train.gradient_accumulation_steps,
        "hbm_bytes_per_chip": one.memory.total,
        "step_seconds_at_least": one.bound.step,
        "bound_by": one.bound.binds,
        "tokens_per_second_per_chip_at_most": one.bound.tokens_per_second / one.chips,
    }
