"""What one program takes of one chip and how long it needs at least: `examine` compiles it, `lines` says it."""

from __future__ import annotations

import dataclasses
import glob
import os
import re
import tempfile
import time
from typing import Any

from pasta_jax.chips import Chip
from pasta_jax.compile import hlo
from pasta_jax.compile.cost import Cost, by_kind, cost_of
from pasta_jax.compile.programs import Job, host_calls
from pasta_jax.memory import GIB, gib


@dataclasses.dataclass(frozen=True)
class Report:
    """What the compiler made of a program, for one chip.

    Attributes:
      name: of the program.
      parts: bytes by name; together what it takes.
      limit: bytes that a chip has.
      cost: of a run, or of one decode step; None if it does not fit.
      seconds: at least, by resource.
      tokens: of a run or step.
      calls: signs of waiting for the host.
      compile_s: seconds to compile.
      too_much: what the compiler says, if it does not fit.
    """

    name: str
    parts: dict[str, int]
    limit: int
    cost: Cost | None
    seconds: dict[str, float]
    tokens: int
    calls: list[str]
    compile_s: float
    too_much: str = ""

    @property
    def fits(self) -> bool:
        return not self.too_much

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def bound(self) -> str:
        """The resource that takes longest."""
        return max(self.seconds, key=lambda name: self.seconds[name]) if self.seconds else ""

    @property
    def tokens_per_s(self) -> float:
        """At most, of the whole slice."""
        return self.tokens / max(self.seconds.values()) if self.seconds else 0.0


def examine(job: Job, chip: Chip, shape: tuple[int, ...]) -> Report:
    """Compiles a program for a slice and reads what it takes."""
    with tempfile.TemporaryDirectory(prefix="pasta_jax_compile_") as folder:
        start = time.monotonic()
        try:
            compiled = job.lower().compile(
                compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
            )
        except Exception as error:  # the compiler's own class, which jax does not document
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            took = time.monotonic() - start
            return Report(job.name, job.parts, chip.hbm, None, {}, job.tokens, [], took, _reason(error))
        compile_s = time.monotonic() - start
        memory, text = compiled.memory_analysis(), _text(compiled, folder)
    program = hlo.parse(text)
    cost = cost_of(program, program.loop if job.steps else "")
    parts = {name: size for name, size in job.parts.items() if name != "activations"}
    given = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    parts["other arguments and results"] = max(0, given - sum(parts.values()))
    kept = min(job.parts.get("activations", 0), memory.temp_size_in_bytes)
    parts |= {"activations": kept} if kept else {}
    parts["temporaries"] = memory.temp_size_in_bytes - kept
    parts["code"] = memory.generated_code_size_in_bytes
    seconds = cost.seconds(chip, shape)
    return Report(job.name, parts, chip.hbm, cost, seconds, job.tokens, host_calls(text), compile_s)


def _text(compiled: Any, folder: str) -> str:
    """The text of a compiled program, as the compiler has written it into a folder, or else as jax has it.

    A libtpu that is newer than jaxlib may use what that jaxlib cannot read.
    """
    written = glob.glob(os.path.join(folder, "*.after_codegen.txt"))
    if not written:
        return str(compiled.as_text())
    with open(max(written, key=os.path.getsize), encoding="utf-8") as file:
        return file.read()


def lines(report: Report) -> list[str]:
    """A report in lines: memory, then costs, and what follows for the speed."""
    head = f"{report.name} (compiled in {report.compile_s:.0f} s)"
    if report.cost is None:
        return [f"{head}: DOES NOT FIT. {report.too_much}"]
    parts = ", ".join(f"{name} {_size(size)}" for name, size in report.parts.items() if size >= 2**20)
    one = "a step" if report.name == "decode" else "a run"
    sent = ", ".join(
        f"{name} {_size(size)}" for name, size in by_kind(report.cost.collectives).items() if size >= 2**16
    )
    times = ", ".join(f"{name} {_time(value)}" for name, value in report.seconds.items())
    made = [
        f"{head}: fits, {_size(report.total)} of {gib(report.limit)} GiB a chip ({parts})",
        f"    {one}: {report.cost.flops / 1e12:.3g} TFLOP, {_size(report.cost.bytes)} of memory, "
        f"received from others {sent or 'nothing'}",
        f"    at least {times}: bound by {report.bound}, at most {report.tokens_per_s:,.0f} tokens/s",
    ]
    return made + ([f"    WAITS FOR THE HOST: {', '.join(report.calls)}"] if report.calls else [])


def _size(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _reason(error: Exception) -> str:
    """What the compiler says of memory, in its own words."""
    text = " ".join(str(error).split())
    match = re.search(r"the total memory.*?(?= HLO module|$)", text) or re.search(r"Ran out of.*", text)
    return (match.group() if match else text)[:300]
