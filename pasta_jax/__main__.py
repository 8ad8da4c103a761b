"""Answers a prompt: `python -m pasta_jax --ckpt=W "List the capitals of France and Peru."`.

Prints the answer, with --stream as it is decoded; on stderr its cost and, with --timeline, its threads over time.
--trace=FILE.html or FILE.png writes them as a page or a figure. Without a prompt it is what comes on stdin; on a
terminal it is a conversation.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from pasta_jax import __version__, verbs
from pasta_jax.memory import is_out_of_memory
from pasta_jax.verbs import begin_first, define_loading, define_processes, loading_options, refuse, say

if TYPE_CHECKING:
    from pasta_jax.decoding.results import DecodeResult

MODES = ["parallel", "sequential", "both"]


def main(argv: Sequence[str], decoding: Sequence[flags.FlagHolder]) -> None:
    """The command; `decoding` are the flags that `decode` takes. Usage errors end in one line and status 2."""
    values = flags.FLAGS
    if values.version:
        print(__version__)
        return
    if len(argv) > 2:
        refuse(f"{len(argv) - 1} prompts were given, {' '.join(argv[1:])[:80]!r}. Put the prompt in quotes.")
    if not values.ckpt:
        refuse(f"Add --ckpt=WORKDIR. {__doc__.splitlines()[0]}")
    is_conversation = len(argv) < 2 and all(file and file.isatty() for file in (sys.stdin, sys.stdout))
    if is_conversation and (flag := _for_one_answer(values)):
        refuse(f"{flag} is for a single answer, not for a conversation. Add a prompt.")
    if values.stream and values.annotated:
        refuse("--stream prints the text as it settles, --annotated the whole with its tags. Choose one.")
    if values.trace:
        from pasta_jax.decoding.timeline import check_path

        try:
            check_path(values.trace)
        except ValueError as error:
            refuse(f"--trace={error}")
        except ImportError as error:
            refuse(str(error))
    begin_first()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # what is no UTF-8 is refused with the prompt
    options = {flag.name: flag.value for flag in decoding}
    if is_conversation:
        _converse(values, options)
        return
    prompt = argv[1] if len(argv) > 1 else _piped()
    result = _answer(prompt, values, options)
    from pasta_jax.terminal import CUT, harmless, timeline

    if not values.stream:
        text = result.annotated if values.annotated else result.text
        print(harmless(text) if sys.stdout.isatty() else text, flush=True)
    stats = result.stats
    summary = [
        f"{stats.decode_steps} steps for {stats.text_tokens} tokens of text",
        f"{len(result.branches)} branches",
        f"{stats.wall_s:.3f} s{'' if values.mode == 'both' else ' without loading and compiling'}",
    ]
    if cut := CUT.get(result.stop_reason):
        summary.append(cut)
    if stats.measured_speedup:
        other = f"{stats.sequential_text_tokens} tokens in {stats.sequential_wall_s:.3f} s"
        summary.append(f"without promises {other}: {stats.measured_speedup:.2f}x the tokens per second")
    print(f"[{', '.join(summary)}]", file=sys.stderr)
    for issue in result.issues:
        print(f"[{issue}]", file=sys.stderr)
    if values.timeline:
        print(timeline(result), file=sys.stderr)
    if values.trace:
        dataclasses.replace(result.timeline(), title=prompt).save(values.trace)
        print(f"[{values.trace} has the threads over time]", file=sys.stderr)


def _for_one_answer(values: flags.FlagValues) -> str | None:
    """A flag that asks for what a conversation does not have."""
    if values.mode == "both":
        return "--mode=both"
    return next((f"--{name}" for name in ("annotated", "timeline", "trace") if values[name].value), None)


def _piped() -> str:
    """The prompt that comes on stdin: all of it, without the end of its last line."""
    prompt = sys.stdin.read().removesuffix("\n") if sys.stdin else ""
    return prompt or refuse("Add a prompt, in quotes or on stdin.")


def _answer(prompt: str, values: flags.FlagValues, options: dict[str, Any]) -> DecodeResult:
    """Decodes, with --stream to stdout."""
    from pasta_jax import decode, load
    from pasta_jax.terminal import ERASE, printer

    live, started = values.stream and sys.stdout.isatty(), time.monotonic()
    with _refusing():
        if sys.stderr.isatty():
            say("Loading", started)
        model = load(values.ckpt, **loading_options(values))
        if sys.stderr.isatty():
            say("Answering (programs are compiled the first time, and kept)", started)
        try:
            return decode(
                model, prompt, **options, stream=printer(sys.stdout, live=live) if values.stream else False
            )
        except KeyboardInterrupt:
            if live:
                print(ERASE)  # the text behind the cursor, which is not settled
            raise


def _converse(values: flags.FlagValues, options: dict[str, Any]) -> None:
    from pasta_jax import load
    from pasta_jax.live.conversation import converse

    with _refusing():
        converse(load(values.ckpt, **loading_options(values)), **options)


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """What cannot be decoded is one line, and status 2."""
    from pasta_jax.checkpoints.about import CheckpointError
    from pasta_jax.decoding.fits import DoesNotFit

    try:
        yield
    except DoesNotFit as error:
        refuse(error.for_decode)
    except (CheckpointError, ValueError) as error:
        refuse(str(error))
    except Exception as error:
        if not is_out_of_memory(error):  # where it is not known how much is free
            raise
        refuse(f"Out of memory. Lower --max_new_tokens, or shorten the prompt. {error}".splitlines()[0])


def command() -> None:
    """Parses the command line and runs `main`."""
    flags.DEFINE_string("ckpt", None, "Workdir or checkpoint of the model.")
    define_loading()
    flags.adopt_module_key_flags(verbs)  # so that --help shows them
    decoding = [
        flags.DEFINE_enum("mode", "parallel", MODES, "How to decode; both compares their times."),
        flags.DEFINE_integer("max_new_tokens", 512, "Maximum tokens of answer and tags.", lower_bound=1),
        flags.DEFINE_integer("max_branches", 15, "Maximum promises in the answer.", lower_bound=0),
        flags.DEFINE_integer("lanes", 8, "Maximum threads that decode in one step.", lower_bound=1),
        flags.DEFINE_float("temperature", 0.0, "0 is greedy.", lower_bound=0.0),
        flags.DEFINE_integer("top_k", 0, "Sample among this many likeliest tokens; 0: all.", lower_bound=0),
        flags.DEFINE_float("top_p", 1.0, "Sample among the likeliest tokens of this probability; 1: all."),
        flags.DEFINE_float("min_p", 0.0, "Leave out tokens below this share of the likeliest one; 0: none."),
        flags.DEFINE_integer("seed", 0, "Seed of the sampling."),
        flags.DEFINE_float("open_bias", 0.0, "Added to the logit that opens a promise; above 0 opens more."),
        flags.DEFINE_multi_string("stop", [], "End the answer before this text. May be repeated."),
        flags.DEFINE_bool("grammar", True, "Allow only well-formed tags; else malformed ones become text."),
        flags.DEFINE_integer("cache_len", None, "Maximum tokens of prompt and answer; by default both fit."),
        flags.DEFINE_bool(
            "batch_invariant",
            False,
            "Make the answer independent of other prompts, bit for bit; needs --cache_len.",
        ),
    ]
    flags.DEFINE_bool("stream", False, "Print text as it is decoded, in a terminal with later text, faint.")
    flags.DEFINE_bool("annotated", False, "Print the answer with its tags.")
    flags.DEFINE_bool("version", False, "Print the version and exit.")
    flags.DEFINE_bool("timeline", False, "Draw the threads over time.")
    flags.DEFINE_string(
        "trace", None, "Write the threads over time as a page, FILE.html, or a figure, FILE.png."
    )
    define_processes()
    verbs.run_main(lambda argv: main(argv, decoding))


if __name__ == "__main__":
    command()
