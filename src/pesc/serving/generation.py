"""Answers of one model to several clients, a step each in turn.

A step is one token of an answer, or the reading of one prompt. So a long answer delays the others, and does not stop
them.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Any

import psutil
import torch
from starlette.exceptions import HTTPException
from transformers import PreTrainedModel, StoppingCriteriaList
from transformers.cli.serving.utils import GenerateManager

from pesc.serving import context_length
from pesc.serving.middleware import CLIENT
from pesc.serving.requests import LONGEST_STOP
from pesc.serving.stops import UntilStop, until_stop

logger = logging.getLogger("uvicorn.error")


def places(model: PreTrainedModel) -> int:
    """How many answers, from 1 to 64, to generate at the same time: the free memory holds their keys and values."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    bytes_a_token = 2 * config.num_hidden_layers * heads * size * model.dtype.itemsize
    on_gpu = model.device.type == "cuda"
    free = torch.cuda.mem_get_info(model.device)[0] if on_gpu else psutil.virtual_memory().available
    return max(1, min(64, free // (bytes_a_token * context_length(config))))


class Generation(GenerateManager):
    """Runs each answer in a thread of its own, because `generate` cannot be left and entered again.

    Args:
        places: how many answers are generated at the same time; others wait.
    """

    def __init__(self, places: int) -> None:
        self.turns, self.threads = _Turns(), ThreadPoolExecutor(places)

    def submit(self, fn: Callable, *args: Any, **kwargs: Any) -> Future:
        return self.threads.submit(fn, *args, **kwargs)

    def async_submit(self, fn: Callable, *args: Any, **kwargs: Any) -> asyncio.Future:
        return asyncio.wrap_future(self.submit(fn, *args, **kwargs))

    def generate_streaming(self, model: Any, processor: Any, inputs: Any, gen_config: Any, **kwargs: Any) -> Any:
        answer = _Answer(self.turns, model, inputs, gen_config)
        return super().generate_streaming(answer, processor, inputs, gen_config, **kwargs)

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, **kwargs: Any
    ) -> Any:
        answer = _Answer(self.turns, model, inputs, gen_config)
        text, *rest = await super().generate_non_streaming(answer, processor, inputs, gen_config, **kwargs)
        return until_stop(text, answer.stops), *rest


class _Turns:
    """A lock that threads get in the order in which they ask; `threading.Lock` may give it to the same one again."""

    def __init__(self) -> None:
        self.changing, self.taken, self.waiting = Lock(), False, deque[Lock]()

    def take(self) -> None:
        with self.changing:
            if not self.taken:
                self.taken = True
                return
            self.waiting.append(mine := Lock())
            mine.acquire()
        mine.acquire()

    def give(self) -> None:
        with self.changing:
            if self.waiting:
                self.waiting.popleft().release()
            else:
                self.taken = False


class _Answer:
    """A model that generates for one client: within the context, with the client's seed, and only while it waits.

    Raises:
        HTTPException: 400 for a prompt that is empty or fills the context.
    """

    def __init__(self, turns: _Turns, model: Any, inputs: Any, gen_config: Any) -> None:
        self.turns, self.model, self.client = turns, model, CLIENT.get()
        context, self.length = context_length(model.config), inputs["input_ids"].shape[-1]
        if not 0 < self.length < context:
            rule = f"it must have some, and fewer than the model's context ({context})"
            raise HTTPException(400, f"the prompt has {self.length} tokens: {rule}")
        asked = self.client.request
        wanted = asked.max_completion_tokens or gen_config.max_new_tokens  # transformers 5.19 ignores the first
        gen_config.max_new_tokens = min(wanted, context - self.length)
        # transformers leaves stop texts in the answer, and compares each character of them with its whole vocabulary.
        self.stops, gen_config.stop_strings = asked.stop or [], None
        if asked.logit_bias:  # transformers ignores it in /v1/completions
            gen_config.sequence_bias = {(int(token),): bias for token, bias in asked.logit_bias.items()}
        if asked.temperature or (asked.temperature is None and asked.top_p is not None):
            gen_config.do_sample = True  # a model whose own settings are greedy would ignore the temperature

    def generate(self, *, tokenizer: Any, **kwargs: Any) -> Any:
        """As the model's, in turn with other answers; called by the answer's own thread."""

        def is_over(tokens: torch.Tensor, *_: Any, **__: Any) -> bool:
            with torch.random.fork_rng(range(torch.cuda.device_count())):  # others draw from the same generator
                self.turns.give()
                self.turns.take()
            # A character has up to four tokens.
            text = tokenizer.decode(tokens[0, self.length :][-4 * LONGEST_STOP :]) if self.stops else ""
            return self.client.left.is_set() or until_stop(text, self.stops) != text

        if self.stops and "streamer" in kwargs:
            kwargs["streamer"]._enqueue = UntilStop(self.stops, kwargs["streamer"]._enqueue)
        self.turns.take()
        try:
            if self.client.left.is_set():
                raise HTTPException(499, "the client left before its answer began")
            seed = self.client.request.seed
            torch.seed() if seed is None else torch.manual_seed(seed)  # else it goes on with another answer's numbers
            return self.model.generate(**kwargs, stopping_criteria=StoppingCriteriaList([is_over]))
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
            status = 400 if isinstance(error, ValueError) else 500  # generate() checks its settings so
            if status == 500:
                logger.exception("generation failed")
            # In streams, transformers pastes the message into a JSON string.
            raise HTTPException(status, re.sub(r'[\s"\\]+', " ", f"generation failed: {error}")) from error
        finally:
            self.turns.give()
