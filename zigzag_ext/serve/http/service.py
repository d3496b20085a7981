"""Service: an engine that is served, and what its server knows beside it."""

import secrets

from ...planning.reading import shown
from ..engine import Engine
from ..request import Request
from .errors import ApiError, api_error
from .fields import ChatFields, CompletionFields
from .metrics import Metrics

STALL_SECONDS, PING_SECONDS = 30.0, 15.0
_BODY_BYTES = 1 << 20  # of a request beside its tokens
_TOKEN_BYTES = 32  # of a body, for each token that a request may have: token ids take 8, texts about 5, escapes twice that


class Service:
    """An engine with a tokenizer under a name.

    Args:
        name: of the model, which requests have to give.
        api_key: which requests under /v1 have to bring; None: none.
        stall_seconds: how long a client may read nothing of its stream before its request is cancelled.
        ping_seconds: how often a stream says that its first token is still to come.
    """

    def __init__(
        self,
        engine: Engine,
        name: str,
        *,
        api_key: str | None = None,
        stall_seconds: float = STALL_SECONDS,
        ping_seconds: float = PING_SECONDS,
    ):
        if engine.tokenizer is None:
            raise ValueError("a served engine needs a tokenizer: give one to zz.Engine(tokenizer=)")
        self.engine, self.tokenizer, self.name = engine, engine.tokenizer, name
        self.stall_seconds, self.ping_seconds = stall_seconds, ping_seconds
        self._key = None if api_key is None else api_key.encode()
        self.metrics = Metrics(engine)
        self.is_draining = False  # takes no more requests
        self.active = 0  # requests under /v1 that have not been answered to the end
        self.max_body = _BODY_BYTES + _TOKEN_BYTES * engine.most_tokens
        self.tokenizer("text")  # the first call may set options of a tokenizer, which no two threads may do at once

    @property
    def health(self) -> str:
        return "stopped" if self.engine.stopped else "draining" if self.is_draining else "ok"

    def refusal(self, authorization: str, length: str) -> ApiError | None:
        """Why a request with these headers (Authorization, Content-Length) is not looked at, if it is not."""
        scheme, _, given = authorization.partition(" ")
        given = given.strip().encode("latin-1") if scheme.lower() == "bearer" else b""  # headers are bytes, shown as Latin-1
        if self._key is not None and not secrets.compare_digest(given, self._key):
            why = (
                "the key is not the one that this server was given"
                if given
                else "no key: send the header Authorization: Bearer KEY"
            )
            return ApiError(401, why, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        if self.is_draining:
            return ApiError(503, "the server is shutting down", code="draining")
        return self.too_large(int(length)) if length.isdecimal() and len(length) < 20 else None

    def too_large(self, length: int) -> ApiError | None:
        return (
            ApiError(413, f"the body has more than {self.max_body:,} bytes, the most that is read")
            if length > self.max_body
            else None
        )

    def check_model(self, name: str) -> None:
        if name != self.name:
            raise ApiError(404, f"there is no model {shown(name)}, this is {shown(self.name)}", "model", "model_not_found")

    def submit(self, fields: CompletionFields | ChatFields) -> Request:
        """Takes a request. For a thread: long texts take a while. Raises ApiError."""
        param = "messages" if isinstance(fields, ChatFields) else "prompt"
        clock = self.metrics.clock()
        ids = self._chat_ids(fields) if isinstance(fields, ChatFields) else self._ids(fields.prompt)
        sampling = fields.sampling(fields.tokens_within(self.engine.most_tokens - len(ids)))
        try:
            return self.engine.submit(ids, sampling, clock, fields.cache_salt)
        except (TypeError, ValueError, RuntimeError) as error:
            is_theirs = isinstance(error, TypeError | ValueError) and api_error(error).status == 500
            raise ApiError(400, str(error), param) if is_theirs else api_error(error, param) from error

    def _ids(self, prompt: str | list[int]) -> list[int]:
        return self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt

    def _chat_ids(self, fields: ChatFields) -> list[int]:
        if not getattr(self.tokenizer, "chat_template", None):
            raise ApiError(400, "the model's tokenizer has no chat template: use /v1/completions", "messages")
        messages = [message.spoken for message in fields.messages]
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # of a program that comes with the model
            raise ApiError(400, f"the chat template refuses these messages: {error}", "messages") from error
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]
