"""The flags of commands that ask an endpoint."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import Any

from absl import flags

from pasta_jax.endpoint.client import KEY_VARIABLE, Endpoint
from pasta_jax.endpoint.cost import Prices
from pasta_jax.endpoint.post import EndpointError


def define_endpoint(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines them."""
    text: Any = functools.partial(flags.DEFINE_string, flag_values=values)
    whole: Any = functools.partial(flags.DEFINE_integer, flag_values=values)
    number: Any = functools.partial(flags.DEFINE_float, flag_values=values)
    text("base_url", None, "Of the endpoint, up to the version: http://localhost:8000/v1.")
    text("model", None, "The endpoint's model, as it calls it.")
    text("key_variable", KEY_VARIABLE, "The variable of the environment that holds the key.")
    whole("concurrency", 8, "Requests under way at once.", lower_bound=1)
    number("timeout", 120.0, "Seconds to wait for the endpoint to answer.", lower_bound=0.001)
    number("temperature", 0.0, "Of the endpoint's sampling.", lower_bound=0.0)
    number("price_in", 0.0, "Dollars for a million tokens that are sent.", lower_bound=0.0)
    number("price_out", 0.0, "Dollars for a million tokens of replies.", lower_bound=0.0)
    whole("budget_requests", None, "The most requests, with those that the cache has.", lower_bound=0)
    number("budget_dollars", None, "The most dollars, with those for what the cache has.", lower_bound=0.0)
    text("cache", None, "Folder of replies that are never asked for again.")
    whole("dry_run", None, "Show this many requests and what all would cost; send nothing.", lower_bound=0)


def endpoint_of(values: Mapping[str, Any], *, cache: str | None = None) -> Endpoint:
    """The endpoint that the flags describe.

    Args:
      values: of the flags, by name.
      cache: the folder of replies unless --cache names another.

    Raises:
      EndpointError: they describe none.
      InUse: another process uses the cache.
    """
    if not values["base_url"] or not values["model"]:
        raise EndpointError(
            "Name the endpoint and its model: --base_url=http://localhost:8000/v1 --model=NAME."
        )
    prices = Prices(values["price_in"], values["price_out"])
    if values["budget_dollars"] is not None and prices == Prices():
        raise EndpointError(
            "--budget_dollars needs the prices of a million tokens: --price_in and --price_out."
        )
    same = ("key_variable", "concurrency", "timeout", "temperature", "budget_requests", "budget_dollars")
    options = {name: values[name] for name in same}
    folder = values["cache"] or cache
    if values["dry_run"] is not None and not os.path.isdir(folder or ""):
        folder = None  # nothing is written
    return Endpoint(values["base_url"], values["model"], prices=prices, cache=folder, **options)
