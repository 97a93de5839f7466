"""Makes the Kaggle notebooks: notebooks/kaggle_t4x2.ipynb for two T4 GPUs, notebooks/kaggle_tpu_v5e8.ipynb for a TPU.

    python tools/make_notebooks.py            writes them
    python tools/make_notebooks.py --check    exits with 1 where a file is not what this script writes

A notebook is a list of (kind, text).  A kind is markdown or code; install and parameters are code cells with that tag,
which the test leaves out and replaces.  The same texts give the same bytes, and no outputs are stored.
"""

import argparse
import json
import sys
from pathlib import Path

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"

# ---------------------------------------------------------------- What is said before anything runs

INTRO = """\
# {title}

{what}

The result is an adapter in [PEFT](https://github.com/huggingface/peft)'s format, which loads in torch and in JAX. The
settings below train 300 steps on a public dataset of Persian chats; change them for a model and data of your own.

Before you run it:

1. **Accelerator**: Settings → Accelerator → {accelerator}.
2. **Internet**: Settings → Internet on (Kaggle asks for a verified phone number first).
3. **Licence**: accept Gemma's on [its page](https://huggingface.co/google/gemma-2-2b-it), logged in at Hugging Face.
4. **Token**: make a token at Hugging Face (to read; to push the result, to write), and store it here under Add-ons →
   Secrets as `HF_TOKEN`, attached to this notebook.
5. **jaxtune**: attach the repository as a dataset (Add Input), or clone it; `SOURCE` below is where it lies.

Then Run All. For a long run take Save Version → Save & Run All: it goes on when the browser is closed, and what is in
`/kaggle/working` at its end is kept as the version's output.

This file is made by `tools/make_notebooks.py`. jaxtune's tests run it on a CPU; on Kaggle it has not been run yet."""

SETTINGS = """\
## Settings

The cell below is all there is to change. `CONFIG` is a recipe of the repository, and `EXTRA` changes single settings of
it: `jaxtune/defaults.py` has them all. For data of your own add `--config.data.train=/kaggle/input/NAME/train.jsonl`,
with rows such as `{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}`. Without
`--config.train.steps` the whole dataset is read once, which takes many hours."""

PARAMETERS = """\
# Where the repository is: Kaggle shows the path beside the dataset.
SOURCE = "/kaggle/input/jaxtune"
CONFIG = f"{{SOURCE}}/configs/{recipe}.py"
MODEL = "google/gemma-2-2b-it"
# Under /kaggle/working, so that it is part of this notebook's output.
WORKDIR = "/kaggle/working/runs/{recipe}"
EXTRA = ["--config.train.steps=300", "--config.evaluate.samples=8"]
# What the trained model is asked at the end.
PROMPT = "What is the capital of Iran?"
# The run saves and stops after this many hours: Kaggle ends a {kind} session after {limit}.
HOURS = {hours}
# To go on with a run of an earlier version: its directory among the inputs (see Training).
PREVIOUS = \"\""""

# ---------------------------------------------------------------- Installing, devices, token

INSTALL = """\
## Install

pip may complain about other packages of Kaggle's image, which are not used here. If it replaced something that was
already imported, restart the kernel and run on from here."""

# {pins} is what is left of constraints.txt.
INSTALL_CODE = """\
import shutil
import subprocess
import sys
from pathlib import Path

# Kaggle's inputs are read-only, and a build writes beside its sources.
repository = Path("/tmp/jaxtune")
shutil.copytree(SOURCE, repository, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".git", ".venv", "runs"))
pins = (repository / "constraints.txt").read_text().splitlines(){pins}
(repository / "pins.txt").write_text("\\n".join(pins) + "\\n")
install = ["install", "--quiet", "-c", f"{{repository}}/pins.txt", f"{{repository}}[{extra}]"]
subprocess.run([sys.executable, "-m", "pip", *install], check=True)"""

OWN_TORCH = """
# Kaggle's own torch, which fits the GPUs' driver, stays where it is new enough.
pins = [pin for pin in pins if not pin.startswith("torch==")]"""

TOKEN = """\
import os

try:
    from kaggle_secrets import UserSecretsClient
except ImportError:
    pass
else:
    os.environ["HF_TOKEN"] = UserSecretsClient().get_secret("HF_TOKEN")"""

DEVICES_GPU = """\
import shutil
import subprocess

import torch

listed = []
if shutil.which("nvidia-smi"):
    said = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    listed = [line for line in said.splitlines() if line.startswith("GPU ")]
gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
print(*listed, f"torch {torch.__version__} sees {gpus} GPUs", sep="\\n")
if listed and not gpus:
    raise RuntimeError("This torch does not work with the driver: install one for the CUDA version in `nvidia-smi`.")
if not gpus:
    print("Training would run on the CPU. On Kaggle choose Settings → Accelerator → GPU T4 x2.")"""

DEVICES_TPU = """\
import subprocess
import sys

# One process at a time can have the TPU, so another one looks, and lets go of it.
look = "import jax; print(*jax.devices(), sep='\\\\n'); print(jax.device_count(), jax.default_backend())"
done = subprocess.run([sys.executable, "-c", look], stdout=subprocess.PIPE, text=True, check=True)
print(done.stdout, end="")
if not done.stdout.strip().endswith("tpu"):
    print("Training would run without a TPU. On Kaggle choose Settings → Accelerator → TPU v5e-8.")"""

# ---------------------------------------------------------------- Training

TRAINING = """\
## Training

The stop button ends the run after its step, and saves it; so does `HOURS`. Run the cell again, and it goes on where it
stopped.

To go on in a new session: attach the output of this notebook's earlier version as input (Add Input → Your Work), set
`PREVIOUS` to the run directory in it, e.g. `PREVIOUS = "/kaggle/input/NAME/runs/…"`, leave the other settings as they
were, and run all."""

PREVIOUS_RUN = """\
import shutil
from pathlib import Path

if PREVIOUS and not Path(WORKDIR).exists():
    shutil.copytree(PREVIOUS, WORKDIR)"""

COMMAND_GPU = """\
# One process for each GPU: `torchrun --nproc_per_node=2 -m torch_gpu.train …`
processes = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"] if gpus > 1 else []
train = [*processes, "-m", "torch_gpu.train"]
"""

COMMAND_TPU = """\
train = ["-m", "jaxtune.train"]
"""

TRAIN = """\
command = [sys.executable, *train, "--config", CONFIG, "--workdir", WORKDIR, f"--config.model.id={MODEL}", *EXTRA]


def read_record():
    path = Path(WORKDIR, "run.json")
    return json.loads(path.read_text()) if path.exists() else {}


def stop():
    # The run's first process is named in run.lock; torchrun itself would not wait for it to save.
    lock = Path(WORKDIR, "run.lock")
    begun = lock.exists() and lock.stat().st_mtime >= launched
    with contextlib.suppress(ProcessLookupError):
        os.kill(json.loads(lock.read_text())["pid"] if begun else process.pid, signal.SIGTERM)


def show_output():
    for line in process.stdout:
        print(line, end="")


print(shlex.join(command))
before, launched = read_record(), time.time()
process = subprocess.Popen(
    command,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    env=os.environ | {"PYTHONUNBUFFERED": "1", "FORCE_COLOR": ""},  # lines, no progress bar: this is no terminal
    start_new_session=True,  # the stop button reaches this cell alone
)
timer = threading.Timer(HOURS * 3600, stop)
timer.start()
try:
    show_output()
except KeyboardInterrupt:
    stop()
    show_output()
finally:
    timer.cancel()
    process.stdout.close()
code, after = process.wait(), read_record()
if code and after != before:
    code = after["exit_code"] or code  # torchrun's own is 1, whatever the run's was
if code == 75:
    print("Stopped and saved. Run this cell again: it goes on where it stopped.")
elif code:
    raise RuntimeError(f"Training ended with exit code {code}. The lines above say why.")"""

TRAIN_IMPORTS = """\
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

"""

# ---------------------------------------------------------------- What came out

RESULTS = """\
## What came out

The loss of each step and, with `--config.data.eval`, of the rows held back. Then the answers before and after
training, to rows held back or, without these, to training rows."""

LOSS = """\
import matplotlib.pyplot as plt

lines = [json.loads(line) for line in Path(WORKDIR, "metrics.jsonl").read_text().splitlines()]
for key, style in (("loss", "-"), ("eval_loss", "o")):
    points = {line["step"]: line[key] for line in lines if key in line}
    if points:
        plt.plot(list(points), list(points.values()), style, label=key)
plt.xlabel("step")
plt.legend()
plt.show()"""

SAMPLES = """\
import pandas

path = Path(WORKDIR, "samples.jsonl")
rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
pandas.set_option("display.max_colwidth", 300)
pandas.DataFrame(rows, columns=["prompt", "reference", "before", "after"])"""

USE = """\
## Use it

From here on this notebook itself holds {holds}: restart the kernel before you train again."""

USE_GPU = """\
import peft
import torch
import transformers

adapter = Path(WORKDIR, "adapter")
if adapter.exists():
    config = json.loads(Path(WORKDIR, "config.json").read_text())["model"]
    device, dtype, bits = "cuda:0" if torch.cuda.is_available() else "cpu", config["dtype"], None
    if device != "cpu" and torch.cuda.get_device_capability() < (8, 0):
        dtype = "float32"  # no bfloat16 here, and float16 is too small for Gemma
    if config["quant"] == "nf4":  # the base that the adapter was trained over
        how = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": config["double_quant"]}
        bits = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype, **how)
    place = {"dtype": dtype, "quantization_config": bits, "device_map": {"": device}}
    base = transformers.AutoModelForCausalLM.from_pretrained(config["id"], **place)
    model = peft.PeftModel.from_pretrained(base, adapter).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(config["id"])
    chat = [{"role": "user", "content": PROMPT}]
    tokens = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    answer = model.generate(**tokens.to(device), max_new_tokens=64, do_sample=False)
    print(tokenizer.decode(answer[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True))
else:
    print("There is no adapter yet: run the training cell again, to its end.")"""

USE_TPU = """\
import jaxtune

adapter = Path(WORKDIR, "adapter")
if adapter.exists():
    config = json.loads(Path(WORKDIR, "config.json").read_text())["model"]
    how = {key: config[key] for key in ("dtype", "quant", "double_quant", "quant_embedding")}
    lm = jaxtune.load(config["id"], adapter=adapter, **how)
    print(lm.generate([[{"role": "user", "content": PROMPT}]], max_new_tokens=64)[0])
else:
    print("There is no adapter yet: run the training cell again, to its end.")"""

SHARE = """\
## Keep it, and go on elsewhere

`adapter` in the run directory is all that is needed; it is in this version's output. (Of a run that was stopped it is
written by `python -m {program}.export WORKDIR`.) The command below, without its
`#`, puts it on the Hugging Face Hub, with a token that may write.

To train the same adapter further on {other}, open `notebooks/{notebook}.ipynb` there, attach this output as input and
add `--config.peft.init_from=/kaggle/input/NAME/…/adapter` and `--config.model.quant={quant}` to its `EXTRA`: it was
trained over such weights, and over others the loss would have a step (`docs/exchange.md`). A Hub adapter is downloaded
first, with `hf download me/my-adapter --local-dir adapter`. Rank and targets are then the adapter's own."""

PUSH = """\
# !{sys.executable} -m jaxtune.export {WORKDIR}/adapter --push_to_hub me/my-adapter"""


# ---------------------------------------------------------------- The notebooks

T4X2 = [
    (
        "markdown",
        INTRO.format(
            title="Fine-tune Gemma 2 2b with QLoRA on two T4 GPUs",
            what="This notebook trains LoRA on all linear layers of a chat model whose own weights are held in 4 bits, "
            "with torch, one copy of it on each GPU.",
            accelerator="GPU T4 x2",
        ),
    ),
    ("markdown", SETTINGS),
    ("parameters", PARAMETERS.format(recipe="gemma2_persian_qlora", kind="GPU", limit="12", hours=11)),
    ("markdown", INSTALL),
    ("install", INSTALL_CODE.format(pins=OWN_TORCH, extra="torch_gpu")),
    ("code", TOKEN),
    ("code", DEVICES_GPU),
    ("markdown", TRAINING),
    ("code", PREVIOUS_RUN),
    ("code", TRAIN_IMPORTS + COMMAND_GPU + TRAIN),
    ("markdown", RESULTS),
    ("code", LOSS),
    ("code", SAMPLES),
    ("markdown", USE.format(holds="memory of a GPU")),
    ("code", USE_GPU),
    ("markdown", SHARE.format(other="a TPU", notebook="kaggle_tpu_v5e8", quant="nf4", program="torch_gpu")),
    ("code", PUSH),
]

TPU_V5E8 = [
    (
        "markdown",
        INTRO.format(
            title="Fine-tune Gemma 2 2b with LoRA on a TPU v5e-8",
            what="This notebook trains LoRA on all linear layers of a chat model, with JAX, its weights split over the "
            "TPU's eight cores.",
            accelerator="TPU v5e-8",
        ),
    ),
    ("markdown", SETTINGS),
    ("parameters", PARAMETERS.format(recipe="gemma_lora", kind="TPU", limit="9", hours=8)),
    ("markdown", INSTALL),
    ("install", INSTALL_CODE.format(pins="", extra="tpu")),
    ("code", TOKEN),
    ("code", DEVICES_TPU),
    ("markdown", TRAINING),
    ("code", PREVIOUS_RUN),
    ("code", TRAIN_IMPORTS + COMMAND_TPU + TRAIN),
    ("markdown", RESULTS),
    ("code", LOSS),
    ("code", SAMPLES),
    ("markdown", USE.format(holds="the TPU")),
    ("code", USE_TPU),
    ("markdown", SHARE.format(other="GPUs", notebook="kaggle_t4x2", quant="none", program="jaxtune")),
    ("code", PUSH),
]

CELLS = {"kaggle_t4x2.ipynb": T4X2, "kaggle_tpu_v5e8.ipynb": TPU_V5E8}


def notebook(cells: list[tuple[str, str]]) -> str:
    """The notebook's file, in nbformat 4.5."""
    written = []
    for i, (kind, text) in enumerate(cells):
        tags = {} if kind in ("markdown", "code") else {"tags": [kind]}
        cell = {"id": f"cell-{i:02}", "metadata": tags, "source": text.splitlines(keepends=True)}
        if kind == "markdown":
            written.append({"cell_type": "markdown", **cell})
        else:
            written.append({"cell_type": "code", **cell, "execution_count": None, "outputs": []})
    metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    whole = {"cells": written, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, ensure_ascii=False, indent=1) + "\n"


def changed() -> list[str]:
    """The notebooks whose files are not what `notebook` gives."""
    paths = {name: NOTEBOOKS / name for name in CELLS}
    return [
        name
        for name, path in paths.items()
        if not path.exists() or path.read_text(encoding="utf-8") != notebook(CELLS[name])
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, and say which files would change")
    args = parser.parse_args()
    names = changed()
    for name in names:
        if args.check:
            print(f"notebooks/{name} is not what tools/make_notebooks.py writes; run it")
        else:
            NOTEBOOKS.mkdir(exist_ok=True)
            (NOTEBOOKS / name).write_text(notebook(CELLS[name]), encoding="utf-8")
    return int(args.check and bool(names))


if __name__ == "__main__":
    sys.exit(main())
