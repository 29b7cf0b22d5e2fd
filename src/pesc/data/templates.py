"""Chat templates that a recipe can choose instead of the tokenizer's own."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

# The prompt format of Camelidae; the end-of-text token ends an answer, so any tokenizer can speak it.
_CAMELIDAE = (
    "{{ bos_token or '' }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}### System:\n{{ message['content'] }}\n"
    "{% elif message['role'] == 'user' %}### Human:\n{{ message['content'] }}\n"
    "{% elif message['role'] == 'assistant' %}### Assistant:\n{{ message['content'] }}{{ eos_token }}\n"
    "{% else %}{{ raise_exception('roles are system, user and assistant') }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}### Assistant:\n{% endif %}"
)

_CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_TEMPLATES = {"camelidae": _CAMELIDAE, "chatml": _CHATML}


def set_chat_template(tokenizer: PreTrainedTokenizerBase, name: str | None) -> None:
    """Give a tokenizer the template of a recipe.

    Args:
        tokenizer: changed in place.
        name: chatml, camelidae, a .jinja file, or None to leave the tokenizer's own.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: ChatML for a tokenizer that lacks its tokens, so that no answer would end.
    """
    if name is None:
        return
    if name == "chatml" and "<|im_end|>" not in tokenizer.get_vocab():
        raise ValueError(
            f"data.chat_template (chatml) needs the token <|im_end|>, which {tokenizer.name_or_path} lacks: choose "
            "camelidae"
        )
    if name not in _TEMPLATES and not Path(name).is_file():
        raise FileNotFoundError(f"data.chat_template ({name}) must be {', '.join(_TEMPLATES)}, or a .jinja file")
    tokenizer.chat_template = _TEMPLATES.get(name) or Path(name).read_text(encoding="utf-8")
