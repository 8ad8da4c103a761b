"""Preference optimization in rounds: sample, score, pair, train, and again from the trained model.

    WORKDIR/round-1/samples.jsonl    the policy's and the baseline's answers
                    judged.jsonl     what the judge said of each comparison
                    pairs.jsonl      scores, and the samples of each pair
                    reference.npz    log-probabilities of those under the policy that drew them
                    checkpoints/     the next policy, metrics.jsonl beside it
                    round.json       a summary; it is written last
            round-2/...

The model that draws a round's samples is where its training starts from, and its reference. With adapters
(config.lora) those of a round go on from those of the one before, all beside the same weights; the model is both.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
from jax.sharding import Mesh

from pasta_jax.arrays import PairedTokens
from pasta_jax.checkpoints.about import checkpoint_identity, find_checkpoint, read_metadata
from pasta_jax.config import JUDGES, Config, ConfigError, PreferenceConfig
from pasta_jax.data import almanac
from pasta_jax.data.batches import held_out, permuted
from pasta_jax.data.fitting import TOO_LONG, Account
from pasta_jax.data.layouts import Fault
from pasta_jax.data.prompts import Question, read_questions
from pasta_jax.data.records import (
    Example,
    Problem,
    RecordError,
    digest,
    encode_prompt,
    prompt_text,
    read_records,
)
from pasta_jax.data.records import Prompt as Asked
from pasta_jax.data.sources import check_held_out, held_out_file
from pasta_jax.decoding.model import Model
from pasta_jax.experiment import round_of
from pasta_jax.files import Stamp, is_writer, locked, write_json, write_jsonl
from pasta_jax.interchange.origin import carry
from pasta_jax.judges import make_judge, source_of
from pasta_jax.judges.likelihood import ITS_OWN
from pasta_jax.judges.llm import LlmJudge
from pasta_jax.judges.protocol import Judge, JudgeError
from pasta_jax.lang.program import Program
from pasta_jax.loading import load
from pasta_jax.model import param_shapes
from pasta_jax.overrides import to_dict
from pasta_jax.preference.pairs import Choice, Pair, choose_all, make_pairs, pair_batches, steps_for
from pasta_jax.preference.sample import Prompt, Record, sample
from pasta_jax.preference.score import qualities, scores
from pasta_jax.sharding import decoding_mesh
from pasta_jax.tokens.tokenizer import Tokenizer
from pasta_jax.training.loop import SFT, Stage, train, training_mesh
from pasta_jax.training.losses import bonbon_margin, preference_loss
from pasta_jax.training.remat import device_memory

LOG = logging.getLogger("pasta_jax")

Columns: TypeAlias = tuple[tuple[str, str], ...]

AGAIN = "What it said is kept: run the same command again to go on."


def run(config: Config, workdir: str) -> str:
    """Runs all rounds; finished ones are skipped.

    Args:
      config: the experiment, as `experiment.resolve` returns it.
      workdir: for the folders of the rounds.

    Returns:
      the workdir of the last round.

    Raises:
      ConfigError: prompts that the judge does not know, no pairs, a mesh that does not divide sizes, or a workdir
        of another experiment.
      CheckpointError: as `train`.
    """
    check_held_out(config.data, "preference.prompts", config.preference.prompts)
    if config.preference.judge not in ("almanac", "likelihood"):  # before hours of sampling
        try:
            judge = make_judge(config.preference.judge, **_endpoint(config.preference))
        except JudgeError as error:
            raise ConfigError(f"config.preference.judge: {error}") from error
        if isinstance(judge, LlmJudge):
            judge.endpoint.close()
    mesh, policy = training_mesh(config), config.init_from
    for number in range(1, config.preference.rounds + 1):
        folder = os.path.join(workdir, f"round-{number}")
        with locked(folder):
            run_round(config, mesh, number, policy, folder)
        policy = folder
    LOG.info("All rounds are done; the model is in %s.", policy)
    return policy


def run_round(config: Config, mesh: Mesh, number: int, policy: str, folder: str) -> None:
    """One round from the model in the workdir `policy`; `folder` becomes the workdir of the next policy."""
    _check_stamp(folder, config, policy)
    if os.path.exists(os.path.join(folder, "round.json")):
        LOG.info("Round %d was done before.", number)
        return

    # ------------------------------------------------------------------------- sample, score, pair; train

    data, parts, seed = config.data, config.microbatches, _seed(config, number)
    records, pairs, tokenizer = pairs_of_round(config, mesh, number, policy, folder)
    # The models that drew the samples are freed: training has all the memory.
    stage = stage_of(config, seed)
    numbers, held_numbers = held_out([pair.prompt for pair in pairs], data.held_out_share, seed)
    if not numbers:
        raise ConfigError(
            f"config.data.held_out leaves none of {len(pairs)} pairs to train on; those with the same prompt "
            "stay together."
        )
    trained = [pairs[i] for i in numbers]
    held: tuple[Stage, Sequence[Any]] | None = None
    if held_numbers:
        held = stage, [pairs[i] for i in held_numbers]
    elif examples := held_out_file(data, tokenizer):
        held = SFT, examples
    steps = steps_for(trained, config.preference.epochs_per_round, data.rows, data.length, seed, parts)
    LOG.info("Round %d: %d pairs of %d prompts, %d steps.", number, len(pairs), len(records), steps)
    carry(policy, folder)
    train(
        round_of(config, policy, steps),
        source=trained,
        tokenizer=tokenizer,
        workdir=folder,
        stage=stage,
        mesh=mesh,
        held_out=held,
    )
    stats = [drawn.stats for record in records for drawn in record.samples]
    summary = {
        "round": number,
        "policy": policy,
        "prompts": len(records),
        "pairs": len(pairs),
        "without_pair": len(records) - len(pairs),
        "steps": steps,
        "mean_critical_path": float(np.mean([s.critical_path for s in stats])),
        "mean_tokens": float(np.mean([s.output_tokens for s in stats])),
    }
    write_json(os.path.join(folder, "round.json"), summary)


def pairs_of_round(
    config: Config, mesh: Mesh, number: int, policy: str, folder: str
) -> tuple[list[Record], list[Pair], Tokenizer]:
    """The records and training pairs of a round, and the policy's tokenizer. Raises ConfigError without pairs."""
    data = config.data
    model = load_to_decode(policy, mesh)
    opponent = config.preference.baseline or config.init_from
    same = find_checkpoint(opponent) == find_checkpoint(policy)
    baseline = model if same else load_to_decode(opponent, mesh)
    records = draw(config, number, model, baseline, folder)
    LOG.info("Round %d: judging.", number)
    loaded = {find_checkpoint(policy): model, find_checkpoint(opponent): baseline}
    judge = judge_of(config, mesh, folder, loaded)
    try:
        found = qualities(records, judge, os.path.join(folder, "judged.jsonl"))
    except JudgeError as error:
        raise ConfigError(f"config.preference.judge: {error} {AGAIN}") from error
    finally:
        if isinstance(judge, LlmJudge):
            LOG.info("%s", judge.report())
            judge.endpoint.close()
    del baseline, judge, loaded  # and their weights
    all_scores = [
        scores(record, values, config.preference) for record, values in zip(records, found, strict=True)
    ]
    choices = choose_all(records, all_scores, data.length)
    _write_pairs(os.path.join(folder, "pairs.jsonl"), records, all_scores, choices)
    if not any(choices):
        raise ConfigError(
            f"No pairs in {folder}: the samples of every prompt scored alike. Raise "
            "--config.preference.temperature, .samples or .prompts_per_round"
            + (
                ", or set .efficiency_when=always."
                if config.preference.efficiency_when == "not_worse"
                else "."
            )
        )
    path, parts = os.path.join(folder, "reference.npz"), config.microbatches
    pairs = make_pairs(records, choices, model, rows=data.rows, length=data.length, path=path, parts=parts)
    return records, pairs, model.tokenizer


def load_to_decode(path: str, mesh: Mesh) -> Model:
    """A model over the devices of a mesh, arranged to decode."""
    shapes = param_shapes(read_metadata(find_checkpoint(path)).config.model)
    return load(path, mesh=decoding_mesh(mesh, shapes, device_memory(mesh)))


def stage_of(config: Config, seed: int = 0) -> Stage:
    """The second stage of training: its loss, and batches of pairs in the order of a seed."""
    preference = config.preference
    loss = functools.partial(
        preference_loss,
        kind=preference.loss,
        alpha=preference.alpha,
        margin=preference.margin or bonbon_margin(preference.samples),
        beta=preference.beta,
    )
    batches = functools.partial(pair_batches, seed=seed, parts=config.microbatches)
    return Stage(PairedTokens, loss, batches)


def draw(config: Config, number: int, policy: Model, baseline: Model, folder: str) -> list[Record]:
    """The samples of one round, in FOLDER/samples.jsonl; those that are there already are kept."""
    data, seed = config.data, _seed(config, number)
    fault = functools.partial(_fault, models=(policy, baseline), length=data.length)
    prompts = prompts_of(config.preference, seed, data.max_unusable, data.columns, fault)
    path = os.path.join(folder, "samples.jsonl")
    LOG.info("Round %d: sampling.", number)
    sizes = {"length": data.length, "threads": data.threads}
    return sample(policy, baseline, prompts, config.preference, **sizes, seed=seed, path=path)


def _seed(config: Config, number: int) -> int:
    """Seeds the prompts, the samples and the order of a round."""
    return config.seed * 1000 + number


def _fault(asked: Asked, models: Sequence[Model], length: int) -> Fault | None:
    """Why a prompt cannot be asked of all these models in rows of this length, if it cannot."""
    for model in models:
        try:
            tokens = len(encode_prompt(model.tokenizer, asked))
        except ValueError as error:
            return Fault("chat format", str(error))
        if not 0 < tokens < length:
            return Fault(
                TOO_LONG if tokens else "empty", f"{tokens} tokens, a row holds {length} with the answer."
            )
    return None


def prompts_of(
    config: PreferenceConfig,
    seed: int,
    most: float = 1.0,
    columns: Columns = (),
    fault: Callable[[Asked], Fault | None] = lambda asked: None,
) -> list[Prompt]:
    """The prompts of a round: new training prompts of the almanac, its families in turn, or those of a file.

    Args:
      config: names them.
      seed: of the round.
      most: the share of a file that may be unusable.
      columns: the file's own names, `config.data.columns`.
      fault: why the models cannot be asked a prompt, None if they can.

    Raises:
      ConfigError: the judge cannot judge them, or more of a file cannot be used.
    """
    count = config.prompts_per_round
    if config.prompts == "almanac":
        families = enumerate(itertools.islice(itertools.cycle(almanac.FAMILIES), count))
        tasks = [almanac.training_task(np.random.default_rng([seed, i]), name) for i, name in families]
        return [Prompt(task.prompt, almanac.plain(task)) for task in tasks]
    found, problems = questions_of(config, columns)
    faults = [fault(question.prompt) for question in found]
    questions = [question for question, each in zip(found, faults, strict=True) if each is None]
    problems += [
        Problem(config.prompts, question.line, None, each.message, question.raw, each.reason, unit="record")
        for question, each in zip(found, faults, strict=True)
        if each is not None
    ]
    account = Account(config.prompts, len(questions) + len(problems))
    for problem in problems:
        account.add(problem)
    if not questions:
        raise ConfigError(
            f"config.preference.prompts: nothing in {config.prompts} can be used. It takes a prompt on each line, "
            'as in {"prompt": "..."}, or a record of any other layout that training takes.'
        )
    try:
        account.check(most)
    except ConfigError as error:
        raise ConfigError(f"config.preference.prompts: {error}") from None
    if problems:
        LOG.warning("%s", account.report())
    order = (permuted(i, len(questions), seed) for i in range(len(questions)))
    distinct = dict.fromkeys(prompt_of(questions[i]) for i in order)
    prompts = [*itertools.islice(distinct, count)]
    try:
        for prompt in prompts if config.judge == "almanac" else ():
            almanac.task_of(prompt.text)
    except ValueError as error:
        raise ConfigError(
            f"config.preference.judge: the almanac judges its own prompts only. {error} For others use "
            "--config.preference.judge=likelihood, llm or MODULE:FUNCTION."
        ) from None
    return prompts


def questions_of(config: PreferenceConfig, columns: Columns) -> tuple[list[Question], list[Problem]]:
    """The questions of the file that `config.prompts` names, and what cannot be used. Raises ConfigError."""
    try:
        return read_questions(config.prompts, dict(columns))
    except RecordError as error:
        raise ConfigError(f"config.preference.prompts: {error}") from error


def prompt_of(question: Question) -> Prompt:
    """What a round asks, and the answer of the data as the reference."""
    asked = () if isinstance(question.prompt, str) else question.prompt
    messages = tuple((message["role"], message["content"]) for message in asked)
    return Prompt(prompt_text(question.prompt), question.answer, messages)


def judge_of(
    config: Config, mesh: Mesh, folder: str, loaded: Mapping[Any, Model] = MappingProxyType({})
) -> Judge:
    """The judge of a round.

    Args:
      config: of the experiment.
      mesh: of the devices, for a judge that is a model.
      folder: of the round, for the replies of an endpoint.
      loaded: models by their checkpoints.

    Raises:
      ConfigError: it cannot be made.
      CheckpointError: its model cannot be loaded.
    """
    preference, data = config.preference, config.data
    options: dict[str, Any] = {}
    if preference.judge == "likelihood":
        path = find_checkpoint(preference.judge_model or config.init_from)
        if path == find_checkpoint(preference.baseline or config.init_from):
            LOG.warning("%s", ITS_OWN % path)
        model = loaded[path] if path in loaded else load_to_decode(str(path), mesh)
        options = {"model": model, "rows": data.rows, "length": data.length, "parts": config.microbatches}
    elif preference.judge == "llm":
        options = _endpoint(preference)
        options["cache"] = os.path.join(folder, "judge") if is_writer() else None
    try:
        return make_judge(preference.judge, **options)
    except JudgeError as error:
        raise ConfigError(f"config.preference.judge: {error}") from error


ENDPOINT = ("key_variable", "concurrency", "timeout", "price_in", "price_out")
"""Fields judge_... of the configuration, which `judges.llm.make` takes by these names."""


def _endpoint(config: PreferenceConfig) -> dict[str, Any]:
    """The options of the judge llm; none for another."""
    if config.judge != "llm":
        return {}
    options = {name: getattr(config, f"judge_{name}") for name in ENDPOINT}
    budget = config.judge_budget or None
    return {**options, "base_url": config.judge_url, "model": config.judge_model, "budget_dollars": budget}


def _check_stamp(folder: str, config: Config, policy: str) -> None:
    """Stamps a round with what it is made from, and refuses one that was made from something else."""
    tree = to_dict(config)
    about = {name: tree[name] for name in ("seed", "data", "optimizer", "preference")}
    about["preference"].pop("rounds")  # more rounds may follow
    for name in (*ENDPOINT, "budget"):
        about["preference"].pop(f"judge_{name}")  # what an endpoint says does not depend on them
    about["data"].pop("max_unusable")
    if config.lora.rank:
        about["lora"] = tree["lora"]
    baseline = config.preference.baseline or config.init_from
    about["policy"], about["opponent"] = checkpoint_identity(policy), checkpoint_identity(baseline)
    stamp = Stamp(os.path.join(folder, "about.json"))
    if config.preference.prompts != "almanac":
        about["prompts"] = _digest_of(config.preference, config.data.columns)
    if config.preference.judge == "likelihood":
        about["judge"] = checkpoint_identity(config.preference.judge_model or config.init_from)
    elif config.preference.judge not in JUDGES:
        about["judge"] = {"source": source_of(config.preference.judge)}
    started = os.path.exists(stamp.path) and os.path.exists(os.path.join(folder, "samples.jsonl"))
    # Older versions had fewer fields, and did not stamp the prompts and the judge.
    absent = {name: tree for name, tree in to_dict(Config()).items() if name in about}
    absent |= {name: about.get(name, {}) for name in ("prompts", "judge")}
    changed = stamp.check(about, absent) if started else []
    if changed:
        more = f" ({len(changed)} fields differ)" if len(changed) > 1 else ""
        raise ConfigError(f"{folder} is of another experiment: {changed[0]}{more}. Use a new --workdir.")
    stamp.write(about)


def _digest_of(config: PreferenceConfig, columns: Columns) -> dict[str, Any]:
    """What the file of prompts holds: that of its answers, as older versions stamped it, and of what has none."""
    unanswered = [question for question in questions_of(config, columns)[0] if question.answer is None]
    examples = [Example(each.prompt, Program(()), each.line, each.raw) for each in unanswered]
    found = digest(read_records(config.prompts, columns=dict(columns))[0])
    return found | ({"unanswered": digest(examples)} if examples else {})


def _write_pairs(
    path: str,
    records: Sequence[Record],
    all_scores: Sequence[Sequence[float]],
    choices: Sequence[Choice | None],
) -> None:
    lines = [
        {
            "prompt": record.prompt.text,
            "scores": [round(score, 4) for score in values],
            "better": choice and record.samples[choice.better].annotated,
            "worse": choice and record.samples[choice.worse].annotated,
        }
        for record, values, choice in zip(records, all_scores, choices, strict=True)
    ]
    write_jsonl(path, lines)
