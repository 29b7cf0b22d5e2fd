"""A tokenizer and its chat template as GGUF metadata.

llama.cpp splits text by rules it knows by name; a tokenizer is recognised by its own rules, not by its model's name.

| tokenizer | `tokenizer.ggml.model`, `.pre` |
|---|---|
| byte-level BPE, split as GPT-2 does | `gpt2`, `gpt-2` |
| the same, each digit apart (SmolLM2, StarCoder, Granite) | `gpt2`, `smollm` |
| byte-level BPE, split as Llama 3 does | `gpt2`, `llama-bpe` |
| byte-level BPE, split as Qwen2 does | `gpt2`, `qwen2` |
| BPE over characters with bytes to fall back on (Llama 2) | `llama`, `default` |
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from pesc.crafting.load import ModelRef
from pesc.storage.files import read_json

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {
    _CONTRACTIONS + r"\p{N}{1,3}" + _REST: "llama-bpe",
    _CONTRACTIONS + r"\p{N}" + _REST: "qwen2",
}
_LLAMA2_NORMALIZER = [
    {"type": "Prepend", "prepend": "▁"},
    {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
]
_BYTE = re.compile("<0x[0-9A-F]{2}>")
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE_TYPE = 1, 2, 3, 4, 5, 6


def vocabulary_reasons(folder: Path, vocab_size: int) -> list[str]:
    """Why a folder's tokenizer cannot be written to a GGUF file; empty if it can.

    Args:
        folder: with a `tokenizer.json`.
        vocab_size: rows of the embeddings.
    """
    if not (folder / "tokenizer.json").is_file():
        return [f"{folder} holds no tokenizer.json, and a GGUF file carries its tokenizer"]
    values = read_json(folder / "tokenizer.json")
    if _kind(values) is None:
        steps = json.dumps({key: values.get(key) for key in ("normalizer", "pre_tokenizer")})[:300]
        return [
            f"its tokenizer ({values['model'].get('type')}) splits text by rules that are none of those known here "
            f"({steps}): convert an export as granitemoeshared with llama.cpp's own convert_hf_to_gguf.py"
        ]
    if (last := max(_tokens(values))) >= vocab_size:
        return [f"its tokenizer has a token of id {last}, and its embeddings only {vocab_size} rows"]
    return []


def add_vocabulary(writer: Any, ref: ModelRef, vocab_size: int) -> None:
    """Give a `gguf.GGUFWriter` a model's tokenizer and chat template.

    Args:
        writer: before its header is written.
        ref: `vocabulary_reasons` has nothing against the folder of its base.
        vocab_size: rows of the embeddings; ids without a token get a placeholder.
    """
    values = read_json(ref.base.folder / "tokenizer.json")
    kind = _kind(values)
    assert kind is not None
    tokens = _tokens(values)
    texts = [tokens.get(number, f"[PAD{number}]") for number in range(vocab_size)]
    writer.add_tokenizer_model("llama" if kind == "default" else "gpt2")
    writer.add_tokenizer_pre(kind)
    writer.add_token_list(texts)
    writer.add_token_types(_types(values, texts, set(tokens)))
    if kind == "default":
        writer.add_token_scores(_scores(values, texts))
    else:
        writer.add_token_merges([" ".join(_pair(merge)) for merge in values["model"]["merges"]])
    writer.add_add_space_prefix(kind == "default")
    _add_special_tokens(writer, ref.tokenizer())


def _kind(values: dict[str, Any]) -> str | None:
    """The value of `tokenizer.ggml.pre`; None if none fits."""
    model, normalizer = values["model"], values.get("normalizer")
    if model.get("type") != "BPE":
        return None
    if model.get("byte_fallback"):
        steps = normalizer.get("normalizers") if normalizer else None
        return "default" if steps == _LLAMA2_NORMALIZER and values.get("pre_tokenizer") is None else None
    # llama.cpp does not normalize; NFC changes only texts that are not in that form already, as most are.
    if normalizer is not None and normalizer["type"] != "NFC":
        return None
    kind = _split_of(values.get("pre_tokenizer"))
    return kind if bool(model.get("ignore_merges")) == (kind == "llama-bpe") else None


def _split_of(pre_tokenizer: dict[str, Any] | None) -> str | None:
    if pre_tokenizer is None:
        return None
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    *before, last = steps
    if last["type"] != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if last.get("use_regex", True):
        if not before:
            return "gpt-2"
        digits = len(before) == 1 and before[0]["type"] == "Digits" and before[0].get("individual_digits")
        return "smollm" if digits else None
    if len(before) == 1 and before[0]["type"] == "Split" and not before[0].get("invert"):
        return _SPLITS.get(before[0]["pattern"].get("Regex", ""))
    return None


def _tokens(values: dict[str, Any]) -> dict[int, str]:
    added = {token["id"]: token["content"] for token in values.get("added_tokens", [])}
    return {number: text for text, number in values["model"]["vocab"].items()} | added


def _types(values: dict[str, Any], texts: list[str], known: set[int]) -> list[int]:
    added = {token["id"]: token["special"] for token in values.get("added_tokens", [])}
    unknown = values["model"].get("unk_token")

    def type_of(number: int, text: str) -> int:
        if number not in known:
            return _UNUSED
        if text == unknown and values["model"].get("byte_fallback"):
            return _UNKNOWN
        if number in added:
            return _CONTROL if added[number] else _USER_DEFINED
        return _BYTE_TYPE if values["model"].get("byte_fallback") and _BYTE.fullmatch(text) else _NORMAL

    return [type_of(number, text) for number, text in enumerate(texts)]


def _scores(values: dict[str, Any], texts: list[str]) -> list[float]:
    """What llama.cpp merges by: the earlier the rule that makes a token, the higher its score."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(values["model"]["merges"]):
        ranks.setdefault("".join(_pair(merge)), rank)
    return [float(-ranks.get(text, len(ranks))) for text in texts]


def _pair(merge: Any) -> tuple[str, str]:
    # Older files write a rule as one string.
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second


def _add_special_tokens(writer: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    adders: dict[str, Callable[[int], None]] = {
        "bos_token_id": writer.add_bos_token_id,
        "eos_token_id": writer.add_eos_token_id,
        "unk_token_id": writer.add_unk_token_id,
        "pad_token_id": writer.add_pad_token_id,
    }
    for name, add in adders.items():
        if (number := getattr(tokenizer, name)) is not None:
            add(number)
    probe = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and probe[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(tokenizer.eos_token_id is not None and probe[-1] == tokenizer.eos_token_id)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)
