"""Whatever is wrong is said on one screen, with its exit code, before a weight is read or a file is touched."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run

from jaxtune import cli, rundir, train
from jaxtune.errors import MissingInputError

SCREEN = 15  # lines
TOKEN = "hf_" + "cAnArY" * 6


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Its weights are garbage: a command that read one would say so instead of what it is to say."""
    place = tiny_run.make(tmp_path_factory.mktemp("place"))
    (place.model / "model.safetensors").write_bytes(b"garbage" * 99)
    return place


@pytest.fixture
def refused(monkeypatch, capsys):
    """refused(argv, code, *words): the command exits with `code` and says every one of `words` on one screen."""

    def run(argv, code, *words):
        monkeypatch.setattr(sys, "argv", ["jaxtune", *map(str, argv)])
        with pytest.raises(SystemExit) as ended:
            cli.run(train.main)
        said = capsys.readouterr().err
        assert ended.value.code == code, said
        assert [word for word in words if word not in said] == [], said
        assert said.startswith("error: ") and "Traceback" not in said
        assert len(said.splitlines()) <= SCREEN and max(map(len, said.splitlines())) < 1000, said
        return said

    return run


# Settings of a command line -> exit code and what the message holds: what was asked, what there is, what to do.
SETTINGS = {
    "optim.learning_rte=1": (64, "`optim.learning_rte`", "Did you mean `optim.learning_rate`?", "optim.warmup_steps"),
    "optm.learning_rate=1": (64, "`optm.learning_rate`", "Did you mean `optim.learning_rate`?", "Sections: checkpoint"),
    "optim=1": (64, "No config key `optim`", "optim.learning_rate"),
    "=1": (64, "No config key ``"),
    "train.steps": (64, "has no value", "--config.section.key=value"),
    "train.steps=many": (64, "`train.steps` is 'many'", "type int"),
    "train.steps=8.0": (64, "`train.steps` is 8.0", "type int"),
    "train.steps=true": (64, "`train.steps` is True", "type int"),
    "train.steps=(1,2)": (64, "`train.steps` is (1, 2)", "type int"),
    "train.steps=" + "9" * 5000: (64, "`train.steps` is '999", "type int"),
    "train.steps=" + "(" * 500: (64, "`train.steps` is '(((", "type int"),
    "train.steps=9999999999999": (64, "`train.steps` is 9999999999999", "The most it can be is 2147483647"),
    "train.steps=0": (64, "`train.steps` is 0", "The least it can be is 1"),
    "train.seed=-1": (64, "`train.seed` is -1", "The least it can be is 0"),
    "optim.weight_decay=none": (64, "`optim.weight_decay` is None", "type float"),
    "optim.learning_rate=true": (64, "`optim.learning_rate` is True", "type float"),
    "optim.learning_rate=nan": (64, "`optim.learning_rate` is 'nan'", "type float"),
    "optim.learning_rate=1e400": (64, "`optim.learning_rate` is inf", "a finite number"),
    "optim.learning_rate=-1e400": (64, "`optim.learning_rate` is -inf", "a finite number"),
    "optim.learning_rate=-0.1": (64, "`optim.learning_rate` is -0.1", "The least it can be is 0"),
    "optim.learning_rate=${HOME}": (64, "`optim.learning_rate` is '${HOME}'", "type float"),
    "optim.b2=1.0": (64, "`optim.b2` is 1.0", "less than 1"),
    "optim.end_fraction=1.5": (64, "`optim.end_fraction` is 1.5", "The most it can be is 1"),
    "optim.name=adam": (64, "`optim.name` is 'adam'", "lion", "Did you mean `adamw`?"),
    "optim.schedule=cosin": (64, "`optim.schedule` is 'cosin'", "linear", "Did you mean `cosine`?"),
    "data.shuffle=maybe": (64, "`data.shuffle` is 'maybe'", "type bool"),
    "model.id=none": (64, "`model.id` is not set", "--config.model.id="),
    "model.dtype=int8": (64, "`model.dtype` is 'int8'", "bfloat16"),
    "train.gradient_accumulation_steps=3": (64, "`train.global_batch_size` is 8", "e.g. 9"),
    "mesh.data=0": (64, "`mesh`", "'data': 0", "-1"),
    "mesh.data=3": (64, "data=3", "8 are attached", "-1"),
    # Two micro-batches of four rows over eight devices.
    "mesh.fsdp=8": (64, "is 4 rows", "= 8 devices", "Nearest legal sizes: 8 rows"),
    "peft.method=loar": (64, "`peft.method` is 'loar'", "full", "Did you mean `lora`?"),
    "peft.r=0": (64, "r is 0", "from 1 to 65536"),
    "peft.lora_alpha=-1e400": (64, "`peft.lora_alpha` is -inf"),
    "peft.lora_dropout=1.0": (64, "lora_dropout is 1.0", "less than 1"),
    "peft.target_modules=('q_proj','v_porj')": (64, "v_porj", "Did you mean `v_proj`?", "gate_proj", "target_modules"),
    "peft.target_modules=[": (64, "target_modules is '['", "regular expression"),
    "peft.modules_to_save=('lm_haed',)": (64, "lm_haed", "embed_tokens", "modules_to_save"),
    "data.train=": (64, "`data.train` is not set"),
    "data.train=no/such/folder/rows.jsonl": (66, "rows.jsonl", "there is no folder"),
    "data.train=rows.tar.gz": (66, "There is no file rows.tar.gz"),
    "data.eval=evil.jsonl": (66, "There is no file evil.jsonl"),
    "data.format=mesages": (64, "`data.format` is 'mesages'", "Did you mean `messages`?"),
    "data.max_length=4": (65, " rows: the answer lies beyond data.max_length", "Raise `data.max_length`"),
    "data.chat_template=gema": (64, "gema", "Did you mean `gemma`?"),
    "train.save_unit=epochs": (64, "`train.save_unit` is 'epochs'", "It is written epoch"),
    "train.eval_unit=minute": (64, "`train.eval_unit` is 'minute'", "step, epoch"),
    "checkpoint.mode=maximum": (64, "`checkpoint.mode` is 'maximum'", "min, max"),
    "checkpoint.metric=accurcy": (
        64,
        "`checkpoint.metric` is 'accurcy'",
        "eval_loss, perplexity",
        "`evaluate.samples`",
    ),
    "evaluate.metrics=('roug',)": (64, "`evaluate.metrics` has 'roug'", "Did you mean `rouge`?"),
    "evaluate.metrics=rouge": (64, "`evaluate.samples` is 0"),
    "evaluate.metrics=7": (64, "`evaluate.metrics` is 7", "It takes names"),
    "checkpoint.resume=bets": (64, "`checkpoint.resume` is 'bets'", "auto, last, best, never", "Did you mean `best`?"),
    "checkpoint.resume=./nowhere": (66, "'./nowhere', and there is no such directory"),
    "checkpoint.save_optim=maybe": (64, "`checkpoint.save_optim` is 'maybe'", "type bool"),
    "wandb.every=0": (64, "`wandb.every` is 0", "The least it can be is 1"),
    "logging.wandb.project=x": (64, "`logging.wandb.project`", "Did you mean `wandb.project`?"),
    "storage.sync_to=nope://x": (64, "`storage.sync_to` is 'nope://x'", "Protocol not known", "gs://…"),
    "model.id=./no-such-model": (66, "`model.id` is './no-such-model', and there is no such directory"),
    f"data.train=https://user:{TOKEN}@host/x.jsonl": (64, "The command line holds", "a secret", "HF_TOKEN"),
    f"model.revision={TOKEN}": (64, "looks like a secret", "HF_TOKEN"),
}
# The mesh of these commands, unless they set their own: the batch fits it.
MESH = ("mesh.data=4", "mesh.fsdp=1", "mesh.tensor=2")


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s[:40])
def test_settings(setting, place, refused, tmp_path):
    code, *words = SETTINGS[setting]
    settings = [setting] if setting.startswith("mesh.fsdp") else [*MESH, setting]
    said = refused(tiny_run.arguments(place, tmp_path / "run", *settings), code, *words)
    assert TOKEN not in said
    # Nothing but the trace of a try is left, and the next one is not in its way.
    left = {p.name for p in (tmp_path / "run").rglob("*")} if (tmp_path / "run").exists() else set()
    assert left <= {"run.lock", "log.txt"}
    rundir.open_workdir(tmp_path / "run")


HEAD = "from jaxtune.config import get_default\ndef get_config():\n    c = get_default()\n"
RECIPES = {
    "key.py": (HEAD + "    c.optim.learning_rat = 1\n", 64, "key.py, line 4", 'mean "learning_rate"', "c.optim"),
    "section.py": (HEAD + "    c.optm.name = 'lion'\n", 64, "section.py, line 4", 'mean "optim"', "c.optm.name"),
    "type.py": (HEAD + "    c.train.steps = 'x'\n", 64, "type.py, line 4", "`steps` is x", "type int"),
    "bool.py": (HEAD + "    c.train.steps = True\n    c.model.id = c.data.train = 'x'\n    return c\n", 64, "type int"),
    "empty.py": (HEAD + "    return c\n", 64, "`model.id` is not set"),
    "syntax.py": (HEAD + "    c.train.steps =\n", 64, "syntax.py, line 4", "invalid syntax"),
    "import.py": ("\nimport no_such_module\n", 64, "import.py, line 2", "No module named 'no_such_module'"),
    "nothing.py": ("x = 1\n", 64, "nothing.py has no `get_config()`", "quickstart.py"),
    "dict.py": ("def get_config():\n    return {}\n", 64, "dict.py has no `get_config()`"),
    "own.py": ("from ml_collections import ConfigDict as C\nget_config = C\n", 64, "`get_default()`", "checkpoint."),
    "secret.py": (HEAD + f"    c.model.id = {TOKEN!r}\n    return c\n", 64, "`model.id` holds", "a secret"),
    "broken.json": ("{", 64, "broken.json is not valid JSON", "line 1"),
    "list.json": ("[1]", 64, "list.json is no config", "config.json"),
    "key.json": ('{"train": {"stps": 1}}', 64, "key.json", "`train.stps`", "Did you mean `train.steps`?"),
    "type.json": ('{"train": {"steps": "1"}}', 64, "type.json", "`train.steps` is '1'", "type int"),
    "config.yaml": ("train: {steps: 1}", 64, "config.yaml is no config file", ".py"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_config_files(name, refused, tmp_path):
    text, code, *words = RECIPES[name]
    (tmp_path / name).write_text(text)
    said = refused(["--config", tmp_path / name, "--workdir", tmp_path / "run"], code, *words)
    assert TOKEN not in said and not (tmp_path / "run").exists()


def test_command_lines(refused, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.py").write_text(HEAD + "    return c\n")
    refused([], 64, "--config is missing", "configs/quickstart.py")
    refused(["--config"], 64, "--config", "expected one argument")
    refused(["--config", "recpie.py"], 66, "'recpie.py'", "Did you mean `recipe.py`?")
    refused(["--config", "recipe.py:argument"], 64, "takes 0 positional arguments")
    refused(["--wrkdir=x"], 64, "'--wrkdir=x'", "Did you mean `--workdir`?", "--config.section.key=value")
    refused(["--optim.learning_rate=1"], 64, "Did you mean `--config.optim.learning_rate`?")
    refused(["--token", TOKEN], 64, "looks like a secret (hf_c…)")
    monkeypatch.setattr(sys, "argv", ["jaxtune", "trian"])
    with pytest.raises(SystemExit) as ended:
        cli.run_command()
    assert ended.value.code == 64
    assert "Did you mean `train`?" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_the_command_to_go_on_can_be_typed(place):
    argv = tiny_run.arguments(place, Path("a b"), "peft.target_modules=('q_proj', \"v_proj\")", "data.text=$x")
    command = cli.parse("jaxtune.train", argv, "").command
    assert shlex.split(command) == ["python", "-m", "jaxtune.train", *argv]


def rows_of(place):
    return [json.loads(line) for line in place.train.read_text(encoding="utf-8").splitlines()]


def without_messages(rows):
    del rows[2]["messages"]


def with_a_number(rows):
    rows[1]["messages"][0]["content"] = 7


def nothing_to_learn(rows):
    for message in (m for row in rows for m in row["messages"] if m["role"] == "assistant"):
        message["content"] = " "


ROWS = {
    without_messages: (65, "rows.jsonl:3", "messages", "`data.on_bad_row`"),
    with_a_number: (65, "rows.jsonl:2", "content"),
    # Every label is masked.
    nothing_to_learn: (65, "No row of", "60 rows: no text to learn", "Are the answers empty"),
}


@pytest.mark.parametrize("change", ROWS, ids=lambda change: change.__name__)
def test_rows(change, place, refused, tmp_path):
    code, *words = ROWS[change]
    rows = rows_of(place)
    change(rows)
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    refused(tiny_run.arguments(place, tmp_path / "run", *MESH, f"data.train={path}"), code, *words)


def test_rows_that_are_no_rows(place, refused, tmp_path):
    path = tmp_path / "rows.jsonl"
    arguments = tiny_run.arguments(place, tmp_path / "run", *MESH, f"data.train={path}")
    refused(arguments, 66, "There is no file", "rows.jsonl", str(tmp_path))
    path.write_text("")
    refused(arguments, 65, "rows.jsonl has no rows")
    path.write_bytes(b'{"messages": "\xff"}\n{"messages"\n')
    refused(arguments, 65, "rows.jsonl:1", "not UTF-8", "rows.jsonl:2", "not JSON")
    near = tmp_path / "row.jsonl"
    refused(tiny_run.arguments(place, tmp_path / "run", f"data.train={near}"), 66, "Did you mean `rows.jsonl`?")
    refused(tiny_run.arguments(place, tmp_path / "run", f"data.train={tmp_path}"), 64, "is a directory", "rows.jsonl")


def test_the_weights_are_read_last(place, refused, tmp_path):
    """With nothing else to refuse, the garbage is found: so it had not been read before."""
    arguments = tiny_run.arguments(place, tmp_path / "run", *MESH)
    refused(arguments, 64, "model.safetensors is not a safetensors file")


@pytest.mark.parametrize(
    ("file", "text", "code", "words"),
    [
        ("config.json", None, 66, ["has no config.json", "tokenizer.json"]),
        ("config.json", "{", 64, ["config.json is not valid JSON"]),
        ("config.json", '{"model_type": "gemma9"}', 64, ["'gemma9'", "gemma2", "Did you mean"]),
        ("tokenizer.json", None, 66, ["has no tokenizer.json", "tokenizer_config.json"]),
        ("tokenizer.json", "version https://git-lfs.github.com/spec/v1", 64, ["Git LFS pointer", "git lfs pull"]),
        ("model.safetensors", None, 66, ["has no model.safetensors"]),
    ],
)
def test_model_directories(file, text, code, words, place, refused, tmp_path):
    shutil.copytree(place.model, tmp_path / "model")
    (tmp_path / "model" / file).unlink()
    if text:
        (tmp_path / "model" / file).write_text(text)
    arguments = tiny_run.arguments(place, tmp_path / "run", *MESH, f"model.id={tmp_path / 'model'}")
    refused(arguments, code, str(tmp_path / "model") if text is None else "", *words)


def test_work_directories(place, refused, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("mine")
    refused(tiny_run.arguments(place, tmp_path / "file"), 73, "`--workdir`", "file", "Give a directory")
    refused(tiny_run.arguments(place, tmp_path / "file" / "below"), 73, "`--workdir`", "Give a directory")
    refused(tiny_run.arguments(place, tmp_path / "mine"), 73, "not a run directory", "thesis.tex")
    # Where not even root may write.
    refused(tiny_run.arguments(place, Path("/proc/self/run")), 73, "`--workdir`", "Give a directory")
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "mine" and len(list((tmp_path / "mine").iterdir())) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_without_permission(place, refused, tmp_path):
    (tmp_path / "run").mkdir(mode=0o555)
    refused(tiny_run.arguments(place, tmp_path / "run"), 73, "cannot be written to or locked")


def test_a_refused_command_leaves_an_earlier_run_alone(place, refused, tmp_path):
    run = tmp_path / "run"
    for name in ("run.json", "config.json", "metrics.jsonl", "samples.jsonl", "eval.json", "adapter/adapter_model.x"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(f"of an earlier run: {name}")
    before = tiny_run.contents(run)
    for setting, code in {
        "train.stps=1": 64,
        "peft.r=0": 64,
        "data.train=no.jsonl": 66,
        "peft.target_modules=('x',)": 64,
        "train.log_every=3": 64,  # as far as the garbage of the weights
    }.items():
        said = refused(tiny_run.arguments(place, run, *MESH, setting), code)
        assert tiny_run.contents(run) == before, setting
    assert said.strip() in (run / "log.txt").read_text()


def command(*arguments, **environment):
    """The real thing: (exit code, standard output, standard error)."""
    argv = [sys.executable, "-m", "jaxtune.train", *map(str, arguments)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=240, env=os.environ | environment)
    return done.returncode, done.stdout, done.stderr


def test_help():
    code, out, err = command("--help")
    assert (code, err) == (0, "")
    assert "python -m jaxtune.train" in out and "--config.section.key=value" in out and "--workdir" in out


def test_a_refusal_as_a_user_sees_it(place, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"messages": []}\n')
    settings = tiny_run.arguments(place, tmp_path / "run", f"data.train={path}")
    code, _, err = command(*settings, HF_TOKEN=TOKEN)
    assert code == 65
    assert err.startswith(f"error: {path} has rows that cannot be used.")
    assert f"{path}:1:messages: the list is empty" in err
    assert "Traceback" not in err and len(err.splitlines()) < SCREEN
    for file in tmp_path.rglob("*"):
        assert file.is_dir() or TOKEN not in file.read_text()


def test_the_exit_code_survives_a_screen_on_a_full_disk():
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "jaxtune.train", "--config", "absent.py"], stderr=full)
    assert done.returncode == MissingInputError.exit_code
