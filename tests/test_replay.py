"""Replay: the engine says what it is made to say, in as few steps as the answer's shape allows."""

from __future__ import annotations

import dataclasses
import functools
import math
import random

import jax
import numpy as np
import pytest

from pasta_jax.baselines import apar
from pasta_jax.benchmark import replay as replaying
from pasta_jax.benchmark import trees as answers
from pasta_jax.benchmark.replay import Replayed, limits_for, replay, summaries
from pasta_jax.benchmark.trees import random_tree, without_tags
from pasta_jax.decoding.engine import Decoder
from pasta_jax.decoding.model import Model
from pasta_jax.decoding.request import SamplingParams, script_size
from pasta_jax.decoding.script import FREE, Script, depth_of, in_document_order, script_of, threads_in
from pasta_jax.decoding.state import Limits, Stop
from pasta_jax.lang.assemble import assemble
from pasta_jax.lang.parse import parse
from pasta_jax.lang.program import Program, Promise, Sync, Text
from pasta_jax.lang.render import render
from pasta_jax.model import ModelConfig, init_params
from pasta_jax.testing import WordTokenizer
from pasta_jax.tokens.cost import critical_path
from pasta_jax.tokens.detokenize import read
from pasta_jax.tokens.layout import LayoutError
from tests.helpers import compilations, only_full
from tests.helpers.programs import random_program

WORDS = WordTokenizer("A the river and the cities of a world")
LIMITS = Limits(lanes=9, threads=9, pool=320, max_depth=2)
SIZE = (16, 256)
"""Of all scripts here, so that they share a program."""


@functools.cache
def decoder() -> Decoder:
    config = ModelConfig(
        vocab_size=len(WORDS.vocabulary), num_layers=1, model_dim=16, num_heads=2, num_kv_heads=1, head_dim=8,
        mlp_dim=16,
    )  # fmt: skip
    model = Model(init_params(config, jax.random.key(0)), config, WORDS, max_depth=2)
    return Decoder(model, limits=LIMITS, rows=2, chunk=64, prompt_buckets=(16,), widths=())


@pytest.fixture
def rng(seed: int) -> random.Random:
    return random.Random(seed)


@pytest.mark.slow
def test_what_is_scripted_is_said_exactly(rng: random.Random) -> None:
    """Two at a time, one of them any program there is, syncs that wait for nothing and empty blocks included."""
    prompt = WORDS.encode_prompt("the river")
    for _ in range(6):
        trees = [
            random_tree(
                rng, WORDS, branches=rng.randint(1, 8), tokens=9, balanced=False, syncs=True, depth=2
            ),
            next(p for p in iter(lambda: random_program(rng, max_depth=2, max_nodes=8), None) if fits(p)),
        ]
        scripts = [script_of(tree, WORDS) for tree in trees]
        sampling = [
            SamplingParams(1000, 1000, temperature=1.0, script=script.padded(SIZE)) for script in scripts
        ]
        traces, _ = decoder().decode([prompt] * 2, sampling)
        for tree, script, trace in zip(trees, scripts, traces):
            assert trace.stop == Stop.EOS
            assert in_document_order(trace.threads) == threads_in(tree, WORDS) == script.threads
            assert read(WORDS.vocabulary, trace.threads).program == tree
            assert critical_path(trace.threads, WORDS.vocabulary) == trace.steps
            assert np.all(trace.logprob[trace.prompt_length :] <= 0) and trace.logprob.min() < -1
        again, _ = decoder().decode(
            [prompt],
            [dataclasses.replace(sampling[0], script=script_of(traces[0], WORDS).padded(SIZE))],
        )
        np.testing.assert_array_equal(again[0].tokens.token, traces[0].tokens.token)
        np.testing.assert_array_equal(again[0].step, traces[0].step)


@pytest.mark.slow
def test_scripts_of_a_size_class_share_their_programs(rng: random.Random) -> None:
    prompt = WORDS.encode_prompt("the river")
    small, large = (script_of(random_tree(rng, WORDS, branches=n, tokens=9), WORDS) for n in (2, 7))
    rows, columns = script_size([SamplingParams(script=large)])
    small, large = small.padded((rows - 1, columns // 2 + 1)), large.padded((rows, columns))
    decoder().decode([prompt], [SamplingParams(1000, 1000, script=large)])
    with compilations() as names:
        decoder().decode([prompt], [SamplingParams(1000, 1000, script=small)])
    assert names == []


def fits(program: Program) -> bool:
    try:
        threads = threads_in(program, WORDS)
    except LayoutError:  # a topic that is too long for the grammar
        return False
    longest = max(map(len, threads.tokens))
    return len(threads.tokens) <= 9 and longest <= 256 and sum(map(len, threads.tokens)) < 300


@pytest.mark.slow
def test_a_script_leaves_its_neighbour_and_what_follows_it_free() -> None:
    prompt = WORDS.encode_prompt("the river")
    script = script_of(Program((Text(" cities of"),)), WORDS)
    short = Script(script.tokens[:, :2], script.branches[:, :2]).padded(SIZE)
    free = SamplingParams(8, temperature=1.0, seed=3)
    said_by_none = dataclasses.replace(short, tokens=np.full_like(short.tokens, FREE))
    (alone,), _ = decoder().decode([prompt], [dataclasses.replace(free, script=said_by_none)])
    (beside, scripted), _ = decoder().decode([prompt] * 2, [free, dataclasses.replace(free, script=short)])
    np.testing.assert_array_equal(alone.tokens.token, beside.tokens.token)
    script_tokens = scripted.threads.tokens[0]
    assert WORDS.vocabulary.text(script_tokens[:2]) == " cities of" and len(script_tokens) == 8


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize(
    ("branches", "depth", "syncs"), [(2, 1, False), (16, 1, True), (8, 2, True), (9, 3, False)]
)
def test_random_trees_are_as_asked(
    rng: random.Random, branches: int, depth: int, syncs: bool, balanced: bool
) -> None:
    tree = random_tree(rng, WORDS, branches=branches, tokens=20, balanced=balanced, syncs=syncs, depth=depth)
    promises = [*tree.promises()]
    threads = threads_in(tree, WORDS)
    assert len(promises) == branches and depth_of(threads) == depth
    assert parse(render(tree), max_depth=depth) == tree
    assert any(isinstance(node, Sync) for node in walk(tree.nodes)) == syncs
    own = [
        sum(len(WORDS.encode(node.text)) for node in promise.block if isinstance(node, Text))
        - answers.BETWEEN * sum(isinstance(node, Promise) for node in promise.block)
        - 10 * sum(isinstance(node, Sync) for node in promise.block)
        for promise in promises
    ]
    if balanced:
        assert own == [20] * branches
    else:
        assert abs(sum(own) - 20 * branches) <= branches
        assert len({*own}) > 1 or branches == 2  # two may happen to be as long
    text = without_tags(tree)
    assert assemble(text) == assemble(tree) and not [*text.promises()]
    assert len(threads_in(text, WORDS).tokens[0]) - 1 == read(WORDS.vocabulary, threads).text_tokens


def walk(nodes: tuple) -> list:
    return [item for node in nodes for item in (node, *walk(getattr(node, "block", ())))]


def test_answers_that_a_rule_annotated_get_topics() -> None:
    text = "- The river: 1234567890 1234567890 42.\n- 1: And so it is.\nThe end. And a river."
    tree = answers.complete_promises(apar.annotate(text), WORDS)
    assert assemble(tree) == text
    assert [promise.topic for promise in tree.promises()] == ["part", "And so", "And a"]
    assert threads_in(tree, WORDS)


@pytest.mark.slow
@only_full
def test_replay_measures_both_ways(rng: random.Random) -> None:
    trees = [
        random_tree(rng, WORDS, branches=8, tokens=14, syncs=True, depth=2),
        Program((Text(" the river"),)),
    ]
    wide, plain = replay(decoder(), {"wide": trees[:1], "plain": trees[1:]}, repeats=3)
    assert (wide.kind, wide.branches, plain.kind, plain.branches) == ("wide", 8, "plain", 0)
    assert wide.steps == wide.critical_path < wide.text_tokens  # there are as many lanes as threads
    assert plain.steps == plain.critical_path == plain.text_tokens == 2 == plain.theoretical * 2
    assert (
        sum(wide.steps_by_width) == wide.steps
        and len(wide.steps_by_width) > 3
        and plain.steps_by_width == (2,)
    )
    tokens = sum(width * count for width, count in enumerate(wide.steps_by_width, 1))
    assert tokens == sum(map(len, threads_in(trees[0], WORDS).tokens)) - 1  # but for the end
    assert len(wide.parallel_s) == len(wide.sequential_s) == len(wide.start_s) == 3
    assert min(wide.parallel_s + wide.sequential_s + wide.start_s) > 0
    prompt = WORDS.encode_prompt("the river")
    (trace,), _ = decoder().decode([prompt], [SamplingParams(1000, 1000, script=script_of(trees[0], WORDS))])
    (again,) = replay(decoder(), {"a trace": [trace]}, repeats=1)
    assert (again.critical_path, again.steps_by_width) == (wide.critical_path, wide.steps_by_width)
    assert again.text_tokens == wide.text_tokens
    (cut,), _ = decoder().decode([prompt], [SamplingParams(9, 9)])
    with pytest.raises(ValueError, match="stopped with 'length' has no end to replay"):
        replay(decoder(), {"": [cut]})


def test_what_does_not_fit_is_refused(rng: random.Random) -> None:
    with pytest.raises(ValueError, match="11 threads, the decoder room for 9. Raise Limits.threads"):
        replay(decoder(), {"": [random_tree(rng, WORDS, branches=10, tokens=3)]})
    with pytest.raises(ValueError, match="nest 3 deep, the decoder's 2. Raise Limits.max_depth"):
        replay(decoder(), {"": [random_tree(rng, WORDS, branches=8, tokens=3, depth=3)]})
    with pytest.raises(
        ValueError, match=r"answer of 320 do not fit into the pool of 320. Raise Limits.pool to 3\d\d"
    ):
        replay(decoder(), {"": [Program((Text(" the" * 320),))]})
    with pytest.raises(ValueError, match=r"9 threads and \d+ tokens does not fit into 1 and 4"):
        script_of(random_tree(rng, WORDS, branches=8, tokens=1), WORDS).padded((1, 4))
    tree = random_tree(rng, WORDS, branches=12, tokens=30, depth=3)
    limits = limits_for([tree], WORDS, lanes=4)
    assert (limits.lanes, limits.threads, limits.max_depth) == (4, 13, 3)
    replaying.check_room(script_of(tree, WORDS), limits, 7)


@pytest.mark.slow
def test_an_engine_that_does_not_say_it_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    run = replaying.Run(decoder(), WORDS.encode_prompt("the"), script_of(Program((Text(" a"),)), WORDS))
    free = dataclasses.replace(run.script, tokens=np.full_like(run.script.tokens, FREE)).padded(SIZE)
    monkeypatch.setattr(replaying, "UNLIMITED", 5)
    with pytest.raises(replaying.ReplayError, match="'length' and differs from the script in the threads"):
        dataclasses.replace(run, script=free).answer()


def test_efficiency_by_hand() -> None:
    """100 tokens of text in a critical path of 25 steps, but 30 were taken; repeats are compared one by one."""
    one = Replayed("a", 4, 100, 25, 30, (10, 10, 10), (4.0, 1.0, 9.0), (12.0, 12.0, 18.0), (0.5, 0.6, 0.4))
    assert one.theoretical == 4.0
    assert one.speedups == (3.0, 12.0, 2.0)
    (alone, _) = summaries([one])
    assert alone.realized == pytest.approx(3.0) and alone.efficiencies == pytest.approx((0.75, 3.0, 0.5))
    assert one.step_s == (3.5 / 29, 11.5 / 99)
    assert one.decode_efficiency == pytest.approx(25 / 30 * (11.5 / 99) / (3.5 / 29))
    noisy = dataclasses.replace(one, start_s=(5.0,))
    assert math.isnan(noisy.decode_efficiency) and math.isnan(summaries([one, noisy])[0].decode_efficiency)
    half = dataclasses.replace(
        one, critical_path=50, parallel_s=(6.0, 6.0, 6.0), sequential_s=(12.0, 12.0, 12.0)
    )
    other = dataclasses.replace(half, kind="b")
    a, b, all_ = summaries([one, half, other])
    assert [(item.kind, item.answers) for item in (a, b, all_)] == [("a", 2), ("b", 1), ("overall", 3)]
    assert a.theoretical == pytest.approx(8**0.5)
    assert a.speedups == pytest.approx((6**0.5, 24**0.5, 2.0)) and a.realized == pytest.approx(6**0.5)
    assert a.efficiencies[0] == pytest.approx((6 / 8) ** 0.5)
    assert b.efficiencies[0] == 1
    assert all_.efficiencies[0] == pytest.approx((3 * 2 * 2 / (4 * 2 * 2)) ** (1 / 3))
