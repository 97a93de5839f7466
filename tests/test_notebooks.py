"""The Kaggle notebooks: they are what their script writes, and run to the end on a CPU with the embedded model."""

import ast
import json
import runpy
from pathlib import Path

import nbclient
import nbformat
import pytest
import tiny_run

from jaxtune.config import ASSETS

ROOT = Path(__file__).parents[1]
MAKER = runpy.run_path(str(ROOT / "tools" / "make_notebooks.py"))
NAMES = sorted(MAKER["CELLS"])
RECIPE = {"kaggle_t4x2.ipynb": "gemma2_persian_qlora", "kaggle_tpu_v5e8.ipynb": "gemma_lora"}

EXTRA = {
    "model.dtype": "float32",
    "data.train": ASSETS / "quickstart" / "train.jsonl",
    "data.eval": ASSETS / "quickstart" / "eval.jsonl",
    "data.max_length": 64,
    "data.max_train_rows": 64,
    "data.max_eval_rows": 4,
    "optim.warmup_steps": 1,
    "train.steps": 2,
    "train.global_batch_size": 4,
    "train.log_every": 1,
    "evaluate.samples": 2,
    "evaluate.max_new_tokens": 8,
}

# What a run does as the notebook sees it: argv[-1] is sent as EXTRA.  It says that it begins, and ends as asked.
RUN = """
import json, os, pathlib, signal, sys

signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
workdir = pathlib.Path(sys.argv[sys.argv.index("--workdir") + 1])
workdir.mkdir(exist_ok=True)
(workdir / "run.lock").write_text(json.dumps({"pid": os.getpid()}))
ends = json.loads(sys.argv[-1])
print("begun", flush=True)
if ends["waits"]:
    signal.sigwait([signal.SIGTERM])
if ends["recorded"] is not None:
    (workdir / "run.json").write_text(json.dumps({"exit_code": ends["recorded"], "pid": os.getpid()}))
sys.exit(ends["code"])
"""


def cells(name, tag):
    whole = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    return [cell for cell in whole.cells if tag in cell.metadata.get("tags", [])]


def assigned(source):
    return [ast.unparse(node.targets[0]) for node in ast.parse(source).body if isinstance(node, ast.Assign)]


def parameters(name, workdir):
    """What the test puts in place of the settings."""
    values = {
        "SOURCE": str(ROOT),
        "CONFIG": str(ROOT / "configs" / f"{RECIPE[name]}.py"),
        "MODEL": str(ASSETS / "tiny_gemma"),
        "WORKDIR": str(workdir),
        "EXTRA": [f"--config.{key}={value}" for key, value in EXTRA.items()],
        "PROMPT": "What is the colour of a carrot?",
        "HOURS": 1,
        "PREVIOUS": "",
    }
    return "\n".join(f"{key} = {value!r}" for key, value in values.items())


def outputs(notebook):
    """{stdout, stderr or a MIME type: all outputs of that kind, in order}."""
    found = {}
    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        data = {output.name: output.text} if output.output_type == "stream" else output.get("data", {})
        for kind, text in data.items():
            found.setdefault(kind, []).append(text)
    return found


def test_the_notebooks_are_what_the_script_writes():
    assert MAKER["changed"]() == [], "run python tools/make_notebooks.py"
    assert sorted(path.name for path in (ROOT / "notebooks").iterdir() if path.suffix == ".ipynb") == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_valid_and_empty_of_outputs(name, tmp_path):
    whole = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    nbformat.validate(whole)
    assert all(not cell.outputs and cell.execution_count is None for cell in whole.cells if cell.cell_type == "code")
    (install,), (settings,) = cells(name, "install"), cells(name, "parameters")
    assert "constraints.txt" in install.source
    assert f"{RECIPE[name]}.py" in settings.source and (ROOT / "configs" / f"{RECIPE[name]}.py").exists()
    assert assigned(settings.source) == assigned(parameters(name, tmp_path))


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_to_its_end(name, tmp_path, monkeypatch):
    # One device, as a newcomer's CPU has, not the eight of conftest; nothing in the home directory.
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for place in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(place, str(tmp_path / place))
    whole = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    whole.cells = [cell for cell in whole.cells if "install" not in cell.metadata.get("tags", [])]
    for cell in whole.cells:
        if "parameters" in cell.metadata.get("tags", []):
            cell.source = parameters(name, tmp_path / "run")
    nbclient.NotebookClient(whole, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()

    assert [row["step"] for row in tiny_run.metrics(tmp_path / "run") if "loss" in row] == [1, 2]
    adapter = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(ASSETS / "tiny_gemma")
    shown = outputs(whole)
    assert len(shown["image/png"]) == 1
    assert "What is" in shown["text/html"][0] and "after" in shown["text/html"][0]
    *before, answer = shown["stdout"]
    assert "PEFT adapter is in" in "".join(before)
    assert "\x1b" not in "".join(before)  # no progress bar
    assert answer.strip() and "no adapter" not in answer


@pytest.mark.parametrize(
    ("code", "recorded", "waits", "says"),
    [
        (0, 0, False, None),
        (75, 75, True, "goes on where it stopped"),
        (1, 75, True, "goes on where it stopped"),
        (80, 80, False, "code 80"),
        (64, None, False, "code 64"),
    ],
    ids=["done", "stopped", "stopped under torchrun", "diverged", "refused, over the record of a stopped run"],
)
def test_how_the_training_cell_ends(code, recorded, waits, says, tmp_path, monkeypatch):
    said = []

    def show(text, end="\n"):
        said.append(text + end)
        if waits and text == "begun\n":
            raise KeyboardInterrupt  # the stop button

    (tmp_path / "jaxtune").mkdir()
    (tmp_path / "jaxtune" / "train.py").write_text(RUN)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps({"exit_code": 75, "pid": 0}))
    ends = json.dumps({"code": code, "recorded": recorded, "waits": waits})
    here = {"CONFIG": "c", "MODEL": "m", "WORKDIR": str(tmp_path / "run"), "EXTRA": [ends], "HOURS": 1, "print": show}
    source = MAKER["TRAIN_IMPORTS"] + MAKER["COMMAND_TPU"] + MAKER["TRAIN"]
    if says and says.startswith("code"):
        with pytest.raises(RuntimeError, match=says):
            exec(source, here)
    else:
        exec(source, here)
        assert (says or "begun") in "".join(said)
