"""`pasta_jax.decode` as a caller meets it: what it returns agrees with itself, and its options do what they say."""

import copy
import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import pasta_jax
from pasta_jax.decoding.api import _with_speedup
from pasta_jax.decoding.interpreter import rules_for
from pasta_jax.decoding.results import result as result_of
from pasta_jax.decoding.state import Limits
from pasta_jax.lang import tags
from pasta_jax.lang.assemble import text_of
from pasta_jax.lang.grammar import Kind
from pasta_jax.tokens.cost import critical_path
from tests.helpers.answers import OTHER, PROMPT, SEEDS, WORDS, model, options, results, what_was_said

pytestmark = pytest.mark.slow


def test_there_is_something_to_test() -> None:
    assert sum(len(result.branches) for result in results()) >= 6
    assert {"eos", "length"} & {result.stop_reason for result in results()}


def test_texts_agree() -> None:
    for result in results():
        assert str(result) == result.text == pasta_jax.assemble(result.program)
        assert pasta_jax.parse(result.annotated) == result.program
        assert pasta_jax.render(result.program) == result.annotated


def test_branches_agree_with_the_promises() -> None:
    for result in results():
        promises = list(result.program.promises())
        assert [branch.id for branch in result.branches] == list(range(1, len(promises) + 1))
        for branch, promise in zip(result.branches, promises):
            assert (branch.topic, branch.promised_tokens) == (promise.topic, 10 * promise.tokens)
            assert branch.text == text_of(promise.block)
            assert branch.parent == 0
            assert 0 <= branch.tokens <= 20
            assert 1 <= branch.start_step <= branch.end_step <= result.stats.decode_steps
            assert branch.stop_reason in ("done", "budget", "cut")
            if branch.stop_reason == "budget":
                assert branch.tokens == 20
                assert f"branch {branch.id}: over its budget, its </async> was forced." in result.issues
            if result.stop_reason == "eos":
                assert branch.stop_reason != "cut"


def test_stats_agree_with_the_tokens() -> None:
    end, tag_ids = WORDS.vocabulary.eos, set(WORDS.vocabulary.tag_ids.values())
    for result in results():
        stats = result.stats
        assert stats.prompt_tokens == len(WORDS.encode_prompt(PROMPT))
        assert len(result.tokens) == len(result.logprobs)
        assert (result.logprobs <= 0).all() and np.isfinite(result.logprobs).all()
        assert stats.output_tokens == int((result.tokens != end).sum()) <= 100
        assert (result.stop_reason == "eos") == (result.tokens[-1] == end)
        written = sum(token in tag_ids for token in result.tokens.tolist())
        assert stats.text_tokens <= stats.output_tokens - written
        assert stats.critical_path == max(1, critical_path(result.trace.threads, WORDS.vocabulary))
        assert stats.critical_path <= max(1, stats.decode_steps)
        assert stats.step_speedup == pytest.approx(stats.text_tokens / stats.decode_steps)
        assert stats.tokens_per_s == pytest.approx(stats.output_tokens / stats.wall_s)
        assert 1 <= stats.mean_width <= stats.max_width <= 8
        fed = round(stats.mean_width * stats.decode_steps)
        # Whatever was sampled was fed, but for the last token of each thread when the answer ended.
        assert fed <= len(result.tokens) <= fed + 1 + len(result.branches)
        assert stats.sequential_wall_s is None and stats.measured_speedup is None


def test_sequential_has_no_branches() -> None:
    for seed in SEEDS:
        result = pasta_jax.decode(model(), PROMPT, mode="sequential", **options(seed=seed))
        assert result.branches == () and tags.PROMISE_OPEN not in result.annotated
        assert result.stats.max_width == 1
        assert result.stats.decode_steps == result.stats.output_tokens


def test_both_measures_the_speedup() -> None:
    result = pasta_jax.decode(model(), PROMPT, mode="both", **options(seed=SEEDS[0]))
    assert what_was_said(result) == what_was_said(results()[0])
    stats = result.stats
    assert stats.sequential_wall_s is not None and stats.measured_speedup is not None
    other = dataclasses.replace(result, stats=dataclasses.replace(stats, text_tokens=10, wall_s=1.0))
    long = dataclasses.replace(result, stats=dataclasses.replace(stats, text_tokens=60, wall_s=3.0))
    both = _with_speedup(long, other).stats
    assert (both.sequential_text_tokens, both.sequential_wall_s, both.measured_speedup) == (10, 1.0, 2.0)


def test_a_list_gives_a_list() -> None:
    alone = [pasta_jax.decode(model(), prompt, **options()) for prompt in (PROMPT, OTHER, PROMPT)]
    together = pasta_jax.decode(model(), [PROMPT, OTHER, PROMPT], **options())
    assert isinstance(together, list)
    assert [what_was_said(a) for a in together] == [what_was_said(a) for a in alone]
    assert together[1].stats.prompt_tokens == len(WORDS.encode_prompt(OTHER))
    (one,) = pasta_jax.decode(model(), [OTHER], **options())
    assert what_was_said(one) == what_was_said(alone[1])
    assert pasta_jax.decode(model(), []) == []


def test_conversations() -> None:
    """One message of the user is the prompt; more are more to read; a list of conversations gives a list."""
    short: list[dict[str, str]] = [{"role": "user", "content": PROMPT}]
    long = [*short, {"role": "assistant", "content": "the world"}, {"role": "user", "content": OTHER}]
    alone = pasta_jax.decode(model(), PROMPT, **options())
    assert what_was_said(pasta_jax.decode(model(), short, **options())) == what_was_said(alone)
    one, other, _ = pasta_jax.decode(model(), [short, long, short], **options())  # four rows, as before
    assert what_was_said(one) == what_was_said(alone)
    assert other.stats.prompt_tokens == len(WORDS.encode_chat(long)) > one.stats.prompt_tokens
    with pytest.raises(
        ValueError, match=r'The prompt is a dict. Give a text, a conversation \[\{"role": "user"'
    ):
        pasta_jax.decode(model(), short[0])  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="Message 2 of the conversation has the role 'user'; \"assistant\""):
        pasta_jax.decode(model(), [*short, *short], **options())


def test_more_than_one_id_ends_an_answer() -> None:
    """As families have it: the end of a turn, which training writes, and the end of a text, which comes up too."""
    words, end = copy.copy(WORDS), WORDS.vocabulary.eos
    words.vocabulary = dataclasses.replace(WORDS.vocabulary, eos=WORDS.vocabulary.pad, ends=frozenset({end}))
    assert np.array_equal(
        rules_for(words.vocabulary, Limits()).kinds[:2], [Kind.END, Kind.END]
    )  # both stop it
    ended = [result for result in results() if result.tokens[-1] == end]
    assert ended
    for result in ended:
        read = result_of(words, result.trace, result.stats.wall_s, result.stats.compile_s)
        assert read.stats == result.stats and what_was_said(read) == what_was_said(result)
        steps = critical_path(result.trace.threads, WORDS.vocabulary)
        assert critical_path(result.trace.threads, words.vocabulary) == steps


def test_seeds() -> None:
    again = [pasta_jax.decode(model(), PROMPT, **options(seed=seed)) for seed in SEEDS]
    assert [what_was_said(a) for a in again] == [what_was_said(a) for a in results()]
    assert len({result.annotated for result in again}) > 1
    greedy = {
        pasta_jax.decode(model(), PROMPT, **options(seed=seed, temperature=0.0)).annotated for seed in SEEDS
    }
    assert len(greedy) == 1


def test_what_was_compiled_is_kept() -> None:
    assert results()
    for changes in (
        {"seed": 99},
        {"temperature": 0.5},
        {"top_k": 3},
        {"top_p": 0.5},
        {"min_p": 0.5},
        {"top_k": None, "top_p": None, "min_p": None},
        {"open_bias": -math.inf},
    ):
        result = pasta_jax.decode(model(), PROMPT, **options(**changes))
        assert result.stats.compile_s == 0, changes
    assert result.branches == ()


def test_limits() -> None:
    short = pasta_jax.decode(model(), PROMPT, **options(max_new_tokens=3, cache_len=20))
    assert short.stats.output_tokens <= 3
    for seed in SEEDS:
        one = pasta_jax.decode(model(), PROMPT, **options(seed=seed, max_branches=1, lanes=1))
        assert len(one.branches) <= 1 and one.stats.max_width == 1
    full = [pasta_jax.decode(model(), PROMPT, **options(seed=s, cache_len=20)) for s in SEEDS]
    cut = [result for result in full if result.stop_reason == "cache_full"]
    assert cut and all(result.stats.prompt_tokens + len(result.tokens) == 20 for result in cut)


@pytest.mark.parametrize(
    "given",
    [
        {"max_new_tokens": "5"}, {"max_new_tokens": 2.5}, {"max_new_tokens": 0}, {"max_new_tokens": 2**31},
        {"max_branch_tokens": True}, {"temperature": "hot"}, {"temperature": b"1"}, {"temperature": math.nan},
        {"temperature": math.inf}, {"top_k": 1.0}, {"top_p": "0.5"}, {"min_p": [0.1]}, {"open_bias": math.nan},
        {"open_bias": math.inf}, {"open_bias": "x"}, {"seed": 1.5}, {"seed": -1}, {"seed": 2**64}, {"seed": "a"},
        {"stop": 5}, {"stop": b"x"}, {"max_branches": -1}, {"max_branches": 1.5}, {"lanes": 0}, {"lanes": None},
        {"lanes": b"8"}, {"cache_len": 0}, {"cache_len": "128"}, {"cache_len": 2**31}, {"grammar": "no"},
        {"stream_tokens": 1}, {"stream": "yes"}, {"mode": ["parallel"]}, {"batch_invariant": "no"},
    ],
)  # fmt: skip
def test_an_option_that_cannot_be_is_named(given: dict[str, Any]) -> None:
    [(name, value)] = given.items()
    with pytest.raises(ValueError, match=f"^{re.escape(f'{name}={value!r}')}") as error:
        pasta_jax.decode(model(), PROMPT, **given)
    assert "\n" not in str(error.value)


def test_options_of_parameters_and_limits() -> None:
    """As from array libraries, too; None is no number there."""
    given: dict[str, Any] = {"max_new_tokens": np.int32(5), "temperature": np.float32(0.5), "stop": ["a"]}
    params = pasta_jax.SamplingParams(**given)
    assert params == pasta_jax.SamplingParams(5, temperature=0.5, stop=("a",))
    assert type(params.max_new_tokens) is int and type(params.temperature) is float
    assert pasta_jax.SamplingParams(open_bias=-math.inf).open_bias == -math.inf
    given = {"lanes": np.int64(2), "threads": np.int64(3)}
    assert Limits(**given) == Limits(2, 3)
    makers: dict[Callable[..., object], tuple[dict[str, Any], ...]] = {
        pasta_jax.SamplingParams: (
            {"open_bias": None},
            {"max_new_tokens": None},
            {"script": 5},
            {"seed": 10**5000},
            {"stop": 10**5000},
        ),
        Limits: ({"lanes": "8"}, {"threads": 0}, {"pool": 1.5}, {"pool": 2**31}, {"constrained": 1}),
        functools.partial(pasta_jax.Decoder, model()): (
            {"rows": 0},
            {"rows": "2"},
            {"chunk": 0},
            {"batch_invariant": 1},
        ),
    }
    for make, each in makers.items():
        for wrong in each:
            with pytest.raises(ValueError, match=f"^{next(iter(wrong))}"):
                make(**wrong)


def test_a_notebook_shows_one_line() -> None:
    assert re.fullmatch(r"Model\(\d+ layers, D \d+, V [\d,]+, float32; [\d,]+ parameters\)", repr(model()))
    answer = results()[0]
    assert re.fullmatch(
        r"DecodeResult\('.{0,80}', \d+ branches, \d+ decode steps, stop_reason='\w+'\)", repr(answer)
    )


def test_no_two_seeds_are_the_same() -> None:
    keys = [pasta_jax.SamplingParams(seed=seed).request().key.tolist() for seed in (5, 2**32 + 5, 2**64 - 1)]
    assert keys == [[0, 5], [1, 5], [2**32 - 1, 2**32 - 1]]


def test_mistakes_in_words() -> None:
    wrong: Any
    for wrong in (5, b"text", ["a", b"b"], [PROMPT, 3], [[3]]):
        with pytest.raises(ValueError, match="The prompt is an? |Message 1 of the conversation is 3"):
            pasta_jax.decode(model(), wrong)
    with pytest.raises(ValueError, match="half a character, U\\+D83D, after 'cut '. Remove it."):
        pasta_jax.decode(model(), "cut \ud83d")
    for prompt in ("", " \n"):
        with pytest.raises(ValueError, match="empty"):
            pasta_jax.decode(model(), prompt)
    with pytest.raises(ValueError, match="^Prompt 2 of 2: The prompt is empty"):
        pasta_jax.decode(model(), [PROMPT, ""])
    wrong = "runs/almanac/bon"
    with pytest.raises(
        ValueError, match="model='runs/almanac/bon' is no model. Give what pasta_jax.load returns"
    ):
        pasta_jax.decode(wrong, PROMPT)
    with pytest.raises(ValueError, match="is no model"):
        pasta_jax.Decoder(wrong)
    wrong = {"temprature": 1.0}
    with pytest.raises(TypeError, match=r"no option temprature\. Did you mean temperature\?"):
        pasta_jax.decode(model(), PROMPT, **wrong)
    with pytest.raises(
        ValueError, match=r"The prompt has \d+ tokens, and the pool holds 16 .* set cache_len"
    ):
        pasta_jax.decode(model(), "x" * 50, cache_len=16)
    with pytest.raises(ValueError, match="mode='fast' is unknown. Use one of parallel, sequential, both."):
        pasta_jax.decode(model(), PROMPT, mode="fast")
    with pytest.raises(ValueError, match="top_p=0 is out of range"):
        pasta_jax.decode(model(), PROMPT, top_p=0)
    with pytest.raises(ValueError, match="min_p=1.5 is out of range"):
        pasta_jax.decode(model(), PROMPT, min_p=1.5)
