"""Preference optimisation in rounds: sample, score, pair, train, and again from what came out.

    WORKDIR/round-1/samples.jsonl    the policy's answers with their traces
                    pairs.jsonl      scores, and which samples make the pair
                    reference.npz    log-probabilities of the chosen ones under the policy that drew them
                    checkpoints/     the next policy, metrics.jsonl beside it
                    round.json       how it went; it is written last
            round-2/...

The model that draws a round's samples is where its training starts from, and its reference. With adapters
(config.lora) those of a round go on from those of the one before, all beside the same weights; the model is both.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from pasta_jax.arrays import PairedTokens
from pasta_jax.checkpoints.about import checkpoint_mark, find
from pasta_jax.config import Config, ConfigError, PreferenceConfig, to_dict
from pasta_jax.data import almanac
from pasta_jax.data.batches import permuted
from pasta_jax.data.records import RecordError, read_records
from pasta_jax.decoding.engine import Model
from pasta_jax.files import replacing
from pasta_jax.interchange.origin import carry
from pasta_jax.lang.assemble import assemble
from pasta_jax.loading import load
from pasta_jax.model import init_params
from pasta_jax.preference.pairs import Choice, Pair, choose_all, make_pairs, pair_batches, steps_for
from pasta_jax.preference.sample import Prompt, Record, sample
from pasta_jax.preference.score import scores
from pasta_jax.sharding import make_mesh, param_shardings
from pasta_jax.tokens.tokenizer import Tokenizer
from pasta_jax.training.loop import Stage, train
from pasta_jax.training.losses import bonbon_margin, preference_loss
from pasta_jax.training.microbatches import rows_sharding

LOG = logging.getLogger("pasta_jax")


def run(config: Config, workdir: str) -> str:
    """All rounds, those that are done already apart.

    Returns:
      the workdir of the last one.

    Raises:
      ConfigError: prompts that the judge does not know, no pairs, or a workdir of another experiment.
      CheckpointError: as `train`.
    """
    policy = config.init_from
    for number in range(1, config.preference.rounds + 1):
        policy = run_round(config, number, policy, os.path.join(workdir, f"round-{number}"))
    LOG.info("All rounds are done; the model is in %s.", policy)
    return policy


def run_round(config: Config, number: int, policy: str, folder: str) -> str:
    """One round from the model in the workdir `policy`; returns `folder`, the workdir of the next policy."""
    os.makedirs(folder, exist_ok=True)
    _check_same(os.path.join(folder, "about.json"), config, policy)
    if os.path.exists(os.path.join(folder, "round.json")):
        LOG.info("Round %d was done before.", number)
        return folder

    # ------------------------------------------------------------------------- sample, score, pair; train

    wishes, data, seed = config.preference, config.data, _seed(config, number)
    records, pairs, tokenizer = pairs_of_round(config, number, policy, folder)
    # The models that drew the samples are gone: training has all the memory.
    parts = config.microbatches
    steps = steps_for(pairs, wishes.epochs, data.rows, data.length, seed, parts)
    LOG.info("Round %d: %d pairs of %d prompts, %d steps.", number, len(pairs), len(records), steps)
    optimizer = dataclasses.replace(config.optimizer, lr=wishes.lr, warmup_steps=max(1, steps // 10))
    carry(policy, folder)
    train(
        dataclasses.replace(config, stage="preference", init_from=policy, steps=steps, optimizer=optimizer),
        source=pairs,
        tokenizer=tokenizer,
        workdir=folder,
        stage=stage_of(config, seed),
    )
    answers = [answer for record in records for answer in record.samples]
    about = {
        "round": number,
        "policy": policy,
        "prompts": len(records),
        "pairs": len(pairs),
        "without_pair": len(records) - len(pairs),
        "steps": steps,
        "mean_critical_path": float(np.mean([answer.critical_path for answer in answers])),
        "mean_tokens": float(np.mean([answer.output_tokens for answer in answers])),
    }
    _write_json(os.path.join(folder, "round.json"), about)
    return folder


def pairs_of_round(
    config: Config, number: int, policy: str, folder: str
) -> tuple[list[Record], list[Pair], Tokenizer]:
    """What a round learns from, and the policy's tokenizer; models lie on the mesh of training meanwhile.

    Raises:
      ConfigError: no pairs, or a mesh that does not divide what it should.
    """
    wishes, data = config.preference, config.data
    mesh = _mesh(config)
    model = load(policy, mesh=mesh)
    opponent = wishes.baseline or config.init_from
    baseline = model if find(opponent) == find(policy) else load(opponent, mesh=mesh)
    records = draw(config, number, model, baseline, folder)
    del baseline
    scored = [scores(record, wishes) for record in records]
    choices = choose_all(records, scored, data.length)
    _write_pairs(os.path.join(folder, "pairs.jsonl"), records, scored, choices)
    if not any(choices):
        raise ConfigError(
            f"No pairs in {folder}: the samples of every prompt scored alike. Raise "
            "--config.preference.temperature, .samples or .prompts_per_round."
        )
    path, parts = os.path.join(folder, "reference.npz"), config.microbatches
    pairs = make_pairs(records, choices, model, rows=data.rows, length=data.length, path=path, parts=parts)
    return records, pairs, model.tokenizer


def _mesh(config: Config) -> Mesh:
    """That of training. Raises ConfigError if it does not divide what it should."""
    try:
        mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
        rows_sharding(mesh, config.data.rows, config.microbatches)
        param_shardings(jax.eval_shape(functools.partial(init_params, config.model), jax.random.key(0)), mesh)
    except ValueError as error:
        raise ConfigError(f"config.mesh: {error}") from error
    return mesh


def stage_of(config: Config, seed: int = 0) -> Stage:
    """What is trained on in the second stage: the loss, and batches in the order of a seed."""
    wishes = config.preference
    loss = functools.partial(
        preference_loss,
        kind=wishes.loss,
        alpha=wishes.alpha,
        margin=wishes.margin or bonbon_margin(wishes.samples),
        beta=wishes.beta,
    )
    made = functools.partial(pair_batches, seed=seed, parts=config.microbatches)
    return Stage(PairedTokens, loss, made)


def draw(config: Config, number: int, policy: Model, baseline: Model, folder: str) -> list[Record]:
    """The samples of one round, in FOLDER/samples.jsonl; those that are there already are kept."""
    wishes, prompts = config.preference, prompts_of(config.preference, _seed(config, number))
    LOG.info("Round %d: sampling.", number)
    return sample(
        policy,
        baseline,
        prompts,
        wishes,
        length=config.data.length,
        threads=config.data.threads,
        seed=_seed(config, number),
        path=os.path.join(folder, "samples.jsonl"),
    )


def _seed(config: Config, number: int) -> int:
    """Of the prompts, the samples and the order of a round."""
    return config.seed * 1000 + number


def prompts_of(config: PreferenceConfig, seed: int) -> list[Prompt]:
    """The prompts of a round: training prompts of the almanac made up afresh, all families alike, or a file's."""
    count = config.prompts_per_round
    if config.prompts == "almanac":
        families = itertools.cycle(almanac.FAMILIES)
        tasks = [
            almanac.training_task(np.random.default_rng([seed, i]), next(families)) for i in range(count)
        ]
        return [Prompt(task.prompt, almanac.plain(task)) for task in tasks]
    try:
        examples, problems = read_records(config.prompts)
    except RecordError as error:
        raise ConfigError(f"config.preference.prompts: {error}") from error
    if problems:
        LOG.warning("%d prompts cannot be used, the first: %s", len(problems), problems[0])
    if not examples:
        raise ConfigError(
            f"config.preference.prompts: nothing in {config.prompts} can be used. It takes a prompt and a "
            'response on each line, as in {"prompt": "...", "response": "..."}.'
        )
    chosen = [examples[permuted(i, len(examples), seed)] for i in range(min(count, len(examples)))]
    prompts = [Prompt(example.prompt, assemble(example.program)) for example in chosen]
    if config.judge == "almanac":
        for prompt in prompts:
            _check_almanac(prompt)
    return prompts


def _check_almanac(prompt: Prompt) -> None:
    try:
        almanac.task_of(prompt.text)
    except ValueError as error:
        raise ConfigError(
            f"config.preference.judge: the almanac judges its own prompts only. {error}"
        ) from None


def _check_same(path: str, config: Config, policy: str) -> None:
    """Keeps what a round is of beside it, and refuses to go on with one that is of something else."""
    tree = to_dict(config)
    about = {name: tree[name] for name in ("seed", "data", "optimizer", "preference")}
    about["preference"].pop("rounds")  # more rounds may follow
    if config.lora.rank:
        about["lora"] = tree["lora"]
    baseline = config.preference.baseline or config.init_from
    about["policy"], about["opponent"] = checkpoint_mark(policy), checkpoint_mark(baseline)
    folder = os.path.dirname(path)
    if os.path.exists(path) and os.path.exists(os.path.join(folder, "samples.jsonl")):
        with open(path, encoding="utf-8") as file:
            found, wanted = dict(_leaves(json.load(file))), dict(_leaves(json.loads(json.dumps(about))))
        changed = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
        if changed:
            name = changed[0]
            raise ConfigError(
                f"{folder} is of another experiment: {name} was {found.get(name)!r} and is {wanted.get(name)!r} now"
                f"{f' ({len(changed)} fields differ)' * (len(changed) > 1)}. Use a new --workdir."
            )
    _write_json(path, about)


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of nested dicts."""
    if not isinstance(tree, dict):
        yield path, tree
        return
    for name, below in tree.items():
        yield from _leaves(below, f"{path}.{name}" if path else name)


def _write_pairs(
    path: str,
    records: Sequence[Record],
    scored: Sequence[Sequence[float]],
    choices: Sequence[Choice | None],
) -> None:
    with replacing(path) as file:
        for record, values, choice in zip(records, scored, choices, strict=True):
            line = {
                "prompt": record.prompt.text,
                "scores": [round(score, 4) for score in values],
                "better": choice and record.samples[choice.better].annotated,
                "worse": choice and record.samples[choice.worse].annotated,
            }
            print(json.dumps(line, ensure_ascii=False), file=file)


def _write_json(path: str, tree: Any) -> None:
    with replacing(path) as file:
        json.dump(tree, file, indent=2)
