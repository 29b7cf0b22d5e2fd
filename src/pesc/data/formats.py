"""Files of conversations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_ROLES = ("system", "user", "assistant", "tool")


def read_examples(path: Path) -> list[dict[str, Any]]:
    """Read a JSONL file of conversations.

    Each line is an object with `messages`, a list of objects with `role` (system, user, assistant, tool) and
    `content`; at least one message is the assistant's. Other keys are kept.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: for an empty file, or listing the first faulty lines with what is wrong.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such data file")
    examples, faults = [], []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8 text ({error})") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            example, fault = _parse(line)
            examples.append(example)
            if fault:
                faults.append(f"  line {number}: {fault}")
    if not examples:
        raise ValueError(f"{path} is empty: it must hold a JSON object with messages on each line")
    if faults:
        more = f"\n  and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ValueError(
            f"{path}: {len(faults)} of {len(examples)} lines are not conversations:\n" + "\n".join(faults[:5]) + more
        )
    return examples


def _parse(line: str) -> tuple[dict[str, Any], str | None]:
    try:
        example = json.loads(line)
    except json.JSONDecodeError as error:
        return {}, f"not JSON ({error})"
    messages = example.get("messages") if isinstance(example, dict) else None
    if not isinstance(messages, list) or not messages:
        return {}, 'no list of "messages"'
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            return {}, f"a message's role must be one of {', '.join(_ROLES)}"
        if not isinstance(message.get("content"), str):
            return {}, "a message's content must be text"
    if messages[0]["role"] == "assistant":
        return example, "starts with the assistant, who has nothing to answer"
    if not any(message["role"] == "assistant" for message in messages):
        return {}, "no message of the assistant, so nothing to train on"
    return example, None
