"""The fields of requests, as OpenAI's API has them. What is not served is refused by name."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, FailFast, Field, model_validator

from ...planning.reading import shown
from ..sampling import Sampling
from .errors import ApiError

COMPLETION_TOKENS = 16  # new ones at most, where a completion does not say how many: OpenAI's default
CHAT_TOKENS = 4096  # the same of chats, or as many as fit behind the prompt: they are reserved
MAX_STOPS, MAX_STOP = 16, 256  # stop strings, and characters of each: every token is compared with all of them
# Say nothing about the answer.
IGNORED = {"metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier", "store", "user"}
# Not served; with these values, or null, they ask for nothing.
NOT_SERVED: dict[str, tuple] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0, 0.0),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "parallel_tool_calls": (False, True),
    "prediction": (),
    "presence_penalty": (0, 0.0),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": (),
    "web_search_options": (),
}


def _stop(value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(texts, list) or not all(isinstance(text, str) and 0 < len(text) <= MAX_STOP for text in texts):
        raise ApiError(400, f"stop must be strings of 1 to {MAX_STOP} characters, got {shown(value)}", "stop")
    if len(texts) > MAX_STOPS:
        raise ApiError(400, f"stop must be at most {MAX_STOPS} strings, got {len(texts)}", "stop")
    return tuple(texts)


def _prompt(value: Any) -> str | list[int]:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    if isinstance(value, str):
        return _text("prompt", value)
    if not isinstance(value, list) or not all(type(token) is int and 0 <= token < 1 << 31 for token in value):
        raise ApiError(400, f"prompt must be one text or the token ids of one, got {shown(value)}", "prompt")
    return value


def _content(value: Any) -> str:
    """Text, or parts of it in a list, as {"type": "text", "text": ...}."""
    parts = [{"type": "text", "text": value}] if isinstance(value, str) else value
    is_text = isinstance(parts, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in parts
    )
    if not is_text:
        raise ApiError(400, f"the content of messages must be text, got {shown(value)}", "messages")
    return _text("messages", "".join(part["text"] for part in parts))


def _text(name: str, value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ApiError(400, f"{name} must be Unicode text, got half of a surrogate pair at {error.start}", name) from None
    return value


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # never


class Message(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Any, AfterValidator(_content)]

    @model_validator(mode="after")
    def _refuse(self) -> "Message":
        if given := [name for name, value in self.model_extra.items() if value]:
            raise ApiError(400, f"{shown(given[0])} of messages is not served", "messages")
        return self

    @property
    def spoken(self) -> dict[str, str]:
        """For chat templates, most of which know no developers: these speak as the system."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


class Fields(BaseModel):
    """What both kinds of requests have."""

    model_config = ConfigDict(extra="allow", strict=True)
    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: Annotated[Any, AfterValidator(_stop)] = ()
    ignore_eos: bool | None = None
    cache_salt: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _refuse(self) -> "Fields":
        for name, value in self.model_extra.items():
            if value is None or name in IGNORED:
                continue
            if name not in NOT_SERVED:
                raise ApiError(400, f"there is no field {shown(name)}", one_name(name), "unknown_field")
            if not any(type(value) is type(nothing) and value == nothing for nothing in NOT_SERVED[name]):
                raise ApiError(400, f"{name}={shown(value)} is not served, leave it out", name, "unsupported_value")
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options is for stream=true", "stream_options")
        return self

    @property
    def usage_wanted(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def sampling(self, max_tokens: int) -> Sampling:
        """Where nothing is said, as OpenAI's API: temperature 1. Raises ApiError."""
        temperature, top_p = (1.0 if value is None else value for value in (self.temperature, self.top_p))
        try:
            return Sampling(max_tokens, temperature, self.top_k, top_p, self.seed, self.stop, bool(self.ignore_eos))
        except (TypeError, ValueError) as error:
            raise ApiError(400, str(error), str(error).split()[0]) from None


class CompletionFields(Fields):
    prompt: Annotated[Any, AfterValidator(_prompt)]

    def tokens_within(self, left: int) -> int:
        return COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens


class ChatFields(Fields):
    messages: Annotated[list[Message], Field(min_length=1), FailFast()]
    max_completion_tokens: int | None = None

    def tokens_within(self, left: int) -> int:
        """Most new tokens, where `left` fit behind the prompt."""
        given = {value for value in (self.max_tokens, self.max_completion_tokens) if value is not None}
        if len(given) > 1:
            raise ApiError(400, "max_tokens and max_completion_tokens differ: give one", "max_completion_tokens")
        return given.pop() if given else max(1, min(CHAT_TOKENS, left))


def one_name(name: str) -> str:
    """A name that anyone may have made up, fit for an answer."""
    return shown(name)[1:-1]
