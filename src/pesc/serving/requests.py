"""What a request to transformers' server may say.

transformers ignores some fields and hands others to functions that can be made to take minutes. So a field that is not
listed here is refused, and a field that transformers would ignore may only have its neutral value. transformers itself
checks which fields belong to which path.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from starlette.exceptions import HTTPException

POSTS = {"/v1/chat/completions": "messages", "/v1/completions": "prompt", "/v1/responses": "input"}
"""Paths that generate, and the field that each needs."""
GETS = ("/v1/models", "/health")
LONGEST_STOP = 64
"""Characters of a stop text, at most; each token of an answer is compared with them."""

# transformers fails on an empty list or dict.
_EmptyIsNone = BeforeValidator(lambda value: value or None)
# Logits divided by less may overflow; on a GPU, to sample from those ends all further work. The answer is the same.
_TinyIsZero = AfterValidator(lambda temperature: temperature if temperature >= 0.01 else 0.0)
_Length = Annotated[int, Field(ge=1)] | None
_Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]
_OneIsList = BeforeValidator(lambda value: [value] if isinstance(value, str) and value else value or None)


class _Part(BaseModel):
    model_config = ConfigDict(strict=True)
    type: Literal["text", "input_text", "output_text", "reasoning_text"]
    text: str


class _Message(BaseModel):
    """A chat's message, or an item of a /v1/responses input."""

    model_config = ConfigDict(strict=True, extra="allow")
    type: Literal["message", "input_text", "reasoning", "function_call", "function_call_output"] | None = None
    role: str | None = None
    content: str | list[_Part] | None = None
    tool_calls: Annotated[list[dict[str, Any]] | None, _EmptyIsNone] = None


class Request(BaseModel):
    """A checked request."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    model: str | None = None
    messages: Annotated[list[_Message], Field(min_length=1)] | None = None
    prompt: str | None = None
    input: str | Annotated[list[_Message], Field(min_length=1)] | None = None
    instructions: str | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[Literal["enable_thinking", "thinking"], bool] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=2), _TinyIsZero] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: Annotated[list[_Stop] | None, Field(max_length=4), _OneIsList] = None
    max_tokens: _Length = None
    max_completion_tokens: _Length = None
    max_output_tokens: _Length = None
    frequency_penalty: Annotated[float, Field(gt=-1, le=2)] | None = None
    logit_bias: Annotated[
        dict[str, Annotated[float, Field(ge=-100, le=100)]] | None, Field(max_length=1024), _EmptyIsNone
    ] = None
    # Without effect:
    metadata: dict[str, str] | None = None
    store: bool | None = None
    stream_options: dict[Literal["include_usage"], bool] | None = None
    user: str | None = None
    # Neutral values:
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    logprobs: Literal[False] | None = None
    n: Literal[1] | None = None
    parallel_tool_calls: Literal[True] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    tool_choice: Literal["auto"] | None = None

    @property
    def ends_with_done(self) -> bool:
        """Whether a streamed answer ends with the mark of OpenAI's streams, which transformers does not send."""
        return self.input is None


def read(method: str, path: str, body: bytes, name: str) -> tuple[Request | None, bytes]:
    """Check a request.

    Args:
        method: of HTTP; the app refuses any that the path does not take.
        path: one of the above.
        body: of the request, in JSON.
        name: of the model that is served.

    Returns:
        What is asked for, None if nothing is to be generated; and the body for transformers, with nothing in it that
        was not checked.

    Raises:
        HTTPException: 400 for a request that breaks a rule, naming the fields; 404 for another path or model.
    """
    if path not in [*POSTS, *GETS]:
        raise HTTPException(404, f"{path} is not served: there are {', '.join([*POSTS, *GETS])}")
    if path in GETS or method != "POST":
        return None, body
    try:
        request = Request.model_validate_json(body)
    except ValidationError as error:
        wrong = (".".join(map(str, each["loc"])) + f": {each['msg']}" for each in error.errors()[:5])
        raise HTTPException(400, "; ".join(wrong).removeprefix(": ")) from error
    if getattr(request, POSTS[path]) is None:
        raise HTTPException(400, f"{POSTS[path]}: Field required")
    if request.model not in (None, name):
        raise HTTPException(404, f"model ({request.model!r}) is not served here: the only one is {name!r}")
    request.stream = bool(request.stream)  # unasked, /v1/responses would stream
    return request, request.model_dump_json(exclude_none=True, exclude={"model", "seed"}).encode()
