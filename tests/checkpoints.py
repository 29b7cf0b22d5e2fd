"""Tiny checkpoints on disk, with a byte-level tokenizer and a ChatML template."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, and the marks of ChatML."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<|pad|>", "<|im_start|>", "<|im_end|>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHATML,
    )


def tiny_dense(folder: Path, seed: int = 0, **save: str) -> Path:
    """A random Llama of two layers, saved with its tokenizer."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder, **save)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def without_sums(folder: Path) -> Path:
    """A folder without hashes of its files, so that other checks see what a test changes."""
    for sums in folder.rglob("SHA256SUMS"):
        sums.unlink()
    return folder


def write_pairs(path: Path, count: int = 12) -> Path:
    """Preference pairs to learn: count, and do not refuse."""
    rows = [
        {
            "prompt": f"count to {n % 7 + 1}",
            "chosen": " ".join(map(str, range(1, n % 7 + 2))),
            "rejected": "no" * (n % 3 + 1),
        }
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_rows(path: Path, count: int = 12) -> Path:
    """Conversations to learn: count up to a number."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"count to {n % 7 + 1}"},
                {"role": "assistant", "content": " ".join(str(i + 1) for i in range(n % 7 + 1))},
            ],
            "domain": "even" if n % 2 == 0 else "odd",
        }
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
