"""Evaluates a model against a sequential baseline, on Almanac's held-out prompts or on your own.

    python -m pasta_jax.evaluate --ckpt=runs/pasta --baseline=runs/baseline --workdir=runs/evaluation
    python -m pasta_jax.evaluate --ckpt=W --baseline=B --prompts=prompts.jsonl --judge=likelihood
    python -m pasta_jax.evaluate --ckpt=W --prompts=alpaca_eval.json --judge=llm --base_url=http://localhost:8000/v1
    python -m pasta_jax.evaluate --annotations=annotations.json --prompts=alpaca_eval.json --df_gamed=df_gamed.csv

Both models answer each prompt in turn, at batch 1, through the same engine. Each request is decoded twice and the
second decode is timed (paper section 5.1). The workdir gets every answer, and the tables. Running the same command
again resumes. Of several processes the first does it all, on one device; the others wait.

A file of prompts has any layout that training reads; it needs no answers. Without --judge, speed is measured. With
one, the model's answers are compared with the baseline's, or with those of --opponent, in both orders. Without
--baseline the model's own sequential decoding is the baseline. Several models, --ckpt=A,B, take turns with one
baseline; or each has a command of its own. summary-PROMPTS.html in the workdir compares all that were evaluated
there. With --rows=8 prompts are answered together, too, and --timed=50 has only the first answered at batch 1.
--audit=WORKDIR measures what branches lose without sight of each other. --annotations computes the win rates of a
judge's annotations as AlpacaEval publishes them, and loads no model.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from pasta_jax import verbs
from pasta_jax.config import JUDGES, is_judge
from pasta_jax.endpoint import flags as endpoint_flags
from pasta_jax.evaluate.compare import compare, table
from pasta_jax.verbs import begin_first, columns_of, define_loading, define_processes, loading_options, refuse

if TYPE_CHECKING:
    from pasta_jax.evaluate.contests import Contests
    from pasta_jax.evaluate.length_controlled import Difficulties
    from pasta_jax.evaluate.own import Evaluated, Settings
    from pasta_jax.judges.protocol import Judge

LOG = logging.getLogger("pasta_jax")


def main(argv: Sequence[str]) -> None:
    """Runs the command line. A mistake ends in one line and status 2."""
    values = flags.FLAGS
    is_own = not values.prompts.isdecimal()
    if len(argv) > 1 or not (values.ckpt or values.annotations):
        refuse("Name both models: --ckpt=runs/pasta --baseline=runs/baseline.")
    if values.annotations and values.ckpt:
        refuse("--annotations are of answers that were judged already. Leave --ckpt out.")
    if not (values.annotations or is_own or values.baseline):
        refuse("Name both models: --ckpt=runs/pasta --baseline=runs/baseline.")
    if not is_own and not values.annotations and (values.judge or values.opponent):
        refuse(
            "--judge and --opponent are for prompts of your own: --prompts=FILE. Almanac has its own judge."
        )
    if values.judge and not is_judge(values.judge):
        refuse(f"--judge={values.judge}: use {', '.join(JUDGES)} or MODULE:FUNCTION.")
    if (values.opponent or values.df_gamed) and not (values.judge or values.annotations):
        refuse("--opponent and --df_gamed are for a judge: add --judge=llm, for one.")
    if not is_own and (values.rows > 1 or values.timed or values.audit or values.sampling):
        refuse("--rows, --timed, --audit and --sampling are for prompts of your own: --prompts=FILE.")
    if not is_own and len(values.ckpt) > 1:
        refuse("Several models, --ckpt=A,B, are for prompts of your own: --prompts=FILE. Name one.")
    if values.timed and values.rows == 1:
        refuse("--timed leaves the other prompts to batches: add --rows=8.")
    if values.dry_run is not None and (values.judge != "llm" or values.annotations):
        refuse("--dry_run shows what an endpoint would be asked: add --judge=llm.")
    if not is_own and not values.annotations and int(values.prompts) < 1:
        refuse("--prompts must be a file, or at least 1 of Almanac's.")
    begin_first()
    try:
        if values.annotations:
            annotated(values)
        elif is_own:
            on_own_prompts(values)
        else:
            almanac(values)
    except (ValueError, OSError) as error:
        refuse(str(error))


def almanac(values: flags.FlagValues) -> None:
    """Evaluates on Almanac's held-out prompts."""
    from pasta_jax.evaluate.compare import folder_of, warn_of_strangers

    (ckpt,), options = values.ckpt, loading_options(values)
    tests = {"PASTA": ckpt}
    warn_of_strangers(ckpt, values.baseline)
    folder = os.path.join(values.workdir, folder_of(ckpt, values.baseline, options))
    print(table(compare(values.baseline, tests, int(values.prompts), folder, **options)))
    LOG.info("The answers and table.md are in %s.", folder)


def drawing_of(words: Sequence[str]) -> dict[str, float]:
    """The words of --sampling=temperature=0.7,seed=1 as options of `SamplingParams`. Raises ValueError."""
    from pasta_jax.decoding.request import SamplingParams

    kinds = {"temperature": float, "top_k": int, "top_p": float, "min_p": float, "seed": int}
    found = dict[str, float]()
    for name, _, value in (word.partition("=") for word in words):
        try:
            found[name] = kinds[name](value)
        except (KeyError, ValueError):
            known = ", ".join(kinds)
            raise ValueError(f"--sampling={name}={value}: give NAME=NUMBER; the names are {known}.") from None
    SamplingParams(**dict[str, Any](found))
    return found


def annotated(values: flags.FlagValues) -> None:
    """Prints the win rates of a file of annotations."""
    from pasta_jax.data.prompts import questions_of
    from pasta_jax.evaluate import alpaca_eval, own
    from pasta_jax.evaluate.report import NO_LC

    keys = ("instruction", "output_1", "generator_1", "output_2", "generator_2", "preference")
    annotations = alpaca_eval.read_list(values.annotations, *(keys if values.df_gamed else keys[-1:]))
    raw = alpaca_eval.win_rate(annotations)
    print(f"Win rate {raw} %.")
    difficulties = _difficulties(values)
    if difficulties is None:
        print(f"{NO_LC} Raw win rate {raw}.")
    elif values.prompts.isdecimal():
        refuse("--df_gamed goes by the order of the prompts: add --prompts=alpaca_eval.json, to compare it.")
    else:
        questions = questions_of(values.prompts, columns_of(values.columns))
        official = [own.instruction_of(question) for question in questions]
        print(f"LC win rate {alpaca_eval.length_controlled_win_rate(annotations, difficulties, official)} %.")


def on_own_prompts(values: flags.FlagValues) -> None:
    """Evaluates on the prompts of a file."""
    from pasta_jax.data.prompts import questions_of
    from pasta_jax.evaluate import alpaca_eval, contests, own
    from pasta_jax.evaluate.report import summary_of
    from pasta_jax.loading import place_of

    several = [
        own.Settings(
            ckpt=ckpt,
            baseline=values.baseline or "",
            prompts=values.prompts,
            columns=columns_of(values.columns),
            workdir=values.workdir,
            max_new_tokens=values.max_new_tokens,
            loading=loading_options(values),
            rows=values.rows,
            timed=values.timed,
            audit=values.audit or "",
            plain_kinds=tuple(values.plain_kinds),
            drawing=drawing_of(values.sampling),
        )
        for ckpt in values.ckpt
    ]
    settings = several[0]
    difficulties = _difficulties(values)
    questions = questions_of(settings.prompts, settings.columns)
    # What cannot work is said before minutes of decoding.
    if settings.audit:
        place_of(settings.audit)
    _check_judge(values, [own.instruction_of(question) for question in questions])
    if difficulties is not None:
        alpaca_eval.check_official(own.datasets_of(questions), difficulties)
    if values.opponent:
        contests.opponent_of(questions, values.opponent, settings.columns)
    for settings, evaluated in zip(several, own.answer_all(several, questions)):
        _judge_and_report(values, settings, evaluated, difficulties)
    if values.dry_run is None:
        summary = summary_of(settings.workdir, settings.prompts)
        print(f"{summary}.html compares the models that were evaluated there.")


def _judge_and_report(
    values: flags.FlagValues, settings: Settings, evaluated: Evaluated, difficulties: Difficulties | None
) -> None:
    """Has the judge compare a model's answers, and audits them; writes and prints the report."""
    from pasta_jax.evaluate import contests

    asked, quality, caution = None, None, ""
    if values.judge:
        opponent = (
            contests.opponent_of(evaluated.questions, values.opponent, settings.columns)
            if values.opponent
            else contests.baseline_as_opponent(evaluated)
        )
        asked = contests.contests_of(evaluated, opponent, _judge_name(values), _judge_identity(values))
        caution = _caution(values, settings.ckpt)
        if caution:
            LOG.warning("%s", caution)
        judge = _judge(values, evaluated, asked)
        if values.dry_run is not None:
            return
        try:
            quality = contests.judge_contests(evaluated, asked, judge, _judge_name(values), difficulties)
        finally:
            if (said := getattr(judge, "report", None)) is not None:
                LOG.info("%s", said())
    audited = contests.audit(settings, evaluated) if settings.audit else []
    print(contests.write_report(settings, evaluated, quality, _judge_name(values), asked, caution, audited))
    folder = asked.folder if asked else evaluated.folder
    print(f"{os.path.join(folder, 'report.html')} has it with its figure.")


def _judge_name(values: flags.FlagValues) -> str:
    """The judge for people, with what it depends on."""
    if not values.judge:
        return ""
    model = {"llm": values.model, "likelihood": values.judge_model or values.baseline}.get(values.judge)
    return f"{values.judge} of {model}" if model else str(values.judge)


def _judge_identity(values: flags.FlagValues) -> Any:
    """What the verdicts of the judge depend on, as JSON can hold it."""
    from pasta_jax.judges import source_of
    from pasta_jax.loading import identity_of

    if values.judge == "likelihood":
        return identity_of(values.judge_model or values.baseline) | loading_options(values)
    if values.judge == "llm":
        return [values.base_url, values.model, values.temperature]
    return None if values.judge == "almanac" else source_of(values.judge)


def _caution(values: flags.FlagValues, ckpt: str) -> str:
    """What to know of a reference model that judges what it said itself; "" if it did not."""
    from pasta_jax.loading import place_of

    if values.judge != "likelihood":
        return ""
    reference = place_of(values.judge_model or values.baseline)
    opponent = "" if values.opponent else place_of(values.baseline or ckpt)
    whose = ["the opponent's answers"] * (reference == opponent)
    whose += ["the model's answers"] * (reference == place_of(ckpt))
    if not whose:
        return ""
    return (
        f"The judge's reference model gave {' and '.join(whose)} itself, and a model prefers what it says itself, "
        "so this win rate says little. Name another with --judge_model."
    )


def _check_judge(values: flags.FlagValues, prompts: Sequence[str]) -> None:
    """Refuses a judge that cannot be made, or cannot judge these prompts."""
    from pasta_jax.data import almanac as built_in
    from pasta_jax.judges import make_judge
    from pasta_jax.loading import place_of

    if values.judge == "likelihood":
        if not (values.judge_model or values.baseline):
            refuse(
                "--judge=likelihood needs a reference model: --judge_model=WORKDIR, or --baseline=WORKDIR."
            )
        place_of(values.judge_model or values.baseline)
    elif values.judge == "llm":
        if not (values.base_url and values.model):
            refuse("--judge=llm needs an endpoint: --base_url=http://localhost:8000/v1 --model=NAME.")
        endpoint_flags.endpoint_of(values.flag_values_dict()).close()
    elif values.judge == "almanac":
        for prompt in prompts:
            built_in.task_of(prompt)
    elif values.judge:
        make_judge(values.judge)


def _judge(values: flags.FlagValues, evaluated: Evaluated, asked: Contests) -> Judge:
    """The judge that the flags name. With --dry_run it shows what an endpoint would be asked."""
    from pasta_jax.judges import make_judge
    from pasta_jax.loading import load

    options: dict[str, Any] = {}
    if values.judge == "likelihood":
        options["model"] = (
            load(values.judge_model, **loading_options(values))
            if values.judge_model
            else evaluated.baseline_model
        )
    elif values.judge == "llm":
        options["endpoint"] = endpoint_flags.endpoint_of(
            values.flag_values_dict(), cache=os.path.join(asked.folder, "replies")
        )
    judge = make_judge(values.judge, **options)
    if values.judge == "llm" and values.dry_run is not None:
        from pasta_jax.judges.llm import LlmJudge

        assert isinstance(judge, LlmJudge)
        comparisons = [each for contest in asked.contests for each in contest.comparisons]
        print(judge.endpoint.estimate(judge.planned(comparisons), shown=values.dry_run))
    return judge


def _difficulties(values: flags.FlagValues) -> Difficulties | None:
    from pasta_jax.evaluate.length_controlled import read_difficulties

    return read_difficulties(values.df_gamed) if values.df_gamed else None


def command() -> None:
    """Parses the command line and runs `main`."""
    flags.DEFINE_list("ckpt", [], "Workdir or checkpoint of the model to evaluate, or several: A,B.")
    flags.DEFINE_string("baseline", None, "Workdir or checkpoint of the sequential baseline.")
    define_loading()
    flags.adopt_module_key_flags(verbs)  # so that --help shows them
    flags.DEFINE_string("workdir", "runs/evaluation", "Folder of the answers and the tables.")
    flags.DEFINE_string("prompts", "500", "Number of Almanac's held-out prompts, or a file of your own.")
    flags.DEFINE_list("columns", [], "The file's own names, as in prompt=question,response=answer.")
    flags.DEFINE_integer("max_new_tokens", 512, "Of an answer to a prompt of your own.", lower_bound=1)
    about = (
        "How prompts of your own are answered, as in temperature=0.7,min_p=0.05,seed=1; by default greedily."
    )
    flags.DEFINE_list("sampling", [], about)
    flags.DEFINE_integer("rows", 1, "Answer all prompts so many at once, too.", lower_bound=1)
    about = "Of --rows: how many of the first prompts to answer at batch 1; by default all."
    flags.DEFINE_integer("timed", None, about, lower_bound=1)
    flags.DEFINE_string(
        "audit", None, "Workdir of a model that measures what blocks lose without their siblings."
    )
    about = "Kinds, by the key `kind` of records, to which a promise is a false one."
    flags.DEFINE_list("plain_kinds", ["single", "story"], about)
    flags.DEFINE_string("judge", None, f"Compares answers: {', '.join(JUDGES)} or MODULE:FUNCTION.")
    flags.DEFINE_string("judge_model", None, "Of likelihood: workdir of the reference; else the baseline.")
    flags.DEFINE_string("opponent", None, "File of answers to compare with, such as model_outputs.json.")
    flags.DEFINE_string("annotations", None, "A judge's annotations as AlpacaEval has them: their win rates.")
    flags.DEFINE_string("df_gamed", None, "AlpacaEval's df_gamed.csv: length-controlled win rate too.")
    endpoint_flags.define_endpoint()
    flags.adopt_module_key_flags(endpoint_flags)
    define_processes()
    verbs.run_main(main)


if __name__ == "__main__":
    command()
