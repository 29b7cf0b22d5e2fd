"""Chat templates that a recipe can choose."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from checkpoints import CHATML, tiny_tokenizer
from pesc.data.chat import IGNORE_INDEX, encode_messages
from pesc.data.templates import set_chat_template

TURNS = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "no"},
]


def trained(tokenizer: PreTrainedTokenizerFast) -> tuple[str, str]:
    [(input_ids, labels)] = encode_messages(TURNS, tokenizer)
    return tokenizer.decode(input_ids), tokenizer.decode([label for label in labels if label != IGNORE_INDEX])


def test_the_authors_form() -> None:
    tokenizer = tiny_tokenizer()
    set_chat_template(tokenizer, "camelidae")
    text, answers = trained(tokenizer)
    assert text == (
        "### System:\nbe brief\n### Human:\none?\n### Assistant:\nyes<|im_end|>\n"
        "### Human:\ntwo?\n### Assistant:\nno<|im_end|>\n"
    )
    assert answers == "yes<|im_end|>no<|im_end|>"


def test_chatml_needs_its_tokens() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    set_chat_template(tokenizer, "chatml")
    expected = tiny_tokenizer()
    assert expected.chat_template == CHATML
    assert trained(tokenizer) == trained(expected)
    bare = PreTrainedTokenizerFast(tokenizer_object=type(tokenizer.backend_tokenizer).from_str(_without_chatml()))
    with pytest.raises(ValueError, match=r"chatml\) needs the token <\|im_end\|>.*choose camelidae"):
        set_chat_template(bare, "chatml")


def _without_chatml() -> str:
    return tiny_tokenizer().backend_tokenizer.to_str().replace("<|im_end|>", "<|other|>")


def test_a_file_or_none(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    set_chat_template(tokenizer, None)
    assert tokenizer.chat_template == CHATML
    (tmp_path / "mine.jinja").write_text("{{ messages[0]['content'] }}")
    set_chat_template(tokenizer, str(tmp_path / "mine.jinja"))
    assert tokenizer.chat_template == "{{ messages[0]['content'] }}"
    with pytest.raises(FileNotFoundError, match=r"data.chat_template \(chatlm\) must be camelidae, chatml, or"):
        set_chat_template(tokenizer, "chatlm")
