"""A model's description as a table for the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from pesc.crafting.info import ModelInfo


def show_info(info: ModelInfo, console: Console) -> None:
    """Print what `describe` found."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    for key, value in _rows(info):
        table.add_row(key, value)
    console.print(table, highlight=False, markup=False)


def _rows(info: ModelInfo) -> list[tuple[str, str]]:
    rows = [
        ("model", info.path),
        ("kind", info.kind + (f" of {info.base_model}" if info.base_model else "")),
        ("family", f"{info.family}, {info.num_layers} layers, hidden size {info.hidden_size}, {info.dtype}"),
    ]
    if info.pesc:
        rows.append(("experts", _experts(info)))
    if info.lora:
        rows.append(("LoRA", f"r {info.lora.get('r', 8)}, alpha {info.lora.get('lora_alpha', 8)}"))
    counts = info.parameters
    rows += [
        ("parameters", f"{_millions(counts['total'])} total, {_millions(counts['active'])} active for a token"),
        ("trained", _millions(counts["trained"])),
        ("files", f"{info.file_bytes / 1e6:,.0f} MB"),
    ]
    if info.pesc:
        rows.append(("missing", ", ".join(info.missing) or "none"))
        if info.wrong_shape:
            rows.append(("wrong shape", ", ".join(info.wrong_shape)))
        rows.append(("untouched", _untouched(info)))
    return rows


def _experts(info: ModelInfo) -> str:
    assert info.pesc is not None
    p, layers = info.pesc, len(info.crafted_layers)
    return (
        f"{p['num_experts']} in {'every layer' if layers == info.num_layers else f'{layers} layers'}, top "
        f"{p['num_experts_per_tok']}, adapter dim {p['adapter_dim']}, {p['adapter_placement']}, "
        f"{p['adapter_activation']}, scaling {p['adapter_scaling']:g}"
    )


def _untouched(info: ModelInfo) -> str:
    if not info.untouched:
        return "none: every expert has left its initial value"
    names = ", ".join(info.untouched[:4]) + (", …" if len(info.untouched) > 4 else "")
    return f"{len(info.untouched)} experts still at their initial value, adding nothing ({names})"


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M"
