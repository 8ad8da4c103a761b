"""What is compiled ahead of time: the programs that training and decoding run, lowered for absent devices."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Unpack

from pasta_jax.chips import chip_named
from pasta_jax.config import Config

if TYPE_CHECKING:
    from pasta_jax.decoding.compiled import Compiled, Sizes
    from pasta_jax.tokens.tokenizer import Tokenizer
    from pasta_jax.training.update import Update

HOST_CALLS = ("callback", "outfeed", "infeed", "send-to-host", "SendToHost", "is_host_transfer=true")
"""Signs, in a compiled program's text, that it waits for the host."""

SHORT_NAMES = {"v5e": "v5litepod-8", "v7x": "tpu7x-8"}
"""Generation to a type of accelerator, where that is not the name and the number of cores."""


def topology_devices(topology: str) -> Any:
    """The devices of a TPU slice such as v5e:2x4, as libtpu describes them. No machine is looked for.

    Raises:
      ValueError: libtpu is not installed, or it knows no such slice.
    """
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise ValueError("libtpu is not installed: pip install libtpu (Linux; needs no TPU).")
    chip, shape = chip_named(topology)
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is opened: nobody needs to wait
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", SHORT_NAMES.get(chip.name, f"{chip.name}-8"))
    from jax.experimental import topologies

    name = f"{'tpu7x' if chip.name == 'v7x' else chip.name}:{'x'.join(map(str, shape))}"
    # Both cores of a v4 are one device, as on the machines themselves.
    cores = {"chip_config_name": "megacore"} if chip.name == "v4" else {}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **cores).devices
    except Exception as error:  # of several classes, by version
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"--topology={topology}: libtpu knows no such slice ({reason}).") from error


def update_of(config: Config, mesh: Any) -> tuple[Update, Any]:
    """The update step of `config.stage`, and the class of its batches. Nothing is compiled.

    Raises:
      ValueError: the mesh does not divide what it should.
    """
    from pasta_jax.preference.rounds import stage_of
    from pasta_jax.training.loop import SFT
    from pasta_jax.training.update import make_update

    stage = stage_of(config) if config.stage == "preference" else SFT
    return make_update(config, mesh, stage.loss_fn, stage.record), stage.record


def lower_update(config: Config, update: Update, record: Any) -> Any:
    """An update step, lowered for its mesh: parameters and optimizer over fsdp and tensor."""
    from pasta_jax import sharding

    state = sharding.abstract(update.shapes, update.shardings)
    base = sharding.abstract(update.base_shapes, update.base_shardings)
    return update.step.lower(state, base, sharding.abstract(_batch(config, record), update.batch_sharding))


def lower_reference(config: Config, mesh: Any) -> Any:
    """The second stage's pass over the reference model for log-probabilities, lowered for a mesh to decode on."""
    from pasta_jax import sharding
    from pasta_jax.arrays import ThreadedTokens
    from pasta_jax.model import param_shapes
    from pasta_jax.training.logprobs import reference_pass
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


# ------------------------------------------------------------------------------------------------------- jobs


@dataclasses.dataclass(frozen=True)
class Job:
    """A program to compile.

    Attributes:
      name: as "train".
      lower: lowers it (`jax.stages.Lowered`), which takes seconds.
      parts: bytes on one chip of what it is given, by name ("parameters", "optimizer", "pool"), and of what it
        keeps ("activations", an estimate).
      tokens: fed or decoded by one run, or by one step of its loop.
      steps: it is a loop of decode steps: costs are of one.
    """

    name: str
    lower: Callable[[], Any]
    parts: dict[str, int]
    tokens: int
    steps: bool = False


def training_jobs(config: Config, mesh: Any) -> list[Job]:
    """What training with `config.stage` runs: updates, and the reference pass of the second stage."""
    from pasta_jax import sharding
    from pasta_jax.experiment import stages
    from pasta_jax.model import param_shapes
    from pasta_jax.training.remat import bytes_of, device_memory

    jobs = []
    for stage in stages(config):
        tokens = stage.data.rows * stage.data.length
        if stage.stage == "preference":
            params = param_shapes(stage.model)
            own = sharding.decoding_mesh(mesh, params, device_memory(mesh))
            params = sharding.abstract(params, sharding.param_shardings(params, own))
            lower: Callable[[], Any] = functools.partial(lower_reference, stage, own)
            jobs.append(Job("reference", lower, {"parameters": bytes_of(params)}, tokens))
        update, record = update_of(stage, mesh)
        needs = update.remat.needs
        parts = dict(parameters=needs.parameters, optimizer=needs.optimizer, activations=needs.activations)
        name = "train" if stage.stage == "sft" else "preference"
        jobs.append(Job(name, functools.partial(lower_update, stage, update, record), parts, tokens))
    return jobs


def decoding_jobs(compiled: Compiled) -> list[Job]:
    """The prefill of the longest prompts and the decode loop over the whole pool: those that take most."""
    from pasta_jax.training.remat import bytes_of

    largest = {program.verb: program for program in compiled.programs}  # the last of each verb
    parts = {"parameters": bytes_of(compiled.shapes), "pool": bytes_of(compiled.batch_shapes())}
    admit, decode = largest["admit"], largest["decode"]
    step = compiled.rows * compiled.limits.lanes
    return [
        Job("admit", functools.partial(compiled.lower, admit), parts, admit.rows * admit.length),
        Job("decode", functools.partial(compiled.lower, decode), parts, step, steps=True),
    ]


# --------------------------------------------------------------------------------------- what a program's text says


def host_calls(text: str) -> list[str]:
    """The signs of waiting for the host in a compiled program's text (`compiled.as_text()`)."""
    return [sign for sign in HOST_CALLS if sign in text]
