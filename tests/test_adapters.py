"""lm-eval and inspect_ai: what their adapters answer, with the packages themselves where these are installed."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
import pathlib
import re
import sys
import types
from typing import Any

import jax
import pytest

from pasta_jax.adapters import inspect_ai, lm_eval
from pasta_jax.adapters.sampling import sampling_of
from pasta_jax.arrays import NO_TARGET
from pasta_jax.decoding.api import decode
from pasta_jax.decoding.model import Model
from pasta_jax.model import init_params
from pasta_jax.tokens.layout import layout_ids
from pasta_jax.training.logprobs import continuation_scores, reference_logprobs, scores_pass
from tests.helpers import full
from tests.helpers.answers import OTHER, PROMPT, WORDS, model

ROOT = pathlib.Path(__file__).parents[1]
BOS = WORDS.vocabulary.bos


def encode(text: str) -> list[int]:
    return model().tokenizer.encode(text)


@functools.cache
def plain() -> Model:
    """One that likes no tags."""
    return dataclasses.replace(model(), params=init_params(model().config, jax.random.key(2)))


def by_hand(before: list[int], ids: list[int]) -> float:
    """The log-probability of ids that follow others, by another pass in rows of another length."""
    document = layout_ids(plain().tokenizer.vocabulary, before, ids, plain().positions, threads=1)
    [found] = reference_logprobs(plain(), [document], 1, 64)
    return float(found[document.target != NO_TARGET].sum())


def test_scores_of_continuations() -> None:
    """In rows that several share, and in longer ones; of all tokens one is the likeliest."""
    forward = scores_pass(plain().config, None)
    before, after = [BOS, *encode("rivers and cities")], encode(" of the world and its rivers")
    pairs = [(before, after), ([BOS], before[1:]), (before, after[:1]), (before, after * 3), (before, [])]
    found = continuation_scores(forward, plain(), pairs, 2, 16)
    assert [logprob for logprob, _ in found] == pytest.approx([by_hand(*pair) for pair in pairs], abs=1e-3)
    tags = {*plain().tokenizer.vocabulary.tag_ids.values()}
    every = [token for token in range(len(plain().tokenizer.vocabulary)) if token not in tags]
    rated = continuation_scores(forward, plain(), [(before, [token]) for token in every], 2, 16)
    [(likeliest, _)] = [score for score in rated if score[1]]
    assert likeliest == max(logprob for logprob, _ in rated)


# --------------------------------------------------------------------------------------------------- lm-eval


def answers(**options: Any) -> list[str]:
    """Of `decode` to both prompts."""
    limits: Any = {"max_new_tokens": 40, "max_branch_tokens": 40}
    return [result.text for result in decode(model(), [PROMPT, OTHER], **limits, **options)]


def asked(*args: Any) -> types.SimpleNamespace:
    return types.SimpleNamespace(args=args)


def module(patch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    patch.setitem(sys.modules, name, types.SimpleNamespace(**contents))


@pytest.fixture(params=[full("stand-in"), "real"])
def pasta_lm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    if request.param == "real":
        pytest.importorskip("lm_eval")
        return lm_eval.PastaLM

    class TemplateLM:
        def __init__(self) -> None:
            self.cache_hook = types.SimpleNamespace(add_partial=lambda *args: None)

    def normalized(given: dict[str, Any], tokens: int) -> dict[str, Any]:
        return {"max_gen_toks": tokens, "until": [], "temperature": 0.0, **given}

    module(monkeypatch, "lm_eval.api.model", TemplateLM=TemplateLM)
    module(monkeypatch, "lm_eval.models.utils", normalize_gen_kwargs=normalized)
    module(monkeypatch, "lm_eval.utils")
    return lm_eval._pasta_lm.__wrapped__()


def test_lm_eval_generates_what_decode_does(pasta_lm: Any) -> None:
    """In the chat format, and from text as it stands, which for this tokenizer lacks the end of the line."""
    lm = pasta_lm(model(), batch_size="2", max_gen_toks=40)
    chats = [lm.apply_chat_template([{"role": "user", "content": text}]) for text in (PROMPT, OTHER)]
    greedy: dict[str, Any] = {"until": [""]}
    assert lm.generate_until([asked(chat, greedy) for chat in chats]) == answers()
    assert lm.generate_until([asked(f"{text}\n", greedy) for text in (PROMPT, OTHER)]) == answers()
    drawn = [asked(chats[0], {"do_sample": True, "temperature": 1.0})] * 2
    assert len({*lm.generate_until(drawn)}) == 2, "repeated samples differ"
    sequential = pasta_lm(model(), batch_size=2, max_gen_toks=40, sequential=True)
    assert sequential.generate_until([asked(chat, greedy) for chat in chats]) == answers(mode="sequential")
    begun = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": "and"}]
    assert lm.tok_encode(lm.apply_chat_template(begun, False)) == [BOS, *encode(f"{PROMPT}\nand")]


TASKS = {
    "generate": ("generate_until", "\n", "generation_kwargs: {until: [], max_gen_toks: 40}", "exact_match"),
    "choose": ("multiple_choice", "{{gold}}", 'doc_to_choice: ["of the world", "rivers"]', "acc"),
    "roll": ("loglikelihood_rolling", "{{prompt}} of the world and its rivers", "", "bits_per_byte"),
}


def rolling(ids: list[int], size: int) -> list[tuple[list[int], list[int]]]:
    """Windows of a text, its first token apart: each of `size` tokens to be predicted but the last, which has fewer
    and the tokens before them."""
    windows = []
    for start in range(1, len(ids), size):
        end = min(start + size, len(ids))
        windows.append((ids[max(0, end - size - 1) : start], ids[start:end]))
    return windows


def test_lm_eval_runs_tasks(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package itself, with a task of each kind from files; a text longer than its window too."""
    harness = pytest.importorskip("lm_eval")
    tasks = pytest.importorskip("lm_eval.tasks")
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    documents = [{"prompt": PROMPT, "gold": 0}, {"prompt": OTHER, "gold": 1}]
    (tmp_path / "test.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in documents))
    for name, (kind, target, more, metric) in TASKS.items():
        text = "" if name == "roll" else "{{prompt}}"
        lines = [
            f"task: pasta_{name}",
            "dataset_path: json",
            f"output_type: {kind}",
            "test_split: test",
            more,
        ]
        lines += [f"dataset_kwargs: {{data_files: {{test: {tmp_path}/test.jsonl}}, cache_dir: {tmp_path}}}"]
        lines += [f"doc_to_text: '{text}'", f"doc_to_target: {json.dumps(target)}"]
        (tmp_path / f"{name}.yaml").write_text("\n".join([*lines, f"metric_list: [{{metric: {metric}}}]\n"]))
    found = harness.simple_evaluate(
        model=lm_eval.PastaLM(plain(), batch_size=2, max_length=8),
        tasks=[f"pasta_{name}" for name in TASKS],
        task_manager=tasks.TaskManager(include_path=str(tmp_path)),
        bootstrap_iters=0,
    )
    said = {name: [each["resps"][0] for each in found["samples"][f"pasta_{name}"]] for name in TASKS}
    assert len(said["generate"]) == 2 and all(isinstance(text, str) for [text] in said["generate"])
    chosen = found["samples"]["pasta_choose"]
    for each, document in zip(chosen, documents, strict=True):
        for [(logprob, _)], choice in zip(each["resps"], ("of the world", "rivers"), strict=True):
            before = [BOS, *encode(str(document["prompt"]))]
            ids = encode(f"{document['prompt']} {choice}")[len(before) - 1 :]
            expected = by_hand(before[-max(1, 8 - len(ids)) :], ids)  # the end of the context
            assert logprob == pytest.approx(expected, abs=1e-3)
    for [logprob], document in zip(said["roll"], documents, strict=True):
        ids = encode(f"{document['prompt']} of the world and its rivers")
        windows = rolling([BOS, *ids], 7)
        assert len(windows) > 1 and logprob == pytest.approx(
            sum(by_hand(*each) for each in windows), abs=1e-3
        )


class NotInstalled:
    """Finds no lm_eval, wherever it is."""

    def find_spec(self, name: str, *_: Any) -> None:
        if name == "lm_eval":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_the_command_of_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    """It registers the model and hands over; without the package it says what to install."""
    registered, ran = dict[str, str](), list[bool]()
    registry = types.SimpleNamespace(register=lambda name, target: registered.update({name: target}))
    module(monkeypatch, "lm_eval.api.registry", model_registry=registry)
    module(monkeypatch, "lm_eval.__main__", cli_evaluate=lambda: ran.append(True))
    lm_eval.main()
    assert registered == {"pasta_jax": "pasta_jax.adapters.lm_eval:PastaLM"} and ran == [True]
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [NotInstalled(), *sys.meta_path])
    with pytest.raises(
        SystemExit, match=r"^This command needs lm_eval: pip install lm_eval, or .*\[lm-eval\]"
    ):
        lm_eval.main()


# ------------------------------------------------------------------------------------------------ inspect_ai


@pytest.fixture(params=[full("stand-in"), "real"])
def pasta_api(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(inspect_ai, "load", lambda name: {"runs/answers": model()}[name])
    if request.param == "real":
        pytest.importorskip("inspect_ai")
        return inspect_ai.provider

    class Output(types.SimpleNamespace):
        @classmethod
        def from_content(cls, model: str, content: str, reason: str, error: str | None = None) -> Output:
            return cls(model=model, completion=content, stop_reason=reason, error=error)

    class ModelAPI:
        def __init__(self, model_name: str, *_: Any):
            self.model_name = model_name

    def config(**given: Any) -> types.SimpleNamespace:
        names = ("max_tokens", "temperature", "top_k", "top_p", "stop_seqs", "seed")
        return types.SimpleNamespace(**{**dict.fromkeys(names), **given})

    names = {"ModelAPI": ModelAPI, "ModelOutput": Output, "ModelUsage": types.SimpleNamespace}
    module(monkeypatch, "inspect_ai.model", modelapi=lambda name: lambda c: c, GenerateConfig=config, **names)
    module(monkeypatch, "anyio", to_thread=types.SimpleNamespace(run_sync=asyncio.to_thread))
    return inspect_ai._provider.__wrapped__()


def test_inspect_generates_what_decode_does(pasta_api: Any) -> None:
    """Samples that are asked at once are decoded at once; reasons to stop have its names."""
    api = pasta_api("runs/answers", rows=2, cache_len=128)
    config = sys.modules["inspect_ai.model"].GenerateConfig

    async def ask(*prompts: str, **options: Any) -> list[Any]:
        inputs = [[types.SimpleNamespace(role="user", text=text)] for text in prompts]
        return await asyncio.gather(*(api.generate(each, [], None, config(**options)) for each in inputs))

    outputs = asyncio.run(ask(PROMPT, OTHER, max_tokens=40))
    assert [output.completion for output in outputs] == answers()
    results = decode(model(), [PROMPT, OTHER], max_new_tokens=40, max_branch_tokens=40)
    assert [each.metadata["annotated"] for each in outputs] == [each.annotated for each in results]
    assert [each.usage.output_tokens for each in outputs] == [each.stats.output_tokens for each in results]
    assert [each.stop_reason for each in outputs] == [inspect_ai.STOPS[each.stop_reason] for each in results]
    [cut] = asyncio.run(ask(PROMPT, max_tokens=3))
    assert cut.stop_reason == "max_tokens"
    [long] = asyncio.run(ask("rivers " * 200, max_tokens=3))
    assert long.stop_reason == "model_length" and "prompt" in long.error
    drawn = asyncio.run(ask(PROMPT, PROMPT, max_tokens=40, temperature=1.0))
    assert drawn[0].completion != drawn[1].completion, "epochs differ"
    with pytest.raises(ValueError, match="call no tools"):
        asyncio.run(api.generate([], ["a tool"], None, config()))


def test_inspect_runs_a_task(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package itself finds the provider by its name, and logs the answers."""
    package = pytest.importorskip("inspect_ai")
    dataset, scorer = (pytest.importorskip(f"inspect_ai.{name}") for name in ("dataset", "scorer"))
    monkeypatch.setattr(inspect_ai, "load", lambda name: {"runs/answers": model()}[name])
    assert inspect_ai.provider  # what the entry point loads
    samples = [dataset.Sample(input=text, target="of") for text in (PROMPT, OTHER)]
    task = package.Task(dataset=samples, scorer=scorer.includes())
    [log] = package.eval(
        task, model="pasta_jax/runs/answers", model_args={"rows": 2, "cache_len": 128}, max_tokens=40,
        log_dir=str(tmp_path), display="none",
    )  # fmt: skip
    assert log.status == "success"
    assert [sample.output.completion for sample in log.samples] == answers()


def test_the_entry_point_names_the_provider() -> None:
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    [(name, home, attribute)] = re.findall(r'"inspect_ai": \["(\w+) = ([\w.]+):(\w+)"\]', setup)
    assert (name, home, attribute) == ("pasta_jax", inspect_ai.__name__, "provider")


def test_what_is_not_given_is_the_default() -> None:
    assert sampling_of(9, sequential=False, stop=None, temperature=None, seed=0, top_k=None).top_k == 0
    chosen = sampling_of(9, sequential=True, stop=["", "."], temperature=0.5, seed=3, top_p=0.9)
    assert (chosen.stop, chosen.temperature, chosen.top_p) == ((".",), 0.5, 0.9)
    assert (chosen.max_new_tokens, chosen.max_branch_tokens, chosen.open_bias) == (9, 9, -float("inf"))
