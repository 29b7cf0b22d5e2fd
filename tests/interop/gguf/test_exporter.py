"""GGUF files hold every tensor bit for bit, with the shape, the tokenizer and the template that llama.cpp needs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from checkpoints import CHATML, tiny_tokenizer
from pesc.interop.formats import export
from pesc.interop.gguf import vocabulary as gguf_vocab
from pesc.interop.verify.verify import verify
from published import GATED, NO_WINDOW, ROPES, crafted, disturbed

gguf = pytest.importorskip("gguf")
WIDE = {"vocab_size": 300}


def with_tokenizer(folder: Path) -> Path:
    tiny_tokenizer().save_pretrained(folder)
    return folder


def read(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata, and tensors in our order of axes, dequantized."""
    reader = gguf.GGUFReader(file)
    tensors = {}
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        tensors[tensor.name] = torch.from_numpy(values.reshape(*reversed([int(n) for n in tensor.shape])).copy())
    return {key: field.contents() for key, field in reader.fields.items()}, tensors


def turned(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head as llama.cpp pairs them: first half and second half in turn."""
    parts = [torch.stack(list(head.chunk(2)), dim=1).flatten(0, 1) for head in weight.chunk(heads)]
    return torch.cat(parts)


def test_every_tensor_is_there_bit_for_bit(tmp_path: Path) -> None:
    ours = with_tokenizer(disturbed(tmp_path, "qwen2", WIDE, adapter_scaling=0.5))
    _, theirs = read(export(ours, tmp_path / "out.gguf", "gguf-f32"))
    tensors = load_file(ours / "model.safetensors")
    expected = {"token_embd.weight": tensors["model.embed_tokens.weight"], "output.weight": tensors["lm_head.weight"]}
    expected["output_norm.weight"] = tensors["model.norm.weight"]
    for layer in range(3):
        part = {name.removeprefix(f"model.layers.{layer}."): tensor for name, tensor in tensors.items()}
        experts, attention = part["mlp.experts.gate_up_proj"], {}
        for name, heads in (("q", 4), ("k", 2)):
            for kind in ("weight", "bias"):
                attention[f"attn_{name}.{kind}"] = turned(part[f"self_attn.{name}_proj.{kind}"], heads)
        block = attention | {
            "attn_v.weight": part["self_attn.v_proj.weight"],
            "attn_v.bias": part["self_attn.v_proj.bias"],
            "attn_output.weight": part["self_attn.o_proj.weight"],
            "attn_norm.weight": part["input_layernorm.weight"],
            "ffn_norm.weight": part["post_attention_layernorm.weight"],
            "ffn_gate_shexp.weight": part["mlp.gate_proj.weight"],
            "ffn_up_shexp.weight": part["mlp.up_proj.weight"],
            "ffn_down_shexp.weight": part["mlp.down_proj.weight"],
            "ffn_gate_inp.weight": part["mlp.router.weight"],
            "ffn_gate_exps.weight": experts[:, :8],
            "ffn_up_exps.weight": experts[:, 8:],
            "ffn_down_exps.weight": part["mlp.experts.down_proj"] * 0.5,
        }
        expected |= {f"blk.{layer}.{name}": tensor for name, tensor in block.items()}
    assert theirs.keys() == expected.keys()
    assert all(torch.equal(theirs[name], expected[name]) for name in expected)


def test_metadata_is_complete(tmp_path: Path) -> None:
    multipliers = {"embedding_multiplier": 3.0, "attention_multiplier": 0.125}
    ours = with_tokenizer(disturbed(tmp_path, "granite", WIDE | multipliers, num_experts=3))
    (ours / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    fields, _ = read(export(ours, tmp_path / "out.gguf", "gguf-f32"))
    expected = {
        "general.architecture": "granitemoe",
        "general.license": "apache-2.0",
        "general.file_type": 0,
        "granitemoe.vocab_size": 300,
        "granitemoe.context_length": 128,
        "granitemoe.embedding_length": 32,
        "granitemoe.block_count": 3,
        "granitemoe.feed_forward_length": 8,
        "granitemoe.expert_shared_feed_forward_length": 48,
        "granitemoe.expert_count": 3,
        "granitemoe.expert_used_count": 2,
        "granitemoe.attention.head_count": 4,
        "granitemoe.attention.head_count_kv": 2,
        "granitemoe.attention.key_length": 8,
        "granitemoe.attention.scale": 0.125,
        "granitemoe.embedding_scale": 3.0,
        "granitemoe.residual_scale": 0.5,
        "granitemoe.logit_scale": 2.0,
        "granitemoe.rope.dimension_count": 8,
        "granitemoe.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHATML,
    }
    assert {key: fields.get(key) for key in expected} == expected
    texts, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(texts) == len(kinds) == 300
    assert (texts[1], texts[258], texts[299]) == (
        "<|im_start|>",
        tiny_tokenizer().convert_ids_to_tokens(258),
        "[PAD299]",
    )
    assert (kinds[1], kinds[258], kinds[299]) == (3, 1, 5)


def test_qwen3_goes_into_glm4moe_with_a_softmax_router(tmp_path: Path) -> None:
    dense = WIDE | {"head_dim": 16, "tie_word_embeddings": True}
    ours = with_tokenizer(disturbed(tmp_path, "qwen3", dense, adapter_dim=10))
    fields, theirs = read(export(ours, tmp_path / "out.gguf", "gguf-f32"))
    tensors = load_file(ours / "model.safetensors")
    assert fields["general.architecture"] == "glm4moe"
    assert (fields["glm4moe.expert_gating_func"], fields["glm4moe.expert_weights_norm"]) == (1, True)
    assert fields["glm4moe.expert_shared_count"] == 5
    assert fields["glm4moe.attention.key_length"] == 16
    up, down = (tensors[f"model.layers.2.mlp.{name}_proj.weight"] for name in ("up", "down"))
    assert torch.equal(theirs["blk.2.ffn_up_shexp.weight"], torch.cat([up, torch.zeros(2, 32)]))
    assert torch.equal(theirs["blk.2.ffn_down_shexp.weight"], torch.cat([down, torch.zeros(32, 2)], dim=1))
    assert torch.equal(theirs["blk.2.attn_q.weight"], tensors["model.layers.2.self_attn.q_proj.weight"])
    assert torch.equal(theirs["blk.2.attn_k_norm.weight"], tensors["model.layers.2.self_attn.k_norm.weight"])
    assert torch.equal(theirs["blk.2.exp_probs_b.bias"], torch.zeros(4))
    assert "output.weight" not in theirs


@pytest.mark.parametrize(("format", "error"), [("gguf-f16", 1e-3), ("gguf-q8_0", 1e-2)])
def test_rounded_files_keep_routers_and_norms_whole(format: str, error: float, tmp_path: Path) -> None:
    ours = with_tokenizer(disturbed(tmp_path, "llama", WIDE, adapter_dim=32))
    _, exact = read(export(ours, tmp_path / "exact.gguf", "gguf-f32"))
    _, rounded = read(export(ours, tmp_path / "out.gguf", format))
    assert exact.keys() == rounded.keys()
    for name, tensor in exact.items():
        found = rounded[name].float()
        if tensor.dim() == 1 or "gate_inp" in name:
            assert torch.equal(found, tensor)
        else:
            assert (found - tensor).abs().max() <= error * tensor.abs().max()
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    # Rows of 48 are no multiple of a block of 32.
    assert kinds["blk.0.ffn_down_shexp.weight"] == "F16"
    assert kinds["blk.0.ffn_down_exps.weight"] == ("F16" if format == "gguf-f16" else "Q8_0")
    assert (tmp_path / "out.gguf").stat().st_size < 0.7 * (tmp_path / "exact.gguf").stat().st_size


def test_llama3_frequencies_are_written(tmp_path: Path) -> None:
    rope = ROPES["llama3"] | {"original_max_position_embeddings": 300}
    dense = WIDE | {"rope_parameters": rope, "max_position_embeddings": 2048}
    ours = with_tokenizer(disturbed(tmp_path, "llama", dense))
    _, theirs = read(export(ours, tmp_path / "out.gguf", "gguf-f32"))
    plain = 5e5 ** -(np.arange(0, 8, 2) / 8)
    long = 2 * np.pi / plain
    smooth = np.clip((300 / long - 1) / 3, 0, 1)
    factors = 1 / ((1 - smooth) / 8 + smooth)
    torch.testing.assert_close(theirs["rope_freqs.weight"], torch.from_numpy(factors).float())
    assert 1 < factors[1] < 8
    linear = with_tokenizer(disturbed(tmp_path / "b", "llama", WIDE | {"rope_parameters": ROPES["linear"]}))
    fields, _ = read(export(linear, tmp_path / "linear.gguf", "gguf-f32"))
    assert (fields["granitemoe.rope.scaling.type"], fields["granitemoe.rope.scaling.factor"]) == ("linear", 4.0)


def test_verify_finds_the_file_whole(tmp_path: Path) -> None:
    ours = with_tokenizer(disturbed(tmp_path, "llama", WIDE))
    report = verify(export(ours, tmp_path / "out.gguf", "gguf-f32"))
    assert report.facts["experts promised"] == report.facts["experts present"] == 12
    assert not [finding for finding in report.findings if finding.severity == "error"]


@pytest.mark.parametrize(
    ("family", "dense", "method", "reason"),
    [
        ("llama", {}, {"adapter_activation": "gelu"}, r"parallel \+ gelu.*--format pesc"),
        ("mistral", {"sliding_window": 8}, {}, "sliding_window 8"),
        ("qwen3", {}, {"layers": [1]}, r"only layers \[1\].*--format qwen3_next"),
        ("gemma2", {}, {}, "its base is gemma2, and the format holds llama, mistral, granite, qwen2, qwen3"),
        ("llama", {"rope_parameters": ROPES["yarn"]}, {}, "rope_type is 'yarn'.*--format granitemoeshared"),
        ("llama", {"vocab_size": 100}, {}, "a token of id 258, and its embeddings only 100 rows"),
    ],
)
def test_what_the_file_cannot_hold_is_refused(
    family: str, dense: dict[str, Any], method: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    crafted(tmp_path / "ours", family, WIDE | dense, **GATED | method)
    with_tokenizer(tmp_path / "ours")
    (tmp_path / "ours" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=reason):
        export(tmp_path / "ours", tmp_path / "out.gguf", "gguf-f32")
    assert not (tmp_path / "out.gguf").exists()


def test_a_file_needs_its_ending_and_a_tokenizer(tmp_path: Path) -> None:
    ours = disturbed(tmp_path, "mistral", WIDE | NO_WINDOW)
    with pytest.raises(ValueError, match=r"must be a file that ends in .gguf, such as out.gguf"):
        export(ours, tmp_path / "out", "gguf-f16")
    with pytest.raises(ValueError, match="holds no tokenizer.json"):
        export(ours, tmp_path / "out.gguf", "gguf-f16")
    export(with_tokenizer(ours), tmp_path / "out.gguf", "gguf-f16")
    with pytest.raises(FileExistsError, match="exists already"):
        export(ours, tmp_path / "out.gguf", "gguf-f16")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def _bpe(pre_tokenizer: Any, normalizer: Any = None, **settings: Any) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[], **settings))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    return tokenizer


def _split(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


_WHOLE = pre_tokenizers.ByteLevel(add_prefix_space=False)
_DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _WHOLE])
_LLAMA3, _QWEN2 = gguf_vocab._SPLITS
RULES: dict[str, tuple[Any, str | None]] = {
    "gpt2": (lambda: _bpe(_WHOLE), "gpt-2"),
    "smollm2": (lambda: _bpe(_DIGITS), "smollm"),
    "llama3": (lambda: _bpe(_split(_LLAMA3), ignore_merges=True), "llama-bpe"),
    "qwen2": (lambda: _bpe(_split(_QWEN2), normalizers.NFC()), "qwen2"),
    "other split": (lambda: _bpe(_split(r"\p{N}{1,2}")), None),
    "llama3, merges kept": (lambda: _bpe(_split(_LLAMA3)), None),
    "prefix": (lambda: _bpe(pre_tokenizers.ByteLevel(add_prefix_space=True)), None),
    "lower case": (lambda: _bpe(_WHOLE, normalizers.Lowercase()), None),
    "unigram": (lambda: Tokenizer(models.Unigram([("a", 0.0)])), None),
}


@pytest.mark.parametrize("name", RULES)
def test_a_tokenizer_is_known_by_its_rules(name: str, tmp_path: Path) -> None:
    make, kind = RULES[name]
    PreTrainedTokenizerFast(tokenizer_object=make()).save_pretrained(tmp_path)
    reasons = gguf_vocab.vocabulary_reasons(tmp_path, 300)
    if kind is None:
        assert len(reasons) == 1
        assert "convert_hf_to_gguf.py" in reasons[0]
    else:
        assert reasons == []
        assert gguf_vocab._kind(json.loads((tmp_path / "tokenizer.json").read_text())) == kind


def test_a_vocabulary_with_bytes_to_fall_back_on(tmp_path: Path) -> None:
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "ab", "▁ab"]
    merges = [("a", "b"), ("▁", "ab")]
    vocab = {text: number for number, text in enumerate(texts)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(tmp_path / "tokenizer")
    ours = disturbed(tmp_path, "llama", WIDE)
    for file in (tmp_path / "tokenizer").iterdir():
        shutil.copyfile(file, ours / file.name)
    fields, _ = read(export(ours, tmp_path / "out.gguf", "gguf-f32"))
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.add_space_prefix"]) == ("llama", True)
    kinds, scores = fields["tokenizer.ggml.token_type"], fields["tokenizer.ggml.scores"]
    assert kinds[:4] == [2, 3, 3, 6]
    assert kinds[259:265] == [1, 1, 1, 1, 1, 5]
    assert scores[262] > scores[263] > scores[260]
