"""The labels of a batch, for any number of groupings."""

from __future__ import annotations


def groups(n_samples: int, *, groupings: int = 1, labels: int = 2) -> dict[str, list[str]]:
    """Up to four groupings of `labels` labels each, none of which tells another; the first one alternates.

    Three are digits of the sample's number. The fourth is the sum of all digits, so that it is no constant where a
    batch of 8 has three digits only.
    """
    if not 1 <= groupings <= 4:
        raise ValueError(f"groupings={groupings}: from one to four can be made.")
    found = {}
    for place in range(groupings):
        digits = [_digits(n, labels) for n in range(n_samples)]
        of_sample = [sum(d) if place == 3 else (*d, 0, 0, 0)[place] for d in digits]
        found[f"grouping{place}"] = [f"label{digit % labels}" for digit in of_sample]
    return found


def _digits(number: int, base: int) -> tuple[int, ...]:
    """The lowest first."""
    return (number % base, *_digits(number // base, base)) if number else ()
