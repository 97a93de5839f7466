"""Scores of models on rows held back: loss, and answers by generation or by the probabilities of labels.

`python -m jaxtune.evaluate` with --workdir, --model or --compare.  What does not depend on weights is read and checked
first, of all models; their weights come one model after the other, and a base that several share is loaded once.
"""

import functools
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxtune import board, trained
from jaxtune import mesh as meshes
from jaxtune.answers import mean_loss
from jaxtune.console import Console, counting, visible
from jaxtune.data.examples import Prompt
from jaxtune.data.load import Dataset
from jaxtune.data.seq2seq import Lengths
from jaxtune.data.splits import read_prompts, read_splits
from jaxtune.errors import CannotCreateError, DataError, UserError, did_you_mean
from jaxtune.generate import Sampling, generate
from jaxtune.hf.handover import held_as
from jaxtune.likelihood import bucket, continuations, label_ids, loss_and_tokens, loss_batches
from jaxtune.models import decoder_start
from jaxtune.questions import Question, questions, scored
from jaxtune.rundir import write_atomic, write_json_atomic
from jaxtune.scores import METRICS, labels, metrics_of
from jaxtune.scoring import losses, names_of
from jaxtune.tokenizer import Tokenizer, load_tokenizer
from jaxtune.trained import Trained
from jaxtune.typing import Tree

# Prompts generated side by side.
BATCH = 32
ALL = 2**31  # rows


def answer(
    model: Any, variables: Tree, tokenizer: Tokenizer, prompts: Sequence[Prompt], *, max_new_tokens: int, **how: Any
) -> list[str]:
    """Greedy answers as text, in the order of the prompts; equal prompts are answered once.  `how` as in `batched`."""
    ids = list({tuple(prompt.ids): None for prompt in prompts})
    out = batched(model, variables, ids, max_new_tokens=max_new_tokens, stop_ids=tokenizer.stop_ids, **how)
    found = {row: tokenizer.decode(tokens).strip() for row, tokens in zip(ids, out, strict=True)}
    return [found[tuple(prompt.ids)] for prompt in prompts]


def batched(
    model: Any,
    variables: Tree,
    ids: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    shards: int,
    batch_size: int = BATCH,
    sampling: Sampling | None = None,
    advance: Callable[[int], None] = lambda done: None,
) -> list[list[int]]:
    """`generate`, the longest prompts first and each side by side with others of about its length.

    Args:
      batch_size: filled up to a multiple of `shards`.  advance: told of prompts answered.
    """
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    size = max(-(-min(len(ids), batch_size) // shards), 1) * shards
    found: dict[int, list[int]] = {}
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        how: dict[str, Any] = {"batch_size": size, "slots": bucket(len(ids[rows[0]])), "stop_ids": stop_ids}
        how |= {"max_new_tokens": max_new_tokens, "sampling": sampling, "seed": start}
        found |= zip(rows, generate(model, variables, [ids[i] for i in rows], **how), strict=True)
        advance(len(rows))
    return [found[i] for i in range(len(ids))]


class Asked(NamedTuple):
    """What a model is scored on.  rows, length: for the loss.  asked: rows that have a question."""

    tokenizer: Tokenizer
    rows: Dataset
    length: int | Lengths
    asked: int
    questions: list[Question]


def run(arguments: Any) -> int:
    """Scores what the command line names, prints a table and, with `--json`, one object.

    Raises:
      UserError: and its kinds: flags that do not go together, a missing run, data or metric, rows that cannot be used.
    """
    with Console(None, stream=sys.stderr if arguments.json else None) as console:
        models = trained.named(arguments, console.say)
        first = models[0].config
        metrics = wanted(arguments, first)
        mesh = trained.mesh_of(first, console.say)
        once = functools.cache(console.say)  # of several models the same lines
        rows = {model.name: read(model, metrics, arguments.labels, once) for model in models}
        warnings = compared(models, rows) if len(models) > 1 else []
        for line in warnings:
            console.say(f"WARNING: {line}")
        load = trained.one_at_a_time(mesh)
        bases = [trained.key_of(model.base) for model in models]
        found = {}
        for model in sorted(models, key=lambda model: bases.index(trained.key_of(model.base))):
            found[model.name] = measure(model, rows[model.name], metrics, arguments, mesh, load, console)
        results = {model.name: found[model.name] for model in models}
        board.show(results, console)
        if arguments.json:
            one = {"models": results, "warnings": warnings} if arguments.compare else results[models[0].name]
            print(json.dumps(one, ensure_ascii=False), flush=True)
    return 0


def wanted(arguments: Any, c: Any) -> list[str]:
    """The metrics of answers: those asked for, else those of the config, else exact match where it samples answers.

    Raises:
      UserError: one that does not exist, or rows that ask nothing.
    """
    if arguments.metric is not None:
        metrics = metrics_of(arguments.metric)
    else:
        usual = names_of(c.evaluate.metrics) or (("exact_match",) if c.evaluate.samples else ())
        metrics = [] if c.data.format == "text" or arguments.labels else list(usual)
    if c.data.format == "text" and (metrics or arguments.labels):
        flag = "--metric" if metrics else "--labels"
        raise UserError(
            f"{flag} scores answers, and `data.format` is text, whose rows ask nothing. Drop it for the loss alone, or "
            "set --config.data.format=prompt_completion with `data.prompt` and `data.completion`."
        )
    if arguments.references or arguments.stemmer:
        raise UserError("--references and --stemmer are for --predictions. Write answers with --out, and score these.")
    if arguments.out and not trained.path_of(arguments.out).parent.is_dir():
        raise CannotCreateError(f"--out is {arguments.out}, and there is no such folder. Make it, or give another.")
    if arguments.normalise and not arguments.labels:
        raise UserError("--normalise divides the log-probability of labels by their tokens: it needs --labels.")
    return metrics


def read(model: Trained, metrics: Sequence[str], names: Sequence[str] | None, say: Callable[[str], None]) -> Asked:
    """The rows of a model's data, tokenised.

    Raises:
      DataError: and other kinds of UserError: rows that cannot be used, or scored by a metric.
    """
    c = model.config
    tokenizer, start_id = load_tokenizer(model.base.directory), decoder_start(model.base.hf_config)
    data = c.data.copy_and_resolve_references()
    data.update({"train": data.eval, "train_split": data.eval_split, "max_train_rows": data.max_eval_rows})
    data.update({"eval": None, "streaming": False})
    rows, _, length = read_splits(data, tokenizer, say, model.virtual, start_id)
    assert isinstance(rows, Dataset)
    prompts: list[Prompt] = []
    if metrics or names:
        count = data.max_train_rows or ALL
        prompts = read_prompts(data, tokenizer, count, model.virtual, start_id)
        prompts = [prompt for prompt in prompts if prompt.row <= count]
        if not prompts:
            raise DataError(f"No row of {data.train} has a prompt of at most {data.max_length} tokens and an answer.")
    if "squad_v2" in metrics and (odd := next((p.row for p in prompts if p.row_id is None), None)):
        raise DataError(
            f"{data.train}: row {odd} has no `id`. squad_v2 is for rows with an `id`, by which it knows questions, and "
            "`answers` as SQuAD has them."
        )
    asked = questions(prompts, apart="squad_v2" in metrics)
    for question in asked if names else ():
        right = question.references or [question.prompt.reference]
        if not {labels.plain(text) for text in right} & {labels.plain(name) for name in names or ()}:
            near = did_you_mean(labels.plain(right[0]), names or ())
            raise DataError(
                f"{data.train}: the answer of row {question.prompt.row}, {visible(right[0][:80])!r}, is none of "
                f"--labels {','.join(names or ())}.{near} Name all of them."
            )
    return Asked(tokenizer, rows, length, len(prompts), asked)


def compared(models: Sequence[Trained], rows: dict[str, Asked]) -> list[str]:
    """In what models are not comparable, a line each.

    Raises:
      UserError: they would be scored on other rows.
    """

    def digest(parts: Any) -> str:
        return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()

    def of(asked: Asked) -> tuple[str, str]:
        """Of what is right, whatever the prompts; of prompts, targets and tokenizer."""
        right = [[q.prompt.row, q.references or [q.prompt.reference]] for q in asked.questions]
        own = asked.rows.tokens >= 0  # no virtual ones
        tokens = [hashlib.sha256(x[own].tobytes()).hexdigest() for x in (asked.rows.tokens, asked.rows.mask)]
        return digest([right, asked.rows.rows.tolist() if not right else None]), digest(tokens)

    (first, *others), lines = models, []
    for other in others:
        a, b = of(rows[first.name]), of(rows[other.name])
        sources = [(m.config.data.eval, m.config.data.eval_split) for m in (first, other)]
        if a[0] != b[0] or (a[1] != b[1] and not rows[first.name].questions and sources[0] != sources[1]):
            raise UserError(
                f"{first.name} and {other.name} would be scored on other rows: {first.config.data.eval} and "
                f"{other.config.data.eval}. Give the same to all with --data FILE."
            )
        if trained.key_of(first.base) != trained.key_of(other.base):
            held = [held_as(m.base.settings, m.config.model.dtype) for m in (first, other)]
            lines.append(
                f"{other.name} is over {other.base.id} ({held[1]}), {first.name} over {first.base.id} ({held[0]})"
            )
        if a[1] != b[1]:
            lines.append(
                f"{other.name} reads the rows as other tokens than {first.name} (tokenizer, template or length): "
                "compare answers, not losses"
            )
    return lines


def measure(
    model: Trained,
    asked: Asked,
    metrics: Sequence[str],
    arguments: Any,
    mesh: Mesh,
    load: Callable[[Any], Tree],
    console: Console,
) -> dict[str, Any]:
    """All scores of one model; also written where `--out` and the run directory want them."""
    c, flax_model = model.config, model.base.model
    with jax.set_mesh(mesh):
        variables = model.variables(mesh, load)
        form = held_as(model.base.settings, c.model.dtype)
        below = f" over {model.base.id}" if model.where != model.base.id else ""
        console.say(f"model: {model.where}{below}, {form}, on {mesh.size} {jax.default_backend()}")
        shards = meshes.batch_shards(mesh)
        size = c.evaluate.batch_size or c.train.global_batch_size // c.train.gradient_accumulation_steps
        result: dict[str, Any] = {"model": model.base.id, "adapter": model.where if model.where != c.model.id else None}
        result |= {"data": c.data.eval, "rows": len(asked.rows), "target_tokens": asked.rows.counts.target_tokens}
        result |= losses(loss(flax_model, variables, asked, -(-size // shards) * shards, mesh, console))
        out: list[dict[str, Any]] = []
        squad = "squad_v2" in metrics
        if asked.questions:
            result |= {"asked": asked.asked, "questions": len(asked.questions)}
        if metrics:
            prompts = [question.prompt for question in asked.questions]
            limits = {"max_new_tokens": c.evaluate.max_new_tokens, "shards": shards}
            unique = len({tuple(prompt.ids) for prompt in prompts})
            with counting(console, "answers", unique) as advance:
                limits |= {"batch_size": c.evaluate.batch_size or BATCH, "advance": advance}
                texts = answer(flax_model, variables, asked.tokenizer, prompts, **limits)
            pairs = zip(asked.questions, texts, strict=True)
            out = [scored(question, text, squad=squad, no_answer=c.data.no_answer) for question, text in pairs]
        if arguments.labels:
            chosen = by_probability(flax_model, variables, asked, arguments, size, shards, console)
            best = [max(values, key=lambda name: values[name]) for values in chosen]
            rows = [scored(question, name) for question, name in zip(asked.questions, best, strict=True)]
            result["accuracy_logprob"] = labels.score(rows, labels=arguments.labels)
            out = [row | {"label_scores": values} for row, values in zip(out or rows, chosen, strict=True)]
        for name in metrics:
            options = {"labels": arguments.labels} if name == "accuracy" and arguments.labels else {}
            result[name] = METRICS[name].score(out, **options)
    if arguments.out and out:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in out)
        where = trained.path_of(arguments.out)
        if arguments.compare:
            where = where.with_name(f"{where.stem}-{model.name.replace(' ', '-').replace('/', '-')}{where.suffix}")
        write_atomic(where, lines.encode())
        console.say(f"answers: {where}")
    if model.workdir is not None:
        write_json_atomic(model.workdir / "scores.json", result)
    return result


def loss(model: Any, variables: Tree, asked: Asked, size: int, mesh: Mesh, console: Console) -> float:
    """Mean over the target tokens of all rows, in nats."""
    where = meshes.batch_sharding(mesh)
    with counting(console, "loss", len(asked.rows)) as advance:

        def score(batch: Any) -> Any:
            out = loss_and_tokens(model, variables, jax.device_put(batch, where))
            advance(int(np.any(batch["weights"] > 0, axis=1).sum()))
            return out

        return mean_loss(score, loss_batches(asked.rows, size, asked.length))


def by_probability(
    model: Any, variables: Tree, asked: Asked, arguments: Any, size: int, shards: int, console: Console
) -> list[dict[str, float]]:
    """For each question {label: log-probability of its tokens after the prompt}; with `--normalise` that of a token."""
    apart = getattr(model.config, "start_id", None) is not None
    pairs = [label_ids(asked.tokenizer, q.prompt, arguments.labels, apart) for q in asked.questions]
    with counting(console, "labels", len(pairs)) as advance:
        how = {"batch_size": max(size, BATCH), "shards": shards, "advance": advance}
        found = continuations(model, variables, [p for p, _ in pairs], [texts for _, texts in pairs], **how)
    of = [dict(zip(arguments.labels, row, strict=True)) for row in found]
    return [{name: s.logprob / (s.tokens if arguments.normalise else 1) for name, s in row.items()} for row in of]
