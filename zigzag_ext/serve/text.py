"""TextStream: the text of tokens as they come, up to the first stop string."""

from collections.abc import Sequence

_INCOMPLETE = "�"  # what a tokenizer makes of bytes that are no whole character


class TextStream:
    """`push` a token for the text that it makes certain; `finish` for what is left.

    Held back are bytes that are no whole character yet, and an end that a stop string may begin with. Special tokens are no text.

    tokenizer: has `decode(ids, skip_special_tokens=)`. stopped: whether a stop string has come, which the text ends before.
    """

    def __init__(self, tokenizer, stop: Sequence[str] = ()):
        self.tokenizer, self.stop, self.stopped = tokenizer, stop, False
        self.ids: list[int] = []
        self.start = self.end = 0  # the text of ids[:end] is known; decoding starts at `start`, since words depend on neighbours
        self.ahead = 0  # characters behind ids[:end] that are known, too: of tokens that end within another one
        self.held = ""

    def push(self, token: int) -> str:
        self.ids.append(token)
        return "" if self.stopped else self._release(self._decoded(whole=False), last=False)

    def finish(self) -> str:
        return "" if self.stopped else self._release(self._decoded(whole=True), last=True)

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _decoded(self, whole: bool) -> str:
        """What the tokens behind ids[:end] add to the text; while more may come, without an end that is no whole character."""
        known, text = len(self._decode(self.ids[self.start : self.end])) + self.ahead, self._decode(self.ids[self.start :])
        certain = text if whole else text.rstrip(_INCOMPLETE)
        new = certain[known:]
        if certain != text:
            self.ahead += len(new)
        elif new:
            self.start, self.end, self.ahead = self.end, len(self.ids), 0
        return new

    def _release(self, new: str, last: bool) -> str:
        text = self.held + new
        found = [place for place in map(text.find, self.stop) if place >= 0]
        if found:
            self.stopped, self.held = True, ""
            return text[: min(found)]
        most = max(map(len, self.stop), default=1) - 1
        begun = [n for n in range(min(most, len(text)), 0, -1) if any(stop.startswith(text[-n:]) for stop in self.stop)]
        kept = len(text) - (begun[0] if begun and not last else 0)
        self.held = text[kept:]
        return text[:kept]
