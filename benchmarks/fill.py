"""What share of a recipe's slots hold a token: padded, at a few widths, packed.  Nothing is trained; seconds.

  python benchmarks/fill.py --config configs/gemma2_persian_p_tuning.py --tokenizer DIR \\
      --config.data.train=rows.jsonl [--config.train.global_batch_size=8 …]

DIR holds the tokenizer's files.  It runs one epoch of the batches that `jaxtune.train` would take, and counts.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtune.cli import load_config, run, settings_in
from jaxtune.config import set_value
from jaxtune.data.batches import real_tokens, slots
from jaxtune.data.splits import plan_course, read_splits, train_batches
from jaxtune.tokenizer import load_tokenizer

WAYS = {
    "padded to the longest row": {"data.packing": False, "data.length_buckets": 1},
    "at its usual widths": {"data.packing": False},
    "packed": {"data.packing": True},
}


def fill(c: Any, tokenizer: Any) -> tuple[float, int, tuple[int, ...]]:
    """(share of slots filled, steps, widths) of an epoch."""
    c.data.eval, c.train.steps, c.train.epochs = None, None, 1.0
    splits = read_splits(c.data, tokenizer, lambda line: None)
    course = plan_course(c.data, c.train, splits)
    order = {
        "seed": c.train.seed,
        "shuffle": c.data.shuffle,
        "widths": course.widths,
        "packed": course.packing or False,
    }
    where = {"batch_size": c.train.global_batch_size, "start_row": 0, "stop_row": course.stop_row}
    given = [batch for batch, _ in train_batches(splits.train, **order, **where, length=splits.length)]
    share = sum(map(real_tokens, given)) / sum(map(slots, given))
    return share, len(given), tuple(sorted({batch["tokens"].shape[1] for batch in given}))


def main(argv: Sequence[str]) -> None:
    changes, words = settings_in(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    arguments = parser.parse_args(words)
    tokenizer = load_tokenizer(arguments.tokenizer)
    for name, own in WAYS.items():
        c = load_config(arguments.config)
        for path, value in (changes | own).items():
            set_value(c, path, value)
        share, steps, widths = fill(c, tokenizer)
        print(f"{name:28}{share:7.1%} of {', '.join(map(str, widths))} slots, {steps} steps")


if __name__ == "__main__":
    run(main)
