"""A language model that can decode: weights, sizes, tokenizer."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from jax.sharding import Mesh

from pasta_jax import sharding
from pasta_jax.decoding.compiled import CHANGES, Form
from pasta_jax.messages import shown
from pasta_jax.model import ModelConfig, param_count
from pasta_jax.tokens.positions import Positions
from pasta_jax.tokens.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A language model that can decode.

    Attributes:
      params: nested dict of arrays, named as `Transformer` names them. On a mesh they are where `sharding` puts
        them, and decoding is spread over the same devices.
      config: sizes and choices.
      tokenizer: with an id for each tag piece.
      positions: the scheme that the model was trained with.
      max_depth: how deep its promises may nest.
    """

    params: Any
    config: ModelConfig
    tokenizer: Tokenizer
    positions: Positions = Positions()
    max_depth: int = 1

    def __repr__(self) -> str:
        c = self.config
        sizes = f"{c.num_layers} layers, D {c.model_dim}, V {c.vocab_size:,}, {c.dtype}"
        return f"Model({sizes}; {param_count(self.params):,} parameters)"

    @property
    def mesh(self) -> Mesh | None:
        """The mesh that the parameters are on; None if that is one device."""
        return sharding.mesh_of(self.params)

    def params_as(self, form: Form) -> Any:
        """The parameters as decode steps read them. A second copy of some of them is made once and kept."""
        if form not in self._forms:
            self._forms[form] = CHANGES[form](self.params)
        return self._forms[form]

    @functools.cached_property
    def _forms(self) -> dict[Form, Any]:
        return {"plain": self.params}


def check_model(model: Any) -> None:
    """Raises ValueError for what is no model, such as its path."""
    if not isinstance(model, Model):
        raise ValueError(f"model={shown(model)} is no model. Give what pasta_jax.load returns for a path.")
