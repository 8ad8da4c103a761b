"""Serves a model to OpenAI's clients and to a browser: `python -m pasta_jax.serve --ckpt=W`.

Everything that requests may need is compiled before the port opens. SIGTERM or Ctrl-C ends the server when all that
it has taken is answered; a second one breaks these answers off. docs/server.md describes the endpoints.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from pasta_jax import verbs
from pasta_jax.extras import optional
from pasta_jax.memory import is_out_of_memory
from pasta_jax.verbs import begin_first, define_loading, define_processes, loading_options, refuse

if TYPE_CHECKING:
    from pasta_jax.decoding.engine import Decoder
    from pasta_jax.serve.app import Settings

LOG = logging.getLogger("pasta_jax")

LOOPBACK = ("localhost", "127.0.0.1", "::1")


class JsonLines(logging.Formatter):
    """A JSON object a line, for programs; with the fields of a request, if the line is of one."""

    def format(self, record: logging.LogRecord) -> str:
        line = {"time": round(record.created, 3), "level": record.levelname, "message": record.getMessage()}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line | getattr(record, "fields", {}))


def log_for_programs() -> None:
    """Makes each line of the log a JSON object, the warnings of libraries such as uvicorn included."""
    for handler in (*LOG.handlers, *logging.getLogger().handlers):
        handler.setFormatter(JsonLines())


def main(argv: Sequence[str]) -> None:
    """The command. Usage errors, and a model that cannot be served, end in one line and status 2."""
    values = flags.FLAGS
    if len(argv) > 1:
        refuse(f"{argv[1]} is no flag. --help shows them.")
    if not values.ckpt:
        refuse(f"Add --ckpt=WORKDIR. {__doc__.splitlines()[0]}")
    try:
        for package in ("starlette", "uvicorn"):
            optional(package, "serve", "The server")
    except ImportError as error:
        refuse(str(error))
    begin_first()
    # Until the server itself listens for them. In a container, a signal that nobody asked for is lost; and so is an
    # exception of a handler that is called within a callback of jax's.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: os._exit(128 + number))
    if values.log_prompts or not sys.stderr.isatty():
        log_for_programs()
    from pasta_jax.serve.app import Service
    from pasta_jax.serve.server import Server, bound

    settings = _settings(values)
    if not settings.keys and values.host not in LOOPBACK:
        LOG.warning("Anybody who reaches %s may use this server. Set $%s.", values.host, values.key_variable)
    try:
        listening = bound(values.host, values.port)
    except OSError as error:
        refuse(
            f"--host={values.host} --port={values.port}: {error.strerror}. Choose another, or port 0: any."
        )
    with listening:
        service = Service(_decoder(values), settings)
        Server(service, lambda url: print(f"Serving {settings.model} at {url}", flush=True)).run([listening])


def _settings(values: Any) -> Settings:
    from pasta_jax.serve.app import Settings

    keys = tuple(key.strip() for key in os.environ.get(values.key_variable, "").split(",") if key.strip())
    for proxy in values.proxies:
        try:
            ipaddress.ip_network(proxy)
        except ValueError as error:
            refuse(f"--proxies: {error}. Give addresses or networks, such as 127.0.0.1,10.0.0.0/8.")
    return Settings(
        model=values.name or os.path.basename(os.path.abspath(values.ckpt)),
        max_new_tokens=values.max_new_tokens,
        keys=keys,
        hosts=LOOPBACK if values.host in LOOPBACK and not keys else (),
        proxies=tuple(values.proxies),
        most_bytes=values.most_bytes,
        rate=values.rate,
        drain_delay_s=values.drain_delay,
        log_prompts=values.log_prompts,
    )


def _decoder(values: Any) -> Decoder:
    """Loads the model and compiles everything. What cannot be served is one line, and status 2."""
    from pasta_jax.checkpoints.about import CheckpointError
    from pasta_jax.decoding.engine import Decoder
    from pasta_jax.decoding.fits import DoesNotFit
    from pasta_jax.decoding.prefixes import PROMPT_BLOCK
    from pasta_jax.decoding.state import Limits
    from pasta_jax.loading import load
    from pasta_jax.rounding import round_up

    if values.reuse and values.cache_len % PROMPT_BLOCK:
        refuse(
            f"--cache_len={values.cache_len}: with --reuse it must be a multiple of {PROMPT_BLOCK}. "
            f"Give {round_up(values.cache_len, PROMPT_BLOCK)}."
        )
    start, threads = time.monotonic(), values.max_branches + 1
    try:
        model = load(values.ckpt, **loading_options(values))
        limits = Limits(
            lanes=min(values.lanes, threads),
            threads=threads,
            pool=values.cache_len,
            max_depth=model.max_depth,
        )
        decoder = Decoder(
            model,
            limits=limits,
            rows=values.rows,
            queue=values.queue,
            reuse=values.reuse,
            admission=values.admission,
            batch_invariant=values.batch_invariant,
        )
        decoder.warm_up(run=True)
    except DoesNotFit as error:
        refuse(f"{error.problem} Lower --rows, --cache_len or --max_branches.")
    except (CheckpointError, ValueError) as error:
        refuse(str(error))
    except Exception as error:
        if not is_out_of_memory(error):  # where it is not known how much is free
            raise
        refuse(f"Out of memory. Lower --rows, --cache_len or --max_branches. {error}".splitlines()[0])
    LOG.info("Loaded and compiled in %.0f s.", time.monotonic() - start)
    return decoder


def command() -> None:
    """Parses the command line and runs `main`."""
    flags.DEFINE_string("ckpt", None, "Workdir or checkpoint of the model.")
    define_loading()
    flags.adopt_module_key_flags(verbs)  # so that --help shows them
    flags.DEFINE_string("host", "127.0.0.1", "Address to listen at; 0.0.0.0 is every one of this machine.")
    flags.DEFINE_integer(
        "port", 8000, "Port to listen at; 0: any that is free.", lower_bound=0, upper_bound=65535
    )
    flags.DEFINE_string("name", None, "The model's name for clients; by default that of its folder.")
    flags.DEFINE_integer("rows", 8, "Requests that are decoded at once.", lower_bound=1)
    flags.DEFINE_integer("queue", 64, "Requests that may wait for a row; more are refused.", lower_bound=0)
    flags.DEFINE_integer("lanes", 8, "Maximum threads of a request that decode in one step.", lower_bound=1)
    flags.DEFINE_integer("max_branches", 15, "Maximum promises in an answer.", lower_bound=0)
    flags.DEFINE_integer("cache_len", 2048, "Maximum tokens of prompt and answer.", lower_bound=1)
    flags.DEFINE_integer(
        "max_new_tokens", 512, "Maximum tokens of an answer, if a request does not say.", lower_bound=1
    )
    flags.DEFINE_integer(
        "reuse", 0, "Bytes for the beginnings of prompts, fed once for all that begin alike.", lower_bound=0
    )
    flags.DEFINE_string(
        "admission",
        "all",
        "Which threads a step decodes: all; cap:4, at most so many of a request; cost, those that make most tokens "
        "a second; cost:0.05, the same as far as each of several requests has a token in 0.05 s.",
    )
    flags.DEFINE_bool("batch_invariant", False, "Make answers independent of other requests, bit for bit.")
    flags.DEFINE_string(
        "key_variable", "PASTA_API_KEY", "Environment variable with the API key, or several with commas."
    )
    flags.DEFINE_integer(
        "rate", 0, "Maximum requests of one client in a minute; 0: any number.", lower_bound=0
    )
    flags.DEFINE_list(
        "proxies", [], "Addresses or networks of proxies, whose X-Forwarded-For says who the client is."
    )
    flags.DEFINE_integer("most_bytes", 2**20, "Maximum bytes of a request.", lower_bound=1)
    flags.DEFINE_float(
        "drain_delay", 0.0, "Seconds in which requests are still taken after SIGTERM.", lower_bound=0.0
    )
    flags.DEFINE_bool("log_prompts", False, "Write prompts and answers into the log.")
    define_processes()
    verbs.run_main(main)


if __name__ == "__main__":
    command()
