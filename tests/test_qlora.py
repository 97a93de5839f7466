"""Whole models over quantised weights beside transformers, peft and bitsandbytes: logits, training, merging."""

import functools
import json
import re

import jax
import numpy as np
import peft
import pytest
import reference
import torch
import transformers
from test_training import Run, config, ragged_rows, torch_loss

import jaxtune
from jaxtune import export
from jaxtune import mesh as meshes
from jaxtune.adapt import check_targets
from jaxtune.config import get_default, to_json
from jaxtune.errors import UserError
from jaxtune.hf.base import load_base, open_base
from jaxtune.hf.handover import differences, trained_over
from jaxtune.peft import lora_init
from jaxtune.quant import NF4, Quantised, scheme_of
from jaxtune.results import check_quantised
from jaxtune.tree import flatten

# One kv head, windows shorter than the text; every input a multiple of 64.
SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "head_dim": 32}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    model = reference.randomise(reference.gemma2(**SIZES, num_key_value_heads=2))
    return reference.save(model, tmp_path_factory.mktemp("gemma2"))


def bits(directory, **how):
    """transformers' model over bitsandbytes, in float32: without the packing that its CPU build infers bfloat16 in."""
    if how:
        settings = transformers.BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.float32, **how)
        how = {"quantization_config": settings}
    auto = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager", **how)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.eval()


NF4_BITS = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def dequantised(model):
    """The same model with ordinary linear layers of what bitsandbytes' eight bits stand for: its own product rounds
    activations too."""
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "Linear8bitLt":
            state = module.state_dict()
            w = state["weight"].float() * state["SCB"][:, None] / 127
            plain = torch.nn.Linear(*w.shape[::-1], bias=False)
            plain.weight.data = w
            model.set_submodule(name, plain)
    return model


def test_logits_equal_bitsandbytes(base):
    ids, mask = reference.batch()
    expected = reference.logits(bits(base, **NF4_BITS), ids, mask) * mask[..., None]
    for mesh in (None, meshes.make_mesh(1, 4, 2)):
        logits = jaxtune.load(base, quant="nf4", mesh=mesh).logits(ids, mask)
        reference.close(logits * mask[..., None], expected)
    # As far from the unquantised model as bitsandbytes is.
    assert np.abs(expected - reference.logits(bits(base), ids, mask)).max() > 0.05 * np.abs(expected).max()


@pytest.mark.parametrize("kind", ["nf4", "nf4 with double quantisation", "int8"])
def test_checkpoints_that_are_quantised_already(base, tmp_path, kind):
    """Loaded as they are, scales of scales included; a second quantisation is refused."""
    how = {"load_in_8bit": True} if kind == "int8" else NF4_BITS | {"bnb_4bit_use_double_quant": "double" in kind}
    model = bits(base, **how)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    lm = jaxtune.load(tmp_path)
    assert str(lm.base.quant) == kind
    ids, mask = reference.batch()
    expected = reference.logits(dequantised(model), ids, mask) * mask[..., None]
    reference.close(lm.logits(ids, mask) * mask[..., None], expected)
    assert str(open_base(str(tmp_path), quant=scheme_of(lm.base.quant.kind)).quant) == kind
    with pytest.raises(UserError, match="is quantised already, as"):
        open_base(str(tmp_path), quant=scheme_of("nf4" if kind == "int8" else "int8"))


def test_a_quantised_embedding(base):
    """Rows, and the head that is tied to them, are those of bitsandbytes' Embedding4bit."""
    import bitsandbytes.functional as bnb

    model = bits(base, **NF4_BITS)
    table = model.get_input_embeddings().weight
    packed, state = bnb.quantize_4bit(table.data, quant_type="nf4", blocksize=64)
    table.data = bnb.dequantize_4bit(packed, state)
    ids, mask = reference.batch()
    lm = jaxtune.load(base, quant="nf4", quant_embedding=True)
    assert isinstance(lm.variables["params"]["embed"]["table"], NF4)
    expected = reference.logits(model, ids, mask) * mask[..., None]
    reference.close(lm.logits(ids, mask) * mask[..., None], expected)


def test_twenty_steps_equal_peft_and_bitsandbytes(base, tmp_path):
    """QLoRA in float32 over one base, from one first adapter, on the same ragged batches.

    The base is one whose scales bitsandbytes has rounded: its CPU build rounds them in its own way.
    """
    bits(base, **NF4_BITS, bnb_4bit_use_double_quant=True).save_pretrained(tmp_path / "base")
    model = bits(tmp_path / "base")
    torch.manual_seed(0)
    adapter = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=3, lora_alpha=7)
    model = peft.get_peft_model(model, adapter)
    model.save_pretrained(tmp_path / "first")
    c = config()
    c.optim.update({"weight_decay": 0.1, "max_grad_norm": 0.5, "eps": 1e-6})
    ours = Run(tmp_path / "base", c, init_from=str(tmp_path / "first"))
    optimiser = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=3e-3, weight_decay=0.1, eps=1e-6
    )
    model.train()
    for step in range(20):
        rows = ragged_rows(5, seed=step)
        loss = torch_loss(model, rows)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimiser.step()
        assert ours.step(rows)["loss"] == pytest.approx(float(loss.detach()), rel=1e-3), step


def test_a_mesh_changes_nothing(base):
    """One device or eight, whose shards cut the weights along blocks: the same losses."""
    c = config(init_lora_weights=False)
    rows = ragged_rows(8)
    losses = []
    for sizes in ((1, 1, 1), (1, 4, 2)):
        run = Run(base, c, sizes=sizes, quant=scheme_of("nf4", True))
        losses.append([run.step(rows)["loss"] for _ in range(3)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_no_dequantised_stack_in_the_program(base):
    """Of the compiled step without remat: no array of the stack's shape in a float, and no room for one."""
    rows = ragged_rows(2)
    plain, packed = (Run(base, config(), quant=scheme_of(q), remat="none").compiled(rows) for q in (None, "nf4"))
    layers, width, hidden = 4, SIZES["hidden_size"], SIZES["intermediate_size"]
    stack = re.compile(rf"(f32|bf16|f16)\[{layers},({width},{hidden}|{hidden},{width})\]")
    assert stack.search(plain.as_text())  # that this is how one would be found
    assert not stack.search(packed.as_text())
    saved = plain.memory_analysis().argument_size_in_bytes - packed.memory_analysis().argument_size_in_bytes
    weights = sum(np.prod(s.shape) for s in open_base(str(base)).sites if s.kind == "linear")
    assert saved == pytest.approx(weights * (32 - 4.5) / 8, rel=1e-2)
    more = packed.memory_analysis().temp_size_in_bytes - plain.memory_analysis().temp_size_in_bytes
    assert more < weights // layers * 4  # one layer's


@pytest.mark.parametrize(("double", "expected"), [(False, 4.5), (True, 4 + 8 / 64 + 32 / 64 / 256)])
def test_bits_of_a_weight(base, double, expected):
    mesh = meshes.make_mesh(1, 1, 1, jax.devices()[:1])
    opened = open_base(str(base), quant=scheme_of("nf4", double))
    leaves = flatten(load_base(opened, mesh, lambda path: np.float32), lambda x: isinstance(x, Quantised))
    boxes = [leaf for leaf in leaves.values() if isinstance(leaf, Quantised)]
    assert len(boxes) == 7
    stored = sum(x.nbytes for x in jax.tree.leaves(boxes))
    # Small layers fill the last block of the second level badly, and have an offset each.
    assert stored * 8 / sum(np.prod(b.shape) for b in boxes) == pytest.approx(expected, rel=2e-3 if double else 1e-9)


def test_loftq_is_plain_lora_here(base, tmp_path):
    """A B is the best part of rank r of what NF4 lost, and the base stays as bitsandbytes has it."""
    keys = {"init_lora_weights": "loftq", "r": 5, "lora_alpha": 10.0}
    run = Run(base, config(**keys), quant=scheme_of("nf4"))
    variables = run.adapted.variables(run.adapted.trainable)
    lora = variables["adapters"]["layers"]["mlp"]["up"]["kernel"]
    assert lora.a0 is None
    from safetensors.numpy import load_file

    w = load_file(base / "model.safetensors")["model.layers.2.mlp.up_proj.weight"].T
    lost = w - np.asarray(variables["params"]["layers"]["mlp"]["up"]["kernel"].astype("float32"))[2]
    u, s, v = np.linalg.svd(lost, full_matrices=False)
    product = 2.0 * np.asarray(lora.a[2] @ lora.b[2])
    np.testing.assert_allclose(product, (u[:, :5] * s[:5]) @ v[:5], atol=1e-5)
    written = run.adapted.peft.method.to_config(
        open_base(str(base), quant=scheme_of("nf4")).layout, run.adapted.peft.config, {}
    )
    assert (written["r"], written["init_lora_weights"]) == (5, True)


def section(**keys):
    c = get_default()
    c.peft.update(keys)
    return to_json(c)["peft"]


def test_refusals(base, tmp_path):
    quantised = functools.partial(open_base, str(base))
    with pytest.raises(UserError, match=r"init_lora_weights='pissa'.*`model.quant` is nf4.*loftq"):
        check_targets(section(init_lora_weights="pissa"), quantised(quant=scheme_of("nf4")))
    for kind, rounds in (("int8", 1), ("nf4", 2)):
        with pytest.raises(UserError, match=f"`model.quant` is {kind}, and LoftQ has {rounds} rounds"):
            lora_init.check_base("loftq", rounds, kind)
    plain = to_json(get_default())
    for method, said in (("full", "such weights cannot train"), ("partial", "Set `export.format` to adapter")):
        plain["peft"]["method"] = method
        with pytest.raises(UserError, match=said):
            check_quantised(plain, quantised(quant=scheme_of("nf4")))
    for change, said in (
        ({"quant_method": "gptq", "bits": 4}, "gptq.*bitsandbytes' nf4"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "fp4"),
    ):
        other = json.loads((base / "config.json").read_text()) | {"quantization_config": change}
        (tmp_path / "config.json").write_text(json.dumps(other))
        with pytest.raises(UserError, match=said):
            open_base(str(tmp_path))
    other = json.loads((base / "config.json").read_text()) | {"intermediate_size": 200}
    (tmp_path / "config.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match=r"layers/mlp/down/kernel has 200 inputs.*multiple of 64 \(192 or 256\)"):
        open_base(str(tmp_path), quant=scheme_of("nf4"))
    assert open_base(str(tmp_path), quant=scheme_of("int8")).quant


def test_an_odd_state_is_refused(base, tmp_path):
    """A block size that we do not compute with, a missing state, layers of which only some are quantised."""
    bits(base, **NF4_BITS).save_pretrained(tmp_path)
    path, state = tmp_path / "model.safetensors", "model.layers.1.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"
    tensors = reference.load_file(path)
    values = json.loads(bytes(tensors[state].numpy())) | {"blocksize": 128}
    load = functools.partial(
        load_base, mesh=meshes.make_mesh(1, 1, 1, jax.devices()[:1]), dtype=lambda path: np.float32
    )
    for changed, said in (
        ({state: torch.frombuffer(bytearray(json.dumps(values).encode()), dtype=torch.uint8)}, "blocks of 128"),
        ({state: None}, "is not bitsandbytes' nf4"),
        ({state: None, state.partition(".quant_state")[0]: torch.zeros(192, 128)}, "other layers are"),
    ):
        other = {name: tensor for name, tensor in (tensors | changed).items() if tensor is not None}
        reference.save_file(other, path, metadata={"format": "pt"})
        with pytest.raises(UserError, match=said):
            load(open_base(str(tmp_path)))


def test_merging_says_onto_what(base, tmp_path, capsys):
    """dequantised: transformers gives the adapted model's logits; original: peft's own merge into float weights."""
    model = peft.get_peft_model(
        bits(base), peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=3, init_lora_weights=False)
    )
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "jaxtune.json").write_text(json.dumps({"base": trained_over("x", "nf4", False, False)}))
    words = [str(tmp_path / "adapter"), "--merged", "--base", str(base), "--out"]
    with pytest.raises(UserError, match=r"--onto dequantised .*or --onto original"):
        export.main([*words, str(tmp_path / "out")])
    with pytest.raises(UserError, match=r"--onto dequantised .*or --onto original"):
        jaxtune.load(base, adapter=tmp_path / "adapter", quant="nf4").save_merged(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    ids, mask = reference.batch()
    lm = jaxtune.load(base, adapter=tmp_path / "adapter", quant="nf4")
    expected = {
        "dequantised": lm.logits(ids, mask),
        "original": reference.logits(model.merge_and_unload(), ids, mask),
    }
    for onto, logits in expected.items():
        assert export.main([*words, str(tmp_path / onto), "--onto", onto]) == 0
        merged = reference.logits(bits(tmp_path / onto), ids, mask)
        reference.close(merged * mask[..., None], logits * mask[..., None])
    lm.save_merged(tmp_path / "again", onto="original")
    again = reference.logits(bits(tmp_path / "again"), ids, mask)
    reference.close(again * mask[..., None], merged * mask[..., None], 1e-5)
    with pytest.raises(UserError, match="onto=dequantised is for a quantised base"):
        jaxtune.load(base, adapter=tmp_path / "adapter").save_merged(tmp_path / "out", onto="dequantised")


def test_differences_of_a_hand_over():
    was = trained_over("a", "nf4", True, False)
    assert differences(None, was) == differences(was, was) == []
    (line,) = differences(was, trained_over("a", "nf4", False, False))
    assert line == (
        "its base was quantised (quant=nf4, double_quant), and is quantised (quant=nf4) now. Over the same one it "
        "computes what was trained"
    )
    other, unquantised = differences(was, trained_over("b", None, False, False))
    assert "other weights" in other and "and is not quantised now" in unquantised
    assert trained_over("a", None, True, True) == trained_over("a", None, False, False)
