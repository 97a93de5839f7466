"""T5: logits, gradients and greedy answers equal transformers', from every form of checkpoint; sizes are the published.

Methods over it are in test_t5_methods.py.
"""

import json
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import torch
import transformers
from safetensors.numpy import load_file, save_file
from transformers.models.t5.modeling_t5 import T5Attention

import jaxtune
from jaxtune import mesh as meshes
from jaxtune import tree
from jaxtune.data.batches import collate
from jaxtune.data.seq2seq import Lengths
from jaxtune.errors import UserError
from jaxtune.generate import generate
from jaxtune.hf.base import describe, open_base
from jaxtune.hf.weights import save_params
from jaxtune.layers import output_logits
from jaxtune.loss import batch_loss, hidden_of
from jaxtune.models import t5_hf
from jaxtune.models.t5 import bucket_of


@pytest.mark.parametrize("name", ["t5", "t5_v11", "t5_deep", "mt5"])
def test_logits_equal_transformers(checkpoint, name):
    model, directory = checkpoint(name)
    lm = jaxtune.load(directory)
    ids, mask, labels = reference.t5_batch()
    reference.close(lm.logits(ids, mask, labels=labels), reference.t5_logits(model, ids, mask, labels))


@pytest.mark.parametrize("buckets", [4, 5, 7, 16, 32])
@pytest.mark.parametrize("distance", [17, 20, 128, 200])
def test_buckets_equal_transformers(buckets, distance):
    """Every distance, with the float32 that decides on which side of a border it is."""
    away = torch.arange(-3 * distance, 3 * distance)
    how = {"num_buckets": buckets, "max_distance": distance}
    theirs = T5Attention._relative_position_bucket(away, bidirectional=False, **how)
    ours = bucket_of(buckets, distance)[np.clip(-away.numpy(), 0, distance)]
    np.testing.assert_array_equal(ours, theirs.numpy())
    theirs = T5Attention._relative_position_bucket(away, bidirectional=True, **how | {"num_buckets": 2 * buckets})
    ours = bucket_of(buckets, distance)[np.minimum(np.abs(away.numpy()), distance)] + buckets * (away.numpy() > 0)
    np.testing.assert_array_equal(ours, theirs.numpy())


def test_distance_shows(checkpoint, tmp_path):
    """The comparison of logits would see another bias: with a wider distance they differ."""
    _, directory = checkpoint("t5")
    shutil.copytree(directory, tmp_path / "wide")
    edit(tmp_path / "wide", relative_attention_max_distance=64)
    batch = reference.t5_batch()
    near, wide = (jaxtune.load(d).logits(batch[0], batch[1], labels=batch[2]) for d in (directory, tmp_path / "wide"))
    assert np.abs(near - wide).max() > 1e-3 * np.abs(near).max()


def edit(directory, **changes):
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))


# ---------------------------------------------------------------- generation


def greedy(model, ids, mask, **how):
    """transformers' greedy answers without the start token, each up to its end."""
    how = {"max_new_tokens": 16, "do_sample": False} | how
    with torch.no_grad():
        out = model.generate(torch.tensor(ids), attention_mask=torch.tensor(mask), **how)[:, 1:].tolist()
    stops = how["eos_token_id"]
    return [row[: next((i for i, token in enumerate(row) if token in stops), len(row))] for row in out]


@pytest.mark.parametrize("name", ["t5", "t5_v11"])
def test_greedy_equals_transformers(checkpoint, name):
    """Prompts of different lengths side by side, answers longer than the distance, some rows stopped; in twos too."""
    model, directory = checkpoint(name)
    lm = jaxtune.load(directory)
    ids, mask, _ = reference.t5_batch(3)
    prompts = [row[keep > 0].tolist() for row, keep in zip(ids, mask, strict=True)]
    free = greedy(model, ids, mask, eos_token_id=[96])
    stops = (free[0][3], free[1][5])
    ours = generate(lm.base.model, lm.variables, prompts, max_new_tokens=16, stop_ids=stops)
    assert ours == greedy(model, ids, mask, eos_token_id=list(stops))
    assert {len(answer) for answer in ours} != {16}
    again = generate(lm.base.model, lm.variables, prompts, max_new_tokens=16, stop_ids=stops, batch_size=2)
    assert again == ours


def test_the_encoder_runs_once(checkpoint):
    """In the loop over new tokens there is no product with the prompt's length but attention to it."""
    lm = jaxtune.load(checkpoint("t5")[1])
    seen = []
    plain = type(lm.base.model).encode

    def counted(self, tokens, segments):
        seen.append(tokens.shape)
        return plain(self, tokens, segments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(lm.base.model), "encode", counted)
        generate(lm.base.model, lm.variables, [[5, 6, 7]], max_new_tokens=5, stop_ids=(1,))
    assert seen == [(1, 32)]


# ---------------------------------------------------------------- training


def rows(count, seed=0):
    """(tokens, mask) of prompt and labels, as `data.seq2seq` stores them."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        source, labels = (rng.integers(3, 90, rng.integers(2, 30)).astype(np.int32) for _ in range(2))
        made.append((np.concatenate([source, labels]), np.arange(len(source) + len(labels)) >= len(source)))
    return made


def torch_rows(made):
    ids, mask, labels = (np.zeros((len(made), 32), np.int64) for _ in range(3))
    labels[:] = -100
    for i, (tokens, learnt) in enumerate(made):
        source, target = tokens[~learnt], tokens[learnt]
        ids[i, : len(source)], mask[i, : len(source)], labels[i, : len(target)] = source, 1, target
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("name", ["t5", "t5_v11"])
def test_gradients_equal_torch(checkpoint, name):
    """Of the loss of a ragged batch, for every parameter: tied and untied, both biases; with remat, unrolled."""
    model, directory = checkpoint(name)
    made = rows(5)
    batch = {k: torch.tensor(v) for k, v in torch_rows(made).items()}
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    theirs = {n: p.grad.numpy() for n, p in model.named_parameters()}
    model.zero_grad()

    base = open_base(str(directory), remat="full", unroll=2)
    lm = jaxtune.load(directory)
    arrays = jax.tree.map(jnp.asarray, collate(made, 5, Lengths(32, 32, 0, 0)))
    total = float(arrays["weights"].sum())
    run = jax.jit(jax.value_and_grad(lambda p: batch_loss(base.model, {"params": p}, arrays) / total))
    ours, grads = run(lm.variables["params"])
    assert float(ours) == pytest.approx(float(loss.detach()), rel=1e-5)
    flat = tree.flatten(grads)
    for row in base.rows:
        values = np.asarray(flat[row.path]) if row.stacked else np.asarray(flat[row.path])[None]
        for name_, value in zip(row.names, values, strict=True):
            reference.close(value.T if row.transposed else value, theirs[name_], 2e-4)


def test_meshes_give_the_same(checkpoint):
    """Logits and losses on 2 x 2 x 2 devices are those of one."""
    _, directory = checkpoint("t5_quantisable")
    one, many = jaxtune.load(directory), jaxtune.load(directory, mesh=meshes.make_mesh(2, 2, 2))
    ids, mask, labels = (np.concatenate([x, x[:1]]) for x in reference.t5_batch())
    reference.close(many.logits(ids, mask, labels=labels), one.logits(ids, mask, labels=labels))
    where = many.variables["params"]["decoder"]["layers"]["cross"]["q"]["kernel"].sharding.spec
    assert where == jax.sharding.PartitionSpec(None, "fsdp", "tensor")
    arrays = collate(rows(8), 8, Lengths(32, 32, 0, 0))
    loss = jax.jit(lambda params, batch: batch_loss(one.base.model, {"params": params}, batch))
    losses = []
    for lm in (one, many):
        with jax.set_mesh(lm.mesh):
            batch = {k: jax.device_put(v, meshes.batch_sharding(lm.mesh)) for k, v in arrays.items()}
            losses.append(float(loss(lm.variables["params"], batch)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# ---------------------------------------------------------------- what checkpoints say


@pytest.mark.parametrize(
    ("config", "names", "tied", "scaled"),
    [
        ({}, (), True, True),  # t5-small
        ({}, ("lm_head.weight",), True, True),  # its head once more, as transformers 4 read it
        ({"tie_word_embeddings": False}, ("lm_head.weight",), False, False),  # flan-t5
        ({"tie_word_embeddings": True, "scale_decoder_outputs": False}, ("lm_head.weight",), False, False),  # by 5
        ({"tie_word_embeddings": True, "scale_decoder_outputs": False}, (), True, False),
        ({"tie_word_embeddings": True, "scale_decoder_outputs": True}, (), True, True),
        ({"tie_word_embeddings": False, "scale_decoder_outputs": True}, ("lm_head.weight",), False, True),
        ({"model_type": "mt5", "tie_word_embeddings": False}, ("lm_head.weight",), False, False),
        ({"model_type": "mt5", "tie_word_embeddings": True}, ("lm_head.weight",), False, False),
        ({"model_type": "mt5"}, (), True, False),
    ],
)
def test_tied_and_scaled(config, names, tied, scaled):
    found = t5_hf.settled({"model_type": "t5"} | config, names)
    assert (found["tie_word_embeddings"], found["scale_decoder_outputs"]) == (tied, scaled)


FORMS = {
    "by_4": ("t5_v11", {"tie_word_embeddings": False, "scale_decoder_outputs": "absent"}),
    "by_5": ("t5_v11", {"tie_word_embeddings": True, "scale_decoder_outputs": False}),
    "by_4_tied": ("t5", {"tie_word_embeddings": "absent", "scale_decoder_outputs": "absent"}),
    "untied_scaled": ("t5_v11", {"tie_word_embeddings": True, "scale_decoder_outputs": True}),
}


@pytest.mark.parametrize("form", list(FORMS))
def test_configs_of_both_transformers(checkpoint, tmp_path, form):
    """What transformers itself makes of each; with the tensors that old checkpoints have besides."""
    name, changes = FORMS[form]
    shutil.copytree(checkpoint(name)[1], tmp_path / "model")
    edit(tmp_path / "model", **changes)
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    for side in ("encoder", "decoder"):
        tensors[f"{side}.embed_tokens.weight"] = tensors["shared.weight"]
    bias = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    save_file(tensors | {bias: np.ones((9, 5), np.float32)}, path, metadata={"format": "pt"})
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model").eval()
    batch = reference.t5_batch()
    lm = jaxtune.load(tmp_path / "model")
    expected = reference.t5_logits(model, *batch)
    reference.close(lm.logits(batch[0], batch[1], labels=batch[2]), expected)

    # Written again it has neither of them, and a config that both transformers read alike.
    save_params(
        tmp_path / "out",
        lm.base.rows,
        lm.variables["params"],
        tmp_path / "model",
        dtype="float32",
        changes=lm.base.as_written,
    )
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == load_file(checkpoint(name)[1] / path.name).keys()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] == (name == "t5")
    assert config["scale_decoder_outputs"] == (form in ("by_4_tied", "untied_scaled"))
    again = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").eval()
    reference.close(reference.t5_logits(again, *batch), expected, 1e-6)


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        ({}, 60_506_624),  # t5-small
        ("flan-t5-base", 247_577_856),
        ("t5-v1_1-xxl", 11_135_332_352),
    ],
)
def test_published_sizes(shared, config: Any, parameters):
    """The real models, laid out without a weight, and every tensor of transformers' class by name and shape."""
    if config == "flan-t5-base":  # t5.1.1.base.gin
        found = {"d_model": 768, "d_ff": 2048, "num_layers": 12, "num_heads": 12, "feed_forward_proj": "gated-gelu"}
        config = found | {"tie_word_embeddings": False}
    elif config:
        config = json.loads((shared / "configs" / f"{config}.config.json").read_text())
    config = {"model_type": "t5"} | config
    base = describe("t5", shared, config, dtype="bfloat16")
    assert tree.count(base.abstract) == parameters
    with torch.device("meta"):
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(**config))
    theirs = {n: tuple(p.shape) for n, p in model.state_dict().items() if "embed_tokens" not in n}
    ours = {name: row.tensor_shape for row in base.rows for name in row.names}
    assert ours | ({"lm_head.weight": theirs["lm_head.weight"]} if base.model.config.tied else {}) == theirs


class TestRefusals:
    @pytest.fixture
    def copy(self, checkpoint, tmp_path):
        shutil.copytree(checkpoint("t5")[1], tmp_path / "model")
        return tmp_path / "model"

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"model_type": "umt5"}, "Did you mean `mt5`"),
            ({"model_type": "longt5"}, "model_type='longt5'"),
            ({"feed_forward_proj": "gated-tanh", "dense_act_fn": "absent"}, "gated-tanh.*relu, gelu"),
            ({"feed_forward_proj": "double-gated-gelu", "dense_act_fn": "absent"}, "double-gated-gelu"),
            ({"num_heads": 0}, "num_heads=0"),
            ({"num_decoder_layers": -1}, "num_decoder_layers=-1"),
            ({"relative_attention_num_buckets": 3}, "at least 4 buckets"),
            ({"relative_attention_num_buckets": 32}, "at least 4 buckets"),
            ({"num_decoder_layers": 3}, r"missing: decoder\.block\.2"),
        ],
    )
    def test_configs_we_would_compute_wrongly(self, copy, changes, message):
        edit(copy, **changes)
        with pytest.raises(UserError, match=message):
            jaxtune.load(copy)

    def test_wrong_arguments_of_the_python_face(self, copy, checkpoint):
        lm = jaxtune.load(copy)
        with pytest.raises(UserError, match="give `labels`"):
            lm.logits([[3, 4]])
        with pytest.raises(UserError, match="labels has 2 rows, and input_ids 1"):
            lm.logits([[3, 4]], labels=[[3], [4]])
        with pytest.raises(UserError, match="labels holds ids from -5 to 3"):
            lm.logits([[3, 4]], labels=[[3, -5]])
        with pytest.raises(UserError, match="`labels` is for encoder-decoders"):
            jaxtune.load(checkpoint("gemma")[1]).logits([[3, 4]], labels=[[3, 4]])


def test_dropout_equals_transformers(checkpoint):
    """In training: the mean and the spread of rows' losses over many draws are those of transformers' train mode."""
    model, directory = checkpoint("t5_v11")
    made = rows(2, seed=3) * 250
    batch = {k: torch.tensor(v) for k, v in torch_rows(made).items()}
    arrays = jax.tree.map(jnp.asarray, collate(made, 500, Lengths(32, 32, 0, 0)))
    lm = jaxtune.load(directory)

    @jax.jit
    def run(variables, key):
        rngs = None if key is None else {"dropout": key}
        hidden = hidden_of(lm.base.model, variables, arrays, rngs=rngs)
        return output_logits(hidden, lm.base.model.apply(variables, method="head"), None)

    torch.manual_seed(0)
    model.train()
    with torch.no_grad():
        theirs = model(**batch).logits.numpy()
    model.eval()
    logits = [theirs, *(np.asarray(run(lm.variables, key)) for key in (jax.random.key(0), None))]
    theirs, ours, plain = (losses(x, np.asarray(arrays["targets"]), np.asarray(arrays["weights"])) for x in logits)
    for row in (0, 1):
        a, b = theirs[row::2], ours[row::2]
        assert a.std() > 0.02 * plain[row]  # it shows
        assert abs(a.mean() - b.mean()) < 4 * a.std() * (2 / 250) ** 0.5
        assert b.std() == pytest.approx(a.std(), rel=0.2)


def losses(logits, targets, weights):
    """Of each row, the mean over its targets."""
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    own = np.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]
    return -(own * weights).sum(1) / weights.sum(1)
