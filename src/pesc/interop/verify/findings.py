"""What a verification finds, and how it looks at experts."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """One thing found."""

    severity: Severity
    """An "error" makes the file not complete; a "warning" deserves a look; a "note" explains."""
    message: str


@dataclass
class Report:
    """The result of a verification."""

    path: str
    kind: str = ""
    """What the path holds, such as "crafted", "adapter", "camelidae", "gguf"."""
    findings: list[Finding] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """The verdict: everything that is promised is there and sound."""
        return not any(finding.severity == "error" for finding in self.findings)

    def refuse(self) -> None:
        """Raise ValueError in one line if the model is not complete."""
        errors = [finding.message for finding in self.findings if finding.severity == "error"]
        if errors:
            more = f" (and {len(errors) - 3} more: pesc verify {self.path})" if len(errors) > 3 else ""
            raise ValueError(f"{self.path} is not complete: {'; '.join(errors[:3])}{more}")

    def add(self, severity: Severity, message: str) -> None:
        """Add a finding."""
        self.findings.append(Finding(severity, message))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"complete": self.complete} | asdict(self)


class Examination:
    """Looks at tensors as they stream by, and reports their faults at the end.

    Experts are named by their layer ("layer 3") and their number. Of each, only digests of its matrices
    are remembered.
    """

    def __init__(self) -> None:
        self._dtypes: Counter[str] = Counter()
        self._parameters = 0
        self._unsound: dict[str, str] = {}
        self._digests: dict[tuple[str, int], dict[str, bytes]] = defaultdict(dict)
        self._zero: dict[tuple[str, int], dict[str, bool]] = defaultdict(dict)
        self._zeroed: list[str] = []
        self._blind: list[str] = []
        self._routers: dict[bytes, list[str]] = defaultdict(list)

    def tensor(self, name: str, tensor: torch.Tensor) -> None:
        """Count a tensor and look for NaN and inf."""
        self.counted(str(tensor.dtype).removeprefix("torch."), tensor.numel())
        if tensor.is_floating_point():
            self.values(name, tensor)

    def counted(self, dtype: str, parameters: int) -> None:
        """Count a tensor by its dtype."""
        self._dtypes[dtype] += 1
        self._parameters += parameters

    def values(self, name: str, tensor: torch.Tensor) -> None:
        """Look for NaN and inf."""
        nans = infinite = 0
        # In pieces, since the look at a tensor takes several times its memory.
        for piece in tensor.reshape(-1).split(1 << 20):
            wide = piece if piece.element_size() > 1 else piece.float()
            if not wide.isfinite().all():
                nans += int(wide.isnan().sum())
                infinite += int(wide.isinf().sum())
        counts = ((nans, "NaN"), (infinite, "inf"))
        if nans or infinite:
            self._unsound[name] = " and ".join(f"{count} {what}" for count, what in counts if count)

    def expert(self, where: str, number: int, part: str, tensor: torch.Tensor, *, last: bool) -> None:
        """Look at one matrix of an expert.

        Args:
            where: its layer.
            number: its number in the layer.
            part: the matrix's name.
            tensor: of any shape.
            last: whether it is the matrix that starts at zero.
        """
        self._digests[where, number][part] = _digest(tensor)
        self._zero[where, number]["last" if last else part] = not tensor.any()

    def router(self, name: str, tensor: torch.Tensor) -> None:
        """Look at a router's matrix [E, D]."""
        self._routers[_digest(tensor)].append(name)
        if len(tensor) > 1 and bool((tensor == tensor[:1]).all()):
            self._blind.append(name)

    def zero(self, name: str) -> None:
        """Note a tensor of zeros that should not be one."""
        self._zeroed.append(name)

    def report(self, report: Report, *, mixed_dtypes_are_usual: bool = False) -> None:
        """Add the findings and facts."""
        report.facts |= {"tensors": self._dtypes.total(), "parameters": self._parameters}
        report.facts["dtypes"] = dict(self._dtypes)
        for name, what in self._unsound.items():
            report.add("error", f"{name} holds {what}")
        for name in self._zeroed:
            report.add("error", f"{name} is zero everywhere, as neither crafting nor training leaves it")
        for name in self._blind:
            report.add("error", f"{name} gives all experts the same score, so this router cannot choose")
        if len(self._dtypes) > 1 and not mixed_dtypes_are_usual:
            counts = ", ".join(f"{count} tensors of {dtype}" for dtype, count in self._dtypes.items())
            report.add("warning", f"dtypes are mixed: {counts}")
        self._report_untouched(report)
        self._report_duplicates(report)

    def _report_untouched(self, report: Report) -> None:
        untouched = [place for place, zero in self._zero.items() if zero.get("last")]
        blank = [place for place, zero in self._zero.items() if any(zero[part] for part in zero.keys() - {"last"})]
        if blank:
            report.add(
                "error",
                f"blank experts: {len(blank)} (their first matrices are zero, as neither crafting nor training leaves "
                f"them: filled in by a converter?): {listed(blank)}",
            )
        report.facts["untouched experts"] = len(untouched)
        untouched = [place for place in untouched if place not in blank]
        why = "their second matrix is zero, so they add nothing"
        if untouched and len(untouched) == len(self._zero):
            report.add("warning", f"untouched experts: all ({why}): freshly crafted, it computes what its base does")
        elif untouched:
            report.add("warning", f"untouched experts: {len(untouched)} ({why}): {listed(untouched)}")

    def _report_duplicates(self, report: Report) -> None:
        same: dict[tuple[tuple[str, bytes], ...], list[tuple[str, int]]] = defaultdict(list)
        for place, digests in self._digests.items():
            if not self._zero[place].get("last"):
                same[tuple(sorted(digests.items()))].append(place)
        groups = [places for places in same.values() if len(places) > 1]
        report.facts["duplicate experts"] = sum(len(places) - 1 for places in groups)
        for places in groups:
            report.add("error", f"{len(places)} experts are duplicates, bit for bit: {listed(places)}")
        for names in self._routers.values():
            if len(names) > 1 and names[0] not in self._blind:
                report.add("error", f"{len(names)} routers are duplicates, bit for bit: {', '.join(names)}")


def _digest(tensor: torch.Tensor) -> bytes:
    data: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(data, digest_size=16).digest()


def listed(places: Sequence[tuple[str, int]]) -> str:
    """Experts by layer: "layer 0: 1, 2; layer 3: 0"."""
    by_layer: dict[str, list[str]] = defaultdict(list)
    for where, number in places:
        by_layer[where].append(str(number))
    return "; ".join(f"{where}: {', '.join(numbers)}" for where, numbers in by_layer.items())
