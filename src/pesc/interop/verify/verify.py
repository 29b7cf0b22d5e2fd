"""Prove that a model's files hold what they promise: ours, the published layouts, stock architectures, GGUF."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pesc.crafting.families import MOE_FIELDS
from pesc.crafting.load import ModelRef, locate
from pesc.crafting.skeleton import shapes_in_files, skeleton_of
from pesc.interop.published import layouts
from pesc.interop.published.importer import plan_differences, untied
from pesc.interop.published.layouts import is_published
from pesc.interop.verify.findings import Examination, Finding, Report, listed
from pesc.storage.checksums import check_checksums
from pesc.storage.compare import TensorDifferences
from pesc.storage.files import read_json
from pesc.storage.weights import Weights

__all__ = ["Finding", "Report", "verify"]
_MOE = re.compile(r"\.(router|experts|moe_adapter|block_sparse_moe|mlp\.gate)\.")
_ROUTER = re.compile(r".+\.(router|gate|router\.layer)\.weight")
_EXPERT = re.compile(
    r"\D*(?P<layer>\d+)\.(.+\.)?(experts|block_sparse_moe)\.((expert_)?(?P<number>\d+)\.)?(?P<part>\w+)(\.weight)?"
)
_LAST = ("down_proj", "output_linear", "w2", "adapter_up")
# LoRA starts with one, and our exports to the Qwen architectures switch their gate off with one.
_ZERO_MATRIX = re.compile(r".+\.(lora_B\.\w+|shared_expert_gate)\.weight")


def verify(path: str | Path, *, base: str | Path | None = None) -> Report:
    """Check that a model on disk is complete, reading one tensor at a time and running none of its code.

    Looked for: tensors against those of the config, experts against experts promised, untouched, blank and duplicate
    experts, routers that cannot choose, zeroed tensors, NaN and inf, mixed dtypes, damaged files.

    Args:
        path: a crafted folder, an adapter's or a run's folder, a checkpoint of the Camelidae, Qwen2idae or
            Sparsetral layout, a stock architecture, a GGUF file, or a hub id.
        base: the place of an adapter's base, if it moved.

    Returns:
        A report; `report.complete` is the verdict. An adapter is not complete if its base is not within reach.

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
            check(locate(path, base=base, pickled=True), report)
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


def check(ref: ModelRef, report: Report) -> None:
    """Check a model's folder and add to the report.

    Raises:
        ValueError: the files cannot be read, or make no sense.
    """
    report.kind = ref.kind
    try:
        weights = ref.weights()
    except FileNotFoundError as error:
        raise ValueError(str(error)) from error
    report.facts["checksums"] = "all right" if check_checksums(ref.folder) else "none"
    report.facts["bytes"] = sum(weights.file_sizes)
    values = read_json(ref.folder / "config.json") if ref.kind == "dense" else {}
    if ref.kind == "adapter":
        skeleton = _check_adapter(ref, weights, report)
    elif is_published(values, weights.tensors):
        skeleton = _check_published(values, weights, report)
    else:
        skeleton = _check_config(ref, values, weights, report)
    _examine(weights, skeleton, report)


def _check_adapter(ref: ModelRef, weights: Weights, report: Report) -> Any:
    report.facts |= {key: value for key, value in ref.settings.to_dict().items() if not key.endswith("sha256")}
    try:
        skeleton = ref.skeleton(folded=False)
    except FileNotFoundError as error:
        report.add("error", f"the base could not be checked, and without it nothing can be said: {error}")
        return None
    _compare(ref.differences(weights), shapes_in_files(ref.skeleton()), weights, report)
    try:
        ref.base.weights()  # what is no checkpoint at all shows before all of it is hashed
        ref.settings.check_base(ref.base.folder)
        for line in ref.base.differences().lines():
            report.add("error", f"its base is not complete: {line}")
    except (FileNotFoundError, ValueError) as error:
        report.add("error", str(error))
    return skeleton


def _check_published(values: dict[str, Any], weights: Weights, report: Report) -> Any:
    report.kind = "published"
    report.facts["promised by"] = layouts.promises(values)
    try:
        layout = layouts.detect(values, weights.tensors)
        report.kind = layout.name
        skeleton = skeleton_of(layouts.config_from(values, layout, weights.tensors))
    except ValueError as error:
        _compare(TensorDifferences(), {}, weights, report)
        report.add("error", str(error))
        return None
    report.facts |= {"base": layout.base_model_type, "pesc": skeleton.config.pesc_config.to_dict()}
    plan = layouts.targets(skeleton, layout)
    promised = {name: target.shape for target in plan for name in target.sources}
    _compare(plan_differences(plan, weights, skeleton), promised, weights, report)
    return skeleton


def _check_config(ref: ModelRef, values: dict[str, Any], weights: Weights, report: Report) -> Any:
    """Check a crafted folder, a stock architecture or a dense model against its config."""
    if ref.pesc_config:
        report.facts |= {"base": ref.config.base_model_type, "pesc": ref.pesc_config.to_dict()}
    counts = [f"{key} {values[key]}" for key in MOE_FIELDS if isinstance(values.get(key), int) and values[key] > 1]
    report.kind = "other" if ref.kind == "dense" else ref.kind
    if report.kind == "other" and not counts:
        report.add("note", "the config promises no experts: a dense model, as far as its files tell")
    report.facts["promised by"] = counts
    if ref.kind == "dense" and values.get("quantization_config") and weights.not_floating(weights.tensors):
        report.add("note", "quantized weights: their names and shapes were not compared with the config")
        return None
    differences = ref.differences(weights)
    differences.others += untied(ref.skeleton(), weights)
    if ref.kind == "dense":
        # A dense family may leave tensors aside (old buffers, heads for other tasks); experts are never left aside.
        aside = [name for name in differences.unexpected if not _MOE.search(name)]
        differences.unexpected = [name for name in differences.unexpected if name not in aside]
        for name in aside:
            report.add("warning", f"unexpected: {name}")
    _compare(differences, shapes_in_files(ref.skeleton()), weights, report)
    return ref.skeleton()


def _compare(
    differences: TensorDifferences, promised: Mapping[str, tuple[int, ...]], weights: Weights, report: Report
) -> None:
    """Report differences and count experts.

    Args:
        differences: between the files and the promised tensors.
        promised: the shape of every promised tensor by its name in files.
        weights: the files.
        report: gets the findings and facts, and may already have "promised by", a config's own words for its experts.
    """
    wanted, held = _experts(promised), _experts(weights.shapes)
    lost = [place for place, parts in wanted.items() if not parts <= held.get(place, set())]
    report.facts |= {"experts promised": len(wanted), "experts present": len(wanted) - len(lost)}
    words = report.facts.get("promised by")
    if held and lost:
        report.add("error", f"{len(lost)} of {len(wanted)} experts are not complete: {listed(lost)}")
    elif lost or (words and not held):
        said = ", ".join(words or [str(len(wanted))])
        report.add("error", f"all experts are lost: the config promises them ({said}), and the files hold none")
        missing = [name for name in differences.missing if not _MOE.search(name)]
        differences = dataclasses.replace(differences, missing=missing)
    for line in differences.lines():
        report.add("error", line)


def _experts(shapes: Mapping[str, tuple[int, ...]]) -> dict[tuple[str, int], set[str]]:
    """The names of each expert's matrices, by its layer and number."""
    found: dict[tuple[str, int], set[str]] = defaultdict(set)
    for name, shape in shapes.items():
        layer, part, numbers = _place(name, shape)
        for number in numbers:
            found[layer, number].add(part)
    return found


def _place(name: str, shape: tuple[int, ...]) -> tuple[str, str, range]:
    """The layer, the matrix's name, and the numbers of the experts that a tensor belongs to; none if it is no
    expert's."""
    match = _EXPERT.fullmatch(name)
    if match is None or (match["number"] is None and len(shape) != 3):
        return "", "", range(0)
    numbers = range(shape[0]) if match["number"] is None else range(int(match["number"]), int(match["number"]) + 1)
    return f"layer {int(match['layer'])}", match["part"], numbers


def _examine(weights: Weights, skeleton: Any, report: Report) -> None:
    """Stream all tensors once."""
    examination = Examination()
    for name in sorted(weights.tensors, key=lambda name: (str(weights.tensors[name].file), name)):
        tensor = weights.read(name)
        examination.tensor(name, tensor)
        layer, part, numbers = _place(name, tuple(tensor.shape))
        for number, matrix in zip(numbers, tensor if tensor.dim() == 3 else [tensor], strict=False):
            examination.expert(layer, number, part, matrix, last=part in _LAST)
        if _ROUTER.fullmatch(name):
            examination.router(name, tensor)
        elif (
            tensor.is_floating_point() and not numbers and not tensor.any() and not _may_be_zero(name, tensor, skeleton)
        ):
            examination.zero(name)
    examination.report(report)


def _may_be_zero(name: str, tensor: Any, skeleton: Any) -> bool:
    """Whether a tensor of zeros is what training or an export of ours can leave."""
    if tensor.dim() > 1:
        return _ZERO_MATRIX.fullmatch(name) is not None
    parent, _, key = name.rpartition(".")
    if skeleton is None or parent not in dict(skeleton.named_modules()):
        return True
    # Biases start at zero, and so do the norms of families that add 1 to them.
    module = copy.deepcopy(skeleton.get_submodule(parent)).to_empty(device="cpu")
    skeleton._init_weights(module)
    return key not in module.state_dict() or not module.state_dict()[key].any()
