"""Compiles an experiment's programs for a TPU that is not there: does it fit, and does it compile at all?

    python -m pasta_jax.compile --config=configs/tiny.py --topology=v5e:2x4 [--quantize=int8]

Needs libtpu (Linux), but no TPU. Prints the memory that each program takes on one chip, as the compiler counts it,
and how many bytes a decode step moves to and from main memory.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Unpack

from absl import flags

from pasta_jax.compile import hlo
from pasta_jax.config import Config, ConfigError
from pasta_jax.kept import keep_compiled
from pasta_jax.overrides import load_config, split_overrides
from pasta_jax.verbs import refuse, run_main

if TYPE_CHECKING:
    from pasta_jax.decoding.compiled import Compiled, Sizes
    from pasta_jax.tokens.tokenizer import Tokenizer

HOST_CALLS = ("callback", "outfeed", "infeed", "send-to-host", "SendToHost", "is_host_transfer=true")
"""Signs, in a compiled program's text, that it waits for the host."""


def topology_devices(topology: str) -> Any:
    """The devices of a TPU slice such as v5e:2x4, as libtpu describes them. No machine is looked for.

    Raises:
      ValueError: libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise ValueError("libtpu is not installed: pip install libtpu (Linux; needs no TPU).")
    kind = topology.partition(":")[0]
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is opened: nobody needs to wait
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", {"v5e": "v5litepod-8"}.get(kind, f"{kind}-8"))
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


def lower_train(config: Config, mesh: Any) -> Any:
    """The update step of `config.stage`, lowered for a mesh: parameters and optimizer over fsdp and tensor."""
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
    """The programs that training with `config.stage` runs, by name."""
    from pasta_jax.experiment import stages

    programs = {}
    for stage in stages(config):
        if stage.stage == "preference":
            programs["reference"] = lower_reference(stage, mesh)
        programs["train" if stage.stage == "sft" else "preference"] = lower_train(stage, mesh)
    return programs


def lower_reference(config: Config, mesh: Any) -> Any:
    """The second stage's pass over the reference model for log-probabilities, lowered for a mesh."""
    from pasta_jax import sharding
    from pasta_jax.arrays import ThreadedTokens
    from pasta_jax.model import param_shapes
    from pasta_jax.preference.pairs import reference_pass
    from pasta_jax.training.microbatches import rows_sharding

    params = param_shapes(config.model)
    params = sharding.abstract(params, sharding.param_shardings(params, mesh))
    rows = rows_sharding(mesh, config.data.rows, config.microbatches)
    fields = sharding.abstract(_batch(config, ThreadedTokens), rows)
    return reference_pass(config.model, mesh, config.microbatches).lower(params, fields)


def _batch(config: Config, record: Any) -> Any:
    """Shapes of the fields of a training batch."""
    import jax

    from pasta_jax.visibility import max_segments, words_for

    shape = (config.data.rows, config.data.length)
    fields = {name: jax.ShapeDtypeStruct(shape, "int32") for name in record.__dataclass_fields__}
    words = words_for(max_segments(config.data.threads))
    fields["sees"] = jax.ShapeDtypeStruct((*shape, words), "uint32")
    if "reference" in fields:
        fields["reference"] = jax.ShapeDtypeStruct(shape, "float32")
    return fields


def decoder_programs(
    config: Config,
    mesh: Any,
    tokenizer: Tokenizer | None = None,
    *,
    int8: bool = False,
    **sizes: Unpack[Sizes],
) -> Compiled:
    """What a `Decoder` of the experiment's model runs on a mesh or on its one device; `sizes` as for `Compiled`."""
    import jax

    from pasta_jax import sharding
    from pasta_jax.data.sources import make_tokenizer
    from pasta_jax.decoding.compiled import Compiled
    from pasta_jax.model import forms, param_shapes

    params = param_shapes(config.model)
    params = jax.eval_shape(forms.quantize, params) if int8 else params
    one = jax.sharding.SingleDeviceSharding(mesh.devices.flat[0])
    places = one if mesh.size == 1 else sharding.param_shardings(params, mesh)
    params = sharding.abstract(params, places)
    vocabulary = (tokenizer or make_tokenizer(config.data)).vocabulary
    return Compiled(params, config.model, vocabulary, config.data.positions, **sizes)


def lower_decode(compiled: Compiled) -> dict[str, Any]:
    """The prefill of the longest prompts and the decode loop over the whole pool, lowered: those that take most."""
    largest = {program.verb: program for program in compiled.programs}  # the last of each verb
    return {verb: compiled.lower(largest[verb]) for verb in ("admit", "decode")}


def host_calls(compiled: Any) -> list[str]:
    """The signs of waiting for the host in a compiled program's text."""
    text = compiled.as_text()
    return [sign for sign in HOST_CALLS if sign in text]


def bytes_of_a_step(compiled: Any) -> int | None:
    """Bytes that a step of a loop of one width moves to and from a chip's main memory; None without a loop."""
    program = hlo.read(compiled)
    return hlo.moved(program, program.loop) if program.loop else None


def main(argv: Sequence[str], *, overrides: Sequence[str]) -> None:
    """Runs the command. A user's mistake ends in one line and status 2."""
    values = flags.FLAGS
    if len(argv) > 1 or not values.config:
        refuse(f"Which experiment? Add --config=configs/tiny.py. {__doc__.splitlines()[0]}")
    try:
        config = load_config(values.config, overrides)
        keep_compiled(values.compilation_cache)
        devices = topology_devices(values.topology)
        from pasta_jax import sharding
        from pasta_jax.decoding.state import Limits
        from pasta_jax.experiment import resolve

        config, tokenizer = resolve(config, overrides=overrides, ahead=True)
        mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices)
        limits = Limits(values.lanes, max(values.lanes, config.data.threads), values.pool)
        int8 = values.quantize == "int8"
        compiled = decoder_programs(config, mesh, tokenizer, int8=int8, limits=limits, rows=values.rows)
        programs = {**lower_stages(config, mesh), **lower_decode(compiled)}
    except (ConfigError, ValueError, RuntimeError) as error:
        refuse(str(error))
    shape = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    print(f"{values.topology}, {len(devices)} chips: {shape}")
    fits = True
    for name, lowered in programs.items():
        try:
            program = lowered.compile()
        except Exception as error:  # the compiler's own class, which jax does not document
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            fits = False
            print(f"{name:10} does not fit: {_reason(error)}")
            continue
        calls = ", ".join(host_calls(program)) or "none"
        moved = bytes_of_a_step(program) if name == "decode" else None
        traffic = f"; {moved / 2**20:.1f} MiB moved a step" if moved else ""
        print(f"{name:10} {describe_memory(program)}; host calls: {calls}{traffic}", flush=True)
    if not fits:
        refuse(
            "Try more chips, or another mesh (--config.mesh.tensor=2); to train, --config.remat=true, more "
            "--config.microbatches, or --config.lora.rank=16."
        )


def _reason(error: Exception) -> str:
    """What the compiler says of memory, in its own words."""
    text = " ".join(str(error).split())
    match = re.search(r"the total memory.*?(?= HLO module|$)", text) or re.search(r"Ran out of.*", text)
    return (match.group() if match else text)[:300]


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
    flags.DEFINE_integer("rows", 8, "Requests decoded at once.", lower_bound=1)
    flags.DEFINE_integer("lanes", 8, "Maximum threads of a request that decode in one step.", lower_bound=1)
    flags.DEFINE_integer(
        "pool", 1024, "Maximum tokens of a request, prompt and answer together.", lower_bound=1
    )
    flags.DEFINE_enum("quantize", None, ["int8"], "Weights of the decode programs.")
    overrides, rest = split_overrides(sys.argv)
    run_main(functools.partial(main, overrides=overrides), argv=rest)


if __name__ == "__main__":
    command()
