"""Merged checkpoints and exports: what is written computes what was trained, in transformers too, or is refused."""

import json
import os
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import reference
import tiny_run
import transformers
from safetensors.numpy import load_file

import jaxtune
from jaxtune import export, probe, tree
from jaxtune.config import ASSETS
from jaxtune.errors import CannotCreateError, ExportError, MissingInputError, NoCheckpointError, StorageError, UserError
from jaxtune.hf import merge, weights
from jaxtune.hf.adapters import PeftAdapter, place_adapters
from jaxtune.hf.files import replaced_directory
from jaxtune.peft import lora
from jaxtune.peft.method import Start, from_variables

# (model, LoraConfig, is the merged model tied, is peft's own merge right)
MERGES = {
    "lora": ("gemma2", {"r": 3, "target_modules": "all-linear", "lora_alpha": 5}, True, True),
    "layers": (
        "gemma3",
        {
            "r": 4,
            "use_rslora": True,
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"layers.1.mlp.down_proj": 6},
            "layers_to_transform": [1, 4],
        },
        True,
        True,
    ),
    "dora": ("gemma2", {"r": 5, "use_dora": True, "target_modules": "all-linear"}, True, True),
    "untied": ("gemma2_untied", {"r": 2, "target_modules": ["embed_tokens", "lm_head", "q_proj"]}, False, True),
    "untied_saved": (
        "gemma2_untied",
        {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        False,
        True,
    ),
    "saved": ("gemma3", {"r": 2, "target_modules": ["v_proj"], "modules_to_save": ["mlp", "q_norm"]}, True, True),
    "saved_embedding": (
        "gemma2",
        {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        False,
        True,
    ),
    "saved_head": ("gemma2", {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, False, True),
    "embedding": ("gemma2", {"r": 3, "target_modules": ["embed_tokens", "q_proj"]}, False, False),
    "head": ("gemma2", {"r": 2, "target_modules": ["lm_head", "k_proj"]}, False, False),
    "embedding_and_head": ("gemma", {"r": 2, "target_modules": ["embed_tokens", "lm_head"]}, False, False),
    "token_rows": (
        "gemma3",
        {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": [3, 50, 96]},
        True,
        True,
    ),
    "token_rows_untied": (
        "gemma2_untied",
        {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": [5, 7]},
        False,
        True,
    ),
}


@pytest.fixture
def adapted(checkpoint, tmp_path):
    """(model's name, LoraConfig's keys) -> (peft model, checkpoint directory, adapter directory)."""

    def get(name, keys):
        _, directory = checkpoint(name)
        base = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
        config = peft.LoraConfig(task_type="CAUSAL_LM", **keys)
        return reference.adapt(base, config, tmp_path / "adapter"), directory, tmp_path / "adapter"

    return get


def reloaded(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()


IDS, MASK = reference.batch()
IDS[0, :6] = [3, 50, 96, 5, 7, 4]  # tokens whose rows train


@pytest.mark.filterwarnings("ignore::UserWarning")  # peft's own, about tied embeddings
@pytest.mark.parametrize("case", list(MERGES))
def test_merged_logits_are_the_adapters(adapted, tmp_path, case):
    name, keys, tied, peft_is_right = MERGES[case]
    model, directory, adapter = adapted(name, keys)
    expected = reference.logits(model, IDS, MASK)
    lm = jaxtune.load(directory, adapter=adapter)
    lm.save_merged(tmp_path / "merged", max_shard_size="100KB")

    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config.get("tie_word_embeddings", True) is tied
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 2
    theirs = reloaded(tmp_path / "merged")
    reference.close(reference.logits(theirs, IDS, MASK), expected)
    reference.close(jaxtune.load(tmp_path / "merged").logits(IDS, MASK), expected)
    if peft_is_right:
        whole = model.merge_and_unload().state_dict()
        for key, value in theirs.state_dict().items():
            np.testing.assert_allclose(value.numpy(), whole[key].numpy(), atol=2e-6, err_msg=key)


METHODS = {
    "adalora": peft.AdaLoraConfig(init_r=6, target_r=4, total_step=10, target_modules=["q_proj", "down_proj"]),
    "ia3": peft.IA3Config(),
    "loha": peft.LoHaConfig(r=3),
    "lokr": peft.LoKrConfig(r=3, target_modules=["v_proj", "up_proj"]),
    "ln_tuning": peft.LNTuningConfig(),
    "oft": peft.OFTConfig(oft_block_size=8, target_modules=["q_proj", "down_proj"]),
    "boft": peft.BOFTConfig(boft_block_size=4, target_modules=["q_proj", "down_proj"]),
    "vera": peft.VeraConfig(r=5),
    "randlora": peft.RandLoraConfig(r=7),
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("method", METHODS)
def test_every_method_that_is_a_weight_merges(checkpoint, tmp_path, method):
    _, directory = checkpoint("gemma2")
    base = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    model = reference.adapt(base, METHODS[method], tmp_path / "adapter")
    jaxtune.load(directory, adapter=tmp_path / "adapter").save_merged(tmp_path / "merged")
    reference.close(reference.logits(reloaded(tmp_path / "merged"), IDS), reference.logits(model, IDS))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("dtype", "eps"), [("bfloat16", 2**-8), ("float16", 2**-11)])
def test_rounded_weights_are_the_merged_ones(adapted, tmp_path, dtype, eps):
    """Every tensor is the float32 merge, rounded once; the logits stay within what the check allows."""
    model, directory, adapter = adapted("gemma2", {"r": 3, "target_modules": "all-linear"})
    expected = reference.logits(model, IDS, MASK)
    lm = jaxtune.load(directory, adapter=adapter)
    lm.save_merged(tmp_path / "whole")
    lm.save_merged(tmp_path / "half", dtype)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == dtype
    half, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("half", "whole"))
    for name, value in whole.items():
        np.testing.assert_array_equal(half[name], value.astype(jnp.dtype(dtype)), err_msg=name)
        assert np.abs(half[name].astype(np.float32) - value).max() <= eps * np.abs(value).max()
    ours = jaxtune.load(tmp_path / "half").logits(IDS, MASK)
    reference.close(ours, expected, merge.bound_of(lm.base.layout, jnp.dtype(dtype)))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_multimodal_checkpoint_keeps_its_vision_tower(checkpoint, tmp_path):
    """Tensors are named as they were, and those of the vision tower are the base's, bit for bit."""
    _, directory = checkpoint("gemma3_multimodal")
    base = transformers.AutoModelForImageTextToText.from_pretrained(directory, attn_implementation="eager")
    config = peft.LoraConfig(r=3, target_modules=r".*language_model.*(q_proj|up_proj)")
    theirs = reference.adapt(base, config, tmp_path / "adapter")
    expected = reference.logits(theirs, IDS)
    jaxtune.load(directory, adapter=tmp_path / "adapter").save_merged(tmp_path / "merged")
    merged, before = (load_file(path / "model.safetensors") for path in (tmp_path / "merged", directory))
    assert merged.keys() == before.keys()
    for name in (name for name in before if "vision" in name):
        np.testing.assert_array_equal(merged[name], before[name])
    again = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    reference.close(reference.logits(again.eval(), IDS), expected)


class TestChecks:
    """What an export holds against itself."""

    @pytest.fixture
    def lm(self, adapted):
        _, directory, adapter = adapted("gemma2", {"r": 3, "target_modules": ["q_proj", "v_proj"]})
        return jaxtune.load(directory, adapter=adapter)

    def test_an_adapter_of_another_meaning_is_removed(self, lm, tmp_path, monkeypatch):
        right = lora.to_config
        monkeypatch.setattr(lora, "to_config", lambda *a: right(*a) | {"lora_alpha": 9})
        with pytest.raises(ExportError, match="gives other logits") as error:
            lm.save_adapter(tmp_path / "out")
        assert error.value.exit_code == 70 and not list(tmp_path.glob("out*"))

    def test_other_tensors_are_not_left(self, lm, tmp_path, monkeypatch):
        right = lora.Lora.to_peft
        calls = []

        def later_differs(self, site, layer):
            calls.append(1)
            return {name: value + (len(calls) > 8) for name, value in right(self, site, layer).items()}

        monkeypatch.setattr(lora.Lora, "to_peft", later_differs)
        with pytest.raises(ExportError, match="is not the one that is read back"):
            lm.save_adapter(tmp_path / "out")
        assert not list(tmp_path.glob("out*"))

    def test_a_wrong_merge_writes_nothing(self, lm, tmp_path, monkeypatch):
        right = lora.Lora.merged
        monkeypatch.setattr(lora.Lora, "merged", lambda self, w: right(self, w) * 1.01)
        with pytest.raises(ExportError, match=r"differ from the adapter's by .* Nothing is written"):
            lm.save_merged(tmp_path / "out")
        assert not list(tmp_path.glob("out*"))

    def test_what_half_precision_cannot_hold(self, adapted, tmp_path):
        """A weight beyond 65504 is infinite in float16."""
        _, directory, adapter = adapted("gemma2", {"r": 2, "target_modules": ["q_proj"]})
        lm = jaxtune.load(directory, adapter=adapter)
        kernel = lm.variables["params"]["layers"]["mlp"]["up"]["kernel"]
        lm.variables["params"]["layers"]["mlp"]["up"]["kernel"] = kernel.at[0, 0, 0].set(7e4)
        with pytest.raises(UserError):
            lm.save_merged(tmp_path / "out", "float16")
        assert not list(tmp_path.glob("out*"))

    def test_an_untrained_adapter_is_called_that(self, lm, tmp_path):
        q = lm.variables["adapters"]["layers"]["attn"]["q"]
        q["kernel"] = q["kernel"].replace(b=jnp.zeros_like(q["kernel"].b))
        with pytest.warns(UserWarning, match=r"4 of 8 lora_B in .* are zero"):
            lm.save_adapter(tmp_path / "half")
        v = lm.variables["adapters"]["layers"]["attn"]["v"]
        v["kernel"] = v["kernel"].replace(b=jnp.zeros_like(v["kernel"].b))
        with pytest.warns(UserWarning, match=r"8 of 8 lora_B in .* are zero"):
            lm.save_adapter(tmp_path / "none")
        said = []
        place = (lm.base, lm.mesh, lm.variables, lm.peft, "base")
        probe.write_adapter(tmp_path / "none", *place, readme="", say=said.append)
        assert len(said) == 1 and "does nothing: its logits are the base's own" in said[0]
        assert (tmp_path / "none" / "adapter_model.safetensors").is_file()

    def test_what_is_written_otherwise_computes_the_same(self, checkpoint, tmp_path):
        """PiSSA is written as plain LoRA of twice the rank, which only logits can tell to be the same."""
        _, directory = checkpoint("gemma2")
        lm = jaxtune.load(directory)
        config = lora.Config(r=3, init_lora_weights="pissa")
        boxed = lora.init(jax.random.key(0), lm.base.layout, config, Start(tree.flatten(lm.variables["params"])))
        lm.variables |= place_adapters(lm.mesh, boxed)
        q = lm.variables["adapters"]["layers"]["attn"]["q"]
        q["kernel"] = q["kernel"].replace(a=q["kernel"].a + 0.1)
        lm.peft = PeftAdapter(lora, config, {}, None)
        lm.save_adapter(tmp_path / "out")
        again = jaxtune.load(directory, adapter=tmp_path / "out")
        assert not probe.identical(from_variables(lm.variables), from_variables(again.variables))
        reference.close(again.logits(IDS), lm.logits(IDS))
        lm.save_merged(tmp_path / "merged")
        reference.close(reference.logits(reloaded(tmp_path / "merged"), IDS), lm.logits(IDS))

    def test_a_prompt_is_no_weight(self, checkpoint, tmp_path):
        _, directory = checkpoint("gemma2")
        base = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
        config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
        reference.adapt(base, config, tmp_path / "adapter")
        lm = jaxtune.load(directory, adapter=tmp_path / "adapter")
        with pytest.raises(UserError, match="cannot be merged: what it trained"):
            lm.save_merged(tmp_path / "out")
        lm.save_adapter(tmp_path / "again")
        np.testing.assert_array_equal(jaxtune.load(directory, adapter=tmp_path / "again").logits(IDS), lm.logits(IDS))

    def test_without_an_adapter(self, checkpoint, tmp_path):
        lm = jaxtune.load(checkpoint("gemma2")[1])
        with pytest.raises(UserError, match="no adapter to merge"):
            lm.save_merged(tmp_path / "out")
        with pytest.raises(UserError, match="dtype is 'int8'"):
            lm.save_merged(tmp_path / "out", "int8")

    def test_probes_hold_the_tokens_whose_rows_train(self, adapted):
        keys = {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": [3, 50, 96]}
        _, directory, adapter = adapted("gemma2", keys)
        lm = jaxtune.load(directory, adapter=adapter)
        logits = probe.logits_of(lm.base, lm.mesh, lm.variables, lm.peft)
        before = logits(lm.variables)
        rows = lm.variables["adapters"]["embed"]["table"]
        lm.variables["adapters"]["embed"]["table"] = rows.replace(rows=rows.rows.at[2].add(1.0))
        assert merge.difference(logits(lm.variables), before) > 1e-3


class TestFiles:
    @pytest.mark.parametrize(
        ("text", "size"),
        [("4GB", 4 * 10**9), ("2GiB", 2**31), ("500MB", 5 * 10**8), ("1.5kb", 1500), (7, 7), ("12", 12)],
    )
    def test_sizes(self, text, size):
        assert weights.size_of(text) == size

    @pytest.mark.parametrize("text", ["", "4 apples", "-1GB", "0", "GB", "1e9"])
    def test_no_sizes(self, text):
        with pytest.raises(UserError, match="It is written like 4GB"):
            weights.size_of(text)

    def test_a_failure_leaves_what_was_there(self, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "adapter_config.json").write_text("{}")
        for raised, seen in ((OSError(28, "No space left on device"), StorageError), (SystemExit(), SystemExit)):
            with pytest.raises(seen), replaced_directory(tmp_path / "out") as new:
                (new / "adapter_config.json").write_text("half")
                raise raised
            assert [p.name for p in tmp_path.iterdir()] == ["out"]
            assert (tmp_path / "out" / "adapter_config.json").read_text() == "{}"

    def test_other_directories_are_never_replaced(self, tmp_path, adapted):
        _, directory, adapter = adapted("gemma2", {"r": 2, "target_modules": ["q_proj"]})
        lm = jaxtune.load(directory, adapter=adapter)
        (tmp_path / "home").mkdir()
        (tmp_path / "home" / "letters.txt").write_text("dear")
        (tmp_path / "file").write_text("x")
        (tmp_path / "empty").mkdir()
        for name in ("home", "file"):
            with pytest.raises(CannotCreateError, match="An export replaces a directory as a whole"):
                lm.save_adapter(tmp_path / name)
        assert (tmp_path / "home" / "letters.txt").read_text() == "dear"
        lm.save_adapter(tmp_path / "empty")
        lm.save_adapter(tmp_path / "empty")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tiny_run.make(tmp_path_factory.mktemp("place"), steps=6)


@pytest.fixture(scope="module")
def finished(place):
    """A run of six steps, as the training command leaves it."""
    workdir = place.root / "finished"
    settings = ["evaluate.samples=2", "evaluate.max_new_tokens=4", "checkpoint.keep_best_n=1"]
    assert tiny_run.start(place, workdir, *settings).wait() == 0, (place.root / "finished.screen").read_text()
    return workdir


@pytest.fixture
def run(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def bytes_of(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


class TestCommand:
    def test_an_adapter_again(self, run, place):
        """What a run left is what its last checkpoint gives, bit for bit, card included; the run is untouched."""
        before = bytes_of(run / "adapter")
        shutil.rmtree(run / "adapter")
        whole = tiny_run.contents(run)
        assert export.main([str(run)]) == 0
        assert bytes_of(run / "adapter") == before
        shutil.rmtree(run / "adapter")
        assert tiny_run.contents(run) == whole

    def test_merged(self, run, place):
        words = ["--merged", "--max_shard_size", "60KB", "--out", str(run.parent / "merged")]
        assert export.main([str(run), *words]) == 0
        expected = reference.logits(reference.with_adapter(place.model, run / "adapter"), IDS)
        assert (run.parent / "merged" / "model.safetensors.index.json").is_file()
        reference.close(reference.logits(reloaded(run.parent / "merged"), IDS), expected)
        text = transformers.AutoTokenizer.from_pretrained(run.parent / "merged").decode([5, 6, 7])
        assert text == transformers.AutoTokenizer.from_pretrained(place.model).decode([5, 6, 7])
        assert "merged into" in (run.parent / "merged" / "README.md").read_text()

    def test_from_a_peft_directory(self, run, place, tmp_path):
        words = ["--base", str(place.model), "--out"]
        assert export.main([str(run / "adapter"), *words, str(tmp_path / "again")]) == 0
        name = "adapter_model.safetensors"
        assert (tmp_path / "again" / name).read_bytes() == (run / "adapter" / name).read_bytes()
        assert export.main([str(run / "adapter"), *words, str(tmp_path / "a"), "--merged"]) == 0
        assert export.main([str(run), "--merged", "--out", str(tmp_path / "b")]) == 0
        for key, value in load_file(tmp_path / "a" / "model.safetensors").items():
            np.testing.assert_array_equal(load_file(tmp_path / "b" / "model.safetensors")[key], value)

    @pytest.mark.slow
    def test_a_killed_run(self, place, tmp_path):
        """kill -9 leaves a run that can be exported: its newest checkpoint, which peft runs."""
        process = tiny_run.start(place, tmp_path / "run", "train.steps=4000")
        for _ in range(2400):
            if any((tmp_path / "run" / "checkpoints" / str(step)).is_dir() for step in range(3, 4000, 3)):
                break
            time.sleep(0.1)
        process.kill()
        process.wait()
        assert not (tmp_path / "run" / "adapter").exists()
        assert export.main([str(tmp_path / "run")]) == 0
        expected = reference.logits(reference.with_adapter(place.model, tmp_path / "run" / "adapter"), IDS)
        lm = jaxtune.load(place.model, adapter=tmp_path / "run" / "adapter")
        reference.close(lm.logits(IDS), expected)
        assert np.abs(expected - jaxtune.load(place.model).logits(IDS)).max() > 1e-4

    def test_steps(self, run, capsys):
        for which in ("best", "3"):
            assert export.main([str(run), "--checkpoint", which]) == 0
            assert (run / f"adapter-{which}" / "adapter_model.safetensors").is_file()
        three = run / "adapter-3" / "adapter_model.safetensors"
        assert three.read_bytes() != (run / "adapter" / "adapter_model.safetensors").read_bytes()
        # A damaged step is passed over, and stays where it is for the run to deal with.
        arrays = max((run / "checkpoints" / "6" / "arrays").rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
        arrays.write_bytes(arrays.read_bytes()[:-1] + b"?")
        assert export.main([str(run), "--out", str(run.parent / "newest")]) == 0
        assert "WARNING: checkpoint 6 is damaged and passed over" in capsys.readouterr().out
        assert (run.parent / "newest" / "adapter_model.safetensors").read_bytes() == three.read_bytes()
        assert (run / "checkpoints" / "6").is_dir()
        with pytest.raises(NoCheckpointError, match="is intact"):
            export.main([str(run), "--checkpoint", "6"])
        with pytest.raises(UserError, match="It can be: newest, best, 3, 6"):
            export.main([str(run), "--checkpoint", "7"])

    @pytest.mark.slow
    @pytest.mark.parametrize("method", ["full", "partial"])
    def test_a_base_that_trained_itself(self, place, tmp_path, method):
        settings = [f"peft.method={method}", "train.steps=2"]
        settings += ["peft.target_modules=['embed_tokens','q_proj']"] * (method == "partial")
        assert tiny_run.start(place, tmp_path / "run", *settings).wait() == 0
        before = bytes_of(tmp_path / "run" / "model")
        assert export.main([str(tmp_path / "run")]) == 0
        assert bytes_of(tmp_path / "run" / "model") == before
        assert export.main([str(tmp_path / "run"), "--dtype", "bfloat16", "--out", str(tmp_path / "half")]) == 0
        assert load_file(tmp_path / "half" / "model.safetensors")["model.norm.weight"].dtype == jnp.bfloat16

    @pytest.mark.parametrize(
        ("words", "message", "kind"),
        [
            (["{root}/nope"], "There is no such directory", MissingInputError),
            (["{root}/compiled"], "is neither a run directory", MissingInputError),
            (["{run}", "--dtype", "bfloat16"], "--dtype is for checkpoints", UserError),
            (["{run}", "--dtype", "int8", "--merged"], "dtype is 'int8'", UserError),
            (["{run}", "--max_shard_size", "many", "--merged"], "The size of a shard", UserError),
            (["{run}", "--merge"], "unrecognized arguments: --merge|Unrecognized arguments: --merge", UserError),
            (["{run}", "--base", "{assets}"], "is not the model that", UserError),
            (["{run}", "--merged", "--out", "{model}"], "is, or holds, what is exported", CannotCreateError),
            (["{run}", "--out", "{root}"], "is, or holds, what is exported", CannotCreateError),
            (["{run}", "--out", "{root}/compiled"], "a directory of something else", CannotCreateError),
            (["{run}/adapter"], "give its base model with --base", UserError),
            (["{run}/adapter", "--base", "{model}"], "--out is missing", UserError),
            (["{run}/adapter", "--base", "{model}", "--out", "{run}/adapter"], "what is exported", CannotCreateError),
        ],
    )
    def test_refusals(self, finished, place, words, message, kind):
        names = {"root": place.root, "run": finished, "model": place.model, "assets": ASSETS / "tiny_gemma"}
        before = sorted(place.root.iterdir()), sorted(finished.iterdir())
        with pytest.raises(kind, match=message):
            export.main([word.format(**names) for word in words])
        assert (sorted(place.root.iterdir()), sorted(finished.iterdir())) == before

    def test_a_run_without_a_checkpoint(self, run):
        shutil.rmtree(run / "checkpoints")
        with pytest.raises(MissingInputError, match="has no checkpoints yet"):
            export.main([str(run)])
        (run / "config.json").write_text(os.devnull)
        with pytest.raises(UserError, match="is not valid JSON"):
            export.main([str(run)])
