"""Bodies of the API, field by field: what is not supported is refused by name, never ignored.

The form is that of OpenAI's API (https://platform.openai.com/docs/api-reference); `top_k`, `repetition_penalty`,
`ignore_eos`, `priority`, `timeout` and `session` are this server's own.
"""

from __future__ import annotations

import reprlib
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from megatron_dla.errors import UserError

MAX_CHOICES = 128
MAX_STOPS, MAX_STOP = 16, 256  # strings, and characters of one: each is looked for after every token
Unsupported = Annotated[None, Field(description="not supported")]
Strings = Annotated[list[str], Field(fail_fast=True)]  # one error, not one for each of a million elements
Tokens = Annotated[list[int], Field(fail_fast=True)]
Zero = Annotated[float, Field(ge=0, le=0, description="not supported")]


class ApiError(Exception):
    """An answer other than 200.

    Attributes:
        status: of HTTP. kind, param, code: as OpenAI's errors have them. headers: to add.
    """

    def __init__(
        self, status: int, message: str, *, kind: str = "invalid_request_error", param: str | None = None,
        code: str | None = None, headers: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.headers = status, headers
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Body):
    include_usage: bool | None = False
    include_obfuscation: Literal[False] | None = None


class _Common(_Body):
    """What both kinds of completion have."""

    model: str
    temperature: float | None = 1.0
    top_p: float | None = 1.0
    top_k: int | None = 0
    repetition_penalty: float | None = 1.0
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = 1
    seed: int | None = None
    stop: str | Strings | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    priority: int = 0
    timeout: Annotated[float, Field(gt=0)] | None = None
    session: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    user: str | None = None  # the caller's own note: nothing depends on it
    metadata: dict[str, str] | None = None  # likewise
    store: Literal[False] | None = None
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for stream = true")
        if len(self.stops) > MAX_STOPS or any(len(word) > MAX_STOP for word in self.stops):
            raise ValueError(f"stop: want at most {MAX_STOPS} strings of at most {MAX_STOP} characters")
        if self.session is not None and (self.n or 1) != 1:
            raise ValueError("session: a memory follows one answer: use n = 1")
        return self

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class CompletionBody(_Common):
    """POST /v1/completions."""

    prompt: str | Strings | Tokens | Annotated[list[Tokens], Field(fail_fast=True)]
    max_tokens: int | None = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Literal[False] | None = False
    best_of: int | None = None
    suffix: Unsupported = None

    @model_validator(mode="after")
    def _check_prompts(self) -> Self:
        if self.best_of is not None and self.best_of != self.choices:
            raise ValueError("best_of is not supported: leave it out")
        count = len(self.prompts)
        if not 1 <= count * self.choices <= MAX_CHOICES:
            raise ValueError(f"prompt: {count} prompts of {self.choices} choices: want 1 to {MAX_CHOICES} in all")
        if self.session is not None and count != 1:
            raise ValueError("session: a memory follows one answer: send one prompt")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]

    @property
    def wanted_logprobs(self) -> int | None:
        return self.logprobs


class TextPart(_Body):
    type: Literal["text"]
    text: str


class ChatMessage(_Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]
    name: Unsupported = None
    # in the answers of this server and of others, which clients send back as they are
    refusal: Unsupported = None
    audio: Unsupported = None
    function_call: Unsupported = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None

    def flat(self) -> dict[str, str]:
        """As chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ResponseFormat(_Body):
    type: Literal["text"]


class ChatBody(_Common):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none"] | None = None

    @model_validator(mode="after")
    def _check_logprobs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is for logprobs = true")
        return self

    @property
    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


Body = TypeVar("Body", bound=_Common)


def parse(kind: type[Body], raw: bytes) -> Body:
    """The body of a request. Raises ApiError (400), which names the first field that is wrong."""
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(str(x) for x in first["loc"] if not _is_branch(x))
        message = first["msg"].removeprefix("Value error, ")
        given = _shown(first["input"]) if first["type"] != "json_invalid" else ""
        text = f"{place} = {given}: {message}" if place else message
        if first["type"] == "extra_forbidden":
            text = f"{place}: this server does not know it: leave it out"
        raise ApiError(400, ascii_only(text), param=place or None) from error


def _shown(value: Any) -> str:
    """The beginning of a value, in ASCII, which is not printed whole for it."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 200
    return short.repr(value).encode("ascii", "backslashreplace").decode()[:200]


def _is_branch(part: Any) -> bool:
    """Whether a part of an error's place names a member of a union, and no field."""
    return isinstance(part, str) and (part in ("str", "int", "float", "bool") or "[" in part or part.endswith("Part"))


def ascii_only(text: str) -> str:
    """Without characters that cannot be sent."""
    return text.encode("utf-8", "backslashreplace").decode()


def refused(error: UserError) -> ApiError:
    """What the engine says of a request, as an answer."""
    text = ascii_only(str(error))
    name = text.split(" ", 1)[0].rstrip(":")
    known = {*CompletionBody.model_fields, *ChatBody.model_fields}
    code = "context_length_exceeded" if "the pool holds" in text else None
    return ApiError(400, text, param=name if name in known else None, code=code)
