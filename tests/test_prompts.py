"""Prompts and prefixes, held against the installed peft: logits, files, generation, encoders, training, refusals."""

import dataclasses
import functools
import json
import shutil
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import reference
import tiny_run
import torch
import transformers
from jax.experimental.compilation_cache import compilation_cache
from safetensors.numpy import load_file, save_file

import jaxtune
from jaxtune import mesh as meshes
from jaxtune import optim, train, tree
from jaxtune.adapt import adapt, load_first, virtual_tokens
from jaxtune.config import ASSETS, get_default
from jaxtune.data.batches import collate, fit_length
from jaxtune.data.load import load_dataset, load_prompts
from jaxtune.data.virtual import Virtual, by_column
from jaxtune.errors import DataError, MissingInputError, UserError
from jaxtune.generate import generate
from jaxtune.hf.base import describe, open_base
from jaxtune.peft import METHODS, p_tuning
from jaxtune.peft.keys import BOOKKEEPING
from jaxtune.peft.method import Layout, Site, Start
from jaxtune.state import make_state
from jaxtune.step import train_step
from jaxtune.tokenizer import load_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # peft's own

CLASSES = {
    "prompt_tuning": peft.PromptTuningConfig,
    "p_tuning": peft.PromptEncoderConfig,
    "prefix_tuning": peft.PrefixTuningConfig,
    "multitask_prompt_tuning": peft.MultitaskPromptTuningConfig,
}

# (model, method, keys).  Windows are 5 (Gemma 2) and 4 (Gemma 3): shorter than the texts, and than some prompts.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "prompt_gemma": ("gemma", "prompt_tuning", {}),
    "prompt_gemma2": ("gemma2", "prompt_tuning", {"modules_to_save": ["o_proj", "lm_head"]}),
    "prompt_gemma3": ("gemma3", "prompt_tuning", {"num_virtual_tokens": 9}),
    "mlp_gemma2": ("gemma2", "p_tuning", {"encoder_hidden_size": 11}),
    "lstm_gemma3": ("gemma3", "p_tuning", {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 7}),
    "multitask_gemma2": ("gemma2", "multitask_prompt_tuning", {"num_tasks": 4, "num_ranks": 2}),
    "multitask_gemma3": ("gemma3", "multitask_prompt_tuning", {"num_tasks": 3}),
    "prefix_gemma2": ("gemma2", "prefix_tuning", {"num_virtual_tokens": 3, "modules_to_save": ["lm_head"]}),
    "prefix_gemma3": ("gemma3", "prefix_tuning", {"num_virtual_tokens": 7}),
    "projection_gemma2": ("gemma2", "prefix_tuning", {"prefix_projection": True, "encoder_hidden_size": 6}),
}
TASKS = [2, 0, 1]


def peft_config(case, **keys):
    _, method, own = CASES[case]
    return CLASSES[method](task_type="CAUSAL_LM", **{"num_virtual_tokens": 5} | own | keys)


@pytest.fixture(scope="module")
def adapted(checkpoint, tmp_path_factory):
    """case -> (peft model, checkpoint directory, adapter directory), made once."""
    made = {}

    def get(case):
        if case not in made:
            _, directory = checkpoint(CASES[case][0])
            base = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
            adapter = tmp_path_factory.mktemp(case)
            made[case] = reference.adapt(base, peft_config(case), adapter), directory, adapter
        return made[case]

    return get


def task_of(case, i):
    return TASKS[i] if "multitask" in case else None


def unpadded(case, model, ids, mask):
    """peft's logits of each row by itself, without those of virtual tokens; 0 where padding."""
    out = np.zeros((*ids.shape, 97), np.float32)
    for i, row in enumerate(ids):
        task = {} if task_of(case, i) is None else {"task_ids": torch.tensor([task_of(case, i)])}
        real = row[mask[i] > 0]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor(real[None]), **task).logits[0].numpy()
        out[i, mask[i] > 0] = logits[-len(real) :]
    return out


def ours(case, lm, ids, mask):
    return lm.logits(ids, mask, task_id=TASKS if "multitask" in case else None) * (mask[..., None] > 0)


@pytest.mark.parametrize("case", list(CASES))
def test_import_and_export_equal_peft(adapted, tmp_path, case):
    """Rows padded on the left, on the right and not at all have peft's logits of each row without padding."""
    model, directory, adapter = adapted(case)
    ids, mask = reference.batch()
    expected = unpadded(case, model, ids, mask)
    assert np.abs(expected - jaxtune.load(directory).logits(ids, mask) * (mask[..., None] > 0)).max() > 1e-2

    lm = jaxtune.load(directory, adapter=adapter)
    reference.close(ours(case, lm, ids, mask), expected)

    lm.save_adapter(tmp_path / "out")
    tensors, theirs = (load_file(d / "adapter_model.safetensors") for d in (tmp_path / "out", adapter))
    assert tensors.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(tensors[name], value, err_msg=name)
    written, config = (json.loads((d / "adapter_config.json").read_text()) for d in (tmp_path / "out", adapter))
    assert {k: v for k, v in config.items() if k not in BOOKKEEPING} == {
        k: v for k, v in written.items() if k not in BOOKKEEPING
    }
    reference.close(unpadded(case, reference.with_adapter(directory, tmp_path / "out"), ids, mask), expected, 1e-6)


GENERATED = ("prompt_gemma2", "prompt_gemma3", "lstm_gemma3", "multitask_gemma3", "prefix_gemma2", "prefix_gemma3")


@pytest.mark.parametrize("case", GENERATED)
def test_generation_equals_peft(adapted, case):
    """Greedy answers, beyond the windows, to prompts of different lengths side by side: peft's of each by itself; and
    what the model says without a cache."""
    model, directory, adapter = adapted(case)
    lm = jaxtune.load(directory, adapter=adapter)
    rng = np.random.default_rng(3)
    texts = [rng.integers(10, 97, n).tolist() for n in (3, 11, 7)]
    tasks = [task_of(case, i) or 0 for i in range(3)]
    prompts = [lm.virtual.ids(task).tolist() + text for task, text in zip(tasks, texts, strict=True)]
    answers = generate(lm.base.model, lm.variables, prompts, max_new_tokens=12, stop_ids=())
    for i, (text, answer) in enumerate(zip(texts, answers, strict=True)):
        task = {} if task_of(case, i) is None else {"task_ids": torch.tensor([task_of(case, i)])}
        how = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        with torch.no_grad():
            theirs = model.generate(input_ids=torch.tensor([text]), **how, **task)[0].tolist()
        assert answer == theirs[-12:]
    ids, mask = np.zeros((2, 3, 23), np.int32)
    for i, (text, answer) in enumerate(zip(texts, answers, strict=True)):
        row = text + answer
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    said = ours(case, lm, ids, mask).argmax(-1)
    for i, (text, answer) in enumerate(zip(texts, answers, strict=True)):
        assert said[i, len(text) - 1 :][: len(answer)].tolist() == answer


def copied(state, dropout=0.0):
    """A peft `PromptEncoder`'s weights as ours."""
    state = {name: jnp.array(value.detach().numpy()) for name, value in state.items()}

    def affine(name):
        return p_tuning.Affine(state[f"{name}.weight"].T, state[f"{name}.bias"])

    def cell(end):
        pairs = [(state[f"lstm_head.weight_{of}_{end}"].T, state[f"lstm_head.bias_{of}_{end}"]) for of in ("ih", "hh")]
        return p_tuning.Cell(*(p_tuning.Affine(*pair) for pair in pairs))

    layers = [k for k in range(9) if f"lstm_head.weight_ih_l{k}" in state]
    lstm = tuple((cell(f"l{k}"), cell(f"l{k}_reverse")) for k in layers)
    head = tuple(affine(f"mlp_head.{k}") for k in (0, 2, 4) if f"mlp_head.{k}.weight" in state)
    return p_tuning.Encoder(state["embedding.weight"], lstm, head, dropout, 1.0)


SIZES = {"token_dim": 48, "num_attention_heads": 4, "num_layers": 4, "num_transformer_submodules": 1}
EMBEDDING = Site("embed/table", ("model.embed_tokens",), (97, 48), ("vocab", "embed"), "embedding")
LAYOUT = Layout("gemma2", (EMBEDDING,), True, 48**0.5, 97, 48, 4, 4, 2, 20)


@pytest.mark.parametrize(
    "keys",
    [
        {"encoder_hidden_size": 11},
        {"encoder_hidden_size": 7, "encoder_reparameterization_type": "LSTM"},
        {"encoder_hidden_size": 5, "encoder_reparameterization_type": "LSTM", "encoder_num_layers": 3},
    ],
)
def test_encoder_equals_peft(keys):
    torch.manual_seed(0)
    theirs = peft.PromptEncoder(peft.PromptEncoderConfig(num_virtual_tokens=6, **SIZES, **keys))
    encoder = copied(theirs.state_dict())
    expected = theirs(torch.arange(6)[None])[0].detach().numpy()
    rows = jax.jit(lambda encoder, key=None: encoder.rows(key))
    reference.close(np.asarray(rows(encoder)), expected, 1e-5)
    reference.close(np.asarray(encoder.folded().rows()), expected, 1e-5)
    # Dropout is between the layers of an LSTM, in training alone.
    noisy = rows(encoder.replace(dropout=0.5), jax.random.key(0))
    assert np.allclose(noisy, expected, atol=1e-5) == (not encoder.lstm)


def fresh(method, start=None, layout=LAYOUT, **keys):
    module = METHODS[method]
    config = module.Config(**{"num_virtual_tokens": 5} | keys)
    return nn.unbox(module.init(jax.random.key(0), layout, config, start or Start({})))


def spread(x):
    return np.std(x), np.abs(x).max()


@pytest.mark.parametrize(
    ("method", "keys"),
    [
        ("prompt_tuning", {}),
        ("p_tuning", {"encoder_hidden_size": 64}),
        ("p_tuning", {"encoder_hidden_size": 40, "encoder_reparameterization_type": "LSTM"}),
        ("multitask_prompt_tuning", {"num_tasks": 6, "num_ranks": 4}),
        ("prefix_tuning", {}),
        ("prefix_tuning", {"prefix_projection": True, "encoder_hidden_size": 64}),
        ("prefix_tuning", {"prefix_projection": True, "encoder_hidden_size": 64, "init_weights": "zero"}),
        ("prefix_tuning", {"init_weights": "zero"}),
    ],
)
def test_initial_distributions_are_pefts(method, keys):
    """The same leaves as peft's module, each with its spread and its bound."""
    torch.manual_seed(0)
    sizes = SIZES | ({"token_dim": 40, "num_attention_heads": 2} if method == "prefix_tuning" else {})
    config = CLASSES[method](num_virtual_tokens=50, **sizes, **keys)
    modules = {"prefix_tuning": peft.PrefixEncoder, "p_tuning": peft.PromptEncoder}
    from peft.tuners.multitask_prompt_tuning import MultitaskPromptEmbedding

    modules |= {"multitask_prompt_tuning": MultitaskPromptEmbedding, "prompt_tuning": peft.PromptEmbedding}
    words = () if method in ("prefix_tuning", "p_tuning") else (torch.nn.Embedding(97, 48),)
    theirs = [p.detach().numpy() for p in modules[method](config, *words).parameters()]
    (adapter,) = fresh(method, num_virtual_tokens=50, **keys).values()
    mine = [np.asarray(leaf) for leaf in jax.tree.leaves(adapter)]
    described = [sorted((sorted(x.shape), *spread(x)) for x in side) for side in (mine, theirs)]
    assert len(mine) == len(theirs) and sum(x.size for x in mine) == sum(x.size for x in theirs)
    for (shape, deviation, bound), (their_shape, their_deviation, their_bound) in zip(*described, strict=True):
        assert shape == their_shape
        size = int(np.prod(shape))
        np.testing.assert_allclose(deviation, their_deviation, rtol=5 / size**0.5)
        np.testing.assert_allclose(bound, their_bound, rtol=0.25)
    again = jax.tree.leaves(fresh(method, num_virtual_tokens=50, **keys))
    assert all(np.array_equal(a, b) for a, b in zip(mine, again, strict=True))


def test_prompts_start_from_words(checkpoint):
    """A text's tokens, repeated and cut, or random ones: the rows that peft takes, times √D; in Gemma 2's old
    convention ("pre") without it."""
    model, _ = checkpoint("gemma2")
    words = model.get_input_embeddings()
    start = Start({"embed/table": jnp.asarray(words.weight.detach().numpy())}, lambda text: [2, *map(ord, text)])
    ids = torch.tensor([2, 65, 66, 2, 65])
    expected = words(ids).detach().numpy()
    for method in ("prompt_tuning", "multitask_prompt_tuning"):
        keys = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "AB"}
        tensors = fresh(method, start, **keys)["prompt"].to_peft()
        np.testing.assert_allclose(tensors["prompt_embeddings"], expected, rtol=1e-6)
    old = fresh("prompt_tuning", start, **keys, soft_prompt_scale="pre")["prompt"]
    np.testing.assert_allclose(old.value, words.weight.detach().numpy()[ids], rtol=1e-6)
    assert old.scale == 48**0.5
    drawn = fresh("prompt_tuning", start, prompt_tuning_init="SAMPLE_VOCAB", num_virtual_tokens=40)["prompt"].value
    distance = np.abs(np.asarray(drawn)[:, None] - words(torch.arange(97)).detach().numpy()[None]).max(-1).min(1)
    assert distance.max() < 1e-6 and len(np.unique(np.asarray(drawn)[:, 0])) > 20


def section(method, **keys):
    return {"method": method, "init_from": None, "num_virtual_tokens": 5} | keys


LENGTH = 24


class Run:
    """A training run without files on one device."""

    def __init__(self, directory, section, start=None, **optimiser):
        c = get_default()
        c.optim.update({"schedule": "constant", "max_grad_norm": 0.0, "eps": 1e-6} | optimiser)
        base = open_base(str(directory))
        self.mesh = meshes.make_mesh(1, 1, 1, jax.devices()[:1])
        how = {"dtype": "float32", "seed": 0, "total_steps": 9, "encode": lambda text: [3]}
        with jax.set_mesh(self.mesh):
            self.adapted = adapt(section, base, self.mesh, **how)
            for path, value in tree.flatten({"adapters": start or {}}).items():
                assert self.adapted.trainable[path].shape == value.shape
                self.adapted.trainable[path] = jnp.array(value)
            tx = optim.make_optimiser(c.optim, optim.make_schedule(c.optim, 9))
            self.state = make_state(tx, self.adapted.trainable, self.mesh)
        parts = {"model": base.model, "structure": self.adapted.structure, "optimiser": tx, "seed": 0}
        self.update = jax.jit(functools.partial(train_step, **parts, schedule=optim.make_schedule(c.optim, 9)))
        self.virtual = virtual_tokens(section, base)

    def step(self, rows, tasks):
        length, pairs = LENGTH + self.virtual.count, []
        for (tokens, mask), task in zip(rows, tasks, strict=True):
            own = self.virtual.ids(task if self.virtual.tasks else 0)
            pairs.append((np.concatenate([own, tokens]), np.concatenate([np.zeros(len(own), bool), mask])))
        batch = {k: v[None] for k, v in collate(pairs, len(rows), length).items()}
        with jax.set_mesh(self.mesh):
            self.state, metrics = self.update(self.state, self.adapted.frozen, batch)
        return {k: float(v) for k, v in metrics.items()}


TRAINED = {
    "prompt_tuning": {},
    "p_tuning": {"encoder_hidden_size": 11},
    "multitask_prompt_tuning": {"num_tasks": 3, "num_ranks": 2},
    "prefix_tuning": {},
    "prefix_projection": {"prefix_projection": True, "encoder_hidden_size": 6},
}


@pytest.mark.parametrize("case", list(TRAINED))
def test_two_steps_equal_peft(checkpoint, case):
    """Same base, same first values, same padded rows, AdamW in float32: losses, gradients and what comes of them are
    peft's.  The first token of a row (its BOS) is not learnt here; peft learns it unless its label is -100."""
    method, keys = ("prefix_tuning" if "prefix" in case else case), TRAINED[case]
    _, directory = checkpoint("gemma2")
    base = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    torch.manual_seed(0)
    model = peft.get_peft_model(base, CLASSES[method](task_type="CAUSAL_LM", num_virtual_tokens=5, **keys))
    encoder = model.prompt_encoder["default"]

    def leaves():
        """peft's parameters as our adapter's tree."""
        if method == "p_tuning":
            return {"prompt": copied(encoder.state_dict())}
        state = {n: jnp.array(p.detach().numpy()) for n, p in encoder.named_parameters()}
        if method == "prompt_tuning":
            return {"prompt": {"value": state["embedding.weight"]}}
        if method == "multitask_prompt_tuning":
            own = {"cols": state["prefix_task_cols"], "ranks": state["prefix_task_rows"]}
            return {"prompt": {"embedding": state["embedding.weight"], **own}}
        if "prefix_projection" not in keys:
            return {"prefix": {"value": state["embedding.weight"]}}
        both = (p_tuning.Affine(state[f"transform.{k}.weight"].T, state[f"transform.{k}.bias"]) for k in (0, 2))
        return {"prefix": dict(zip(("first", "last"), both, strict=True)) | {"embedding": state["embedding.weight"]}}

    first = tree.flatten({"adapters": leaves()})
    run = Run(directory, section(method, **keys), leaves(), learning_rate=1e-2, weight_decay=0.1)
    assert run.state.trainable.keys() == first.keys()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1, eps=1e-6)
    model.train()
    rng = np.random.default_rng(0)
    for _ in range(2):
        rows, tasks = [], [2, 0, 1, 0]
        ids, mask, labels = np.zeros((3, 4, LENGTH), np.int64)
        for i, n in enumerate((24, 9, 17, 13)):
            tokens, learnt = rng.integers(3, 90, n).astype(np.int32), np.arange(n) >= rng.integers(1, n - 1)
            rows.append((tokens, learnt))
            ids[i, :n], mask[i, :n] = tokens, 1
            labels[i, :n] = np.where(learnt, tokens, -100)
        labels = np.where(mask > 0, labels, -100)
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        batch |= {"task_ids": np.array(tasks)} if method.startswith("multi") else {}
        loss = model(**{k: torch.tensor(v) for k, v in batch.items()}).loss
        optimiser.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1e9)
        optimiser.step()
        metrics = run.step(rows, tasks)
        assert metrics["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
        assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    for path, value in tree.flatten({"adapters": leaves()}).items():
        assert np.any(value != first[path]), path  # a gradient came here
        moved = np.linalg.norm(value - first[path])
        assert np.linalg.norm(run.state.trainable[path] - value) <= 1e-3 * moved, path


RECIPE = """
from jaxtune.config import get_default


def get_config():
    c = get_default()
    c.model.id, c.model.dtype = {model!r}, "float32"
    c.peft.update({peft!r})
    c.data.train, c.data.max_length = {train!r}, 64
    c.data.update({data!r})
    c.optim.schedule = "constant"
    c.train.global_batch_size, c.train.remat = 8, "none"
    c.train.save_every = 100
    c.logging.tensorboard = False
    return c
"""

RUNS = {
    "prompt_tuning": {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "Answer in Persian."},
    "p_tuning": {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 8, "encoder_dropout": 0.1},
    "multitask_prompt_tuning": {"num_tasks": 3},
    "prefix_tuning": {"prefix_projection": True},
}


@pytest.fixture
def compiled_once(tmp_path):
    """Whatever this test compiles, it compiles once."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    yield
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1)
    compilation_cache.reset_cache()


@pytest.mark.parametrize("method", list(RUNS))
@pytest.mark.usefixtures("compiled_once")
def test_a_run_and_its_resumption(tmp_path, method):
    """The training command on 8 devices, with the method's own learning rate: the loss of the rows it sees falls, a run
    in two parts ends in the same bits as one in one, and peft takes what comes out."""
    place = tiny_run.make(tmp_path)
    tasks = method == "multitask_prompt_tuning"
    rows = [json.loads(line) for line in place.train.read_text().splitlines()[:8]]
    place.train.write_text("".join(json.dumps(row | {"task": i % 3}) + "\n" for i, row in enumerate(rows)))
    keys = {"peft": section(method, **RUNS[method]), "data": {"task_id": "task"} if tasks else {}}
    place.recipe.write_text(RECIPE.format(**{k: str(v) for k, v in place._asdict().items()} | keys))

    def run(workdir, steps):
        assert train.main(tiny_run.arguments(place, tmp_path / workdir, f"train.steps={steps}")) == 0
        return tiny_run.metrics(tmp_path / workdir)

    run("parts", 2)
    run("parts", 4)
    losses = [line["loss"] for line in run("whole", 4) if "loss" in line]
    assert len(losses) == 4 and losses[-1] < losses[0]
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        parts, whole = ((tmp_path / workdir / "adapter" / name).read_bytes() for workdir in ("parts", "whole"))
        assert parts == whole
    ids = np.random.default_rng(0).integers(3, 900, (2, 9))
    lm = jaxtune.load(place.model, adapter=tmp_path / "whole" / "adapter")
    task = {"task_ids": torch.tensor([2, 1])} if tasks else {}
    with torch.no_grad():
        model = reference.with_adapter(place.model, tmp_path / "whole" / "adapter")
        theirs = model(input_ids=torch.tensor(ids), **task).logits[:, -9:].numpy()
    reference.close(lm.logits(ids, task_id=[2, 1] if tasks else None), theirs)


def test_trainable_parameters_of_the_founding_run(shared):
    """P-tuning of Gemma 2 2b with 20 virtual tokens and an encoder of 128 trains 654,848 values."""
    config = json.loads((shared / "configs" / "gemma2-2b.config.json").read_text())
    base = describe("gemma2-2b", shared, config, dtype="bfloat16")
    keys = p_tuning.Config(num_virtual_tokens=20, encoder_hidden_size=128)
    adapters = jax.eval_shape(lambda key: p_tuning.init(key, base.layout, keys, Start({})), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(adapters)) == 654_848


def test_prompts_of_old_transformers(adapted, tmp_path):
    """soft_prompt_scale="pre": the model multiplies the rows by √D, as transformers before 5.4 did; the file keeps its
    numbers, and jaxtune.json says which convention they are in."""
    _, directory, adapter = adapted("prompt_gemma2")
    ids, mask = reference.batch()
    shutil.copytree(adapter, tmp_path / "scaled")
    tensors = load_file(adapter / "adapter_model.safetensors")
    scaled = tensors | {"prompt_embeddings": tensors["prompt_embeddings"] * np.float32(48**0.5)}
    save_file(scaled, tmp_path / "scaled" / "adapter_model.safetensors")
    expected = jaxtune.load(directory, adapter=tmp_path / "scaled").logits(ids, mask)

    old = jaxtune.load(directory, adapter=adapter, soft_prompt_scale="pre")
    reference.close(old.logits(ids, mask), expected, 1e-6)
    old.save_adapter(tmp_path / "out")
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(np.array_equal(written[name], value) for name, value in tensors.items())
    assert "soft_prompt_scale" not in (tmp_path / "out" / "adapter_config.json").read_text()
    again = jaxtune.load(directory, adapter=tmp_path / "out")
    np.testing.assert_array_equal(again.logits(ids, mask), old.logits(ids, mask))
    # Gemma 3 never scaled what it was given.
    _, directory, adapter = adapted("prompt_gemma3")
    logits = [jaxtune.load(directory, adapter=adapter, soft_prompt_scale=how).logits(ids) for how in ("pre", "post")]
    np.testing.assert_array_equal(*logits)
    with pytest.raises(UserError, match="soft_prompt_scale is 'before'"):
        jaxtune.load(directory, adapter=adapter, soft_prompt_scale="before")
    _, directory, adapter = adapted("prefix_gemma3")
    with pytest.raises(UserError, match="PREFIX_TUNING, which knows no such key"):
        jaxtune.load(directory, adapter=adapter, soft_prompt_scale="pre")


@pytest.mark.parametrize(
    ("case", "name", "keys"),
    [("mlp_gemma2", "prompt_tuning", {}), ("projection_gemma2", "prefix_tuning", {"prefix_projection": False})],
)
def test_files_without_their_encoder_train_on(adapted, case, name, keys):
    """What an encoder put out goes on as what it is, and says so."""
    _, directory, adapter = adapted(case)
    base = open_base(str(directory))
    first = load_first({"method": name, "init_from": str(adapter)}, base)
    assert first.method is METHODS[name] and first.config.num_virtual_tokens == 5
    assert all(getattr(first.config, key) == value for key, value in keys.items())
    (path,) = first.adapters
    assert [x.shape[0] for x in jax.tree.leaves(nn.unbox(first.adapters[path]))] == [5]
    if name == "prompt_tuning":
        with pytest.raises(UserError, match=r"is p_tuning\. Set it to prompt_tuning, as which it trains on"):
            load_first({"method": "p_tuning", "init_from": str(adapter)}, base)


def test_multitask_starts_from_other_tasks(adapted, tmp_path):
    """The mean of a source's tasks, one of them, or its prompt alone, as peft takes them."""
    from peft.tuners.multitask_prompt_tuning import MultitaskPromptEmbedding

    path = str(adapted("multitask_gemma2")[2] / "adapter_model.safetensors")
    for how, which in (("AVERAGE_SOURCE_TASKS", 0), ("EXACT_SOURCE_TASK", 3), ("ONLY_SOURCE_SHARED", 0)):
        keys = {"prompt_tuning_init": how, "prompt_tuning_init_state_dict_path": path}
        keys |= {"prompt_tuning_init_task": which, "num_ranks": 2}
        mine = fresh("multitask_prompt_tuning", **keys)["prompt"].to_peft()
        config = peft.MultitaskPromptTuningConfig(num_virtual_tokens=5, **SIZES, **keys)
        theirs = MultitaskPromptEmbedding(config, torch.nn.Embedding(97, 48)).state_dict()
        np.testing.assert_array_equal(mine["prompt_embeddings"], theirs["embedding.weight"])
        if how != "ONLY_SOURCE_SHARED":
            for name in ("prefix_task_cols", "prefix_task_rows"):
                np.testing.assert_allclose(mine[name], theirs[name], rtol=1e-6)
    keys |= {"prompt_tuning_init": "EXACT_SOURCE_TASK"}
    # What is written is done, and needs its source no more.
    module = METHODS["multitask_prompt_tuning"]
    written = module.to_config(LAYOUT, module.Config(num_virtual_tokens=5, **keys), {})
    assert written["prompt_tuning_init"] == "RANDOM" and written["prompt_tuning_init_state_dict_path"] is None
    with pytest.raises(UserError, match="the tasks 0 to 3"):
        fresh("multitask_prompt_tuning", **keys | {"prompt_tuning_init_task": 4})
    with pytest.raises(UserError, match=r"prefix_task_cols has shape \[4, 5, 2\]"):
        fresh("multitask_prompt_tuning", **keys | {"num_ranks": 1})
    (tmp_path / "source.bin").write_bytes(b"\x80\x02pickle of something, which would run code")
    for source, kind, message in (("no", MissingInputError, "no such file"), ("source.bin", UserError, "never read")):
        with pytest.raises(kind, match=message):
            fresh("multitask_prompt_tuning", **keys | {"prompt_tuning_init_state_dict_path": str(tmp_path / source)})


class TestTasks:
    def test_calls_say_which(self, adapted):
        _, directory, adapter = adapted("multitask_gemma3")
        lm, ids = jaxtune.load(directory, adapter=adapter), reference.batch()[0]
        one, each = lm.logits(ids, task_id=1), lm.logits(ids, task_id=[1, 0, 1])
        np.testing.assert_array_equal(one[[0, 2]], each[[0, 2]])
        assert np.abs(one[1] - each[1]).max() > 1e-3
        for task, message in (
            (None, "has 3 tasks: give `task_id`"),
            ([0, 1], "3, one for each row, from 0 to 2"),
            (3, "from 0 to 2"),
            (-1, "from 0 to 2"),
            ("one", "It is an integer"),
            (1.0, "It is an integer"),
        ):
            with pytest.raises(UserError, match=message):
                lm.logits(ids, task_id=task)
        with pytest.raises(UserError, match="this model has none"):
            jaxtune.load(directory).logits(ids, task_id=1)

    def test_rows_say_which(self, tmp_path):
        tokenizer, path = load_tokenizer(ASSETS / "tiny_gemma"), tmp_path / "rows.jsonl"
        virtual = Virtual(4, 3, "kind")
        shape = {"format": "prompt_completion", "prompt": "{q}", "completion": "{a}"}

        def load(*kinds, rows=({"q": "a b c d e f", "a": " g"},) * 9, **how):
            rows = [row | {"kind": kind} for row, kind in zip(rows, kinds, strict=False)]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            return load_dataset(str(path), tokenizer, virtual=virtual, **shape, **how)

        dataset = load(0, 2, "1")
        plain = load_dataset(str(path), tokenizer, **shape)
        for i, task in enumerate((0, 2, 1)):
            tokens, mask = dataset.example(i)
            assert tokens[:4].tolist() == [-1 - 4 * task - k for k in range(4)] and not mask[:5].any()
            np.testing.assert_array_equal(tokens[4:], plain.example(i)[0])
            np.testing.assert_array_equal(mask[4:], plain.example(i)[1])
        # `max_length` is for the text alone, and so are the report's numbers; the static length has room for both.
        assert dataset.counts == plain.counts and dataset.fingerprint != plain.fingerprint
        assert load(0, max_length=6, truncation="left").example(0)[0].shape == (10,)
        assert fit_length([plain], 64, 8, virtual=4) == -(-(plain.counts.longest + 4) // 8) * 8
        (asked, *_) = load_prompts(str(path), tokenizer, count=1, virtual=virtual, **shape)
        assert asked.ids[:4] == [-1, -2, -3, -4] and asked.ids[4] == tokenizer.bos_id
        for kind, shown in ((3, "3"), (None, "null"), (True, "True"), (1.0, "of type float")):
            with pytest.raises(
                DataError, match=f"rows.jsonl:2:kind: it is {shown}; the task is an integer from 0 to 2"
            ):
                load(0, kind)
        assert len(load(0, 5, 1, on_bad_row="skip")) == 2
        path.write_text(json.dumps({"q": "a", "a": "b"}) + "\n")
        with pytest.raises(DataError, match="1:kind: there is no such column"):
            load_dataset(str(path), tokenizer, virtual=virtual, **shape)

    def test_the_column_belongs_to_the_method(self):
        assert by_column(Virtual(4, 3), "kind").column == "kind"
        assert by_column(Virtual(4), None) == Virtual(4)
        with pytest.raises(UserError, match="is not set"):
            by_column(Virtual(4, 3), None)
        with pytest.raises(UserError, match="the method has no tasks"):
            by_column(Virtual(4), "kind")


class TestRefusals:
    def refused(self, adapted, tmp_path, case, message, change=lambda tensors: None, **changes):
        _, directory, adapter = adapted(case)
        copy = shutil.copytree(adapter, tmp_path / "copy")
        tensors = load_file(copy / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, copy / "adapter_model.safetensors")
        config = json.loads((copy / "adapter_config.json").read_text())
        (copy / "adapter_config.json").write_text(json.dumps(config | changes))
        with pytest.raises(UserError, match=message):
            jaxtune.load(directory, adapter=copy)

    @pytest.mark.parametrize(
        ("case", "changes", "message"),
        [
            ("mlp_gemma2", {"token_dim": 64}, "token_dim=64, and this model needs 48. Is it for another base"),
            ("mlp_gemma2", {"num_layers": 26}, "num_layers=26, and this model needs 4"),
            ("projection_gemma2", {"token_dim": 48}, "token_dim=48, and this model needs 40"),
            ("projection_gemma2", {"num_transformer_submodules": 2}, "num_transformer_submodules=2"),
            (
                "mlp_gemma2",
                {"num_virtual_tokens": 4},
                "num_virtual_tokens on this model needs",
            ),
            ("mlp_gemma2", {"num_virtual_tokens": None}, "num_virtual_tokens is None. It is an integer from 1"),
            ("mlp_gemma2", {"encoder_reparameterization_type": "GRU"}, "MLP, LSTM"),
            ("mlp_gemma2", {"encoder_dropout": 1.5}, "encoder_dropout"),
            ("mlp_gemma2", {"encoder_hidden_sise": 4}, "Did you mean `encoder_hidden_size`"),
            ("mlp_gemma2", {"modules_to_save": ["embed_tokens"]}, "PEFT looks tokens up in the original"),
            ("prompt_gemma3", {"prompt_tuning_init": "RANDOMLY"}, "RANDOM, TEXT, SAMPLE_VOCAB"),
            ("prompt_gemma3", {"prompt_tuning_init": "TEXT"}, "prompt_tuning_init_text is not set"),
            ("projection_gemma2", {"init_weights": "one"}, "None, zero"),
            ("multitask_gemma2", {"num_tasks": 3}, r"prefix_task_cols has shape \[4, 5, 2\]"),
            ("multitask_gemma2", {"prompt_tuning_init": "AVERAGE_SOURCE_TASKS"}, "state_dict_path is not set"),
        ],
    )
    def test_config(self, adapted, tmp_path, case, changes, message):
        self.refused(adapted, tmp_path, case, message, **changes)

    def test_tensors(self, adapted, tmp_path):
        def without(tensors):
            tensors["prefix_task_cols"] = tensors.pop("prompt_embeddings")

        self.refused(adapted, tmp_path, "multitask_gemma2", "has no tensor 'prompt_embeddings'", without)
        (tmp_path / "other").mkdir()
        more = {"base_model.prompt": np.ones(2, np.float32)}
        self.refused(adapted, tmp_path / "other", "mlp_gemma2", "1 tensors that its config", lambda t: t.update(more))


@pytest.mark.parametrize("method", list(CLASSES))
def test_every_key_of_the_installed_peft_is_known(method):
    module = METHODS[method]
    known = {f.name for f in dataclasses.fields(module.Config)} | set(module.NEUTRAL) | BOOKKEEPING
    assert {f.name for f in dataclasses.fields(CLASSES[method])} <= known
    defaults = module.Config(num_virtual_tokens=1)
    for field in dataclasses.fields(CLASSES[method]):
        if field.name not in BOOKKEEPING | {"num_virtual_tokens"}:
            assert getattr(defaults, field.name) == field.default, field.name
