"""The numbers of an evaluation, and which of them the best checkpoint is best by.

No jax: `torch_gpu` uses it too.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxtune import scores
from jaxtune.answers import read_answers, write_answers
from jaxtune.console import Console
from jaxtune.data.examples import Prompt
from jaxtune.errors import UserError, did_you_mean
from jaxtune.kept import Goal
from jaxtune.questions import questions, scored

# Numbers of the rows held back that need no answers; less is better.
LOSSES = ("eval_loss", "perplexity")
SHOWN = 8  # answers in the table


def losses(eval_loss: float) -> dict[str, float]:
    """What an evaluation's mean loss (nats a token) comes to."""
    return {"eval_loss": eval_loss, "perplexity": math.exp(min(eval_loss, 700.0))}  # e ** 710 is no float


def names_of(value: Any) -> tuple[str, ...]:
    """('rouge', 'chrf') of a config's value: None, one name, several with commas between, or a sequence of them."""
    words = value.split(",") if isinstance(value, str) else value or ()
    return tuple(word.strip() for word in words)


def score_answers(
    prompts: Sequence[Prompt], answers: Sequence[str], metrics: Sequence[str], no_answer: str | None = None
) -> dict[str, float]:
    """{'exact_match': ..., 'rougeL': ..., ...} of one answer to each prompt.

    Args:
      metrics: of `jaxtune.scores.METRICS`.  no_answer: as in `jaxtune.questions.scored`.
    """
    asked = list(zip(questions(prompts, apart=True), answers, strict=True))
    found: dict[str, float] = {}
    for name in ("exact_match", *metrics):
        rows = [scored(question, text, squad=name == "squad_v2", no_answer=no_answer) for question, text in asked]
        found |= score(name, [row | {"id": row.get("id") or str(i)} for i, row in enumerate(rows)])
    return found


def score(name: str, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    return scores.flat(scores.METRICS[name].score(rows))


def before_and_after(
    path: Path, prompts: Sequence[Prompt], after: Sequence[str], console: Console, **how: Any
) -> dict[str, float]:
    """Adds the answers after training to samples.jsonl, shows some, and gives all scores, as `rougeL_before`.

    `how` as in `score_answers`.
    """
    before = [row["before"] for row in read_answers(path)]
    console.say_answers(write_answers(path, prompts, before=before, after=after)[:SHOWN])
    was, now = (score_answers(prompts, answers, **how) for answers in (before, after))
    match = was.pop("exact_match"), now.pop("exact_match")
    console.say(f"exact match on {len(prompts)} rows: {match[0]:.1%} before, {match[1]:.1%} after")
    if now:
        console.say("\n".join(f"{name}: {was.get(name, math.nan):.4f} before, {now[name]:.4f} after" for name in now))
    found = {"exact_match_before": match[0], "exact_match_after": match[1]}
    for when, values in (("before", was), ("after", now)):
        found |= {f"{name}_{when}": value for name, value in values.items()}
    return found


def goal_of(config: dict[str, Any], say: Callable[[str], None] = lambda line: None) -> Goal:
    """What a run's best checkpoint is best by.

    Args:
      config: as in config.json.  say: told of a mode that would keep the worst.

    Raises:
      UserError: `evaluate.metrics` or `checkpoint.metric` names what is not there, or not computed in this run.
    """
    metrics, samples = names_of(config["evaluate"]["metrics"]), config["evaluate"]["samples"]
    for name in metrics:
        if name not in scores.METRICS:
            raise UserError(
                f"`evaluate.metrics` has {name!r}. There are: {', '.join(scores.METRICS)}."
                f"{did_you_mean(name, scores.METRICS)}"
            )
    if metrics and not samples:
        raise UserError(
            f"`evaluate.metrics` is {', '.join(metrics)}, which score answers, and `evaluate.samples` is 0. Set it to "
            "the number of rows to be answered."
        )
    metric = config["checkpoint"]["metric"]
    if metric == "eval_loss":
        return _goal(config, say)
    # Scored here once, to see what a metric's numbers are called.
    rows = [{"id": text, "prediction": text, "references": [text]} for text in ("a", "")]
    known = [*LOSSES, *(key for name in ("exact_match", *metrics) for key in score(name, rows) if samples)]
    if metric not in known:
        more = "" if samples else " (`evaluate.samples` is 0: no answers are scored)"
        raise UserError(
            f"`checkpoint.metric` is {metric!r}. In this run it can be: {', '.join(known)}{more}."
            f"{did_you_mean(metric, known)} Scores come from `evaluate.metrics`: {', '.join(scores.METRICS)}."
        )
    if not config["data"]["eval"]:
        raise UserError(f"`checkpoint.metric` is {metric}, and there are no evaluations without `data.eval`. Set it.")
    return _goal(config, say)


def _goal(config: dict[str, Any], say: Callable[[str], None]) -> Goal:
    metric, mode = config["checkpoint"]["metric"], config["checkpoint"]["mode"]
    if metric in LOSSES and mode == "max":
        say(f"WARNING: `checkpoint.mode` is max, and of {metric} less is better: the worst checkpoint is kept as best")
    return Goal(metric, mode or ("min" if metric in LOSSES else "max"))


def needs_answers(goal: Goal) -> bool:
    """Whether every evaluation has to generate."""
    return goal.metric not in LOSSES
