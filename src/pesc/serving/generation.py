"""Generation for the server: one answer after the other, within the context, and only while someone waits for it."""

from __future__ import annotations

import asyncio
import atexit
import json
import logging
import sys
from contextlib import suppress
from typing import Any

import torch
from fastapi import HTTPException
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.cli.serving.utils import GenerateManager, GenerationState, _GenerationCancelled

logger = logging.getLogger("uvicorn.error")


class State(GenerationState):
    """Hands out the one manager of generation, whatever the model."""

    def __init__(self) -> None:
        super().__init__()
        self.manager = _Generation()
        # The interpreter must not end while the generating thread, a daemon, is inside torch: that aborts it.
        atexit.register(self.manager.finish)

    def get_manager(self, model_id: str, use_cb: bool = False) -> _Generation:
        return self.manager


class _Generation(GenerateManager):
    """Generates one answer after the other, within the context, and only while someone waits for it."""

    def finish(self) -> None:
        """Wait until nothing is being generated, ten seconds at most."""
        with suppress(TimeoutError):
            self._thread.submit(lambda: None).result(timeout=10)

    def generate_streaming(self, model: Any, processor: Any, inputs: Any, gen_config: Any, **kwargs: Any) -> Any:
        _fit(model, inputs, gen_config)
        return super().generate_streaming(_ForStream(model), processor, inputs, gen_config, **kwargs)

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, **kwargs: Any
    ) -> Any:
        _fit(model, inputs, gen_config)
        gone = _Gone()
        inputs = {**inputs, "stopping_criteria": StoppingCriteriaList([gone])}
        work = asyncio.ensure_future(super().generate_non_streaming(model, processor, inputs, gen_config, **kwargs))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            gone.now = True
            raise
        except ValueError as error:
            raise HTTPException(400, f"the model cannot generate with these settings: {error}") from error
        except Exception as error:
            raise RuntimeError(f"generation failed: {error}") from error


def _fit(model: Any, inputs: Any, gen_config: Any) -> None:
    context, length = context_length(model), inputs["input_ids"].shape[-1]
    if length >= context:
        raise HTTPException(
            400, f"the prompt has {length} tokens and must have fewer than the model's context ({context}): shorten it"
        )
    if length == 0:
        raise HTTPException(400, "the prompt is empty: give the model something to go on")
    gen_config.max_new_tokens = min(gen_config.max_new_tokens, context - length)


def context_length(model: Any) -> int:
    """The most tokens of a prompt and its answer together."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


class _Gone(StoppingCriteria):
    now = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.full(input_ids.shape[:1], self.now, dtype=torch.bool, device=input_ids.device)


class _ForStream:
    """A model whose errors can be pasted into a JSON string, as transformers does with them in streams."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def generate(self, **kwargs: Any) -> None:
        try:
            self.model.generate(**kwargs)
        except _GenerationCancelled:
            raise
        except Exception as error:
            logger.exception("generation failed")
            raise RuntimeError(json.dumps(str(error))[1:-1]) from error
