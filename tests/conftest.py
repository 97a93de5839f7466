"""Strictness for every test: eight fake CPU devices, no silent dtype or rank promotion."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pathlib

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

SHARED = pathlib.Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared():
    """Real rows, tokenizers and goldens kept beside the project; tests that need them skip where they are absent."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is absent")
    return SHARED


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """checkpoint('gemma2') -> (transformers model, its directory), made once."""
    import reference

    made = {}

    def get(name):
        if name not in made:
            model = reference.randomise((reference.MODELS | reference.LLAMAS | reference.T5S)[name]())
            made[name] = (model, reference.save(model, tmp_path_factory.mktemp(name)))
        return made[name]

    return get
