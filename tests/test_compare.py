"""Runs side by side: what the table says, from files alone; and every method trained by one command."""

import json

import pytest
import tiny_run

from jaxtune import cli, compare
from jaxtune.defaults import LEARNING_RATES
from jaxtune.errors import MissingInputError, UserError


def a_run(directory, method="lora", status="finished", **record):
    """A run directory as training leaves it."""
    directory.mkdir(parents=True)
    config = {"peft": {"method": method}, "optim": {"learning_rate": 2e-3}}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "run.json").write_text(json.dumps({"status": status, **record}))
    lines = [{"step": 0, "eval_loss": 4.0}]
    lines += [{"step": n, "loss": 4.0 / n, "seconds": 30.0} for n in range(1, 5)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 5, "lo')
    return directory


@pytest.fixture
def two_runs(tmp_path):
    facts = {"trainable_parameters": 1_234_567, "base_parameters": 10_000_000, "peak_memory_bytes": 3 * 2**29}
    finished = a_run(tmp_path / "first", **facts)
    scores = {"step": 4, "eval_loss": 1.25, "exact_match_before": 0.0, "exact_match_after": 0.739}
    (finished / "eval.json").write_text(json.dumps(scores))
    return finished, a_run(tmp_path / "second", "ia3", "stopped")


def test_the_table_and_the_files(two_runs, tmp_path, capsys):
    assert compare.main([*map(str, two_runs), "--workdir", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    head, _, first, second, *_ = out.splitlines()
    assert head.split() == " ".join(compare.COLUMNS).split()
    cells = [cell for cell in first.split("  ") if cell]
    assert [cell.strip() for cell in cells] == [
        *("first", "lora", "1,234,567", "12.35%", "0.002", "4", "2:00", "1,536 MiB"),
        *("4.000 → 1.250", "0.0% → 73.9%"),
    ]
    # A run that did not end has no scores, and its torn last line is none.
    assert second.split() == ["second", "(stopped)", "ia3", "-", "-", "0.002", "4", "2:00", "-", "4.000", "→", "-", "-"]
    written = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [row["method"] for row in written] == ["lora", "ia3"] and written[0]["exact_match_after"] == 0.739
    assert (tmp_path / "out" / "compare.png").read_bytes()[:4] == b"\x89PNG"


def test_a_narrow_terminal_has_a_paragraph_a_run(two_runs):
    rows = [compare.read_run(run) for run in two_runs]
    narrow = compare.table(rows, 60).splitlines()
    assert len(narrow) == 2 * len(compare.COLUMNS) and narrow[0] == "run: first" and narrow[2] == "  trains: 1,234,567"
    assert len(compare.table(rows, 200).splitlines()) == 4 == len(compare.table(rows, 0).splitlines())


def test_the_average_begins_at_the_first_loss():
    steps, values = compare.smooth([(n, 8.0 if n < 3 else 2.0) for n in range(1, 101)])
    assert steps[0] == 1 and values[0] == pytest.approx(8.0) and values[-1] == pytest.approx(2.0, abs=1e-3)


@pytest.mark.parametrize(
    ("words", "kind", "message"),
    [
        ([], UserError, "Name run directories"),
        (["runs/none"], MissingInputError, "no run directory: it has no config.json"),
        (["--config", "x.py", "--methods", "lora,io3"], UserError, "Did you mean `ia3`"),
        (["runs/none", "--config.train.epochs=1"], UserError, "need --config"),
        (["--confg", "x"], UserError, "Unknown argument --confg"),
    ],
)
def test_refusals(words, kind, message):
    with pytest.raises(kind, match=message):
        compare.main(words)


def test_one_command_trains_and_compares(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")  # one device for the processes it starts
    place = tiny_run.make(tmp_path, steps=4)
    words = ["--config", str(place.recipe), "--methods", "lora,ia3", "--workdir", str(tmp_path / "runs")]
    assert compare.main([*words, "--config.train.steps=4"]) == 0
    out = capfd.readouterr().out
    assert "is for another method; its learning rate and `peft` section are not used" in out
    lora, ia3 = json.loads((tmp_path / "runs" / "compare.json").read_text())
    assert (lora["run"], lora["steps"], lora["learning_rate"]) == ("lora", 4, 5e-3)
    assert ia3["learning_rate"] == LEARNING_RATES["ia3"]
    assert 0 < ia3["trainable_parameters"] < lora["trainable_parameters"] < lora["base_parameters"]
    assert lora["peak_memory_bytes"] > 2**26 and lora["eval_loss_after"] is not None
    # Finished runs are read, not trained again; and not taken for others.
    again = [*words, "--config.train.steps=4"]
    assert compare.main(again) == 0
    assert "step 4/4" not in capfd.readouterr().out
    with pytest.raises(UserError, match=r"lora is finished, with other settings \(data.max_length: 64, now 48"):
        compare.main([*again, "--config.data.max_length=48"])


def test_a_run_that_fails_is_named(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    place = tiny_run.make(tmp_path, steps=4)
    place.train.unlink()
    with pytest.raises(UserError, match="The run of lora ended with exit code 66"):
        compare.main(["--config", str(place.recipe), "--methods", "lora", "--workdir", str(tmp_path / "runs")])
    assert str(place.train) in capfd.readouterr().err


def test_settings_go_to_the_methods_that_have_them(tmp_path):
    """And what cannot be meant is refused before anything is trained."""
    methods = ["ia3", "p_tuning", "lora"]
    settings = [
        "--config.peft.num_virtual_tokens=4",
        "--config.train.steps=2",
        "--config.peft.target_modules=all-linear",
    ]
    found = {
        method: [word.split(".", 1)[1] for word in compare.words_of(method, methods, settings)] for method in methods
    }
    assert found["ia3"] == ["peft.method=ia3", "train.steps=2", "peft.target_modules=all-linear"]
    assert found["p_tuning"] == ["peft.method=p_tuning", "peft.num_virtual_tokens=4", "train.steps=2"]
    with pytest.raises(UserError, match="none of ia3, p_tuning, lora has the key 'deltaT'"):
        compare.words_of("lora", methods, ["--config.peft.deltaT=2"])
    place = tiny_run.make(tmp_path, steps=4)
    words = ["--config", str(place.recipe), "--methods", "lora,ia3", "--workdir", str(tmp_path / "runs")]
    with pytest.raises(UserError, match=r"No config key `train\.stepz`"):
        compare.main([*words, "--config.train.stepz=5"])
    assert not (tmp_path / "runs").exists()


def test_another_method_on_the_command_line_has_its_own_settings(tmp_path, capsys):
    place = tiny_run.make(tmp_path, steps=4)
    words = ["--config", str(place.recipe), "--config.peft.method=loha", "--config.peft.r=2"]
    config = cli.parse("jaxtune.train", words, "").config
    assert (config.peft.method, config.peft.r, config.peft.target_modules) == ("loha", 2, None)
    assert config.peft.lora_alpha is None and config.optim.learning_rate is None
    same = cli.parse("jaxtune.train", [*words[:2], "--config.peft.method=lora"], "").config
    assert (same.peft.r, same.peft.lora_alpha, same.optim.learning_rate) == (4, 8.0, 5e-3)
    assert capsys.readouterr().out.count("are not used") == 1
