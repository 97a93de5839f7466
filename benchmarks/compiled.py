"""Memory and FLOP of a LoRA step on v5e-8, jaxtune beside google-tunix, both compiled for chips that are not there:

  python -m venv tunix && tunix/bin/pip install google-tunix==0.1.7 "libtpu==0.0.42.*"
  python benchmarks/compiled.py --tunix tunix/bin/python --rows 1,2,4

Gemma 2 2b in bfloat16, LoRA of rank 8 on all linear layers, AdamW, rows of 2048 tokens on a mesh of fsdp=8, each layer
computed again in the backward pass (tunix: RematConfig.BLOCK).  Nothing runs; a case is a minute or more of a CPU.

GiB a chip: what the compiler reserves for arguments, temporaries and code.  Where that is more than there is, what it
says it needs of temporaries alone.  TFLOP of a step and chip: the products of tunix's program as it is traced; of
jaxtune's, whose attention is a kernel, what `jaxtune.plan` counts and tests hold against such a program without one.

tunix leaves activations where XLA puts them when the first device is a CPU, which it is here; they are put where it
puts them on TPUs.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
from typing import Any

LENGTH, RANK, CHIPS = 2048, 8, 8
SETTINGS = {
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}
GIB = 2**30


def by_jaxtune(rows: int) -> dict[str, Any]:
    from jaxtune.plan import refresh, search
    from jaxtune.plan.abstract import open_config
    from jaxtune.plan.chips import chip_named
    from jaxtune.plan.compile import Compiled, compile_config

    with refresh.config_of(refresh.Case("gemma-2-2b", "lora", "v5e", CHIPS, rows, {})) as c:
        base, chip = open_config(c), chip_named("v5e")
        flops = search.plan(c, base, chip, CHIPS).flops.hardware * rows
        found = compile_config(c, base, chip, CHIPS)
    fits = isinstance(found, Compiled)
    return {"fits": fits, "bytes": found.total if fits else found.needs, "flops": flops}


def by_tunix(rows: int) -> dict[str, Any]:
    """Tunix's own model, adapters, loss and step, over shapes."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    import qwix
    from flax import nnx
    from jax.experimental import topologies
    from jax.sharding import NamedSharding, PartitionSpec
    from tunix.models.gemma import model as gemma
    from tunix.sft import peft_trainer, utils

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    mesh = jax.sharding.Mesh(np.array(devices).reshape(CHIPS, 1), ("fsdp", "tp"))
    here = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))  # noqa: E731
    config = gemma.ModelConfig.gemma2_2b()
    config.remat_config = gemma.RematConfig.BLOCK
    every = ".*q_einsum|.*kv_einsum|.*attn_vec_einsum|.*gate_proj|.*down_proj|.*up_proj"

    def make() -> Any:
        model = gemma.Gemma(config, rngs=nnx.Rngs(0))
        provider = qwix.LoraProvider(module_path=every, rank=RANK, alpha=16.0)
        return qwix.apply_lora_to_model(model, provider, rngs=nnx.Rngs(1), **model.get_model_input())

    model = nnx.eval_shape(make)
    # Only then: what makes the parameters has batches that do not split.
    gemma.shard = lambda x, axes: jax.lax.with_sharding_constraint(x, here(*axes))
    optimiser = nnx.eval_shape(lambda: nnx.Optimizer(model, optax.adamw(1e-4), wrt=nnx.LoRAParam))
    graph, state = nnx.split((model, optimiser))
    specs = nnx.get_partition_spec(state)

    def place(x: Any, spec: Any) -> Any:
        axes = tuple(spec) if isinstance(spec, PartitionSpec) else ()
        ways = [CHIPS if axis == "fsdp" else 1 for axis in axes]
        fits = all(n % way == 0 for n, way in zip(x.shape, ways, strict=False))
        dtype = jnp.bfloat16 if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=here(*axes if fits else ()))

    state = jax.tree.map(place, state, specs)
    batch = jax.ShapeDtypeStruct((rows * CHIPS, LENGTH), jnp.int32, sharding=here("fsdp"))

    def step(state: Any, tokens: Any) -> Any:
        model, optimiser = nnx.merge(graph, state)
        mask = tokens != 0
        inputs = {"positions": utils.build_positions_from_mask(mask), "input_mask": mask}
        inputs |= {"input_tokens": tokens, "attention_mask": utils.make_causal_attn_mask(mask)}
        gradients_of = nnx.value_and_grad(peft_trainer._default_loss_fn, argnums=nnx.DiffState(0, nnx.LoRAParam))
        loss, gradients = gradients_of(model, **inputs)
        norm = optax.global_norm(gradients)
        optimiser.update(model, gradients)
        return loss, norm, nnx.state((model, optimiser))

    with mesh:
        traced = jax.jit(step, donate_argnums=0).trace(state, batch)
        flops = products(needed(traced.jaxpr.jaxpr)) / CHIPS
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        needs = re.search(r"HLO temporaries \(([\d.]+)([MG])\)", str(error))
        if needs is None:
            raise
        return {"fits": False, "bytes": float(needs[1]) * {"M": 2**20, "G": GIB}[needs[2]], "flops": flops}
    m = compiled.memory_analysis()
    total = m.argument_size_in_bytes + m.temp_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    return {"fits": True, "bytes": total + m.generated_code_size_in_bytes, "flops": flops}


def needed(program: Any) -> Any:
    """Without what no output needs, also inside calls."""
    from jax.interpreters import partial_eval

    return partial_eval.dce_jaxpr(program, [True] * len(program.outvars), instantiate=True)[0]


def products(program: Any) -> float:
    """FLOP of every product; there are no loops."""
    import jax
    from jax.extend import core

    kinds, total = (core.Jaxpr, core.ClosedJaxpr), 0.0
    for one in program.eqns:
        if one.primitive.name == "dot_general":
            (contracted, _), _ = one.params["dimension_numbers"]
            of = math.prod(one.invars[0].aval.shape[i] for i in contracted)
            total += 2.0 * of * math.prod(one.outvars[0].aval.shape)
        inside = jax.tree.leaves(list(one.params.values()), is_leaf=lambda x: isinstance(x, kinds))
        total += sum(products(getattr(x, "jaxpr", x)) for x in inside if isinstance(x, kinds))
    return total


SIDES = {"jaxtune": by_jaxtune, "tunix": by_tunix}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tunix", help="the Python of an environment with google-tunix")
    parser.add_argument("--rows", default="1,2,4", help="a chip, at a time")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    a = parser.parse_args()
    os.environ |= SETTINGS
    if a.side:
        print(json.dumps(SIDES[a.side](int(a.rows))))
        return
    pythons = {"jaxtune": sys.executable} | ({"tunix": a.tunix} if a.tunix else {})
    print(f"{'rows':5}{'':10}{'GiB a chip':>12}{'x':>7}{'TFLOP':>9}")
    for rows in a.rows.split(","):
        first = None
        for name, python in pythons.items():
            words = [python, __file__, f"--side={name}", f"--rows={rows}"]
            done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            first = first or found["bytes"]
            cells = f"{found['bytes'] / GIB:12.2f}{found['bytes'] / first:7.2f}{found['flops'] / 1e12:9.1f}"
            print(f"{rows:5}{name:10}{cells}{'' if found['fits'] else '  does not fit: temporaries alone'}", flush=True)


if __name__ == "__main__":
    main()
