"""Logits equal transformers' on every variant, from every kind of checkpoint, or the checkpoint is refused by name."""

import json
import shutil

import numpy as np
import pytest
import reference
from safetensors.numpy import load_file, save_file

import jaxtune
from jaxtune.errors import MissingInputError, UserError
from jaxtune.hf.base import describe
from jaxtune.tree import count


@pytest.mark.parametrize("name", list(reference.MODELS))
def test_logits_equal_transformers(checkpoint, name):
    model, directory = checkpoint(name)
    lm = jaxtune.load(directory)
    ids, mask = reference.batch()
    reference.close(lm.logits(ids), reference.logits(model, ids))
    # Left and right padding; positions of padding too, where transformers' eager attention is defined as well.
    reference.close(lm.logits(ids, mask), reference.logits(model, ids, mask))


def test_window_shows(checkpoint, tmp_path):
    """The comparison above would see a missing window: without it the logits differ."""
    _, directory = checkpoint("gemma2")
    shutil.copytree(directory, tmp_path / "wide")
    config = json.loads((directory / "config.json").read_text())
    (tmp_path / "wide" / "config.json").write_text(json.dumps(config | {"sliding_window": 400}))
    ids, _ = reference.batch()
    near, wide = jaxtune.load(directory).logits(ids), jaxtune.load(tmp_path / "wide").logits(ids)
    np.testing.assert_allclose(near[:, :5], wide[:, :5], rtol=1e-5, atol=1e-5)
    assert np.abs(near[:, 8:] - wide[:, 8:]).max() > 0.01


def test_sharded_checkpoint(checkpoint, tmp_path):
    model, directory = checkpoint("gemma3")
    reference.save(model, tmp_path / "sharded", max_shard_size="60KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    ids, mask = reference.batch()
    np.testing.assert_array_equal(
        jaxtune.load(tmp_path / "sharded").logits(ids, mask), jaxtune.load(directory).logits(ids, mask)
    )


def test_multimodal_checkpoint_of_older_transformers(checkpoint, tmp_path):
    """Before 4.52 the text tower was `language_model.model.…`, after it `model.language_model.…`."""
    model, directory = checkpoint("gemma3_multimodal")
    shutil.copytree(directory, tmp_path / "old")
    tensors = load_file(directory / "model.safetensors")
    current = {n for n in tensors if n.startswith("model.language_model.")}
    old = {
        n.replace("model.language_model.", "language_model.model.") if n in current else n.removeprefix("model."): t
        for n, t in tensors.items()
    }
    if not current:  # this transformers still writes the old names
        old = {n.replace("language_model.model.", "model.language_model."): t for n, t in tensors.items()}
    save_file(old, tmp_path / "old" / "model.safetensors", metadata={"format": "pt"})
    ids, _ = reference.batch()
    reference.close(jaxtune.load(tmp_path / "old").logits(ids), reference.logits(model, ids))


def test_old_config_keys(checkpoint, tmp_path):
    """rope_theta, rope_local_base_freq, rope_scaling, sliding_window_pattern, as the first Gemma 3 configs had them."""
    model, directory = checkpoint("gemma3")
    shutil.copytree(directory, tmp_path / "old")
    config = json.loads((directory / "config.json").read_text())
    for key in ("rope_parameters", "layer_types"):
        config.pop(key, None)
    config |= {
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "rope_scaling": {"type": "linear", "factor": 8.0},
        "sliding_window_pattern": 6,
    }
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    ids, _ = reference.batch()
    reference.close(jaxtune.load(tmp_path / "old").logits(ids), reference.logits(model, ids))


def test_bfloat16_is_near(checkpoint):
    model, directory = checkpoint("gemma2")
    ids, _ = reference.batch()
    reference.close(jaxtune.load(directory, dtype="bfloat16").logits(ids), reference.logits(model, ids), 0.05)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("gemma-2b", 2_506_172_416),
        ("gemma2-2b", 2_614_341_888),
        ("gemma2-9b", 9_241_705_984),
        ("gemma2-27b", 27_227_128_320),
        ("gemma3-1b", 999_885_952),
    ],
)
def test_published_sizes(shared, name, parameters):
    """The real models, laid out without a weight."""
    directory = shared / "configs"
    config = json.loads((directory / f"{name}.config.json").read_text())
    assert count(describe(name, directory, config, dtype="bfloat16").abstract) == parameters


def test_published_names(shared):
    """Every text tensor of the published Gemma 3 4B, by name and shape, and no other."""
    stored = json.loads((shared / "configs" / "gemma3_hf_param_shapes.json").read_text())
    config = json.loads((shared / "configs" / "gemma3-4b.config.json").read_text())
    from jaxtune.models import canonical

    names = {canonical(n): tuple(shape) for n, shape in stored.items() if canonical(n)}
    base = describe("gemma3-4b", shared, config, dtype="bfloat16")
    needed = {name: row.tensor_shape for row in base.rows for name in row.names}
    names.pop("lm_head.weight", None)
    assert names == needed


class TestRefusals:
    @pytest.fixture
    def copy(self, checkpoint, tmp_path):
        shutil.copytree(checkpoint("gemma2")[1], tmp_path / "model")
        return tmp_path / "model"

    def edit_config(self, directory, **changes):
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def test_no_directory(self, tmp_path):
        (tmp_path / "gemma-2b").mkdir()
        with pytest.raises(MissingInputError, match="holds: gemma-2b"):
            jaxtune.load(tmp_path / "gemma2b")

    def test_tensors_that_do_not_fit(self, copy):
        tensors = load_file(copy / "model.safetensors")
        tensors["model.layers.1.mlp.up_projj.weight"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
        tensors["model.norm.weight"] = np.zeros(47, np.float32)
        save_file(tensors, copy / "model.safetensors")
        with pytest.raises(UserError) as error:
            jaxtune.load(copy)
        text = str(error.value)
        assert "missing: model.layers.1.mlp.up_proj.weight Did you mean `model.layers.1.mlp.up_projj.weight`?" in text
        assert "unexpected: model.layers.1.mlp.up_projj.weight" in text
        assert "model.norm.weight has shape [47]; config.json needs [48]" in text

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"model_type": "gemma22"}, "Did you mean `gemma2`"),
            ({"attention_bias": True}, "attention_bias"),
            ({"num_key_value_heads": 3}, "must be a multiple"),
            ({"vocab_size": 0}, "vocab_size=0"),
            ({"hidden_activation": "silu"}, "gelu_pytorch_tanh"),
            ({"layer_types": ["chunked_attention"] * 4}, "full_attention or sliding_attention"),
            ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "default, linear"),
            ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ],
    )
    def test_configs_we_would_compute_wrongly(self, copy, changes, message):
        self.edit_config(copy, **changes)
        with pytest.raises(UserError, match=message):
            jaxtune.load(copy)

    def test_index_that_leaves_the_directory(self, copy):
        (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../../etc/x.safetensors"}}))
        with pytest.raises(UserError, match=r"only \.safetensors files beside it"):
            jaxtune.load(copy)

    def test_pickles(self, copy):
        (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
        with pytest.raises(MissingInputError, match="pickles run code"):
            jaxtune.load(copy)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "git lfs pull"),
            (b"PK\x03\x04junk", "pickle or zip"),
            (b"<html>", "not a safetensors file"),
        ],
    )
    def test_no_safetensors_file(self, copy, content, message):
        (copy / "model.safetensors").write_bytes(content)
        with pytest.raises(UserError, match=message):
            jaxtune.load(copy)

    def test_wrong_arguments_of_the_python_face(self, copy):
        """One text is not a list of letters, ragged rows are not a matrix."""
        lm = jaxtune.load(copy)
        with pytest.raises(UserError, match="padded, with attention_mask 0"):
            lm.logits([[2, 3], [2, 3, 4]])
        lm.tokenizer = object()  # refused before it is used
        for one in ("Hello", [{"role": "user", "content": "Hello"}]):
            with pytest.raises(UserError, match=r"generate\(\[prompt\]\)"):
                lm.generate(one)

    def test_ids_outside_the_vocabulary(self, copy):
        with pytest.raises(UserError, match="the vocabulary has 97"):
            jaxtune.load(copy).logits([[1, 97]])
