"""Prove that a model's files hold the experts they promise: ours, the published layouts, GGUF."""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from pesc.crafting.families import MOE_FIELDS
from pesc.crafting.load import ModelRef, locate
from pesc.crafting.skeleton import skeleton_of
from pesc.crafting.surgery import expert_parameters
from pesc.interop.published import layouts
from pesc.interop.published.importer import plan_differences
from pesc.interop.published.layouts import Target, is_published
from pesc.interop.verify.findings import Examination, Finding, Report, listed
from pesc.storage.checksums import check_checksums
from pesc.storage.files import read_json
from pesc.storage.weights import Weights

__all__ = ["Finding", "Report", "verify"]
# Stock architectures that our exports use, with experts in every layer unless mlp_only_layers says otherwise.
_EVERY_LAYER = ("granitemoe", "granitemoeshared", "mixtral", "qwen2_moe")
_ROUTERS = (".mlp.gate.weight", ".block_sparse_moe.gate.weight", ".block_sparse_moe.router.layer.weight")
_OURS = re.compile(r"\.(router|experts)\.")
_SINGLE = re.compile(r"(.+)\.experts\.(\d+)\.(\w+)\.weight")
_STACKED = re.compile(r"(.+)\.(?:experts|block_sparse_moe)\.(\w+?)(?:\.weight)?")
_LAST = ("down_proj", "output_linear", "w2")


def verify(path: str | Path) -> Report:
    """Check that a model on disk is complete, reading one tensor at a time and running none of its code.

    Looked for: experts present against experts promised, untouched, blank and duplicate experts, NaN and inf,
    mixed dtypes, shapes, damaged files.

    Args:
        path: a crafted folder, an adapter's or a run's folder, a checkpoint of the Camelidae, Qwen2idae or
            Sparsetral layout, a GGUF file, or a hub id.

    Returns:
        A report; `report.complete` is the verdict.

    Raises:
        FileNotFoundError: when the path is not there or no model, or a GGUF file is given and the package
            `gguf` is not installed.
    """
    report = Report(str(path))
    try:
        if (file := _gguf_file(Path(path).expanduser())) is not None:
            from pesc.interop.verify.gguf import check_gguf

            report.kind = "gguf"
            check_gguf(file, report)
        else:
            _check(locate(path, pickled=True), report)
    except ValueError as error:
        # What cannot be read or makes no sense is a finding, not a failure of the check.
        report.add("error", str(error))
    return report


def _gguf_file(path: Path) -> Path | None:
    if path.is_file():
        with path.open("rb") as stream:
            if stream.read(4) == b"GGUF" or path.suffix == ".gguf":
                return path
        raise FileNotFoundError(f"{path} is a file, but no GGUF file: give the model's folder")
    if path.is_dir() and not (path / "config.json").is_file():
        files = sorted(path.glob("*.gguf"))
        if len(files) > 1:
            raise FileNotFoundError(f"{path} holds {len(files)} GGUF files: give one of them")
        return files[0] if files else None
    return None


def _check(ref: ModelRef, report: Report) -> None:
    report.kind = ref.kind
    report.facts["checksums"] = "all right" if check_checksums(ref.folder) else "none"
    try:
        weights = ref.weights()
    except FileNotFoundError as error:
        raise ValueError(str(error)) from error
    report.facts["bytes"] = sum(weights.file_sizes)
    values = read_json(ref.folder / "config.json") if ref.kind == "dense" else {}
    if ref.kind == "adapter":
        _check_adapter(ref, weights, report)
    elif ref.kind == "crafted":
        report.facts |= {"base": ref.config.base_model_type, "pesc": ref.config.pesc_config.to_dict()}
        _compare(ref, weights, report)
    elif is_published(values, weights.tensors):
        _check_published(values, weights, report)
    else:
        report.kind = "other"
        _check_other(values, weights, report)
    _examine(weights, report)


def _check_adapter(ref: ModelRef, weights: Weights, report: Report) -> None:
    report.facts |= {key: value for key, value in ref.settings.to_dict().items() if key != "base_sha256"}
    try:
        _ = ref.base
    except FileNotFoundError as error:
        report.add("warning", f"the base is not within reach, so nothing was compared with it ({error})")
        return
    _compare(ref, weights, report)
    try:
        ref.check_base()
    except ValueError as error:
        report.add("error", str(error))


def _compare(ref: ModelRef, weights: Weights, report: Report) -> None:
    differences = ref.differences(weights)
    # A dense tensor too many changes nothing; a router or expert too many belongs to another model.
    ours = [name for name in differences.unexpected if ref.kind == "adapter" or _OURS.search(name)]
    for name in set(differences.unexpected) - set(ours):
        report.add("warning", f"unexpected: {name}")
    for line in dataclasses.replace(differences, unexpected=ours).lines():
        report.add("error", line)
    banks = [
        (name, len(bank)) for name, bank in expert_parameters(ref.skeleton()).items() if name.endswith("down_proj")
    ]
    present = sum(experts for name, experts in banks if name in weights.tensors)
    report.facts |= {"experts promised": sum(experts for _, experts in banks), "experts present": present}


def _check_published(values: dict[str, Any], weights: Weights, report: Report) -> None:
    report.kind = "published"
    promised = layouts.promises(values)
    report.facts["promised by"] = promised
    lost = not any(layouts.expert_of(name) for name in weights.tensors)
    if lost:
        report.add(
            "error",
            f"all experts are lost: the config promises them ({', '.join(promised)}), the files "
            "hold none, and only the dense model is left",
        )
    try:
        layout = layouts.detect(values, weights.tensors)
        report.kind = layout.name
        skeleton = skeleton_of(layouts.config_from(values, layout, weights.tensors))
    except ValueError as error:
        report.add("error", str(error))
        return
    report.facts |= {"base": layout.base_model_type, "pesc": skeleton.config.pesc_config.to_dict()}
    plan = layouts.targets(skeleton, layout)
    _report_experts(plan, weights, report)
    for line in plan_differences(plan, weights, skeleton).lines():
        if not (lost and ".moe_adapter." in line):
            report.add("error", line)


def _report_experts(plan: list[Target], weights: Weights, report: Report) -> None:
    promised, present, lost = 0, 0, []
    for target in plan:
        if target.name.endswith("experts.down_proj"):
            keys = [(up, up.replace("adapter_up", "adapter_down")) for up in target.sources]
            held = [all(key in weights.tensors for key in pair) for pair in keys]
            promised, present = promised + len(held), present + sum(held)
            layer = f"layer {target.name.split('.')[2]}"
            lost += [(layer, number) for number, complete in enumerate(held) if not complete]
    report.facts |= {"experts promised": promised, "experts present": present}
    if 0 < present < promised:
        report.add("error", f"{len(lost)} of {promised} experts are not complete: {listed(lost)}")


def _check_other(values: dict[str, Any], weights: Weights, report: Report) -> None:
    """A stock architecture: every layer that has experts must have as many as the config says, each complete."""
    counts = {key: values[key] for key in MOE_FIELDS if isinstance(values.get(key), int) and values[key] > 1}
    matrices: dict[str, dict[str, int]] = defaultdict(dict)
    for name, info in weights.tensors.items():
        if match := _SINGLE.fullmatch(name):
            matrices[match[1]][match[3]] = matrices[match[1]].get(match[3], 0) + 1
        elif (match := _STACKED.fullmatch(name)) and len(info.shape) == 3:
            matrices[match[1]][match[2]] = info.shape[0]
    if not counts:
        report.add("note", "the config promises no experts: a dense model, as far as its files tell")
    else:
        said, experts = ", ".join(f"{key} {value}" for key, value in counts.items()), next(iter(counts.values()))
        layers = len(matrices)
        if values.get("model_type") in _EVERY_LAYER:
            total, dense = values.get("num_hidden_layers", 0), values.get("mlp_only_layers") or []
            if not isinstance(total, int) or not isinstance(dense, list):
                raise ValueError(
                    f"num_hidden_layers ({total!r}) must be a number, and mlp_only_layers ({dense!r}) a list of numbers"
                )
            layers = max(layers, total - len(dense))
        kinds = {kind for held in matrices.values() for kind in held}
        complete = {where: min(held.get(kind, 0) for kind in kinds) for where, held in matrices.items()}
        report.facts |= {"experts promised": experts * layers, "experts present": sum(complete.values())}
        torn = ", ".join(f"{where} has {count}" for where, count in complete.items() if count != experts)
        if not matrices:
            report.add("error", f"all experts are lost: the config promises them ({said}), the files hold none")
        elif torn or layers > len(matrices):
            found = f"{torn or 'none is torn'}; {len(matrices)} of {layers} layers have experts"
            report.add("error", f"experts are lost: the config promises {said} in every layer; {found}")
        for name, info in weights.tensors.items():
            if name.endswith(_ROUTERS) and info.shape[0] != experts:
                report.add("error", f"wrong shape: the router {name} is {list(info.shape)}, for {experts} experts")


def _examine(weights: Weights, report: Report) -> None:
    """Stream all tensors once."""
    examination = Examination()
    for name in sorted(weights.tensors, key=lambda name: (str(weights.tensors[name].file), name)):
        tensor = weights.read(name)
        examination.tensor(name, tensor)
        if place := layouts.expert_of(name):
            examination.expert(f"layer {place[0]}", place[1], place[2], tensor, last=place[2] == "up")
        elif match := _SINGLE.fullmatch(name):
            examination.expert(match[1], int(match[2]), match[3], tensor, last=match[3] in _LAST)
        elif (match := _STACKED.fullmatch(name)) and tensor.dim() == 3:
            for number, matrix in enumerate(tensor):
                examination.expert(match[1], number, match[2], matrix, last=match[2] in _LAST)
    examination.report(report)
