"""Packs and widths: who shares a row of slots, that nobody sees it, and that the cursor stays exact."""

import functools
import hashlib
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from jax.experimental.compilation_cache import compilation_cache

from jaxtune import cadence, train, tree
from jaxtune import mesh as meshes
from jaxtune.adapt import adapt, virtual_tokens
from jaxtune.config import ASSETS, get_default, to_json
from jaxtune.data import buckets, packing
from jaxtune.data.batches import batches, collate, collate_packs, eval_batches, real_tokens, slots
from jaxtune.data.examples import Example
from jaxtune.data.load import Counts, Dataset
from jaxtune.data.seq2seq import Lengths
from jaxtune.data.splits import (
    Splits,
    Stream,
    held_batches,
    lengths_ahead,
    plan_course,
    read_splits,
    train_batches,
)
from jaxtune.errors import UserError
from jaxtune.hf.base import open_base
from jaxtune.loss import batch_loss
from jaxtune.tokenizer import load_tokenizer

CAPACITY = 40


def dataset(n, longest=24, seed=0):
    """Row i begins with token 1000 + i; lengths are random, from 2 to `longest`."""
    rng = np.random.default_rng(seed)
    rows = [np.r_[1000 + i, rng.integers(1, 90, rng.integers(1, longest))].astype(np.int32) for i in range(n)]
    offsets = np.cumsum([0, *map(len, rows)]).astype(np.int64)
    tokens = np.concatenate(rows)
    mask = tokens % 3 == 1
    counts = Counts(n, n, 0, 0, 0, len(tokens), int(mask.sum()), int(np.diff(offsets).max()), {})
    return Dataset("d", np.arange(1, n + 1), offsets, tokens, mask, counts, "")


def rows_of(batch):
    """[packs, rows]: the dataset's rows, by their first tokens."""
    return [(tokens[tokens >= 1000] - 1000).tolist() for tokens in batch["tokens"]]


def flat(found):
    return [row for batch, _ in found for rows in rows_of(batch) for row in rows]


@pytest.fixture
def small_windows(monkeypatch):
    monkeypatch.setattr(packing, "WINDOW", 9)


# ---------------------------------------------------------------- Packs


def test_best_fit_from_the_longest_down():
    # 7; 6 + 4; then 3 to the 7, not beside 6 + 4; 2 opens a pack.  Packs are in the order of their first rows.
    assert packing.pack([3, 7, 4, 2, 6], 10) == [[0, 1], [2, 4], [3]]
    # 5 goes to the 5 that is left (10 - 5), not to the 6 (10 - 4).
    assert packing.pack([4, 5, 5], 10) == [[0], [1, 2]]
    assert packing.pack([], 10) == []
    with pytest.raises(ValueError, match="11 tokens does not fit in a pack of 10"):
        packing.pack([1, 11], 10)
    lengths = np.random.default_rng(0).integers(1, 40, 500).tolist()
    packs = packing.pack(lengths, CAPACITY)
    assert sorted(itertools.chain(*packs)) == list(range(500))
    assert max(sum(lengths[i] for i in pack) for pack in packs) <= CAPACITY
    assert [pack[0] for pack in packs] == sorted(pack[0] for pack in packs)
    # Best-fit decreasing is never worse than 11/9 of the best, and needs no more than what is half full.
    assert len(packs) <= 11 / 9 * -(-sum(lengths) // CAPACITY) + 4


def test_an_epoch_is_permuted_within_its_windows(small_windows):
    data = dataset(31)
    for shuffle in (False, True):
        packs = packing.packing_of(data, CAPACITY, seed=3, shuffle=shuffle)
        epochs = [packing.packs_of(packs, epoch) for epoch in range(3)]
        for epoch, (rows, starts) in enumerate(epochs):
            order = packing.row_order(31, 3, epoch) if shuffle else np.arange(31)
            for first in range(0, 31, 9):
                assert sorted(rows[first : first + 9]) == sorted(order[first : first + 9])
                assert first in starts  # a pack begins with each window
            sums = np.add.reduceat(packs.lengths[rows], starts[:-1])
            assert sums.max() <= CAPACITY and starts[-1] == 31 and packing.pack_count(packs, epoch) == len(sums)
        assert (epochs[0].rows.tolist() == epochs[1].rows.tolist()) == (not shuffle)


def test_packs_are_fixed_for_ever():
    """Runs resume under other versions."""
    lengths = np.random.default_rng(7).integers(1, 300, 3000)
    rows, starts = packing.packs_of(packing.Packing(lengths, 512, 1, True), 2)
    digest = hashlib.sha256(rows.astype("<i8").tobytes() + starts.astype("<i8").tobytes()).hexdigest()
    assert digest == "2d052e01d2ce08e40c9172446adac4ab2c1f989373ff95ece1db31f91b4f692d"


def test_real_rows_fill_the_slots(shared):
    """Lengths of real instructions, in bytes of which a token has about four: 95 % and more, of 37 % when padded."""
    lines = (shared / "persian_slimorca" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    turns = ["".join(turn["content"] for turn in json.loads(line)["messages"]) for line in lines]
    lengths = np.array([len(text.encode()) // 4 + 8 for text in turns])
    lengths = lengths[lengths <= 2048]
    packs = packing.Packing(lengths, 2048, 0, True)
    filled = lengths.sum() / (packing.pack_count(packs, 0) * 2048)
    assert filled >= 0.95 and lengths.mean() / lengths.max() < 0.5
    assert f"{filled:.0%} of them filled" in packing.report(packs, 8)[0]


def test_what_does_not_pack_is_said():
    lines = packing.report(packing.Packing(np.array([30, 30, 31, 29]), 40, 0, False), 8)
    assert lines[0] == "packed: 4 rows in 4 rows of 40 slots, 75% of them filled"
    assert lines[1].startswith("warning: padded to the longest row they would have 4 rows of 32 slots. Raise")
    assert lines[2].startswith("warning: a step takes 8 of them") and len(lines) == 3


# ---------------------------------------------------------------- Batches of packs


def test_no_target_reaches_over_a_border():
    data = dataset(3, longest=9)
    examples = [data.example(i) for i in range(3)]
    batch = collate_packs([examples[:2], examples[2:]], 3, 24)
    assert not any(batch[name][2].any() for name in batch)
    for row, of in ((0, examples[:2]), (1, examples[2:])):
        start = 0
        for segment, pair in enumerate(of, 1):
            alone = collate([pair], 1, 24)
            n = len(pair[0])
            for name in ("tokens", "targets", "positions", "weights"):
                assert batch[name][row, start : start + n].tolist() == alone[name][0, :n].tolist(), name
            assert (batch["segment_ids"][row, start : start + n] == segment).all()
            assert batch["weights"][row, start + n - 1] == 0
            start += n
        assert not batch["segment_ids"][row, start:].any()
    assert real_tokens(batch) == data.offsets[-1] and slots(batch) == 3 * 24
    with pytest.raises(ValueError, match="do not fit"):
        collate_packs([examples], 1, 8)


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_stop_anywhere_loses_and_repeats_nothing(small_windows, shuffle):
    """At each batch of a run over three epochs, with other batch sizes and process counts behind the stop."""
    data = dataset(31)
    packs = packing.packing_of(data, CAPACITY, seed=5, shuffle=shuffle)
    run = functools.partial(packing.packed_batches, data, packs, stop_row=80)
    whole = list(run(batch_size=4, start_row=0))
    expected = [row for epoch in range(3) for row in packing.packs_of(packs, epoch).rows.tolist()][:80]
    assert flat(whole) == expected and whole[-1][1] == 80
    assert len(whole) == -(-packing.packs_until(packs, 80) // 4)
    for done, (_, cursor) in enumerate(whole, 1):
        rest = list(run(batch_size=4, start_row=cursor))
        assert len(rest) == len(whole) - done
        for (mine, at), (other, there) in zip(rest, whole[done:], strict=True):
            assert at == there and all(np.array_equal(mine[name], other[name]) for name in other)
        assert flat(run(batch_size=6, start_row=cursor)) == expected[cursor:]
    parts = [list(run(batch_size=4, start_row=0, process_index=i, process_count=2)) for i in range(2)]
    for i, (batch, cursor) in enumerate(whole):
        assert all(part[i][1] == cursor for part in parts)
        for name in batch:
            assert np.array_equal(np.concatenate([part[i][0][name] for part in parts]), batch[name])
    with pytest.raises(UserError, match="cannot be shared by 3 processes"):
        next(run(batch_size=4, start_row=0, process_count=3))


def test_a_stop_inside_a_pack(small_windows):
    """`train.epochs` may end there; going on with more of them loses nothing."""
    data = dataset(31)
    packs = packing.packing_of(data, CAPACITY, seed=5, shuffle=True)
    starts = set(packing.packs_of(packs, 0).starts.tolist())
    inside = next(row for row in range(31) if row not in starts)
    first = list(packing.packed_batches(data, packs, batch_size=4, start_row=0, stop_row=inside))
    rest = list(packing.packed_batches(data, packs, batch_size=4, start_row=inside, stop_row=62))
    assert first[-1][1] == inside
    assert flat(first) + flat(rest) == np.r_[packing.packs_of(packs, 0).rows, packing.packs_of(packs, 1).rows].tolist()


def test_a_stream_has_the_packs_of_the_same_rows(small_windows):
    data = dataset(31)
    examples = [Example(i + 1, *data.example(i), False, False, True) for i in range(31)]
    packs = packing.packing_of(data, CAPACITY)
    whole = list(packing.packed_batches(data, packs, batch_size=4, start_row=0, stop_row=31 * 3))

    def streamed(cursor, **share):
        opened = packing.packed_stream(lambda: iter(examples), CAPACITY, batch_size=4, start_row=cursor, **share)
        return list(itertools.islice(opened, 5))

    for start in range(5):
        cursor = whole[start - 1][1] if start else 0
        for (mine, at), (other, there) in zip(streamed(cursor), whole[start:], strict=False):
            assert at == there and all(np.array_equal(mine[name], other[name]) for name in other)
    half = streamed(whole[1][1], process_index=1, process_count=2)
    assert rows_of(half[0][0]) == rows_of(whole[2][0])[2:]


# ---------------------------------------------------------------- How long a run is


def settings(**changes):
    c = get_default()
    for path, value in changes.items():
        section, key = path.split("__")
        c[section][key] = value
    return c


@pytest.mark.parametrize("epochs", [0.3, 1.0, 2.6])
def test_totals_are_known_beforehand(small_windows, epochs):
    data = dataset(31)
    c = settings(data__packing=True, train__epochs=epochs, train__global_batch_size=4, train__seed=2)
    said = []
    course = plan_course(c.data, c.train, Splits(data, None, CAPACITY), said.append)
    assert said[0].startswith("packed: 31 rows in")
    order = {"seed": 2, "shuffle": True, "packed": course.packing, "length": CAPACITY}
    given = list(train_batches(data, **order, batch_size=4, start_row=0, stop_row=course.stop_row))
    assert len(given) == course.steps and given[-1][1] == course.stop_row == int(np.ceil(31 * epochs))
    # The step that completes an epoch is the first behind whose batch the cursor has passed it.
    saves = cadence.cadence(settings(train__save_unit="epoch").train, "save", data, course.epochs_done)
    ends = [n for n, (_, at) in enumerate(given, 1) if at // 31 > (given[n - 2][1] // 31 if n > 1 else 0)]
    if epochs != 0.3:  # the last batch may be cut inside a pack of the next epoch, but is past the one before
        assert [n for n in range(1, course.steps + 1) if saves(n)] == ends
    c.train.steps = 7
    course = plan_course(c.data, c.train, Splits(data, None, CAPACITY))
    assert (course.steps, course.stop_row) == (7, None)
    stream = Stream("s", lambda: iter(()), "")
    assert plan_course(c.data, c.train, Splits(stream, None, CAPACITY)).steps == 7
    c.train.steps = None
    with pytest.raises(UserError, match="nobody knows how long an epoch is"):
        plan_course(c.data, c.train, Splits(stream, None, CAPACITY))


def test_evaluation_has_every_row_once_packed_or_not():
    data = dataset(31)
    how = {"batch_size": 4, "length": CAPACITY}
    for widths, packed in (((), True), ((32,), False), ((), False)):
        found = list(held_batches(data, **how, widths=widths, packed=packed))
        rows = [row for batch in found for rows in rows_of(batch) for row in rows]
        assert sorted(rows) == list(range(31))
        assert sum(batch["weights"].sum() for batch in found) == sum(data.example(i)[1][1:].sum() for i in range(31))
        assert (len(found) < 8) == packed


def test_an_encoder_is_refused():
    c = settings(data__packing=True).data
    with pytest.raises(UserError, match="this model has an encoder"):
        read_splits(c, load_tokenizer(ASSETS / "tiny_gemma"), print, start_id=0)


def test_torch_gpu_refuses_packs():
    settings_of_torch = pytest.importorskip("torch_gpu.settings")
    with pytest.raises(UserError, match=r"`data\.packing` is true: transformers keeps the rows of a pack apart"):
        settings_of_torch.check(to_json(settings(data__packing=True)))


# ---------------------------------------------------------------- Widths


def test_widths_are_the_best_there_are(monkeypatch):
    monkeypatch.setattr(buckets, "WORTH", 0.0)
    rng = np.random.default_rng(1)
    for _ in range(60):
        need = rng.integers(1, 300, rng.integers(1, 60))
        size, most = int(rng.integers(1, 4)), int(rng.integers(1, 5))
        whole = [-(-int(max(need[i : i + size])) // 32) * 32 for i in range(0, len(need), size)]
        sizes = sorted(set(whole))

        def cost(widths, whole=whole):
            return sum(min(w for w in widths if w >= x) for x in whole)

        best = min(cost((*some, sizes[-1])) for k in range(most) for some in itertools.combinations(sizes[:-1], k))
        found = buckets.choose(need, size, most)
        assert len(found) <= most and list(found) == sorted(found) and cost(found) == best


def test_a_width_that_saves_little_is_left_out():
    need = np.array([320] * 90 + [250] * 9 + [60])
    assert buckets.choose(need, 1, 4) == (320,)  # 2 and 1 % of the slots
    need = np.array([320] * 50 + [250] * 9 + [60] * 41)
    assert buckets.choose(need, 1, 4) == (64, 320)


def test_a_batch_is_as_wide_as_it_needs():
    """The order of rows stays; all processes take the width of the whole batch; what is compiled is what comes."""
    data = dataset(50, longest=90)
    c = settings(train__global_batch_size=4, train__epochs=1.5)
    splits = Splits(data, None, 96)
    course = plan_course(c.data, c.train, splits)
    assert 1 < len(course.widths) <= 4 and course.widths[-1] == 96
    how = {"seed": 0, "shuffle": True, "batch_size": 4, "start_row": 0, "stop_row": course.stop_row, "length": 96}
    plain, narrow = (list(train_batches(data, **how, widths=widths)) for widths in ((), course.widths))
    shapes = set()
    for (wide, at), (batch, there) in zip(plain, narrow, strict=True):
        width = batch["tokens"].shape[1]
        shapes.add(width)
        longest = int((wide["segment_ids"] > 0).sum(axis=1).max())
        assert at == there and width == min(w for w in course.widths if w >= longest)
        for name in batch:
            assert np.array_equal(batch[name], wide[name][:, :width]) and not wide[name][:, width:].any()
    order = {"batch_size": 4, "seed": 0, "shuffle": True}
    assert set(lengths_ahead(splits, course, **order, start_row=0)) == shapes and len(shapes) > 1
    last = {narrow[-1][0]["tokens"].shape[1]}
    assert lengths_ahead(splits, course, **order, start_row=narrow[-2][1]) == [] and last <= shapes
    parts = [list(batches(data, **how, widths=course.widths, process_index=i, process_count=2)) for i in range(2)]
    for i, (batch, _) in enumerate(narrow):
        for name in batch:
            assert np.array_equal(np.concatenate([part[i][0][name] for part in parts]), batch[name])
    c.data.length_buckets = 1
    assert plan_course(c.data, c.train, splits).widths == ()
    assert plan_course(settings(train__steps=3).data, c.train, splits).widths == course.widths


def test_widths_of_a_stream_and_of_an_encoder():
    assert buckets.evenly(1024, 4) == (256, 512, 768, 1024)
    assert buckets.evenly(96, 4) == (32, 64, 96)
    assert buckets.evenly(Lengths(64, 32, 0), 4) == (32, 64)
    rows = [np.arange(1, n + 1) for n in (70, 20, 40, 9)]
    data = Dataset(
        "d",
        np.arange(1, 5),
        np.cumsum([0, *map(len, rows)]),
        np.concatenate(rows).astype(np.int32),
        np.concatenate([np.arange(len(row)) >= len(row) - 5 for row in rows]),
        Counts(4, 4, 0, 0, 0, 139, 20, 65, {}),
        "",
    )
    length = Lengths(96, 32, 0)
    assert buckets.needs(data, length).tolist() == [65, 15, 35, 4]
    found = list(eval_batches(data, 2, length, widths=(32, 64)))
    assert [batch["source_tokens"].shape for batch in found] == [(2, 96), (2, 32)]
    assert all(batch["tokens"].shape == (2, 32) for batch in found)
    assert [int(batch["source_tokens"].max()) for batch in found] == [65, 15]


# ---------------------------------------------------------------- The model sees no difference

CASES = {
    "lora": ("gemma2_gelu", {"method": "lora", "target_modules": "all-linear", "r": 3}),
    "lora_llama": ("llama", {"method": "lora", "target_modules": "all-linear", "r": 3}),
    "prompt": ("gemma2_gelu", {"method": "prompt_tuning", "num_virtual_tokens": 4}),
    "p_tuning": ("llama", {"method": "p_tuning", "num_virtual_tokens": 4, "encoder_hidden_size": 7}),
    "multitask": ("gemma2_gelu", {"method": "multitask_prompt_tuning", "num_virtual_tokens": 3, "num_tasks": 3}),
    "prefix": ("gemma2_gelu", {"method": "prefix_tuning", "num_virtual_tokens": 3}),
}


@pytest.mark.parametrize("case", CASES)
def test_packed_loss_and_gradients_are_those_of_rows(checkpoint, case):
    """One kv head, windows of 5 tokens in rows of up to 26, virtual tokens before each row, packs that end early."""
    name, keys = CASES[case]
    base = open_base(str(checkpoint(name)[1]))
    mesh = meshes.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        section = {"init_from": None} | keys
        how = {"dtype": "float32", "seed": 0, "total_steps": 9, "encode": lambda text: [3]}
        adapted = adapt(section, base, mesh, **how)
    virtual = virtual_tokens(section, base)
    rng = np.random.default_rng(4)
    # Adapters that start as nothing would hide half of the gradients.
    trainable = {
        path: value + 0.1 * jnp.asarray(rng.standard_normal(value.shape), value.dtype)
        for path, value in adapted.trainable.items()
    }
    rows = []
    for i in range(11):
        own = virtual.ids(i % 3 if virtual.tasks else 0)
        tokens = np.concatenate([own, rng.integers(3, 90, rng.integers(5, 27))]).astype(np.int32)
        rows.append((tokens, np.arange(len(tokens)) >= rng.integers(len(own) + 1, len(tokens))))
    packs = packing.pack([len(tokens) for tokens, _ in rows], 56)
    assert max(map(len, packs)) > 2 and len(packs) < 8
    padded = collate(rows, 11, 56)
    packed = collate_packs([[rows[i] for i in pack] for pack in packs], 11, 56)
    assert packed["weights"].sum() == padded["weights"].sum() > 40

    @jax.jit
    def measure(trainable, batch):
        def loss(trainable):
            return batch_loss(base.model, tree.unflatten(adapted.structure, adapted.frozen | trainable), batch)

        return jax.value_and_grad(loss)(trainable)

    with jax.set_mesh(mesh):
        (expected, theirs), (got, ours) = (measure(trainable, batch) for batch in (padded, packed))
        mixed = measure(trainable, packed | {"segment_ids": np.minimum(packed["segment_ids"], 1)})[0]
    assert got == pytest.approx(float(expected), rel=1e-6)
    assert abs(float(mixed - expected)) > 1e-4 * float(expected)  # that rows do not see each other matters
    assert ours.keys() == theirs.keys()
    for path, gradient in theirs.items():
        largest = float(jnp.abs(gradient).max())
        assert largest > 0, path
        np.testing.assert_allclose(ours[path], gradient, rtol=1e-4, atol=2e-6 * largest, err_msg=path)


# ---------------------------------------------------------------- Runs


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tiny_run.make(tmp_path_factory.mktemp("packing"))


@pytest.fixture(scope="module")
def compiled_once(place):
    """Whatever these runs compile, they compile once."""
    jax.config.update("jax_compilation_cache_dir", str(place.root / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    yield
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1)
    compilation_cache.reset_cache()


PACKED = ["data.packing=True", "data.max_length=128"]
KINDS = {"packed": PACKED, "packed_stream": [*PACKED, "data.streaming=True"], "widths": []}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("compiled_once")
def test_a_run_in_two_parts_ends_in_the_same_bits(place, tmp_path, caplog, kind):
    """With dropout; the packed ones over the end of an epoch.  No step after the first waits for a compiler."""
    common = ["optim.schedule=constant", "optim.warmup_steps=0", "train.gradient_accumulation_steps=1"]
    common += ["data.eval=none", "train.eval_every=0", "logging.tensorboard=False", *KINDS[kind]]

    def run(workdir, steps):
        assert train.main(tiny_run.arguments(place, tmp_path / workdir, f"train.steps={steps}", *common)) == 0
        lines = [line for line in tiny_run.metrics(tmp_path / workdir) if "loss" in line]
        return [{k: v for k, v in line.items() if k not in tiny_run.TIMED} for line in lines]

    run("parts", 2)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        whole = run("whole", 4)
    compiled = [
        r.getMessage() for r in caplog.records if "Finished XLA compilation of jit(train_step)" in r.getMessage()
    ]
    assert run("parts", 4) == whole
    first, second = ((tmp_path / w / "adapter" / "adapter_model.safetensors").read_bytes() for w in ("parts", "whole"))
    assert first == second
    # 8 rows of 32 slots, of 64 or of 128.
    shapes = {round(line["tokens"] / line["fill"]) for line in whole}
    assert shapes == ({256, 512} if kind == "widths" else {1024}) and len(compiled) == len(shapes)
    if kind != "widths":
        assert whole[-1]["rows"] > 60 and np.mean([line["fill"] for line in whole]) > 0.85
