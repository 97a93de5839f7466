"""Plans: counted FLOPs, bytes against real arrays, predictions against the compiler; what is refused, and said."""

import functools
import importlib.util
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core
from jax.interpreters import partial_eval as pe
from jax.sharding import NamedSharding, PartitionSpec

from jaxtune import adapt, optim, tree
from jaxtune import mesh as meshes
from jaxtune.config import ASSETS, get_default, to_json
from jaxtune.data.batches import collate
from jaxtune.errors import UserError
from jaxtune.hf.base import open_base
from jaxtune.plan import abstract, chips, collectives, command, memory, refresh, search
from jaxtune.plan.check import Speed, judge, lengths, speed_of
from jaxtune.plan.chips import CHIPS, GIB
from jaxtune.plan.compile import Compiled, compile_config, compile_step
from jaxtune.plan.flops import flops, seen
from jaxtune.state import make_state


def config(model, **settings):
    c = get_default()
    c.model.id = str(model)
    c.data.train = "rows.jsonl"
    for name, value in settings.items():
        section, _, key = name.partition("__")
        c[section][key] = value
    return c


@pytest.fixture(scope="session")
def described(tmp_path_factory):
    """described({...}) -> a directory that has this config.json and nothing else."""

    @functools.cache
    def make(text):
        directory = tmp_path_factory.mktemp("described")
        (directory / "config.json").write_text(text)
        return directory

    return lambda **values: make(json.dumps(values))


@pytest.fixture(scope="session")
def two_b(described):
    """Gemma 2 2b: transformers' defaults of the family."""
    return described(model_type="gemma2")


ODD = {
    "model_type": "gemma2",
    "vocab_size": 384,
    "hidden_size": 40,
    "intermediate_size": 72,
    "head_dim": 24,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
    "sliding_window": 12,
    "query_pre_attn_scalar": 24,
}
T5 = {
    "model_type": "t5",
    "vocab_size": 384,
    "d_model": 40,
    "d_ff": 72,
    "d_kv": 24,
    "num_heads": 3,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "dropout_rate": 0.0,
}
LORA = {"peft__r": 8, "peft__target_modules": "all-linear"}


# ---------------------------------------------------------------- FLOPs


def test_gemma_2_2b_by_hand(two_b):
    """26 layers of 77,856,768 weights, a head of 256,000 x 2304, eight heads of 256; adapters of 10,383,360."""
    c = config(two_b, data__max_length=2048, **LORA)
    one = search.plan(c, abstract.open_config(c), CHIPS["v5e"], 8).flops
    layers, head, adapters = 26 * 77_856_768, 256_000 * 2304, 10_383_360
    attention = 26 * 4 * 8 * 256 * (2048 + 1) / 2
    assert one.layers / 2048 == 4 * layers
    assert one.head / 2048 == 4 * head
    assert one.attention / 2048 == 3 * attention
    assert one.adapters / 2048 == 6 * adapters
    assert one.per_token == pytest.approx(11.17e9, rel=1e-3)
    # remat: the layers' forward pass once more, and the scores a third time; on TPUs the logits, too.
    assert one.again / 2048 == 2 * layers + 1.5 * attention + 2 * adapters + 2 * head

    full = config(two_b, data__max_length=2048, peft__method="full")
    one = search.plan(full, abstract.open_config(full), CHIPS["v5e"], 8).flops
    assert one.per_token == 6 * (layers + head) + 3 * attention == pytest.approx(16.34e9, rel=1e-3)


@pytest.mark.parametrize(("length", "window"), [(1, None), (7, None), (7, 3), (7, 7), (7, 99)])
def test_keys_seen(length, window):
    mask = np.tril(np.ones((length, length)))
    if window is not None:
        mask = np.triu(mask, 1 - window)
    assert seen(length, window) == pytest.approx(mask.sum() / length)


def products(jaxpr, times=1):
    """FLOP of every product in a program, loops by their turns."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            inner = np.prod([equation.invars[0].aval.shape[i] for i in contracted])
            total += 2 * times * inner * np.prod(equation.outvars[0].aval.shape)
        turns = equation.params["length"] if equation.primitive.name == "scan" else 1
        for inside in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: isinstance(x, core.Jaxpr | core.ClosedJaxpr)
        ):
            if isinstance(inside, core.ClosedJaxpr | core.Jaxpr):
                total += products(getattr(inside, "jaxpr", inside), times * turns)
    return int(total)


@pytest.mark.parametrize(
    ("model", "method", "remat"),
    [
        *(("odd", "lora", name) for name in ("none", "dots", "attn_out", "full")),
        ("odd", "full", "none"),
        ("odd", "full", "full"),
        ("odd", "p_tuning", "full"),
        ("t5", "lora", "none"),
        ("t5", "full", "full"),
    ],
)
def test_what_is_counted_is_what_the_step_multiplies(described, monkeypatch, model, method, remat):
    """The products of the real step.  Plain attention multiplies what it then masks, and so it is counted here."""
    monkeypatch.setattr("jaxtune.plan.flops.seen", lambda length, window: float(length))
    more = LORA if method == "lora" else {"peft__num_virtual_tokens": 4} if method == "p_tuning" else {}
    lengths = {"data__max_length": 64 - more.get("peft__num_virtual_tokens", 0)}
    lengths |= {"data__max_target_length": 32} if model == "t5" else {}
    settings = {"train__remat": remat, "train__global_batch_size": 2, "peft__method": method, "model__dtype": "float32"}
    c = config(described(**(T5 if model == "t5" else ODD)), **lengths, **settings, **more)
    base = abstract.open_config(c)
    mesh = jax.sharding.AbstractMesh((1,) * len(meshes.AXES), meshes.AXES)
    laid = abstract.lay_out(c, base, mesh)
    program = jax.make_jaxpr(laid.step)(laid.state, laid.frozen, laid.batch).jaxpr
    program, _ = pe.dce_jaxpr(program, [True] * len(program.outvars), instantiate=True)
    one = flops(base, laid.state.trainable, laid.length, remat)
    # Beside them: the prompt's rows are chosen by a product, and its encoder is computed once a step.
    assert products(program) == pytest.approx(2 * one.hardware, rel=0.02 if method == "p_tuning" else 1e-9)


def test_a_batch_is_worth_its_real_tokens(two_b):
    """MFU counts segments by their own lengths; a full row is worth what the plan says of one."""
    c = config(two_b, data__max_length=64, **LORA)
    base = abstract.open_config(c)
    laid = abstract.lay_out(c, base, abstract.abstract_mesh(c, 8))
    speed = speed_of(base, laid.state.trainable, "bfloat16", 64)._replace(peak=1.0)
    whole = {"segment_ids": np.ones((3, 64), np.int32), "weights": np.ones((3, 64), np.float32)}
    one = flops(base, laid.state.trainable, 64)
    assert speed.of(whole) == pytest.approx(3 * one.row, rel=1e-6)
    # Two segments in one row and one in another, the rest padding.
    segments = np.zeros((2, 64), np.int32)
    segments[0, :10], segments[0, 10:40], segments[1, :7] = 1, 2, 1
    assert sorted(lengths(segments)) == [7, 10, 30]
    some = {"segment_ids": segments, "weights": (segments == 2).astype(np.float32)}
    pairs = 26 * sum(n * (n + 1) / 2 for n in (7, 10, 30))
    assert speed.of(some) == pytest.approx(47 * speed.body + 30 * speed.head + pairs * speed.pair, rel=1e-6)
    assert speed._replace(peak=None).of(whole) == 0
    assert isinstance(speed, Speed)


# ---------------------------------------------------------------- Bytes


METHODS = {
    "quantised": {"model__quant": "nf4", "model__double_quant": True, "optim__name": "adamw8bit", **LORA},
    "adalora": {"peft__method": "adalora", "optim__name": "adafactor"},
    "p_tuning": {"peft__method": "p_tuning", "peft__num_virtual_tokens": 3, "optim__name": "lion"},
    "partial": {"peft__method": "partial", "peft__target_modules": ("embed_tokens", "q_proj")},
}


@pytest.mark.parametrize("name", METHODS)
def test_shapes_are_those_of_the_real_arrays(name):
    """Every argument of the step: path, shape, dtype, place and bytes on a device."""
    c = config(ASSETS / "tiny_gemma", mesh__fsdp=2, mesh__tensor=2, mesh__data=2, **METHODS[name])
    mesh = meshes.make_mesh(2, 2, 2)
    base = abstract.open_config(c)
    laid = abstract.lay_out(c, base, mesh)
    how = {"dtype": c.model.dtype, "seed": 0, "total_steps": abstract.STEPS}
    loaded = adapt.adapt(to_json(c)["peft"], base, mesh, **how, encode=lambda text: [0])
    rule = loaded.optimiser(optim.make_optimiser(c.optim, optim.make_schedule(abstract.with_rate(c), abstract.STEPS)))
    state = make_state(rule, loaded.trainable, mesh)

    def facts(leaves):
        return {
            path: (x.shape, x.dtype, x.sharding.shard_shape(x.shape), x.sharding.is_fully_replicated)
            for path, x in tree.flatten(leaves).items()
        }

    assert facts(laid.frozen) == facts(loaded.frozen)
    assert facts(laid.state) == facts(state)
    has, first = memory.held(laid), jax.devices()[0]

    def real(leaves):
        shards = [s for x in jax.tree.leaves(leaves) for s in x.addressable_shards if s.device == first]
        return sum(s.data.nbytes for s in shards)

    assert (has.weights, has.trained, has.optimiser) == tuple(
        map(real, (loaded.frozen, state.trainable, state.opt_state))
    )
    # The same on a mesh of sizes alone.
    assert memory.held(abstract.lay_out(c, base, abstract.abstract_mesh(c, 8))) == has
    batch = collate([], 1, laid.length)
    assert {k: (x.shape[2:], x.dtype) for k, x in laid.batch.items()} == {
        k: (x.shape[1:], x.dtype) for k, x in batch.items()
    }


def test_a_directory_with_a_config_alone_is_enough(two_b):
    c = config(two_b)
    assert [path.name for path in two_b.iterdir()] == ["config.json"]
    assert tree.count(abstract.open_config(c).abstract) == 2_614_341_888


@pytest.mark.parametrize("name", sorted(refresh.stored()))
def test_predictions_are_what_the_compiler_reserves(name):
    """Stored figures; `python -m jaxtune.plan.refresh` makes them anew."""
    case = next(case for case in refresh.GRID if case.name == name)
    found = refresh.stored()[name]
    with refresh.config_of(case) as c:
        one = search.plan(c, abstract.open_config(c), CHIPS[case.chip], case.chips)
    assert found["fits"] == one.fits
    held = one.memory.weights + one.memory.trained + one.memory.optimiser + one.memory.batch
    # Rows and columns are filled up to the tiles of the chip's memory.
    assert held == pytest.approx(found["argument"], rel=0.05)
    assert one.memory.total == pytest.approx(found["total"], rel=0.1)
    assert found["complaints"] == []


# ---------------------------------------------------------------- What fits


def plan_of(two_b, chip="v5e", count=8, **settings):
    c = config(two_b, **{"data__max_length": 2048, "train__global_batch_size": 16, **LORA, **settings})
    return search.plan(c, abstract.open_config(c), CHIPS[chip], count)


def test_less_is_less(two_b):
    """More rows need more, more chips less; recomputing and quantising need less, and recomputing takes longer."""
    totals = [plan_of(two_b, train__global_batch_size=n).memory.total for n in (8, 16, 64)]
    assert totals == sorted(set(totals))
    totals = [plan_of(two_b, count=n, train__global_batch_size=32).memory.total for n in (1, 4, 8, 32)]
    assert totals == sorted(set(totals), reverse=True)
    kept, again = (plan_of(two_b, train__remat=remat) for remat in ("none", "full"))
    assert kept.memory.total > again.memory.total
    assert kept.bound.seconds["compute"] < again.bound.seconds["compute"]
    assert plan_of(two_b, model__quant="nf4").memory.total < again.memory.total
    halves = plan_of(two_b, train__gradient_accumulation_steps=2)
    assert halves.memory.total < again.memory.total
    assert halves.bound.tokens == again.bound.tokens


def test_the_bound_by_hand(two_b):
    """16 rows of 2048 on eight v5e: 11.17 GFLOP a token, 4.40 that are computed again and 1.18 for logits that are made
    twice, over 8 x 197 TFLOP/s."""
    one = plan_of(two_b)
    assert one.bound.binds == "compute"
    assert one.bound.step == pytest.approx(16 * 2048 * 16.749e9 / (8 * 197e12), rel=1e-3)
    assert one.bound.tokens_per_second / 8 == pytest.approx(11_762, rel=1e-3)


def test_the_largest_batch_is_the_largest(two_b):
    c = config(two_b, data__max_length=2048, **LORA)
    base = abstract.open_config(c)
    most = search.largest_batch(c, base, CHIPS["v5e"], 8)
    assert most is not None and most.fits
    rows = most.config.train.global_batch_size
    assert not plan_of(two_b, train__global_batch_size=rows + 8).fits


def test_the_smallest_slice(described):
    big = refresh.MODELS["gemma-2-27b"]
    c = config(described(**big), data__max_length=1024, **LORA)
    base = abstract.open_config(c)
    one = search.smallest_slice(c, base, CHIPS["v5e"])
    assert one is not None and one.fits
    # 27 billion weights of two bytes alone need four chips, and more than weights is needed.
    assert one.chips >= 8
    fewer = [n for n in CHIPS["v5e"].counts() if n < one.chips]
    assert not any(found.fits for n in fewer if (found := search.attempt(c, base, CHIPS["v5e"], n)))
    assert search.smallest_slice(c, base, CHIPS["t4"]) is None


def test_the_search_finds_what_fits_fastest_first(two_b):
    c = config(two_b, data__max_length=2048, **LORA)
    best = search.best(c, abstract.open_config(c), CHIPS["v5e"], 8)
    assert best and all(one.fits for one in best)
    steps = [round(one.bound.step, 3) for one in best]
    assert steps == sorted(steps)
    assert {one.config.train.global_batch_size for one in best} == {c.train.global_batch_size}


# ---------------------------------------------------------------- What is said


def test_a_run_that_cannot_fit_is_refused_with_what_fits(two_b):
    c = config(two_b, data__max_length=2048, train__global_batch_size=16, train__remat="none", **LORA)
    base, said = abstract.open_config(c), []
    one = search.plan(c, base, CHIPS["v5e"], 1)
    with pytest.raises(UserError, match=r"does not fit on 1 v5e") as error:
        judge(c, base, one, int(15.75 * GIB), None, said.append)
    assert "--config.train." in str(error.value) and not said
    # What it names does fit.
    near = search.nearest(c, base, CHIPS["v5e"], 1)
    assert near is not None and near[1].fits
    judge(near[1].config, base, near[1], int(15.75 * GIB), None, said.append)
    assert not said
    judge(c, base, one, one.memory.total, None, said.append)
    assert len(said) == 1 and "may run out of memory" in said[0]


def test_json_is_one_object_and_last(two_b, capsys, tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text("from jaxtune.config import get_default as get_config\n")
    words = [f"--config.model.id={two_b}", "--config.data.train=x.jsonl", "--config.data.max_length=512"]
    code = command.main(["--config", str(recipe), "--chip", "v6e", "--chips", "4", "--json", *words])
    out, err = capsys.readouterr()
    assert code == 0
    facts = json.loads(out.splitlines()[-1])
    assert len(out.splitlines()) == 1 and "The fewest chips" in err
    assert (facts["chip"], facts["chips"], facts["fits"]) == ("v6e", 4, True)
    assert facts["trainable_parameters"] == 26 * 8 * (2304 + 2048 + 2304 + 1024)  # q and v of rank 8
    assert sum(facts["parts"].values()) == facts["hbm_bytes_per_chip"]
    assert 9e9 < facts["flops_per_token"] < 11e9
    assert facts["smallest_slice"].keys() == CHIPS.keys()
    assert facts["nearest_that_fits"] is None and facts["largest_batch"] >= 16


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--chip", "v5"], "Did you mean `v5"),
        (["--chip", "v5e", "--chips", "6"], "slices of: 1, 4, 8"),
        (["--chip", "h100", "--chips", "2", "--compile"], "GPUs compile where they are"),
        (["--chops", "3"], "Unknown argument"),
    ],
)
def test_what_is_refused(words, said, two_b, tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text("from jaxtune.config import get_default as get_config\n")
    model = [f"--config.model.id={two_b}", "--config.data.train=x.jsonl"]
    with pytest.raises(UserError, match=said):
        command.main(["--config", str(recipe), *words, *model])


def test_kinds_of_devices():
    kinds = {
        "TPU v4": "v4",
        "TPU v5 lite": "v5e",
        "TPU v5": "v5p",
        "TPU v5p": "v5p",
        "TPU v6 lite": "v6e",
        "Tesla T4": "t4",
        "NVIDIA A100-SXM4-40GB": "a100-40",
        "NVIDIA A100-SXM4-80GB": "a100",
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA H200": "h200",
    }
    assert {kind: getattr(chips.chip_of_kind(kind), "name", None) for kind in kinds} == kinds
    assert chips.chip_of_kind("cpu") is None


# ---------------------------------------------------------------- The compiler


def test_collectives_are_counted_by_turns():
    """A sum of 4 x 6 floats in each of five turns, and one gather to 16 floats after them."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = NamedSharding(mesh, PartitionSpec("x")), NamedSharding(mesh, PartitionSpec())

    def program(x, y):
        def turn(carry, _):
            summed = jnp.broadcast_to(jnp.sum(x * carry[:1, :1, None], axis=0), (4, 6))
            return jnp.tanh(jax.lax.with_sharding_constraint(summed, whole)), None

        out, _ = jax.lax.scan(turn, jnp.ones((4, 6)), None, length=5)
        return out, y

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32, sharding=split) for s in ((8, 4, 6), (16,))]
    text = jax.jit(program, out_shardings=whole).lower(*shapes).compile().as_text()
    assert text is not None
    assert collectives.count(text) == {
        "all-reduce": {"count": 5, "bytes": 5 * 4 * 6 * 4},
        "all-gather": {"count": 1, "bytes": 16 * 4},
    }


def test_the_real_step_compiles_from_shapes():
    """On the eight devices that are here: arguments as predicted, and no gradient of a frozen weight is summed."""
    c = config(ASSETS / "tiny_gemma", data__max_length=32, model__dtype="float32", train__global_batch_size=8, **LORA)
    base, mesh = abstract.open_config(c), meshes.make_mesh(1, 8, 1)
    laid = abstract.lay_out(c, base, mesh)
    with jax.set_mesh(mesh):
        found = compile_step(laid)
    assert isinstance(found, Compiled)
    has = memory.held(laid)
    assert found.argument == pytest.approx(has.weights + has.trained + has.optimiser + has.batch, rel=0.02)
    frozen = sum(x.size * 4 for path, x in tree.flatten(laid.frozen).items())
    assert 0 < found.collectives["all-reduce"]["bytes"] < frozen / 10
    assert found.complaints == []


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_the_real_step_compiles_for_a_tpu(described):
    c = config(described(**ODD), data__max_length=64, train__global_batch_size=4, **LORA)
    found = compile_config(c, abstract.open_config(c), CHIPS["v5e"], 4)
    assert isinstance(found, Compiled)
    assert 0 < found.temp < GIB and found.complaints == []


def test_loading_needs_weights_and_planning_none(two_b):
    """`weights=False` is about what is asked of the Hub alone: a local directory is read alike."""
    base = open_base(str(two_b), weights=False)
    assert nn.unbox(base.abstract)["embed"]["table"].shape == (256_000, 2304)
