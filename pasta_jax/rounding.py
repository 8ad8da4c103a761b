"""Whole numbers rounded up."""


def ceil_div(n: int, by: int) -> int:
    """N / by, rounded up.

    >>> ceil_div(7, 3)
    3
    """
    return -(-n // by)


def round_up(n: int, multiple: int) -> int:
    """The least multiple that is n or more.

    >>> round_up(7, 4)
    8
    """
    return ceil_div(n, multiple) * multiple


def next_power_of_two(n: int) -> int:
    """The least power of two that is n or more; 1 for n < 2.

    >>> [next_power_of_two(n) for n in (0, 1, 2, 3, 8)]
    [1, 1, 2, 4, 8]
    """
    return 1 << max(n - 1, 0).bit_length()
