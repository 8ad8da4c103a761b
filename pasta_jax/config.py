"""One experiment as typed frozen dataclasses: every field, its default and its documentation.

A file in `configs/` returns a `Config` and names only what it changes. `overrides` applies what the command line
changes on top of it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any, Literal, TypeAlias

from pasta_jax.fields import FieldError, check_fields, field
from pasta_jax.lang.tags import Dialect
from pasta_jax.messages import shown
from pasta_jax.model.config import Lora, ModelConfig
from pasta_jax.tokens.chat import Chat
from pasta_jax.tokens.positions import Positions

Remat: TypeAlias = Literal["auto", "none", "dots", "everything"]
"""What the backward pass computes again instead of keeping it, by growing time and shrinking memory: nothing; all
but matrix products and attention; every layer. `auto` is the first that fits (`training.remat`)."""


JUDGES = ("almanac", "likelihood", "llm")


def is_judge(name: str) -> bool:
    """Whether a name is that of a judge, or could be a function of the user's own.

    >>> is_judge("likelihood"), is_judge("my_judges:polite"), is_judge("polite")
    (True, True, False)
    """
    return name in JUDGES or all(part.strip() for part in name.partition(":"))


def remat_of(value: Any) -> Any:
    """The policy that a configuration or a checkpoint means, also by the true and false of older ones.

    >>> remat_of(True), remat_of("False"), remat_of("dots")
    ('everything', 'none', 'dots')
    """
    return {"true": "everything", "false": "none"}.get(str(value).lower(), value)


Turns: TypeAlias = Literal["all", "last"]
"""Which answers of a conversation are learnt: all of them, or the last."""

_FILES = re.compile(r"hf:.+|.+\.(jsonl|json)(\.gz|\.zst)?|.+\.parquet", re.DOTALL)


PREPARED = "prepared:"
"""Before the name of a folder of prepared data, where names of files stand too (`data.prepared`)."""


def is_records(name: str) -> bool:
    """Whether a name is that of a file or data set of records (`data.reading`).

    >>> is_records("mine.jsonl.gz"), is_records("hf:owner/name:test"), is_records("almanac:base")
    (True, True, False)
    """
    return _FILES.fullmatch(name) is not None


class ConfigError(ValueError):
    """A configuration that cannot work; the message says what to change."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The training data, and how it is cut into batches."""

    sources: tuple[tuple[str, float], ...] = field(
        (("almanac:annotated", 1.0),), "almanac:NAME, files of records as a.jsonl, or prepared:FOLDER"
    )
    columns: tuple[tuple[str, str], ...] = field(
        (), "a file's own keys for prompt, response, system, messages: prompt=title+body,response=answer"
    )
    turns: Turns = field("all", "answers of a conversation that are learnt: all, or the last")
    too_long: Literal["drop", "turn", "sentence"] = field(
        "drop", "for more than a row: drop the record, or only the turn, or cut after a sentence or block"
    )
    max_unusable: float = field(
        0.1, "share of records that cannot be used; more stop the run", least=0, most=1
    )
    tokenizer: str = field("almanac", "almanac, tokenizer.model, tokenizer.json, or a folder with one")
    extend_tokenizer: bool = field(False, "give tags new ids if the tokenizer has none to spare")
    chat: Chat = field("auto", "format of prompts; auto follows the chat template or the control tokens")
    rows: int = field(8, "B, rows of a batch", least=1)
    length: int = field(512, "L, tokens of a row; no document may be longer", least=1)
    threads: int = field(16, "T, the maximum number of threads of an answer, main included", least=1)
    max_depth: int = field(1, "how deep promises may nest; the paper uses 1", least=1)
    positions: Positions = Positions()
    dialect: Dialect = field("pasta", "which tags: pasta's, or apar's bare promises without sync")
    held_out: str = field("", "a file of records, or a share as 0.05: measured, never trained on")

    def __post_init__(self) -> None:
        check_fields(self)
        if self.held_out and not self.held_out_file:
            try:
                share = float(self.held_out)
            except ValueError:
                share = math.nan
            if not 0 < share < 1:
                message = "held_out must be a file of records, as a.jsonl, or a share between 0 and 1, got"
                raise FieldError(f"{message} {shown(self.held_out)}.")

    @property
    def held_out_share(self) -> float:
        """The share of the examples that is held out; 0 if those of a file are, or none."""
        return float(self.held_out) if self.held_out and not self.held_out_file else 0.0

    @property
    def held_out_file(self) -> str:
        """The file whose examples are held out, or ""."""
        is_file = is_records(self.held_out) or self.held_out.startswith(PREPARED)
        return self.held_out if is_file else ""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with warm-up, a schedule and gradient clipping."""

    lr: float = field(1e-3, "peak learning rate", least=0)
    warmup_steps: int = field(50, "of a linear warm-up from zero to lr", least=0)
    schedule: Literal["constant", "linear", "cosine"] = field("cosine", "of the decay to lr * final_lr")
    final_lr: float = field(0.1, "at the last step, as a fraction of lr", least=0)
    weight_decay: float = field(0.01, "of matrices only, never of norms", least=0)
    b1: float = field(0.9, "decay of the mean of gradients", least=0, below=1)
    b2: float = field(0.95, "decay of the mean of squared gradients", least=0, below=1)
    eps: float = field(1e-8, "added to the root of that mean", above=0)
    clip_norm: float = field(1.0, "maximum global norm of the gradient; 0 is off", least=0)

    def __post_init__(self) -> None:
        check_fields(self)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The number of devices along each mesh axis; one axis may be -1, which takes the rest."""

    data: int = field(1, "splits rows", least=-1)
    fsdp: int = field(-1, "splits rows, parameters and optimizer", least=-1)
    tensor: int = field(1, "splits heads and the inner dimension of the MLP", least=-1)

    def __post_init__(self) -> None:
        check_fields(self)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save: after so many steps or minutes, whichever comes first, and after the last step."""

    every_steps: int = field(500, "0 is off", least=0)
    every_minutes: float = field(10.0, "0 is off", least=0, most=math.inf)
    keep: int = field(3, "number of checkpoints to keep; older ones are deleted", least=1)

    def __post_init__(self) -> None:
        check_fields(self)


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What is logged during training."""

    every: int = field(10, "steps between lines of metrics.jsonl", least=1)
    tb: bool = field(False, "TensorBoard too (pip install tensorboardX)")
    wandb: str = field("", "Weights & Biases too: the name of a project (pip install wandb)")
    held_out_every: int = field(100, "steps between measurements of data.held_out", least=1)
    profile: str = field("", "steps to profile, FIRST:END as 10:13 for 10, 11 and 12; in WORKDIR/profile")

    def __post_init__(self) -> None:
        check_fields(self)
        if not re.fullmatch(r"(\d{1,9}:\d{1,9})?", self.profile) or (self.profile and not self.profiled):
            raise FieldError(
                f"profile must be FIRST:END, as 10:13 for steps 10, 11 and 12, got {shown(self.profile)}."
            )

    @property
    def profiled(self) -> range:
        """The steps to profile."""
        first, _, end = self.profile.partition(":")
        return range(max(1, int(first)), int(end)) if end else range(0)


@dataclasses.dataclass(frozen=True)
class PreferenceConfig:
    """The second stage, in rounds: sample, score, pair, train (paper section 4)."""

    baseline: str = field("", "workdir of a sequential model, the opponent; empty: that of init_from")
    prompts: str = field(
        "almanac", "almanac (new prompts each round), or a file; its answers are opponents too"
    )
    prompts_per_round: int = field(256, "prompts sampled and judged in a round", least=1)
    rounds: int = field(2, "of sampling and training", least=1)
    samples: int = field(8, "N, answers to each prompt", least=2)
    temperature: float = field(1.0, "of sampling; at 0 all samples are the same", above=0)
    quality_weight: float = field(
        4.0, "lambda: score = efficiency + lambda * quality; inf is quality alone", least=0, most=math.inf
    )
    efficiency: Literal["speedup", "parallelism", "harmonic", "arithmetic"] = field(
        "speedup", "speedup, parallelism, or their harmonic or arithmetic mean"
    )
    efficiency_when: Literal["always", "not_worse"] = field(
        "always", "not_worse: speed counts only where the answer is judged no worse, quality >= 1"
    )
    judge: str = field("almanac", "almanac, likelihood, llm or MODULE:FUNCTION; compares two answers")
    judge_model: str = field("", "likelihood: workdir, empty: that of init_from; llm: the endpoint's model")
    judge_url: str = field("", "llm: the endpoint, as http://localhost:8000/v1")
    judge_key_variable: str = field("OPENAI_API_KEY", "llm: the variable of the environment with the key")
    judge_concurrency: int = field(8, "llm: requests under way at once", least=1)
    judge_timeout: float = field(120.0, "llm: seconds to wait for the endpoint to answer", above=0)
    judge_price_in: float = field(0.0, "llm: dollars for a million tokens that are sent", least=0)
    judge_price_out: float = field(0.0, "llm: dollars for a million tokens of replies", least=0)
    judge_budget: float = field(0.0, "llm: the most dollars in a round; 0: any", least=0)
    loss: Literal["bonbon", "ipo", "dpo"] = field(
        "bonbon", "bonbon is the paper's; formulas: training.losses"
    )
    alpha: float = field(0.005, "bonbon: weight of the better answer's likelihood", least=0, most=1)
    margin: float = field(0.0, "bonbon, ipo: nats; 0 is (N-1) H_(N-1), which best-of-N implies", least=0)
    beta: float = field(0.1, "dpo: steepness", above=0)
    lr: float = field(5e-7, "peak learning rate of this stage; the rest is as in config.optimizer", least=0)
    epochs_per_round: float = field(1.0, "passes over the pairs of a round", above=0)
    sampling_rows: int = field(32, "answers sampled at once", least=1)
    sampling_lanes: int = field(4, "S while sampling", least=1)

    def __post_init__(self) -> None:
        check_fields(self)
        if not is_judge(self.judge):
            raise FieldError(
                f"judge must be {', '.join(JUDGES)} or MODULE:FUNCTION, got {shown(self.judge)}."
            )
        if self.judge == "llm" and not (self.judge_model and self.judge_url):
            raise FieldError(
                "judge_url and judge_model must be set for judge=llm: http://localhost:8000/v1, and the endpoint's "
                "name of a model."
            )
        if self.judge_budget and not (self.judge_price_in or self.judge_price_out):
            raise FieldError(
                "judge_budget needs the prices of a million tokens: judge_price_in, judge_price_out."
            )


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment."""

    stage: Literal["sft", "preference", "both"] = field("sft", "both: first sft, then preference")
    seed: int = field(0, "of new weights and of the order of the data", least=0, most=2**32 - 1)
    steps: int = field(1000, "optimizer steps", least=1)
    epochs: float = field(0.0, "passes over the data; if above 0, steps follows from it", least=0)
    init_from: str = field("", "workdir or checkpoint to start from, model and tokenizer; empty: scratch")
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    lora: Lora = Lora()
    param_dtype: Literal["", "float32", "bfloat16"] = field("", "of what is trained; empty: model.dtype")
    microbatches: int = field(
        1, "parts of a batch computed in turn, to save memory; divides data.rows", least=1
    )
    remat: Remat = field("auto", "what the backward pass computes again; auto by the devices' memory")
    preference: PreferenceConfig = PreferenceConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    def __post_init__(self) -> None:
        object.__setattr__(self, "remat", remat_of(self.remat))
        try:
            check_fields(self)
        except FieldError as error:
            raise ConfigError(f"config.{error}") from None
        self._check_training()
        if self.stage == "preference" and not self.init_from:
            raise ConfigError(
                "config.init_from is empty: preference optimization starts from a finetuned model. Add "
                "--config.init_from=WORKDIR, or set stage to both."
            )
        if not self.data.sources:
            raise ConfigError("config.data.sources is empty. Name at least one, as in almanac:annotated.")
        if not all(0 < weight < math.inf for _, weight in self.data.sources):
            raise ConfigError(f"config.data.sources: weights must be positive, got {self.data.sources}.")

    def _check_training(self) -> None:
        if self.data.rows % self.microbatches:
            raise ConfigError(
                f"config.microbatches={self.microbatches} does not divide config.data.rows={self.data.rows}. "
                "Each part has the same number of rows; change one of them."
            )
        if self.lora.rank and not self.init_from:
            raise ConfigError(
                "config.init_from is empty: adapters go beside the weights of a trained model. Add "
                "--config.init_from=WORKDIR, or set --config.lora.rank=0."
            )
        rows = self.lora.rows
        if len(set(rows)) < len(rows) or not all(0 <= row < self.model.vocab_size for row in rows):
            raise ConfigError(
                f"config.lora.rows must be different ids below model.vocab_size={self.model.vocab_size}, "
                f"got {rows}."
            )

    @property
    def trained_dtype(self) -> str:
        """The dtype of trained parameters and their optimizer state."""
        return self.param_dtype or self.model.dtype
