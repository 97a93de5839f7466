"""Greedy tokens equal transformers' `generate`; sampling follows its filters; bad prompts are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import jaxtune
from jaxtune.errors import UserError
from jaxtune.generate import Sampling, check_sampling, choose, generate

STOPS = (5, 9)


@pytest.mark.parametrize("name", ["gemma", "gemma2", "gemma3"])
def test_greedy_equals_transformers(checkpoint, name):
    """Prompts of different lengths, answers longer than the window, rows that stop early and rows that do not."""
    model, directory = checkpoint(name)
    lm = jaxtune.load(directory)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(10, 97, n).tolist() for n in (3, 11, 7, 1, 30)]
    ours = generate(lm.base.model, lm.variables, prompts, max_new_tokens=24, stop_ids=STOPS)
    ids, mask = np.zeros((2, 5, 30), np.int64)
    for i, prompt in enumerate(prompts):
        ids[i, 30 - len(prompt) :], mask[i, 30 - len(prompt) :] = prompt, 1
    how = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": list(STOPS), "pad_token_id": 0}
    with torch.no_grad():
        theirs = model.generate(torch.tensor(ids), attention_mask=torch.tensor(mask), **how).numpy()[:, 30:]
    for row, answer in zip(theirs.tolist(), ours, strict=True):
        end = next((i for i, token in enumerate(row) if token in STOPS), len(row))
        assert answer == row[:end]
    assert len({len(answer) for answer in ours}) > 1 or all(len(answer) == 24 for answer in ours)


def test_stop_tokens_end_a_row(checkpoint):
    """Every token that greedy decoding would say can be made its stop."""
    lm = jaxtune.load(checkpoint("gemma2")[1])
    prompts = [[11, 12, 13], [40]]
    free = generate(lm.base.model, lm.variables, prompts, max_new_tokens=8, stop_ids=(96,))
    stop = free[0][3]
    stopped = generate(lm.base.model, lm.variables, prompts, max_new_tokens=8, stop_ids=(stop,))
    assert stopped[0] == free[0][: free[0].index(stop)]


def test_batches_change_nothing(checkpoint):
    """The same answers one by one, in twos (the last one filled up), and all at once."""
    lm = jaxtune.load(checkpoint("gemma3")[1])
    prompts = [[11, 12, 13], [40], [7, 8, 90, 91, 92]]

    def run(size):
        return generate(lm.base.model, lm.variables, prompts, max_new_tokens=6, stop_ids=STOPS, batch_size=size)

    assert run(1) == run(2) == run(None)
    assert generate(lm.base.model, lm.variables, [], max_new_tokens=6, stop_ids=STOPS) == []
    with pytest.raises(UserError, match="Prompt 1 is empty"):
        generate(lm.base.model, lm.variables, [[3], []], max_new_tokens=6, stop_ids=STOPS)


@pytest.mark.parametrize(
    "sampling", [Sampling(0.7), Sampling(1.3, top_k=3), Sampling(0.9, top_p=0.6), Sampling(0.8, top_k=6, top_p=0.5)]
)
def test_sampling_distribution_equals_transformers(sampling):
    """The frequencies of 20,000 draws are those of transformers' filtered logits."""
    logits = np.array([2.0, 1.5, 1.4, 0.3, 0.0, -1.0, -2.0, 1.49], np.float32)
    processors = transformers.LogitsProcessorList([transformers.TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k is not None:
        processors.append(transformers.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p is not None:
        processors.append(transformers.TopPLogitsWarper(sampling.top_p))
    expected = torch.softmax(processors(torch.zeros(1, 1, dtype=torch.long), torch.tensor(logits)[None]), -1)[0].numpy()
    draws = np.asarray(choose(jnp.tile(logits, (20_000, 1)), sampling, jax.random.key(0)))
    counts = np.bincount(draws, minlength=8) / 20_000
    assert np.all(counts[expected == 0] == 0)
    np.testing.assert_allclose(counts, expected, atol=0.015)


def test_seed_decides(checkpoint):
    lm = jaxtune.load(checkpoint("gemma2")[1])

    def run(seed):
        sampling = Sampling(temperature=1.0)
        how = {"max_new_tokens": 8, "stop_ids": STOPS, "sampling": sampling, "seed": seed}
        return generate(lm.base.model, lm.variables, [[11, 12]] * 4, **how)

    assert run(0) == run(0) != run(1)
    assert len({tuple(answer) for answer in run(0)}) > 1


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 1.0, "top_k": 0}, "top_k is 0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p is 1.5"),
    ],
)
def test_what_is_no_way_to_choose(how, message):
    with pytest.raises(UserError, match=message):
        check_sampling(Sampling(**how))
