"""What several tests use: small models, folders, scripts. No test imports another test."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import jax
import pytest

from pasta_jax import kept

FULL = bool(os.environ.get("PASTA_FULL"))
"""Full counts, as continuous integration runs them."""

SEEDS_ARE_FIXED = os.environ.get("PASTA_SEED", "0") == "0"
"""Only then may a test assert something about the draw itself."""

ONE_DEVICE = os.environ["OLDER_GENERATOR"]
"""XLA_FLAGS of a subprocess that sees the devices that a user sees. (libtpu refuses them: see conftest.py.)"""

AS_FOR_USERS: dict[str, Any] = {"xla_cpu_use_fusion_emitters": True} if ONE_DEVICE else {}
"""Compiler options of what is compiled within `optimized`."""


@contextlib.contextmanager
def optimized() -> Iterator[None]:
    """Compiles as for users; other tests compile with less care."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


only_full = pytest.mark.skipif(not FULL, reason="one of .ci/run's full counts")
"""For a test that only continuous integration runs."""


def slow(*values: Any) -> Any:
    """A case of `pytest.mark.parametrize` that `make quick` leaves out."""
    return pytest.param(*values, marks=pytest.mark.slow)


def full(*values: Any) -> Any:
    """A case of `pytest.mark.parametrize` that only continuous integration runs: it proves again what others do."""
    return pytest.param(*values, marks=only_full)


@contextlib.contextmanager
def programs_kept() -> Iterator[None]:
    """Decoders keep their programs whole, as those of commands do: one of sizes that were there before traces none.

    For tests that make the same decoder again and again, and patch nothing that its programs are made of.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept, "programs", os.environ["JAX_COMPILATION_CACHE_DIR"])
        yield


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """The programs that are compiled meanwhile, or read from the cache on disk, by name."""
    names: list[str] = []

    def listen(event: str, duration_secs: float, **about: Any) -> None:
        if event.endswith("/backend_compile_duration"):
            names.append(str(about.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
