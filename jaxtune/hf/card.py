"""Model cards: what the Hub reads of a run (base, data, scores) and what a person needs to load the result.

Built from what is known and nothing else: no language is guessed, a local path is no base model and no dataset, and
what stands outside this machine's directories is all that the config shows of them.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from jaxtune import __version__
from jaxtune.hf import handover

# Data files, by what `datasets` calls their kind.
KINDS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
# Keys of eval.json: the Hub's name of a metric, and its name for people.
METRICS = {"eval_loss": ("loss", "Loss per token"), "exact_match_after": ("exact_match", "Exact match")}


class Run(NamedTuple):
    """What a card tells of a run.  config: as in config.json.  scores: as in eval.json."""

    config: Mapping[str, Mapping[str, Any]] | None = None
    scores: Mapping[str, float] = {}


def is_hub_id(name: str) -> bool:
    """Whether a name can be that of a repository on the Hub and is none of a file or directory here."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not name.startswith(".") and Path(name).suffix.lower() not in KINDS and not Path(name).exists()


def public(value: Any) -> Any:
    """The values that a config sets, without the directories of the machine: of a path the last part."""
    if isinstance(value, Mapping):
        return {key: public(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, (list, tuple)):
        return [public(inner) for inner in value]
    if isinstance(value, str) and "\n" not in value and value.startswith(("/", "~/")):
        return Path(value).name
    return value


def card(
    kind: str,
    base: str,
    method: str,
    run: Run | None = None,
    repo_id: str | None = None,
    *,
    over: Mapping[str, Any] | None = None,
    onto: str | None = None,
    seq2seq: bool = False,
) -> str:
    """README.md of an export.

    Args:
      kind: adapter | merged | model (what `full` and `partial` train).  base: the base's name.  method: e.g. lora.
      repo_id: where it will be, if that is known.  over: the base as `handover.trained_over` has it; None: as the
        run's config.  onto: of a merge over a quantised base, dequantised | original.
      seq2seq: the base has an encoder.
    """
    run = run or Run()
    over = (run.config or {}).get("model", {}) if over is None else over
    quantised = handover.how(over)
    if onto == "original":
        run = run._replace(scores={})  # they are the trained model's
    on_hub = is_hub_id(base)
    section: Mapping[str, Any] = (run.config or {}).get("export", {})
    language = section.get("language")
    short = Path(base).name
    data = ModelCardData(
        base_model=base if on_hub else None,
        library_name="peft" if kind == "adapter" else "transformers",
        pipeline_tag=_task(seq2seq),
        tags=[*([f"base_model:adapter:{base}"] if kind == "adapter" and on_hub else []), method, "jaxtune"],
        language=list(language) if isinstance(language, (list, tuple)) else language,
        datasets=_hub_datasets(run) or None,
        model_name=f"{short}-{method}",
        eval_results=_results(run, _task(seq2seq)) or None,
    )
    what = {
        "adapter": f"An adapter ({method}) for",
        "merged": f"An adapter ({method}) merged into",
        "model": f"Trained ({method}) from",
    }[kind]
    parts = [f"# {short}-{method}", f"{what} `{short if not on_hub else base}`, made with jaxtune {__version__}."]
    if over.get("quant"):
        merged = MERGED_ONTO.get(onto, "") if kind == "merged" and onto else ""
        parts += [f"It was trained over that base {quantised}.{merged}"]
    parts += [_loading(kind, base if on_hub else "BASE_MODEL", repo_id, over, handover.auto_class(seq2seq))]
    scores = {name: run.scores[key] for key, (_, name) in METRICS.items() if key in run.scores}
    if scores:
        lines = "\n".join(f"| {name} | {value:.6g} |" for name, value in scores.items())
        parts += ["## On held-back rows", f"| | |\n|---|---|\n{lines}"]
    if run.config:
        text = json.dumps(public(run.config), indent=2, ensure_ascii=False)
        fence = "`" * 3
        while fence in text:
            fence += "`"
        parts += [
            "## The exact config",
            "`config.json` of the run, without directories.",
            f"{fence}json\n{text}\n{fence}",
        ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"


MERGED_ONTO = {
    "dequantised": " What is merged is that base, dequantised: this model is the trained one.",
    "original": " It is merged into the weights as they were before, and differs from the trained model by that loss.",
}


def _hub_datasets(run: Run) -> list[str]:
    data = (run.config or {}).get("data", {})
    names = [data.get("train"), data.get("eval")]
    return list(dict.fromkeys(name for name in names if name and is_hub_id(name)))


def _task(seq2seq: bool) -> str:
    return "text2text-generation" if seq2seq else "text-generation"


def _results(run: Run, task: str) -> list[EvalResult]:
    """model-index: the scores of eval.json over the rows that they were computed on."""
    data = (run.config or {}).get("data", {})
    source = data.get("eval") or data.get("train")
    if not source:
        return []
    if is_hub_id(source):
        about: dict[str, Any] = {"dataset_type": source, "dataset_name": source, "dataset_config": data.get("name")}
        about |= {"dataset_split": data.get("eval_split"), "dataset_revision": data.get("revision")}
    else:
        about = {"dataset_type": KINDS.get(Path(source).suffix.lower(), "text"), "dataset_name": Path(source).name}
    return [
        EvalResult(task, metric_type=kind, metric_value=run.scores[key], metric_name=name, **about)
        for key, (kind, name) in METRICS.items()
        if math.isfinite(run.scores.get(key, math.nan))
    ]


def _loading(kind: str, base: str, repo_id: str | None, over: Mapping[str, Any], auto: str) -> str:
    known = repo_id if repo_id and "/" in repo_id else None
    where = known or "THIS_DIRECTORY_OR_HUB_ID"
    if kind != "adapter":
        return f"""## To load it

```python
import transformers

model = transformers.{auto}.from_pretrained("{where}")
```

```python
import jaxtune

lm = jaxtune.load("{where}")
```"""
    here = f'huggingface_hub.snapshot_download("{known}")' if known else '"THIS_DIRECTORY"'
    needs = "import huggingface_hub\nimport jaxtune" if known else "import jaxtune"
    return f"""## To load it

```python
import peft, transformers

base = transformers.{auto}.from_pretrained("{base}"{handover.in_transformers(over)})
model = peft.PeftModel.from_pretrained(base, "{where}")
```

```python
{needs}

lm = jaxtune.load("{base}", adapter={here}{handover.in_jaxtune(over)})
```"""
