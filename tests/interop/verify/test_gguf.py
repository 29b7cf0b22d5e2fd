"""GGUF files: experts promised by the metadata are there, and lost ones are told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")

from pesc.interop.verify.verify import Report, verify  # noqa: E402

HIDDEN, WIDTH, EXPERTS, BLOCKS = 64, 32, 4, 2


def _tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    tensors = {"token_embd.weight": rng.standard_normal((10, HIDDEN)), "output_norm.weight": np.ones(HIDDEN)}
    for block in range(BLOCKS):
        start = f"blk.{block}"
        tensors[f"{start}.ffn_gate_inp.weight"] = rng.standard_normal((EXPERTS, HIDDEN))
        for part, shape in (("gate", (WIDTH, HIDDEN)), ("up", (WIDTH, HIDDEN)), ("down", (HIDDEN, WIDTH))):
            tensors[f"{start}.ffn_{part}_exps.weight"] = rng.standard_normal((EXPERTS, *shape))
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}


def _write(
    file: Path,
    tensors: dict[str, np.ndarray],
    *,
    experts: int | None = EXPERTS,
    arch: str = "granitemoe",
    name: str = "tiny",
    quantized: bool = False,
) -> Path:
    writer = gguf.GGUFWriter(file, arch)
    writer.add_name(name)
    writer.add_block_count(BLOCKS)
    writer.add_embedding_length(HIDDEN)
    if experts is not None:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(2)
    for key, tensor in tensors.items():
        if quantized and tensor.ndim > 1:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(key, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
        else:
            writer.add_tensor(key, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _errors(report: Report) -> list[str]:
    return [finding.message for finding in report.findings if finding.severity == "error"]


@pytest.mark.parametrize("quantized", [False, True])
def test_a_whole_file(quantized: bool, tmp_path: Path) -> None:
    report = verify(_write(tmp_path / "model.gguf", _tensors(), quantized=quantized))
    assert report.complete
    assert report.findings == []
    assert (report.kind, report.facts["experts promised"], report.facts["experts present"]) == ("gguf", 8, 8)
    assert verify(tmp_path).complete


def _drop_stack(tensors: dict[str, np.ndarray]) -> None:
    del tensors["blk.1.ffn_down_exps.weight"]


def _drop_router(tensors: dict[str, np.ndarray]) -> None:
    del tensors["blk.0.ffn_gate_inp.weight"]


def _narrow_router(tensors: dict[str, np.ndarray]) -> None:
    tensors["blk.0.ffn_gate_inp.weight"] = tensors["blk.0.ffn_gate_inp.weight"][:3]


def _drop_all(tensors: dict[str, np.ndarray]) -> None:
    for name in [name for name in tensors if "exps" in name or "gate_inp" in name]:
        del tensors[name]


def _duplicate(tensors: dict[str, np.ndarray]) -> None:
    for part in ("gate", "up", "down"):
        stack = tensors[f"blk.1.ffn_{part}_exps.weight"]
        stack[3] = stack[0]


def _spoil(tensors: dict[str, np.ndarray]) -> None:
    tensors["blk.1.ffn_up_exps.weight"][2, 0, 0] = np.nan


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (_drop_stack, "expert_count promises 4 experts in every block; found block 1: 0"),
        (_drop_router, "missing: blk.0.ffn_gate_inp.weight (the router)"),
        (_narrow_router, "wrong shape: the router blk.0.ffn_gate_inp.weight is [64, 3], [64, 4] by the metadata"),
        (_drop_all, "all experts are lost: expert_count is 4, but the file holds none"),
        (_duplicate, "2 experts are duplicates, bit for bit: block 1: 0, 3"),
        (_spoil, "blk.1.ffn_up_exps.weight holds 1 NaN"),
    ],
)
def test_what_is_wrong_is_told(change: Callable, error: str, tmp_path: Path) -> None:
    tensors = _tensors()
    change(tensors)
    report = verify(_write(tmp_path / "model.gguf", tensors))
    assert not report.complete
    assert error in _errors(report)


def test_untouched_experts_are_a_warning(tmp_path: Path) -> None:
    tensors = _tensors()
    tensors["blk.0.ffn_down_exps.weight"][1] = 0
    report = verify(_write(tmp_path / "model.gguf", tensors, quantized=True))
    assert report.complete
    assert "untouched experts: 1 (" in report.findings[0].message
    assert "block 0: 1" in report.findings[0].message


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("m.gguf", "hywu_camelidae-8x7b"),
        ("m.gguf", "Sparsetral 16x7B v2"),
        ("m.gguf", "my PESC model"),
        ("camelidae-8x7b.Q4_K_M.gguf", "LLaMA v2"),
    ],
)
def test_a_dense_file_of_a_model_with_experts_has_lost_them(file: str, name: str, tmp_path: Path) -> None:
    tensors = _tensors()
    _drop_all(tensors)
    report = verify(_write(tmp_path / file, tensors, experts=None, arch="llama", name=name))
    assert not report.complete
    assert "all experts are lost: the file was made from a model with experts" in _errors(report)[0]
    assert "holds a dense llama model" in _errors(report)[0]


def test_a_dense_file_of_a_dense_model_is_whole(tmp_path: Path) -> None:
    tensors = _tensors()
    _drop_all(tensors)
    report = verify(_write(tmp_path / "m.gguf", tensors, experts=None, arch="llama", name="SmolLM2 135M"))
    assert report.complete
    assert [finding.severity for finding in report.findings] == ["note"]


def test_a_truncated_file_is_a_finding(tmp_path: Path) -> None:
    file = _write(tmp_path / "model.gguf", _tensors())
    for length in (file.stat().st_size - 64, 200, 10):
        file.write_bytes(file.read_bytes()[:length])
        report = verify(file)
        assert not report.complete
        assert "damaged or truncated" in _errors(report)[0]


def test_a_folder_of_many_files_asks_for_one(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        _write(tmp_path / name, _tensors())
    with pytest.raises(FileNotFoundError, match="holds 2 GGUF files: give one of them"):
        verify(tmp_path)
