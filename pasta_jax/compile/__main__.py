"""Compiles an experiment's programs for a TPU that is not there: does it fit, and does it compile at all?

    python -m pasta_jax.compile --config=configs/tiny.py --topology=v5e:2x4 [--quantize=int8]

Needs libtpu (Linux), no TPU. Prints for each program the memory of one chip, as the compiler counts it, and what a
decode step moves to and from its main memory.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from absl import app, flags

from pasta_jax.compile import hlo
from pasta_jax.config import Config, ConfigError
from pasta_jax.overrides import load_config, split_overrides
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
    """The update step of a stage, lowered for a mesh: parameters and optimiser over fsdp and tensor.

    Of the second stage if config.stage says so, else of the first.
    """
    from pasta_jax import sharding
    from pasta_jax.preference.rounds import stage_of
    from pasta_jax.training.loop import SFT
    from pasta_jax.training.update import make_update

    stage = stage_of(config) if config.stage == "preference" else SFT
    update = make_update(config, mesh, stage.loss_fn, stage.record)
    state = sharding.abstract(update.shapes, update.shardings)
    base = sharding.abstract(update.base_shapes, update.base_shardings)
    fields = _batch(config, stage.record)
    return update.step.lower(state, base, sharding.abstract(fields, update.batch_sharding))


def lower_stages(config: Config, mesh: Any) -> dict[str, Any]:
    """The programs of training by name, as config.stage has them."""
    from pasta_jax.experiment import stages

    programs = {}
    for stage in stages(config):
        if stage.stage == "preference":
            programs["reference"] = lower_reference(stage, mesh)
        programs["train" if stage.stage == "sft" else "preference"] = lower_train(stage, mesh)
    return programs


def lower_reference(config: Config, mesh: Any) -> Any:
    """The pass of the second stage that asks the reference for log-probabilities, lowered for a mesh."""
    import jax

    from pasta_jax import sharding
    from pasta_jax.arrays import ThreadedTokens
    from pasta_jax.model import init_params
    from pasta_jax.preference.pairs import reference_pass
    from pasta_jax.training.microbatches import rows_sharding

    params = jax.eval_shape(functools.partial(init_params, config.model), jax.random.key(0))
    params = sharding.abstract(params, sharding.param_shardings(params, mesh))
    lies = rows_sharding(mesh, config.data.rows, config.microbatches)
    fields = sharding.abstract(_batch(config, ThreadedTokens), lies)
    return reference_pass(config.model, mesh, config.microbatches).lower(params, fields)


def _batch(config: Config, record: Any) -> Any:
    """Shapes of the fields of a batch."""
    import jax

    from pasta_jax.visibility import max_segments, words_for

    shape = (config.data.rows, config.data.length)
    fields = {name: jax.ShapeDtypeStruct(shape, "int32") for name in record.__dataclass_fields__}
    words = words_for(max_segments(config.data.threads))
    fields["sees"] = jax.ShapeDtypeStruct((*shape, words), "uint32")
    if "reference" in fields:
        fields["reference"] = jax.ShapeDtypeStruct(shape, "float32")
    return fields


def lower_decode(
    config: Config, mesh: Any, limits: Any, rows: int, prompt: int = 64, tokenizer: Any = None
) -> tuple[Any, Any]:
    """Prefill and the decode loop, lowered for a mesh: rows over data and fsdp, heads over tensor."""
    import jax

    from pasta_jax import sharding
    from pasta_jax.data.sources import make_tokenizer
    from pasta_jax.decoding import loop
    from pasta_jax.decoding.engine import SamplingParams, batch_shardings
    from pasta_jax.decoding.interpreter import rules_for
    from pasta_jax.model import Transformer, init_params

    if mesh.size == 1:  # as a decoder has them on a single chip
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, fused_qkv=True))
    model = Transformer(config.model)
    params = jax.eval_shape(functools.partial(init_params, config.model), jax.random.key(0))
    params = sharding.abstract(params, sharding.param_shardings(params, mesh))
    vocabulary = (tokenizer or make_tokenizer(config.data)).vocabulary
    rules = rules_for(vocabulary, limits, config.data.positions, config.model.vocab_size)
    rules = sharding.abstract(rules, sharding.replicated(mesh))
    request = SamplingParams().request()
    batch = jax.eval_shape(functools.partial(loop.empty_batch, config.model, limits, rows, request))
    lies = batch_shardings(batch, mesh)
    batch = loop.Batch(
        *(
            sharding.abstract(getattr(batch, part), getattr(lies, part))
            for part in ("rows", "requests", "pool")
        )
    )
    by_row, everywhere = sharding.batch_sharding(mesh, rows), sharding.replicated(mesh)
    each = jax.ShapeDtypeStruct((rows,), "int32", sharding=by_row)
    prompts = jax.ShapeDtypeStruct((rows, prompt), "int32", sharding=by_row)
    admit, decode = (
        jax.jit(functools.partial(function, model), donate_argnums=2, out_shardings=lies)
        for function in (loop.admit, loop.decode_chunk)
    )
    steps = jax.ShapeDtypeStruct((), "int32", sharding=everywhere)
    refill = jax.ShapeDtypeStruct((), "bool", sharding=everywhere)
    return (
        admit.lower(params, rules, batch, each, batch.requests, prompts, each),
        decode.lower(params, rules, batch, steps, refill),
    )


def host_calls(compiled: Any) -> list[str]:
    """What in a compiled program's text would make it wait for the host."""
    text = compiled.as_text()
    return [sign for sign in HOST_CALLS if sign in text]


def bytes_of_a_step(compiled: Any) -> int | None:
    """What a step of a loop of one width moves to and from a chip's main memory; None if no loop is left."""
    program = hlo.read(compiled)
    return hlo.moved(program, program.loop) if program.loop else None


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
        from pasta_jax.experiment import resolve
        from pasta_jax.loading import as_asked

        config, tokenizer = resolve(config, overrides=overrides, ahead=True)
        mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices)
        limits = Limits(values.lanes, max(values.lanes, config.data.threads), values.pool)
        to_decode = dataclasses.replace(config, model=as_asked(config.model, None, values.quantize))
        prefill, decode = lower_decode(to_decode, mesh, limits, values.rows, tokenizer=tokenizer)
        programs = {**lower_stages(config, mesh), "prefill": prefill, "decode": decode}
    except (ConfigError, ValueError, RuntimeError) as error:
        refuse(str(error))
    shape = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    print(f"{values.topology}, {len(devices)} chips: {shape}")
    fits = True
    for name, lowered in programs.items():
        try:
            compiled = lowered.compile()
        except Exception as error:  # the compiler's own, whose class is jax's business
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            fits = False
            print(f"{name:10} does not fit: {_reason(error)}")
            continue
        calls = ", ".join(host_calls(compiled)) or "none"
        moved = bytes_of_a_step(compiled) if name == "decode" else None
        each = f"; {moved / 2**20:.1f} MiB moved a step" if moved else ""
        print(f"{name:10} {describe_memory(compiled)}; host calls: {calls}{each}", flush=True)
    if not fits:
        refuse(
            "Try more chips, or another mesh (--config.mesh.tensor=2); to train, --config.remat=true, more "
            "--config.microbatches, or --config.lora.rank=16."
        )


def _reason(error: Exception) -> str:
    """What the compiler says of memory, in its own words."""
    text = " ".join(str(error).split())
    found = re.search(r"the total memory.*?(?= HLO module|$)", text) or re.search(r"Ran out of.*", text)
    return (found.group() if found else text)[:300]


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
    flags.DEFINE_enum("quantize", None, ["int8"], "Weights of the decode programs.")
    overrides, rest = split_overrides(sys.argv)
    app.run(functools.partial(main, overrides=overrides), argv=rest)


if __name__ == "__main__":
    command()
