"""Conversations: every assistant turn is trained on, nothing else, nothing dropped in silence."""

from __future__ import annotations

import pytest

from checkpoints import tiny_tokenizer
from pesc.data.chat import IGNORE_INDEX, encode_conversation, encode_messages, encode_pair

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


def test_a_template_whose_answers_do_not_follow_the_prompt_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="starts an answer with its generation prompt"):
        encode_messages(TURNS, tokenizer)


def test_a_tokenizer_without_template_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"has no chat template: choose one in the recipe"):
        encode_messages(TURNS, tokenizer)


def test_a_template_that_refuses_a_role_is_named() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system here') }}"
    with pytest.raises(ValueError, match="cannot render the roles system, user, .*no system here"):
        encode_messages(TURNS, tokenizer)


def test_tools_and_thinking_reach_the_template() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% if tools %}{% for tool in tools %}<tool>{{ tool['name'] }}</tool>{% endfor %}{% endif %}"
        "{% for m in messages %}{{ m['role'] }}:{% if m['thinking'] %}<think>{{ m['thinking'] }}</think>{% endif %}"
        "{{ m['content'] }}<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo", "thinking": "greet"}]
    [(input_ids, labels)] = encode_conversation({"messages": turns, "tools": [{"name": "clock"}]}, tokenizer)
    assert tokenizer.decode(input_ids).startswith("<tool>clock</tool>user:hi")
    trained = tokenizer.decode([label for label in labels if label != IGNORE_INDEX])
    assert trained == "<think>greet</think>yo<|im_end|>"


def test_plain_text_is_trained_on_as_it_is() -> None:
    tokenizer = tiny_tokenizer()
    [(input_ids, labels)] = encode_conversation({"text": "abc"}, tokenizer)
    assert tokenizer.decode(input_ids) == "abc<|im_end|>"
    assert labels == [IGNORE_INDEX, *input_ids[1:]]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 1 / 0 }}", "cannot render the roles user, assistant: ZeroDivisionError"),
        ("{", "leaves out what the assistant says"),
    ],
)
def test_a_template_that_fails_or_shows_no_answer_is_named(template: str, message: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    with pytest.raises(ValueError, match=f"the chat template of .*{message}"):
        encode_messages(messages, tokenizer)


def pair(rejected: str, messages: list[dict] = TURNS[:-1]) -> tuple[dict, dict]:
    answers = ({"role": "assistant", "content": text} for text in ("no, été", rejected))
    return tuple({"messages": [*messages, answer]} for answer in answers)  # type: ignore[return-value]


@pytest.mark.parametrize("template", [None, REWRITING])
def test_a_pair_is_a_prompt_with_two_answers(template: str | None) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    prompt, chosen, rejected = map(tokenizer.decode, encode_pair(*pair("never"), tokenizer))
    assert prompt == tokenizer.apply_chat_template(TURNS[:-1], tokenize=False, add_generation_prompt=True)
    thought = "<think></think>" if template else ""
    assert (chosen, rejected) == (f"{thought}no, été<|im_end|>", f"{thought}never<|im_end|>")


def test_a_token_that_spans_prompt_and_answer_belongs_to_the_answer() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["assistant\nnev"])
    prompt, chosen, rejected = encode_pair(*pair("never"), tokenizer)
    assert tokenizer.decode(prompt).endswith("<|im_start|>")
    assert tokenizer.decode(chosen) == "assistant\nno, été<|im_end|>"
    assert tokenizer.decode(rejected) == "assistant\nnever<|im_end|>"


def test_conversations_that_are_no_pair_are_refused() -> None:
    chosen, rejected = pair("never")
    with pytest.raises(ValueError, match="must differ in the last one alone"):
        encode_pair(chosen, {"messages": rejected["messages"][1:]}, tiny_tokenizer())
    asked = {"messages": [*TURNS, TURNS[1]]}
    with pytest.raises(ValueError, match="must end with the assistant's"):
        encode_pair(asked, asked, tiny_tokenizer())
