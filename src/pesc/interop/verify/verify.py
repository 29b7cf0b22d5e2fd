"""Prove that a model's files hold the experts they promise: ours, the published layouts, GGUF."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from pesc.config import PescConfig
from pesc.crafting.adapter import ADAPTER_JSON, ADAPTER_WEIGHTS
from pesc.crafting.configuration import MODEL_TYPE
from pesc.crafting.craft import craft
from pesc.crafting.load import find_adapter, load_config
from pesc.crafting.lora import adapter_tensors, add_lora
from pesc.crafting.skeleton import names_in_model, skeleton_of, tied_names
from pesc.crafting.sources import resolve
from pesc.crafting.surgery import crafted_ffns
from pesc.interop.published import layouts
from pesc.interop.published.importer import mismatches, rotary_problems, source_folder
from pesc.interop.published.layouts import Target
from pesc.interop.verify.findings import Examination, Finding, Report, listed
from pesc.storage.files import read_json
from pesc.storage.weights import Weights, weights_hash

__all__ = ["Finding", "Report", "verify"]


_MOE_FIELDS = ("num_local_experts", "num_experts", "n_routed_experts")


# Stock architectures that our exports use, with experts in every layer unless mlp_only_layers says otherwise.
_EVERY_LAYER = ("granitemoe", "granitemoeshared", "mixtral", "qwen2_moe")


_ROUTERS = (".mlp.gate.weight", ".block_sparse_moe.gate.weight", ".block_sparse_moe.router.layer.weight")


_SINGLE = re.compile(r"(.+)\.experts\.(\d+)\.(\w+)\.weight")


_STACKED = re.compile(r"(.+)\.(?:experts|block_sparse_moe)\.(\w+?)(?:\.weight)?")


_LAST = ("down_proj", "output_linear", "w2")


def verify(path: str | Path) -> Report:
    """Check that a model on disk is whole, reading one tensor at a time and running none of its code.

    Looked for: experts present against experts promised, untouched, blank and duplicate experts, NaN and inf,
    mixed dtypes, shapes, damaged files.

    Args:
        path: a crafted folder, an adapter's or a run's folder, a checkpoint of the Camelidae, Qwen2idae or
            Sparsetral layout, a GGUF file, or a hub id.

    Returns:
        A report; `report.whole` is the verdict.

    Raises:
        FileNotFoundError: when the path is not there or no model, or a GGUF file is given and the package
            `gguf` is not installed.
    """
    report = Report(str(path))
    try:
        gguf_file = _gguf_file(Path(path).expanduser())
        if gguf_file is not None:
            from pesc.interop.verify.gguf import check_gguf

            report.kind = "gguf"
            check_gguf(gguf_file, report)
        elif (adapter := find_adapter(path)) is not None:
            report.kind = "adapter"
            _check_adapter(adapter, report)
        else:
            _check_folder(source_folder(path), report)
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


def _check_folder(folder: Path, report: Report) -> None:
    values = read_json(folder / "config.json")
    weights = _weights(folder, report)
    if values.get("model_type") == MODEL_TYPE:
        report.kind = "crafted"
        _check_crafted(folder, weights, report)
    elif layouts.promises(values) or any(layouts.expert_of(name) for name in weights.tensors):
        report.kind = "foreign"
        _check_foreign(values, weights, report)
    else:
        report.kind = "other"
        _check_other(values, weights, report)


def _weights(folder: Path, report: Report, files: list[Path] | None = None) -> Weights:
    try:
        weights = Weights(folder, files)
    except FileNotFoundError as error:
        raise ValueError(str(error)) from error
    report.facts["bytes"] = sum(file.stat().st_size for file in weights.files)
    return weights


def _check_crafted(folder: Path, weights: Weights, report: Report) -> None:
    try:
        config = AutoConfig.from_pretrained(folder)
        skeleton = skeleton_of(config)
    except (StrictDataclassError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error
    report.facts |= {"base": config.base_model_type, "pesc": config.method.to_dict()}
    in_model = names_in_model(skeleton, weights.tensors)
    on_disk = {name: stored for stored, name in in_model.items()}
    shapes = {on_disk.get(name, name): tuple(parameter.shape) for name, parameter in skeleton.named_parameters()}
    _compare(shapes, weights, report)
    known = set(skeleton.state_dict()) | tied_names(skeleton)
    for name in sorted(stored for stored, name in in_model.items() if name not in known):
        ours = ".router." in name or ".experts." in name
        report.add("error" if ours else "warning", f"unexpected: {name}")
    _count_banks(shapes, weights, report)
    _examine(weights, report)


def _check_adapter(folder: Path, report: Report) -> None:
    settings = read_json(folder / ADAPTER_JSON)
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ValueError(f"{folder} holds no {ADAPTER_WEIGHTS}: the folder is not whole")
    weights = _weights(folder, report, [folder / ADAPTER_WEIGHTS])
    report.facts |= {key: settings.get(key) for key in ("base_model", "pesc", "lora")}
    try:
        expected = _adapter_shapes(settings)
        found = weights_hash(resolve(settings["base_model"]))
    except FileNotFoundError as error:
        report.add("warning", f"the base is not within reach, so nothing was compared with it ({error})")
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / ADAPTER_JSON} lacks or breaks a setting: {error}") from error
    else:
        _compare(expected, weights, report)
        for name in sorted(weights.tensors.keys() - expected.keys()):
            report.add("error", f"unexpected: {name}")
        _count_banks(expected, weights, report)
        if found != settings["base_sha256"]:
            report.add(
                "error",
                f"the base {settings['base_model']} has weights of sha256 {found[:12]}…, but the adapter "
                f"was trained on {settings['base_sha256'][:12]}…",
            )
    _examine(weights, report)


def _adapter_shapes(settings: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    model = skeleton_of(load_config(settings["base_model"]))
    if settings["pesc"] and not crafted_ffns(model):
        craft(model, PescConfig.from_dict(settings["pesc"]))
    if settings["lora"]:
        from peft import LoraConfig

        add_lora(model, LoraConfig(**settings["lora"]))
    return {name: tuple(parameter.shape) for name, parameter in adapter_tensors(model).items()}


def _check_foreign(values: dict[str, Any], weights: Weights, report: Report) -> None:
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
    else:
        report.facts |= {"base": layout.base_model_type, "pesc": skeleton.config.method.to_dict()}
        plan = layouts.targets(skeleton, layout)
        _report_experts(plan, weights, report)
        for line in [*mismatches(plan, weights, tied_names(skeleton)), *rotary_problems(skeleton, weights)]:
            if not (lost and ".moe_adapter." in line):
                report.add("error", line)
    _examine(weights, report)


def _report_experts(plan: list[Target], weights: Weights, report: Report) -> None:
    promised, present, lost = 0, 0, []
    for target in plan:
        if target.name.endswith("experts.down_proj"):
            keys = [(up, up.replace("adapter_up", "adapter_down")) for up in target.sources]
            held = [all(key in weights.tensors for key in pair) for pair in keys]
            promised, present = promised + len(held), present + sum(held)
            layer = f"layer {target.name.split('.')[2]}"
            lost += [(layer, number) for number, whole in enumerate(held) if not whole]
    report.facts |= {"experts promised": promised, "experts present": present}
    if 0 < present < promised:
        report.add("error", f"{len(lost)} of {promised} experts are not whole: {listed(lost)}")


def _check_other(values: dict[str, Any], weights: Weights, report: Report) -> None:
    """A stock architecture: every layer that has experts must have as many as the config says, each whole."""
    counts = {key: values[key] for key in _MOE_FIELDS if isinstance(values.get(key), int) and values[key] > 1}
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
            layers = max(layers, values.get("num_hidden_layers", 0) - len(values.get("mlp_only_layers") or []))
        kinds = {kind for held in matrices.values() for kind in held}
        whole = {where: min(held.get(kind, 0) for kind in kinds) for where, held in matrices.items()}
        report.facts |= {"experts promised": experts * layers, "experts present": sum(whole.values())}
        torn = ", ".join(f"{where} has {count}" for where, count in whole.items() if count != experts)
        if not matrices:
            report.add("error", f"all experts are lost: the config promises them ({said}), the files hold none")
        elif torn or layers > len(matrices):
            found = f"{torn or 'none is torn'}; {len(matrices)} of {layers} layers have experts"
            report.add("error", f"experts are lost: the config promises {said} in every layer; {found}")
        for name, info in weights.tensors.items():
            if name.endswith(_ROUTERS) and info.shape[0] != experts:
                report.add("error", f"wrong shape: the router {name} is {list(info.shape)}, for {experts} experts")
    _examine(weights, report)


def _compare(expected: dict[str, tuple[int, ...]], weights: Weights, report: Report) -> None:
    for name, shape in sorted(expected.items()):
        found = weights.tensors.get(name)
        if found is None:
            report.add("error", f"missing: {name}")
        elif found.shape != shape:
            shapes = f"{list(found.shape)} in the file, {list(shape)} by the config"
            report.add("error", f"wrong shape: {name} is {shapes}")


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


def _count_banks(shapes: dict[str, tuple[int, ...]], weights: Weights, report: Report) -> None:
    banks = {name: shape[0] for name, shape in shapes.items() if name.endswith(".experts.down_proj")}
    present = sum(experts for name, experts in banks.items() if name in weights.tensors)
    report.facts |= {"experts promised": sum(banks.values()), "experts present": present}
