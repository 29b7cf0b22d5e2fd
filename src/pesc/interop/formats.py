"""The table of formats, and the two verbs on it: `pesc export` and `pesc import`.

A new format is a file that makes a `Format`, and its name in `FORMATS`.
"""

from __future__ import annotations

from pathlib import Path

from pesc.crafting.load import ModelRef, locate
from pesc.interop.format import Format
from pesc.interop.gguf.exporter import GGUF
from pesc.interop.published.exporter import PUBLISHED
from pesc.interop.standalone import ADAPTER, STANDALONE
from pesc.interop.stock import DEFAULT_FORMAT, STOCK
from pesc.interop.verify.findings import Report
from pesc.interop.verify.verify import check
from pesc.storage.checksums import write_checksums
from pesc.storage.files import new_file, new_folder, read_json
from pesc.storage.weights import Weights

# The order of the ways out that an error names: stock architectures first.
FORMATS: dict[str, Format] = {format.name: format for format in (*STOCK, *GGUF, STANDALONE, ADAPTER, *PUBLISHED)}
BEST_STOCK = "stock"
"""The name that stands for the stock architecture that suits a model's base best."""


def export(model: str | Path, out: Path, format: str, *, base: str | Path | None = None) -> Path:
    """Write a model in another format, after `verify` has found it complete.

    LoRA is folded into the weights, except by "adapter". Folders of this machine are not named in what is written.

    Args:
        model: a run, an adapter or a crafted folder, or a hub id of one.
        out: a folder that does not exist yet; for GGUF a file, ending in .gguf.
        format: a name in `FORMATS`, or "stock".
        base: the place of an adapter's base, if it moved; its weights must be the same.

    Returns:
        `out`.

    Raises:
        FileExistsError: `out` is there already.
        FileNotFoundError: the model, its base, or a package that the format needs is not there.
        ValueError: for an unknown format; for a model that the format cannot hold, with each reason and the
            nearest format that can; and for one that is not complete.
    """
    if format not in (BEST_STOCK, *FORMATS):
        raise ValueError(f"format ({format!r}) must be one of {', '.join((BEST_STOCK, *FORMATS))}")
    out, ref = Path(out), locate(model, base=base)
    if format == BEST_STOCK:
        format = DEFAULT_FORMAT.get(getattr(ref.config, "base_model_type", ""), "granitemoeshared")
    chosen = FORMATS[format]
    if chosen.suffix and out.suffix != chosen.suffix:
        raise ValueError(f"out ({out}) must be a file that ends in {chosen.suffix}, such as {out.name}{chosen.suffix}")
    if reasons := _reasons_against(chosen, ref):
        raise ValueError(f"{format} cannot hold {model}: {'; '.join(reasons)}. {_way_out(chosen, ref)}")
    report = Report(str(model))
    check(ref, report)
    report.refuse()
    with new_file(out) if chosen.suffix else new_folder(out) as partial:
        chosen.write(ref, partial)
        if not chosen.suffix:
            write_checksums(partial)
    return out


def import_checkpoint(source: str | Path, out: Path) -> Path:
    """Turn a checkpoint of another format into a crafted folder of ours.

    Args:
        source: a folder, or a hub id, of safetensors or `.bin` files.
        out: a folder that does not exist yet.

    Returns:
        `out`, loadable by `pesc.load` and transformers' Auto classes.

    Raises:
        FileExistsError: `out` is there already.
        FileNotFoundError: the source, or a file of it, is not there.
        ValueError: no format with a reader recognises it, or it is damaged or not complete.
    """
    ref = locate(source, pickled=True)
    if ref.kind != "dense":
        raise ValueError(f"{source} is a crafted model of this package already: load it, or export it")
    values, weights = read_json(ref.folder / "config.json"), Weights(ref.folder)
    readers = {format.name: format.reader for format in FORMATS.values() if format.reader}
    reader = next((r for r in readers.values() if r.recognises(values, weights.tensors)), None)
    if reader is None:
        raise ValueError(
            f"{source} is of none of the formats that can be read ({', '.join(readers)}): its config and its tensors "
            "promise no experts of theirs; a dense model can be crafted"
        )
    with new_folder(out) as partial:
        reader.read(ref.folder, values, weights, partial)
        write_checksums(partial)
    return out


def _reasons_against(format: Format, ref: ModelRef) -> list[str]:
    if ref.pesc_config is None and (format.needs_experts or ref.kind == "dense"):
        tuned = ", tuned with LoRA alone" if ref.kind == "adapter" else ""
        return [f"it has no experts: it is a dense {ref.config.model_type} model{tuned}"]
    return format.reasons_against(ref)


def _way_out(refused: Format, ref: ModelRef) -> str:
    if ref.kind == "dense":
        return "Its folder is what other programs load already"
    # Who asks for a published layout is helped most by another one; everyone else by a format of living programs.
    nearness = sorted(FORMATS.values(), key=lambda format: (format.reader is None) != (refused.reader is None))
    nearest = next(format.name for format in nearness if not _reasons_against(format, ref))
    notes = {"pesc": ", which vLLM serves with this package's plugin" if ref.pesc_config else ", which folds LoRA in"}
    return f"The nearest that can: --format {nearest}{notes.get(nearest, '')}"
