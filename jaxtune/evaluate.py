"""Scores answers: those in a file, or those that a model gives.

  python -m jaxtune.evaluate --predictions answers.jsonl --metric rouge --json
  python -m jaxtune.evaluate --workdir runs/mine --metric rouge,chrf
  python -m jaxtune.evaluate --compare base,runs/one,runs/two --labels negative,positive
  python -m jaxtune.evaluate --model google/gemma-2-2b-it --adapter DIR --data test.jsonl --metric exact_match

Rows of a file are {"prediction": "…", "references": ["…", …]}, for squad_v2 {"id": "…", "prediction": "…", "answers":
{"text": ["…", …]}}.  docs/evaluation.md says what each metric equals and what it does with Persian.
"""

import argparse
from collections.abc import Sequence

from jaxtune import cli, config
from jaxtune.errors import UserError, did_you_mean
from jaxtune.scores import METRICS, files

# Of the model, and so of no use beside --predictions.
MODEL_FLAGS = (
    *("workdir", "model", "adapter", "config", "data", "split", "max_rows", "batch_size", "max_new_tokens", "compare"),
    *("out", "quant", "dtype", "checkpoint", "normalise"),
)


def main(argv: Sequence[str]) -> int:
    arguments = parse(argv)
    if arguments.predictions is None:
        from jaxtune import hosts, measure  # jax; a file needs none.

        hosts.alone("python -m jaxtune.evaluate")
        return measure.run(arguments)
    how = {"references": arguments.references, "stemmer": arguments.stemmer, "labels": arguments.labels}
    return files.run(arguments.predictions, arguments.metric, as_json=arguments.json, **how)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Reads the command line.  `labels` is a list; what the flags of a model mean is for `measure` to say.

    Raises:
      UserError: an unknown flag, nothing to score, or flags of a file and of a model together.
    """
    for word in argv:
        config.find_secret("The command line", word)
    parser = cli.Parser(
        prog="python -m jaxtune.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--metric", metavar="A,B", help=f"one or more of: {', '.join(METRICS)}")
    add("--references", choices=("max", "mean"), help="rouge, of several references: the best (default) or their mean")
    add("--stemmer", action="store_true", help="rouge: Porter's, for English")
    add("--labels", metavar="A,B", help="accuracy: all labels there are; a model also answers by their probabilities")
    add("--json", action="store_true", help="one JSON object on stdout, and the table on stderr")
    file = parser.add_argument_group("answers in a file")
    file.add_argument(
        "--predictions", metavar="FILE", help="a .jsonl, .json, .csv or .parquet file; no model is loaded"
    )
    add = parser.add_argument_group("answers of a model").add_argument
    add("--workdir", metavar="RUN", help="a run directory: its model, adapter and held-back rows")
    add("--model", help="a directory or Hub id")
    add("--adapter", help="a PEFT directory to put over it")
    add("--checkpoint", help="of a run: newest, best or a step; default: what it has written at its end, else newest")
    add("--config", help="a recipe, for its data and templates; --config.section.key=value for one setting")
    add("--data", help="rows to answer: a file or Hub dataset")
    add("--split", help="of a Hub dataset")
    add("--max-rows", type=int, help="answer no more than this many")
    add("--batch-size", type=int, help="rows side by side")
    add("--max-new-tokens", type=int, help="the longest answer")
    add("--compare", metavar="A,B", help="score side by side: base, and run directories")
    add("--normalise", action="store_true", default=None, help="labels by the log-probability of a token, not the sum")
    add("--out", help="where to write answers: a .jsonl file, which --predictions scores alike")
    add("--quant", help="hold the base as nf4 or int8")
    add("--dtype", help="compute in float32 or bfloat16")
    arguments, unknown = parser.parse_known_args(list(argv))
    set_to, unknown = cli.settings_in(unknown)
    if unknown:
        flags = ["--" + name.replace("_", "-") for name in vars(arguments)]
        near = did_you_mean(unknown[0].split("=")[0], flags)
        raise UserError(f"Unknown argument {config.shown(unknown[0])}.{near} Try --help.")
    if arguments.labels is not None:
        arguments.labels = [label for label in map(str.strip, arguments.labels.split(",")) if label]
    arguments.settings = set_to
    if arguments.predictions is not None:
        arguments.config = arguments.config or next((f"config.{path}" for path in set_to), None)
        if beside := [name for name in MODEL_FLAGS if getattr(arguments, name) is not None]:
            flag = "--" + beside[0].replace("_", "-")
            raise UserError(f"--predictions scores answers in a file, and {flag} is for answers of a model. Drop one.")
        if arguments.metric is None:
            raise UserError(f"--metric is missing. There are: {', '.join(METRICS)}.")
    elif not (arguments.workdir or arguments.model or arguments.config or arguments.compare):
        raise UserError(
            "There is nothing to score. Give --predictions FILE, --workdir RUN or --model ID; or try --help."
        )
    return arguments


if __name__ == "__main__":
    cli.run(main)
