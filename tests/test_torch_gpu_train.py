"""Runs of torch_gpu.train on a CPU: beside jaxtune's, stopped and resumed, in two processes, quantised, exported."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import peft
import pytest
import reference
import tiny_run
import torch
import transformers
from safetensors.numpy import load_file
from test_torch_gpu import adapter_of

import jaxtune
import jaxtune.export
import jaxtune.train
from jaxtune import cli
from jaxtune.config import ASSETS
from jaxtune.errors import CannotCreateError, DataError, DivergedError, NoCheckpointError, UserError
from torch_gpu import export, loop, method, train

TINY = ASSETS / "tiny_gemma"

RECIPE = """
from jaxtune.config import get_default


def get_config():
    c = get_default()
    c.model.id = {model!r}
    c.model.dtype = "float32"
    c.peft.target_modules = "all-linear"
    c.data.train = {train!r}
    c.data.eval = {eval!r}
    c.data.max_length = 64
    c.optim.learning_rate = 5e-3
    c.optim.warmup_steps = 2
    c.train.steps = 6
    c.train.global_batch_size = 16
    c.train.gradient_accumulation_steps = 2
    c.train.eval_every = 4
    c.train.save_every = 2
    c.train.log_every = 1
    c.train.remat = "none"
    c.logging.tensorboard = False
    return c
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    root = tmp_path_factory.mktemp("recipe")
    paths = {"model": str(TINY)}
    for name, rows in (("train", 60), ("eval", 10)):
        lines = (ASSETS / "quickstart" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:rows]
        path = root / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps(json.loads(line) | {"t": i % 2}) for i, line in enumerate(lines)))
        paths[name] = str(path)
    (root / "recipe.py").write_text(RECIPE.format(**paths))
    return root / "recipe.py"


def words(recipe, workdir, *changes):
    return ["--config", str(recipe), "--workdir", str(workdir), *(f"--config.{change}" for change in changes)]


@pytest.fixture
def run(recipe, tmp_path):
    """run(name, 'peft.r=4', ...) -> (exit code, run directory)."""

    def start(name, *changes, main=train.main):
        return main(words(recipe, tmp_path / name, *changes)), tmp_path / name

    return start


def losses(workdir, key="loss"):
    return {row["step"]: row[key] for row in tiny_run.metrics(workdir) if key in row}


def adapter(workdir):
    return load_file(workdir / "adapter" / "adapter_model.safetensors")


def same_bits(a, b):
    assert a.keys() == b.keys() and a
    for name in a:
        assert a[name].tobytes() == b[name].tobytes(), name


def quick(cases, *names):
    """The cases by name; all but these take their time with the slow tests."""
    return [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in cases]


# ---------------------------------------------------------------- Beside jaxtune


STARTS = {
    "lora": ["peft.method=lora", "peft.r=4"],
    "prefix_tuning": ["peft.method=prefix_tuning", "peft.num_virtual_tokens=4", "optim.learning_rate=0.1"],
    "adalora": ["peft.method=adalora", "peft.init_r=6", "peft.target_r=2", "peft.tinit=2", "peft.tfinal=4"],
    "multitask": ["peft.method=multitask_prompt_tuning", "peft.num_virtual_tokens=4", "peft.num_tasks=2"],
    "ia3": ["peft.method=ia3", "optim.max_grad_norm=0.05", "optim.name=lion", "optim.learning_rate=1e-3"],
}


def start(keys, where):
    """A PEFT directory of that method whose every parameter is random."""
    literal = {path: cli.literal(text) for path, text in (key.split("=", 1) for key in keys)}
    section = {path.removeprefix("peft."): v for path, v in literal.items() if path.startswith("peft.")}
    adapted, _ = adapter_of(section.pop("method"), **section, total_steps=12)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in method.trainable(adapted).values():
            p.add_(0.05 * torch.randn(p.shape))
    if "init_r" in section:
        adapted.peft_config["default"].rank_pattern = None
    method.export(adapted, where, name=str(TINY), readme="", over={"quant": None})


@pytest.mark.parametrize("name", quick(STARTS, "lora", "adalora"))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_losses_follow_jaxtunes_from_the_same_adapter(name, run, tmp_path):
    """Two micro-batches, clipping, a schedule with warm-up; the first metric within 1e-5, the others within 1e-3."""
    keys = [*STARTS[name], "train.steps=12", "train.save_every=50", "train.eval_every=6"]
    keys += ["peft.target_modules=none"] * (name != "lora") + ["data.task_id=t"] * (name == "multitask")
    start(keys, tmp_path / "begun")
    keys.append(f"peft.init_from={tmp_path / 'begun'}")
    assert run("ours", *keys)[0] == 0
    assert run("theirs", *keys, main=jaxtune.train.main)[0] == 0
    ours, theirs = (tiny_run.metrics(tmp_path / where) for where in ("ours", "theirs"))
    assert [set(row) for row in ours] == [set(row) for row in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        for key in ("step", "rows", "tokens", "target_tokens"):
            assert mine.get(key) == other.get(key)
        for key in ("loss", "eval_loss", "grad_norm", "learning_rate"):
            if key in mine:
                tolerance = 5e-3 if key == "grad_norm" else 1e-3 if mine["step"] > 1 else 1e-5
                assert mine[key] == pytest.approx(other[key], rel=tolerance), (key, mine["step"])
    assert len(losses(tmp_path / "ours")) == 12


LOADED = {
    "lora": ["peft.r=4", "peft.use_dora=true"],
    "ia3": ["peft.method=ia3", "peft.target_modules=none"],
    "p_tuning": ["peft.method=p_tuning", "peft.target_modules=none", "peft.num_virtual_tokens=4"],
    "prefix_tuning": ["peft.method=prefix_tuning", "peft.target_modules=none", "peft.num_virtual_tokens=4"],
    "adalora": ["peft.method=adalora", "peft.target_r=2", "peft.init_r=4"],
    "saved": ["peft.r=2", "peft.modules_to_save=('lm_head',)", "peft.target_modules=('q_proj',)"],
}


@pytest.mark.parametrize("name", quick(LOADED, "lora", "p_tuning", "prefix_tuning"))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_is_exported_computes_the_same_in_peft_and_in_jaxtune(name, run):
    keys = ["train.steps=4", "train.eval_every=0", "optim.warmup_steps=0", "evaluate.samples=2"]
    if name == "saved":
        keys.append("evaluate.max_new_tokens=4")
    code, workdir = run("run", *LOADED[name], *keys)
    assert code == 0
    ids = np.random.default_rng(0).integers(3, 2000, (2, 12))
    base = transformers.AutoModelForCausalLM.from_pretrained(TINY, attn_implementation="eager", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, workdir / "adapter").eval()
    expected = reference.logits(model, ids)[:, -12:]
    lm = jaxtune.load(str(TINY), adapter=str(workdir / "adapter"), dtype="float32")
    reference.close(np.asarray(lm.logits(ids.tolist()))[:, -12:], expected)
    plain = reference.logits(transformers.AutoModelForCausalLM.from_pretrained(TINY, attn_implementation="eager"), ids)
    assert np.abs(plain - expected).max() > 1e-3 * np.abs(plain).max()
    rows = [json.loads(line) for line in (workdir / "samples.jsonl").read_text().splitlines()]
    assert [set(row) for row in rows] == [{"prompt", "reference", "before", "after", "match_before", "match_after"}] * 2
    scores = json.loads((workdir / "eval.json").read_text())
    assert set(scores) == {"step", "eval_loss", "perplexity", "exact_match_before", "exact_match_after"}
    # The answers are what jaxtune's own generation gives.
    prompts = [json.loads(line)["messages"][0]["content"] for line in (ASSETS / "quickstart" / "eval.jsonl").open()][:2]
    new = 4 if name == "saved" else 64
    answers = lm.generate([[{"role": "user", "content": p}] for p in prompts], max_new_tokens=new)
    assert [row["after"] for row in rows] == [a.strip() for a in answers]


# ---------------------------------------------------------------- Stopped and resumed


def stop_at(monkeypatch, step):
    """SIGTERM in that step, as a scheduler sends it."""
    plan = loop.Trainer.plan

    def planned(self, control):
        plan(self, control)
        if self.state.global_step == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop.Trainer, "plan", planned)


RESUMED = {
    "lora": ["peft.r=4", "peft.lora_dropout=0.3", "optim.name=adamw8bit", "model.quant=nf4", "train.remat=full"],
    "p_tuning": [
        "peft.method=p_tuning",
        "peft.target_modules=none",
        "peft.encoder_reparameterization_type=LSTM",
        "peft.encoder_hidden_size=16",
        "peft.encoder_dropout=0.3",
    ],
    "prefix_tuning": ["peft.method=prefix_tuning", "peft.target_modules=none", "peft.prefix_projection=true"],
    "adalora": ["peft.method=adalora", "peft.init_r=4", "peft.target_r=2", "peft.lora_dropout=0.2", "peft.tfinal=1"],
    "float16": ["model.dtype=float16", "peft.r=4", "peft.lora_dropout=0.1", "optim.name=lion", "optim.offload=true"],
}


@pytest.mark.parametrize("name", quick(RESUMED, "lora", "p_tuning", "adalora"))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_run_that_was_stopped_ends_in_the_same_bits(name, run, monkeypatch, capsys):
    code, whole = run("whole", *RESUMED[name])
    assert code == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        code, stopped = run("stopped", *RESUMED[name])
    assert code == 75 and json.loads((stopped / "run.json").read_text())["status"] == "stopped"
    assert sorted(p.name for p in (stopped / "checkpoints").iterdir()) == ["2", "3", "tmp"]
    if name == "lora":  # over NF4, which writing its adapter does without
        assert export.main([str(stopped)]) == 0
        trained = load_file(stopped / "checkpoints" / "3" / loop.TRAINABLE)
        same_bits(adapter(stopped), {n.replace(".default.", "."): value for n, value in trained.items()})
        assert "quantization_config=transformers.BitsAndBytesConfig(load_in_4bit=True" in capsys.readouterr().out
        with pytest.raises(UserError, match=r"is a run of torch_gpu.*python -m torch_gpu\.export"):
            jaxtune.export.main([str(stopped)])
        with pytest.raises(UserError, match=r"Go on with it by python -m torch_gpu\.train"):
            run("stopped", *RESUMED[name], main=jaxtune.train.main)
    assert run("stopped", *RESUMED[name])[0] == 0
    same_bits(adapter(stopped), adapter(whole))
    for key in ("loss", "eval_loss", "grad_norm", "learning_rate"):
        assert losses(stopped, key) == losses(whole, key)
    assert len(losses(whole)) == 6
    log = (stopped / "log.txt").read_text()
    assert "resumed at step 3 of 6, row 48" in log and "Stopped; what was done is saved" in log


def test_what_a_resume_finds(run, recipe, monkeypatch):
    """A damaged newest checkpoint, a half-written one, other settings and data, a finished run, and nothing intact."""
    code, whole = run("whole", "peft.r=4")
    assert code == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        _, workdir = run("run", "peft.r=4")
    checkpoints = workdir / "checkpoints"
    assert sorted(p.name for p in checkpoints.iterdir()) == ["4", "5", "tmp"]
    (checkpoints / "tmp" / "checkpoint-6").mkdir()
    with (checkpoints / "5" / "optimizer.pt").open("r+b") as file:
        file.seek(100)
        byte = file.read(1)
        file.seek(100)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(UserError, match=r"other settings:\n +was +is\n +peft.r +4 +8"):
        run("run", "peft.r=8")
    with pytest.raises(DataError, match="other data"):
        run("run", "peft.r=4", f"data.train={recipe.parent / 'eval.jsonl'}")
    assert run("run", "peft.r=4")[0] == 0
    assert "checkpoint 5 is damaged: optimizer.pt is not the file" in (workdir / "log.txt").read_text()
    same_bits(adapter(workdir), adapter(whole))
    shutil.rmtree(workdir / "adapter")
    assert run("run", "peft.r=4")[0] == 0  # completes what is missing
    same_bits(adapter(workdir), adapter(whole))
    for step in ("4", "6"):
        (checkpoints / step / "trainable.safetensors").unlink(missing_ok=True)
    with pytest.raises(NoCheckpointError, match=r"trainable\.safetensors is missing"):
        run("run", "peft.r=4")


def test_the_newest_and_the_best_checkpoints_are_kept(run):
    keep = ["checkpoint.keep_last_n=1", "checkpoint.keep_best_n=1", "train.eval_every=1", "train.save_every=1"]
    _, workdir = run("run", "peft.r=4", "optim.learning_rate=1.0", *keep)
    scores = losses(workdir, "eval_loss")
    best = min((loss, -step) for step, loss in scores.items() if step)[1]
    kept = {int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()}
    assert kept == {-best, 6}


def test_options_mean_what_they_mean_in_jaxtune(run, tmp_path, monkeypatch):
    """By epochs, by scores of answers, back to the best, from a path, without the optimiser, deterministic, copied."""
    # 60 rows in batches of 16: epochs end in steps 4, 8 and 12.
    epochs = ["train.save_unit=epoch", "train.eval_unit=epoch", "train.eval_every=1", "train.save_every=none"]
    answers = ["evaluate.samples=2", "evaluate.max_new_tokens=2", "evaluate.metrics=rouge", "checkpoint.metric=rougeL"]
    tiny_run.make_model(tmp_path / "small")
    small = ["peft.r=4", f"model.id={tmp_path / 'small'}"]
    keep = ["checkpoint.keep_last_n=9", "train.steps=10", "train.deterministic=true", *small]
    copy = f"storage.sync_to={tmp_path / 'bucket'}"
    try:
        _, whole = run("whole", *epochs, *answers, *keep, copy)
        assert torch.are_deterministic_algorithms_enabled() and "CUBLAS_WORKSPACE_CONFIG" in os.environ
        there = [p.name for p in (whole / "checkpoints").iterdir()]
        assert sorted(there) == ["10", "4", "8", "tmp"]
        evaluated = losses(whole, "rougeL")
        assert list(evaluated) == list(losses(whole, "perplexity")) == [0, 4, 8, 10]
        scores = json.loads((whole / "eval.json").read_text())
        assert scores["rougeL_after"] == evaluated[10] and {"rouge1_before", "exact_match_after"} <= scores.keys()
        ours, theirs = (tiny_run.contents(where) for where in (whole, tmp_path / "bucket"))
        theirs.pop("files.sha256")
        assert ours == theirs
        # Another step is the best by another metric and mode; the run goes back to it.
        shutil.copytree(whole, tmp_path / "back")
        worst = ["checkpoint.metric=eval_loss", "checkpoint.mode=max", "checkpoint.resume=best"]
        best = max((value, step) for step, value in losses(whole, "eval_loss").items() if step)[1]
        _, back = run("back", *epochs, *keep, *worst)
        assert f"going back to step {best}, the best by eval_loss" in (back / "log.txt").read_text()
        same_bits(adapter(back), adapter(whole))
        assert losses(back) == losses(whole)
        # From a step of another run, without the optimiser's state; and on from weights alone.
        branch = [*small, "train.steps=10", "train.save_every=1", "checkpoint.keep_last_n=9"]
        branch += ["checkpoint.save_optim=false", f"checkpoint.resume={whole / 'checkpoints' / '8'}"]
        _, other = run("branch", *branch)
        same_bits(adapter(other), adapter(whole))
        assert not (other / "checkpoints" / "9" / "optimizer.pt").exists()
        assert "WARNING" not in (other / "log.txt").read_text()
        shutil.rmtree(other / "checkpoints" / "10")
        _, other = run("branch", *branch)
        assert "WARNING: checkpoint 9 holds no optimiser state" in (other / "log.txt").read_text()
        assert json.loads((other / "run.json").read_text())["exact"] is False
        rates = losses(whole, "learning_rate")
        assert losses(other, "learning_rate") == {9: rates[9], 10: rates[10]}
        # A fresh Adam moves each number by the rate, whatever the gradient: of step 10, the last of the schedule.
        before = load_file(other / "checkpoints" / "9" / loop.TRAINABLE)
        after = load_file(other / "checkpoints" / "10" / loop.TRAINABLE)
        moved = max(float(np.abs(after[name] - before[name]).max()) for name in after)
        assert moved == pytest.approx(rates[10], rel=1e-3)
        with pytest.raises(CannotCreateError, match="resume` is never"):
            run("branch", *branch[:-1], "checkpoint.resume=never")
    finally:
        torch.use_deterministic_algorithms(False)
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)


# ---------------------------------------------------------------- Trouble


def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_module(run, monkeypatch):
    begin = loop.Trainer.begin_step

    def broken(self):
        begin(self)
        if getattr(self, "state", None) is not None and self.state.global_step == 2:
            with torch.no_grad():
                next(p for n, p in self.model.named_parameters() if "layers.3.mlp.up_proj.lora_A" in n)[:] = torch.inf

    monkeypatch.setattr(loop.Trainer, "begin_step", broken)
    with pytest.raises(DivergedError) as caught:
        run("run", "peft.r=4")
    assert caught.value.exit_code == 80 and "loss of step 3 is nan" in str(caught.value)
    assert "layers.3.mlp.up_proj.lora_A" in str(caught.value) and len(str(caught.value).splitlines()) <= 3


def test_steps_that_overflow_float16_are_left_out_and_said(run, monkeypatch):
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device: Scaler(device, init_scale=2.0**24))
    few = ["train.steps=4", "train.global_batch_size=4", "train.gradient_accumulation_steps=1"]
    code, workdir = run("run", "peft.r=4", "model.dtype=float16", "data.eval=none", "optim.warmup_steps=0", *few)
    assert code == 0
    log = (workdir / "log.txt").read_text()
    assert "gradients overflowed float16; the step is left out" in log
    assert re.search(r"[1-4] of 4 steps were left out", log)


Scaler = torch.amp.GradScaler


def test_a_key_is_refused_before_anything_is_read(run):
    with pytest.raises(UserError, match=r"`mesh.fsdp` is 4"):
        run("run", "mesh.fsdp=4", "data.train=nowhere.jsonl")


# ---------------------------------------------------------------- Quantised; two processes


def test_qlora_learns_on_a_cpu(run):
    keys = ["model.quant=nf4", "model.double_quant=true", "optim.name=adamw8bit", "optim.offload=true"]
    code, workdir = run("run", "peft.r=8", "train.steps=30", "train.eval_every=0", "train.remat=full", *keys)
    assert code == 0
    evals = losses(workdir, "eval_loss")
    assert evals[30] < 0.5 * evals[0]
    assert all(np.isfinite(value).all() and value.any() for value in adapter(workdir).values())


def test_two_processes_give_the_losses_of_one(recipe, run, tmp_path):
    keys = ["peft.r=4", "evaluate.samples=2", "evaluate.max_new_tokens=4"]
    _, one = run("one", *keys)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "torch_gpu.train", *words(recipe, tmp_path / "two", *keys)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    ours, theirs = tiny_run.metrics(tmp_path / "two"), tiny_run.metrics(one)
    for mine, other in zip(ours, theirs, strict=True):
        for key in mine.keys() - tiny_run.TIMED - {"fill"}:  # each process trims its own micro-batches
            assert mine[key] == pytest.approx(other[key], rel=1e-5 if "loss" in key else 1e-4)
    for name, value in adapter(one).items():
        reference.close(adapter(tmp_path / "two")[name], value, 1e-3)
    assert (tmp_path / "two" / "samples.jsonl").read_text() == (one / "samples.jsonl").read_text()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_qlora_learns_on_a_card(dtype, run):
    keys = ["model.quant=nf4", f"model.dtype={dtype}", "optim.name=adamw8bit", "optim.offload=true", "train.remat=full"]
    code, workdir = run("run", "peft.r=8", "train.steps=40", "train.eval_every=0", *keys)
    assert code == 0 and losses(workdir, "eval_loss")[40] < 0.5 * losses(workdir, "eval_loss")[0]
