"""Answers in the shape of OpenAI's API: whole, or in pieces as server-sent events."""

import json
import time
import uuid

from ..request import Completion

DONE = b"data: [DONE]\n\n"
PING = b": waiting for the first token\n\n"  # a comment, which clients pass over


def event(body: dict) -> bytes:
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


def usage(completion: Completion) -> dict:
    prompt, new = completion.prompt_tokens, len(completion.token_ids)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": completion.cached_tokens},
    }


class Answer:
    """The bodies of one answer. model: the name that it is served under. usage_wanted: in a stream, at its end."""

    def __init__(self, model: str, is_chat: bool, usage_wanted: bool = False):
        self.is_chat, self.usage_wanted = is_chat, usage_wanted
        self.common = {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, completion: Completion) -> dict:
        message = {"role": "assistant", "content": completion.text, "refusal": None}
        said = {"message": message} if self.is_chat else {"text": completion.text}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": completion.finish_reason}
        kind = "chat.completion" if self.is_chat else "text_completion"
        return self.common | {"object": kind, "choices": [choice], "usage": usage(completion)}

    def opening(self) -> list[bytes]:
        return [self._piece({"delta": {"role": "assistant", "content": ""}})] if self.is_chat else []

    def piece(self, text: str) -> bytes:
        return self._piece({"delta": {"content": text}} if self.is_chat else {"text": text})

    def closing(self, completion: Completion) -> list[bytes]:
        last = self._piece({"delta": {}} if self.is_chat else {"text": ""}, completion.finish_reason)
        totals = [self._chunk([], usage(completion))] if self.usage_wanted else []
        return [last, *totals, DONE]

    def _piece(self, said: dict, reason: str | None = None) -> bytes:
        return self._chunk([{"index": 0, **said, "logprobs": None, "finish_reason": reason}], None)

    def _chunk(self, choices: list[dict], totals: dict | None) -> bytes:
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        return event(self.common | {"object": kind, "choices": choices} | ({"usage": totals} if self.usage_wanted else {}))
