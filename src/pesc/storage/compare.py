"""Comparing the tensors that a model should have with those that its files hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def shape_mismatches(
    expected: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]], promised: str
) -> list[str]:
    """Every missing, unexpected and misshapen tensor, a line each.

    Args:
        expected: shapes by name.
        found: those in a file.
        promised: where the expected shapes come from, as the lines say it: "by the config", "in the model".
    """
    lines = [f"missing: {name}" for name in sorted(expected.keys() - found.keys())]
    lines += [f"unexpected: {name}" for name in sorted(found.keys() - expected.keys())]
    lines += [
        f"wrong shape: {name} is {list(found[name])} in the file, {list(expected[name])} {promised}"
        for name in sorted(expected.keys() & found.keys())
        if list(found[name]) != list(expected[name])
    ]
    return lines
