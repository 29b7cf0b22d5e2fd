"""Answers of a model to a few prompts, to be read side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pesc.data.chat import render


@torch.no_grad()
def generate_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], *, max_new_tokens: int
) -> list[str]:
    """Greedy answers to single questions, generated as one batch.

    Args:
        model: in eval mode.
        tokenizer: with a chat template.
        prompts: what the user says.
        max_new_tokens: where an answer is cut.

    Returns:
        An answer for each prompt, without special tokens.
    """
    texts = [render([{"role": "user", "content": p}], tokenizer, add_generation_prompt=True) for p in prompts]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    batch = batch.to(model.device)
    output = model.generate(
        **batch, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
    )
    return tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
