"""Compiles an experiment's programs for a TPU that is not there: does it fit, and does it compile at all?

    python -m pasta_jax.compile --config=configs/tiny.py --topology=v5e:2x4 [--rows=8] [--config.mesh.tensor=2]

Needs libtpu (Linux), no TPU. Prints for each program the memory of one chip, as the compiler counts it.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Sequence
from typing import Any

from absl import app, flags

from pasta_jax.config import Config, ConfigError, load_config, split_overrides
from pasta_jax.verbs import refuse

HOST_CALLS = ("callback", "outfeed", "infeed", "send-to-host", "SendToHost", "is_host_transfer=true")
"""What a compiled program's text holds if it ever waits for the host."""


def topology_devices(topology: str) -> Any:
    """The devices of a TPU slice such as v5e:2x4, by libtpu's description, without looking for a machine."""
    kind = topology.partition(":")[0]
    os.environ.setdefault(
        "ALLOW_MULTIPLE_LIBTPU_LOAD", "1"
    )  # no chip is opened, so nobody has to wait for it
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", {"v5e": "v5litepod-8"}.get(kind, f"{kind}-8"))
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


def lower_train(config: Config, mesh: Any) -> Any:
    """The update step, lowered for a mesh: parameters and optimiser over fsdp and tensor."""
    import jax

    from pasta_jax import sharding
    from pasta_jax.arrays import ThreadedTokens
    from pasta_jax.training.loop import sft
    from pasta_jax.training.update import make_update
    from pasta_jax.visibility import max_segments, words_for

    update = make_update(config, mesh, sft)
    shape = (config.data.rows, config.data.length)
    words = words_for(max_segments(config.data.threads))
    fields = {name: jax.ShapeDtypeStruct(shape, "int32") for name in ThreadedTokens.__dataclass_fields__}
    fields["sees"] = jax.ShapeDtypeStruct((*shape, words), "uint32")
    state = sharding.abstract(update.shapes, update.shardings)
    return update.step.lower(state, sharding.abstract(fields, update.batch_sharding))


def lower_decode(config: Config, mesh: Any, limits: Any, rows: int, prompt: int = 64) -> tuple[Any, Any]:
    """Prefill and the decode loop, lowered for a mesh: rows over data and fsdp, heads over tensor."""
    import jax
    import numpy as np

    from pasta_jax import sharding
    from pasta_jax.data.sources import make_tokenizer
    from pasta_jax.decoding import loop
    from pasta_jax.decoding.engine import Sampling
    from pasta_jax.decoding.interpreter import rules_for
    from pasta_jax.model import Transformer, empty_pool, init_params

    model = Transformer(config.model)
    params = jax.eval_shape(functools.partial(init_params, config.model), jax.random.key(0))
    params = sharding.abstract(params, sharding.param_shardings(params, mesh))
    vocabulary = make_tokenizer(config.data).vocabulary
    rules = rules_for(vocabulary, limits, config.data.positions, config.model.vocab_size)
    rules = sharding.abstract(rules, sharding.replicated(mesh))
    pool = jax.eval_shape(lambda: empty_pool(config.model, rows, limits.pool + limits.lanes))
    pool = sharding.abstract(pool, sharding.pool_shardings(pool, mesh))

    by_row = sharding.batch_sharding(mesh, rows)
    request = jax.tree.map(lambda leaf: np.stack([leaf] * rows), Sampling().request())
    prompts = jax.ShapeDtypeStruct((rows, prompt), "int32", sharding=by_row)
    lengths = jax.ShapeDtypeStruct((rows,), "int32", sharding=by_row)
    first = (params, rules, pool, sharding.abstract(request, by_row), prompts, lengths)
    prefill = jax.jit(functools.partial(loop.prefill, model), donate_argnums=2)

    shapes = jax.eval_shape(prefill, *first)
    batch = loop.Batch(
        sharding.abstract(shapes.rows, by_row), sharding.abstract(shapes.requests, by_row), pool
    )
    steps = jax.ShapeDtypeStruct((), "int32", sharding=sharding.replicated(mesh))
    decode = jax.jit(functools.partial(loop.decode_chunk, model), donate_argnums=2)
    return prefill.lower(*first), decode.lower(params, rules, batch, steps)


def host_calls(compiled: Any) -> list[str]:
    """What in a compiled program's text would make it wait for the host."""
    text = compiled.as_text()
    return [sign for sign in HOST_CALLS if sign in text]


def main(argv: Sequence[str], *, overrides: Sequence[str]) -> None:
    """The verb. Mistakes end in one line and status 2."""
    values = flags.FLAGS
    if len(argv) > 1 or not values.config:
        refuse(f"Which experiment? Add --config=configs/tiny.py. {__doc__.splitlines()[0]}")
    try:
        config = load_config(values.config, overrides)
        devices = topology_devices(values.topology)
        from pasta_jax import sharding
        from pasta_jax.decoding.state import Limits

        mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices)
        limits = Limits(values.lanes, max(values.lanes, config.data.threads), values.pool)
        prefill, decode = lower_decode(config, mesh, limits, values.rows)
        programs = {"train": lower_train(config, mesh), "prefill": prefill, "decode": decode}
    except (ConfigError, ValueError, RuntimeError) as error:
        refuse(str(error))
    shape = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    print(f"{values.topology}, {len(devices)} chips: {shape}")
    for name, lowered in programs.items():
        compiled = lowered.compile()
        print(
            f"{name:8} {describe_memory(compiled)}; host calls: {', '.join(host_calls(compiled)) or 'none'}"
        )


def describe_memory(compiled: Any) -> str:
    """Memory of one chip, in MiB."""
    memory = compiled.memory_analysis()
    mib = 2**20
    arguments, temporary = memory.argument_size_in_bytes / mib, memory.temp_size_in_bytes / mib
    return f"{arguments + temporary:9.1f} MiB a chip ({arguments:.1f} arguments, {temporary:.1f} temporary)"


def command() -> None:
    """Parses the command line and runs `main`."""
    flags.DEFINE_string("config", None, "The experiment, as configs/tiny.py.")
    flags.DEFINE_string("topology", "v5e:2x4", "TPU generation and shape of the slice.")
    flags.DEFINE_integer("rows", 8, "B, requests decoded at once.", lower_bound=1)
    flags.DEFINE_integer("lanes", 8, "S.", lower_bound=1)
    flags.DEFINE_integer("pool", 1024, "P.", lower_bound=1)
    overrides, rest = split_overrides(sys.argv)
    app.run(functools.partial(main, overrides=overrides), argv=rest)


if __name__ == "__main__":
    command()
