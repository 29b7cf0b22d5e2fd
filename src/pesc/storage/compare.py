"""Comparing the tensors that a model should have with those that its files hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

Shape = Sequence[int]


@dataclass
class TensorDifferences:
    """What is wrong with a set of tensors."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshapen: dict[str, tuple[list[int], list[int]]] = field(default_factory=dict)
    """(shape in the file, expected shape) by name."""
    others: list[str] = field(default_factory=list)
    """Further faults, a line each."""

    def lines(self, promised: str = "by the config") -> list[str]:
        """A line for each difference, in a fixed order.

        Args:
            promised: the source of the expected shapes in the words of the lines: "by the config", "in the model".
        """
        return [
            *(f"missing: {name}" for name in sorted(self.missing)),
            *(f"unexpected: {name}" for name in sorted(self.unexpected)),
            *(
                f"wrong shape: {name} is {found} in the file, {expected} {promised}"
                for name, (found, expected) in sorted(self.misshapen.items())
            ),
            *self.others,
        ]

    def refuse(self, fault: str, promised: str = "by the config") -> None:
        """Raise ValueError with the fault and every line; do nothing if there is no difference."""
        if lines := self.lines(promised):
            raise ValueError(f"{fault}:\n" + "\n".join(f"  {line}" for line in lines))


def compare_tensors(expected: Mapping[str, Shape], found: Mapping[str, Shape]) -> TensorDifferences:
    """Every missing, unexpected and misshapen tensor.

    Args:
        expected: shapes by name.
        found: those in the files.
    """
    return TensorDifferences(
        missing=sorted(expected.keys() - found.keys()),
        unexpected=sorted(found.keys() - expected.keys()),
        misshapen={
            name: (list(found[name]), list(expected[name]))
            for name in sorted(expected.keys() & found.keys())
            if list(found[name]) != list(expected[name])
        },
    )
