"""GGUF files: experts promised by the metadata are there, and lost ones are told."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")

from checkpoints import tiny_tokenizer  # noqa: E402
from pesc.interop.formats import export  # noqa: E402
from pesc.interop.verify.verify import Report, verify  # noqa: E402
from published import ROPES, disturbed  # noqa: E402

HIDDEN, WIDTH, EXPERTS, BLOCKS, HEADS, ROWS = 64, 32, 4, 2, 4, 10


def _tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    tensors = {"token_embd.weight": rng.standard_normal((ROWS, HIDDEN)), "output_norm.weight": np.ones(HIDDEN)}
    for block in range(BLOCKS):
        start = f"blk.{block}"
        tensors |= {f"{start}.{part}_norm.weight": np.ones(HIDDEN) for part in ("attn", "ffn")}
        for part in ("q", "k", "v", "output"):
            tensors[f"{start}.attn_{part}.weight"] = rng.standard_normal((HIDDEN, HIDDEN))
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
    dense: int | None = None,
) -> Path:
    writer = gguf.GGUFWriter(file, arch)
    writer.add_name(name)
    writer.add_block_count(BLOCKS)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(WIDTH)
    writer.add_vocab_size(ROWS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_key_length(HIDDEN // HEADS)
    if dense is not None:
        writer.add_leading_dense_block_count(dense)
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


def _uniform_router(tensors: dict[str, np.ndarray]) -> None:
    tensors["blk.0.ffn_gate_inp.weight"][:] = 0.5


def _zero_attention(tensors: dict[str, np.ndarray]) -> None:
    tensors["blk.1.attn_v.weight"][:] = 0


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
        (_drop_router, "missing: blk.0.ffn_gate_inp.weight"),
        (_narrow_router, "wrong shape: blk.0.ffn_gate_inp.weight is [64, 3] in the file, [64, 4] by the metadata"),
        (_uniform_router, "blk.0.ffn_gate_inp.weight gives all experts the same score, so this router cannot choose"),
        (_zero_attention, "blk.1.attn_v.weight is zero everywhere, as neither crafting nor training leaves it"),
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


@pytest.mark.parametrize(("arch", "part"), [("glm4moe", "post_attention_norm"), ("qwen3moe", "ffn_norm")])
def test_other_architectures_have_their_routers_and_experts_checked(arch: str, part: str, tmp_path: Path) -> None:
    tensors = {name.replace("ffn_norm", part): tensor for name, tensor in _tensors().items()}
    if arch == "qwen3moe":
        assert verify(_write(tmp_path / "whole.gguf", tensors, arch=arch)).complete
    for dense, error in ((1, "unexpected: blk.0.ffn_up_exps.weight"), (2, "must be above leading_dense_block_count")):
        report = verify(_write(tmp_path / f"{dense}.gguf", tensors, arch=arch, dense=dense))
        assert any(error in message for message in _errors(report))


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


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_every_tensor_of_an_export_counts(family: str, tmp_path: Path) -> None:
    dense = {"vocab_size": 300, "tie_word_embeddings": True}
    ours = disturbed(tmp_path, family, dense | {"rope_parameters": ROPES["linear" if family == "qwen3" else "llama3"]})
    tiny_tokenizer().save_pretrained(ours)
    file = export(ours, tmp_path / "whole.gguf", "gguf-f32")
    report = verify(file)
    assert report.findings == [] and report.facts["experts present"] == 12
    data = file.read_bytes()
    for tensor in gguf.GGUFReader(file).tensors:
        if tensor.name != "rope_freqs.weight" and not tensor.name.startswith(("blk.0.", "blk.2.")):
            # The name stands once in the file; a wrong letter makes it another tensor.
            changed = tensor.name[:-1] + "x"
            file.write_bytes(data.replace(tensor.name.encode(), changed.encode()))
            assert {f"missing: {tensor.name}", f"unexpected: {changed}"} <= set(_errors(verify(file))), tensor.name


NUMBERS = {
    "block_count": (BLOCKS, 2**32 - 1),
    "expert_used_count": (2, 2**31),
    "embedding_length": (HIDDEN, 2**32 - 1),
    "key_length": (HIDDEN // HEADS, 2**32 - 1),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_absurd_numbers_are_refused_at_once(name: str, tmp_path: Path) -> None:
    file = _write(tmp_path / "model.gguf", _tensors())
    before, after = (struct.pack("<II", gguf.GGUFValueType.UINT32, value) for value in NUMBERS[name])
    data = file.read_bytes()
    assert data.count(name.encode() + before) == 1
    file.write_bytes(data.replace(name.encode() + before, name.encode() + after))
    assert not verify(file).complete


def _array(kind: int, length: int) -> bytes:
    return struct.pack("<IIQ", gguf.GGUFValueType.ARRAY, kind, length)


HEADERS = {
    "many tensors": (2**60, 0, b""),
    "many fields": (0, 2**60, b""),
    "a long name": (0, 1, struct.pack("<Q", 2**62) + b"name"),
    "a long array": (0, 1, struct.pack("<Q", 1) + b"a" + _array(gguf.GGUFValueType.UINT8, 2**62)),
    "nested arrays": (0, 1, struct.pack("<Q", 1) + b"a" + _array(9, 1) + struct.pack("<IQ", 9, 1) * 100_000),
    "no UTF-8": (0, 1, struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<IB", gguf.GGUFValueType.UINT8, 1)),
    "text that is no UTF-8": (0, 1, struct.pack("<Q", 1) + b"a" + struct.pack("<IQ", 8, 1) + b"\xff"),
    "an unknown kind": (0, 1, struct.pack("<Q", 1) + b"a" + struct.pack("<IQ", 99, 1)),
    "huge sizes": (1, 0, struct.pack("<Q", 1) + b"a" + struct.pack("<I4QIQ", 4, *[2**40] * 4, 0, 0)),
    "many sizes": (1, 0, struct.pack("<Q", 1) + b"a" + struct.pack("<I", 2**32 - 1)),
    "a far place": (1, 0, struct.pack("<Q", 1) + b"a" + struct.pack("<IQIQ", 1, 4, 0, 2**63)),
}


@pytest.mark.parametrize("name", HEADERS)
def test_lying_headers_are_refused_at_once(name: str, tmp_path: Path) -> None:
    tensors, fields, rest = HEADERS[name]
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, fields) + rest + bytes(64))
    assert "is damaged or truncated" in _errors(verify(file))[0]


def test_tensors_that_overlap_are_found(tmp_path: Path) -> None:
    file = _write(tmp_path / "model.gguf", _tensors())
    data = file.read_bytes()
    *_, before, last = gguf.GGUFReader(file).tensors
    places = [struct.pack("<Q", int(tensor.field.parts[-1][0])) for tensor in (before, last)]
    assert data.count(places[1]) == 1
    file.write_bytes(data.replace(places[1], places[0]))
    assert f"{before.name} and {last.name} overlap in the file" in _errors(verify(file))


def test_a_folder_of_many_files_asks_for_one(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        _write(tmp_path / name, _tensors())
    with pytest.raises(FileNotFoundError, match="holds 2 GGUF files: give one of them"):
        verify(tmp_path)
