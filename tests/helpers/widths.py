"""How many lanes steps have in decoders of tests that name no widths."""

from tests.helpers import FULL


def few_widths(lanes: int, *, cached: bool) -> tuple[int, ...]:
    """In place of `cpu.widths_for`: steps of all lanes; with the full counts, of one too (commands: as by itself).

    Each width takes its time to compile, and none changes an answer: tests/test_decode.py shows that with widths
    that it names, as tests of widths do. tests/test_compiled.py has what a decoder takes by itself.
    """
    return (1,) if FULL else ()
