"""Instruction data: rows of messages, and the tokens that are learnt from them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of a token that is not learnt."""

_ROLES = ("system", "user", "assistant", "tool")


@dataclass
class Encoded:
    """Tokenized rows, and what became of those that did not fit."""

    rows: list[dict[str, list[int]]]
    """`input_ids` and `labels` of each row; what is learnt is labelled, all else is `IGNORED`."""
    split: int
    """Conversations that became a row for each assistant turn, as the chat template rewrites earlier turns."""
    cut: int
    """Rows cut to the maximal length."""
    dropped: int
    """Rows without a token to learn from within the maximal length."""


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a JSONL file of conversations.

    Each line is an object with `messages`, a list of objects with `role` (system, user, assistant, tool) and
    `content`; at least one message is the assistant's. Other keys are kept.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: for an empty file, or listing the first faulty lines with what is wrong.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such data file")
    rows, faults = [], []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8 text ({error})") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            row, fault = _parse(line)
            rows.append(row)
            if fault:
                faults.append(f"  line {number}: {fault}")
    if not rows:
        raise ValueError(f"{path} is empty: it must hold a JSON object with messages on each line")
    if faults:
        more = f"\n  and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ValueError(
            f"{path}: {len(faults)} of {len(rows)} rows are no conversations:\n" + "\n".join(faults[:5]) + more
        )
    return rows


def encode_rows(rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
    """Tokenize conversations with the tokenizer's chat template.

    Args:
        rows: as `read_rows` gives them.
        tokenizer: a fast tokenizer with a chat template.
        max_length: tokens of a row; what lies behind is cut off.

    Raises:
        ValueError: when the tokenizer has no chat template, or one that cannot show where an answer begins.
    """
    encoded = Encoded([], 0, 0, 0)
    for row in rows:
        pairs = encode_messages(row["messages"], tokenizer)
        encoded.split += len(pairs) > 1
        for input_ids, labels in pairs:
            encoded.cut += len(input_ids) > max_length
            if all(label == IGNORED for label in labels[1:max_length]):
                encoded.dropped += 1
            else:
                encoded.rows.append({"input_ids": input_ids[:max_length], "labels": labels[:max_length]})
    return encoded


def encode_messages(
    messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[list[int], list[int]]]:
    """Tokens of one conversation and their labels.

    The conversation is rendered up to and with each assistant turn; what that turn adds is what is learnt, its
    end-of-turn token included. A template that only appends gives one row with all turns. Others, as Qwen3's, render
    a turn otherwise once later ones follow; they give a row for each assistant turn, with the turns before it as the
    model sees them when it answers.

    Returns:
        (input_ids, labels) of each row, of equal length.

    Raises:
        ValueError: when the tokenizer has no chat template, or one that cannot show where an answer begins.
    """
    whole = render(messages, tokenizer)
    answers = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = render(messages[:index], tokenizer, add_generation_prompt=True)
            text = render(messages[: index + 1], tokenizer)
            if not text.startswith(prompt):
                raise ValueError(
                    "the tokenizer's chat template renders a prompt otherwise once its answer follows, so what is to "
                    "be learnt cannot be told apart: use a template that starts an answer with its generation prompt"
                )
            answers.append((text, (len(prompt), len(text.rstrip()))))
    if all(whole.startswith(text.rstrip()) for text, _ in answers):
        return [_label(whole, [span for _, span in answers], tokenizer)]
    return [_label(text, [span], tokenizer) for text, span in answers]


def _label(text: str, spans: list[tuple[int, int]], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    labels = [
        token if any(start <= first < end for start, end in spans) else IGNORED
        for token, (first, _) in zip(tokens["input_ids"], tokens["offset_mapping"], strict=True)
    ]
    return list(tokens["input_ids"]), labels


def render(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, **kwargs: Any) -> str:
    """A conversation as text, by the tokenizer's chat template.

    Raises:
        ValueError: when there is no template, or none for these roles.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template: put a chat_template.jinja into the "
            "model's folder"
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **kwargs))
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(f"the chat template cannot render the roles {roles}: {error}") from error


def _parse(line: str) -> tuple[dict[str, Any], str | None]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        return {}, f"no JSON ({error})"
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not messages:
        return {}, 'no list of "messages"'
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            return {}, f"a message's role must be one of {', '.join(_ROLES)}"
        if not isinstance(message.get("content"), str):
            return {}, "a message's content must be text"
    if messages[0]["role"] == "assistant":
        return row, "starts with the assistant, who has nothing to answer"
    if not any(message["role"] == "assistant" for message in messages):
        return {}, "no message of the assistant, so nothing to learn"
    return row, None
