"""Conversations: every assistant turn is trained on, nothing else, nothing dropped in silence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from checkpoints import tiny_tokenizer
from pesc.data.chat import IGNORE_INDEX, encode_examples, encode_messages
from pesc.data.formats import read_examples

TURNS = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "no, été"},
]


def test_every_assistant_turn_is_trained_on_with_its_end() -> None:
    tokenizer = tiny_tokenizer()
    [(input_ids, labels)] = encode_messages(TURNS, tokenizer)
    assert tokenizer.decode(input_ids) == tokenizer.apply_chat_template(TURNS, tokenize=False)
    trained = tokenizer.decode([label for label in labels if label != IGNORE_INDEX])
    assert trained == "yes<|im_end|>no, été<|im_end|>"
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(input_ids, labels, strict=True))


def test_truncated_and_dropped_examples_are_counted() -> None:
    conversations = [{"messages": TURNS[1:3]}, {"messages": TURNS}]
    encoded = encode_examples(conversations, tiny_tokenizer(), max_length=60)
    assert (len(encoded.examples), encoded.truncated, encoded.dropped) == (2, 1, 0)
    assert all(len(example["input_ids"]) <= 60 for example in encoded.examples)
    encoded = encode_examples(conversations, tiny_tokenizer(), max_length=8)
    assert (len(encoded.examples), encoded.truncated, encoded.dropped) == (0, 2, 2)


# As Qwen3's: the last answer shows that it was not thought about, earlier ones do not.
REWRITING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think></think>{% endif %}{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_that_rewrites_earlier_turns_gives_an_example_for_each_answer() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = REWRITING
    pairs = encode_messages(TURNS, tokenizer)
    assert [tokenizer.decode(ids) for ids, _ in pairs] == [
        tokenizer.apply_chat_template(TURNS[:end], tokenize=False) for end in (3, 5)
    ]
    trained = [tokenizer.decode([label for label in labels if label != IGNORE_INDEX]) for _, labels in pairs]
    assert trained == ["<think></think>yes<|im_end|>", "<think></think>no, été<|im_end|>"]
    encoded = encode_examples([{"messages": TURNS}, {"messages": TURNS[1:3]}], tokenizer, max_length=1000)
    assert (len(encoded.examples), encoded.split) == (3, 1)


def test_a_template_whose_answers_do_not_follow_the_prompt_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="starts an answer with its generation prompt"):
        encode_messages(TURNS, tokenizer)


def test_a_tokenizer_without_template_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"has no chat template: put a chat_template.jinja"):
        encode_messages(TURNS, tokenizer)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[]", 'line 2: no list of "messages"'),
        ('{"messages": []}', 'line 2: no list of "messages"'),
        ('{"messages": [{"role": "bot", "content": ""}]}', "role must be one of"),
        ('{"messages": [{"role": "user", "content": 3}]}', "content must be text"),
        ('{"messages": [{"role": "assistant", "content": "hi"}]}', "starts with the assistant"),
        ('{"messages": [{"role": "user", "content": "hi"}]}', "no message of the assistant"),
    ],
)
def test_faulty_lines_are_named_by_number(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"messages": TURNS}) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=message):
        read_examples(path)


def test_marks_and_line_ends_of_other_systems(tmp_path: Path) -> None:
    line = json.dumps({"messages": TURNS})
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + f"{line}\r\n{line}\r\n".encode())
    assert len(read_examples(tmp_path / "bom.jsonl")) == 2
    (tmp_path / "latin.jsonl").write_bytes(json.dumps({"x": "é"}, ensure_ascii=False).encode("latin-1"))
    with pytest.raises(ValueError, match="must be UTF-8 text"):
        read_examples(tmp_path / "latin.jsonl")


def test_a_template_that_refuses_a_role_is_named() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system here') }}"
    with pytest.raises(ValueError, match="cannot render the roles system, user, .*no system here"):
        encode_messages(TURNS, tokenizer)


def test_empty_and_missing_files(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        read_examples(tmp_path / "empty.jsonl")
    with pytest.raises(FileNotFoundError, match="no such data file"):
        read_examples(tmp_path / "none.jsonl")
