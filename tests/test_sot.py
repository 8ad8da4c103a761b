"""Skeleton-of-Thought: two rounds, the second all at once."""

from pasta_jax.baselines import sot
from pasta_jax.baselines.sot import Reply


def test_points_are_asked_together_and_joined_in_order() -> None:
    calls: list[list[str]] = []
    replies = {
        "Why?\nGive only the points.": Reply("1. cost\n2. time\n", 7),
        "Why?\n1. cost\n2. time\nWrite only 1. cost": Reply("It is cheap. ", 4),
        "Why?\n1. cost\n2. time\nWrite only 2. time": Reply("It is quick.", 9),
    }

    def ask(prompts: list[str]) -> list[Reply]:
        calls.append(prompts)
        return [replies[prompt] for prompt in prompts]

    answer = sot.answer(ask, "Why?")
    assert list(map(len, calls)) == [1, 2]
    assert answer == sot.SkeletonAnswer(
        "It is cheap. It is quick.", ("cost", "time"), steps=7 + 9, tokens=7 + 4 + 9
    )


def test_a_skeleton_without_points_is_the_answer() -> None:
    assert sot.answer(lambda prompts: [Reply("No idea.", 3)], "Why?") == sot.SkeletonAnswer(
        "No idea.", (), 3, 3
    )


def test_what_is_no_point_is_passed_over_and_eight_are_enough() -> None:
    assert sot.read_points("Sure:\n1. a\n\n- b\n12. c d\n3.e") == ["a", "c d"]
    assert sot.read_points(sot.skeleton([str(i) for i in range(20)])) == [str(i) for i in range(8)]
