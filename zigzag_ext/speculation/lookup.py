"""Lookup drafts: what followed the last time that the row's latest tokens stood in its own text."""

import numpy as np

_FACTOR, _MASK = 0x9E3779B97F4A7C15, (1 << 64) - 1
MAX_MATCH = 64  # tokens of a match that are looked at


class Lookup:
    """The text of one row, and where each run of `min_match` tokens stood last. O(1) per token, on the host.

    The match is extended backwards, and a draft is no longer than its match: a short one is often by chance. Based on prompt
    lookup decoding (https://github.com/apoorvumang/prompt-lookup-decoding), which searches the whole text per token and takes the
    first match; the length is suffix decoding's idea (https://arxiv.org/abs/2411.04975).
    """

    def __init__(self, tokens: list[int], min_match: int):
        self.min_match, self.tokens = min_match, list(tokens)
        self.places: dict[int, int] = {}  # hash of a run -> where the token behind its latest occurrence stands
        text = np.array(self.tokens, dtype=np.int64).astype(np.uint64)
        if len(text) > min_match:
            keys = np.zeros(len(text) - min_match, dtype=np.uint64)
            for start in range(min_match):
                keys = keys * np.uint64(_FACTOR) + text[start : start + len(keys)]
            self.places.update(zip(keys.tolist(), range(min_match, len(text)), strict=True))

    def extend(self, tokens: list[int]) -> None:
        """Appends tokens. A run is filed once a token follows it, so that the latest one never finds itself."""
        for token in tokens:
            if len(self.tokens) >= self.min_match:
                self.places[self._key()] = len(self.tokens)
            self.tokens.append(token)

    def draft(self, most: int) -> list[int]:
        """Up to `most` tokens that may come next; none without a match."""
        end = self.places.get(self._key()) if most > 0 and len(self.tokens) >= self.min_match else None
        if end is None:
            return []
        match = self._match(end)
        if match < self.min_match:  # another run with the same hash
            return []
        draft: list[int] = []
        for place in range(end, end + min(most, match)):  # runs into itself where the text repeats
            draft.append(self.tokens[place] if place < len(self.tokens) else draft[place - len(self.tokens)])
        return draft

    def _key(self) -> int:
        key = 0
        for token in self.tokens[-self.min_match :]:
            key = (key * _FACTOR + token) & _MASK
        return key

    def _match(self, end: int) -> int:
        """How many tokens in front of `end` are the latest ones."""
        tokens, last = self.tokens, len(self.tokens)
        match = 0
        while match < min(end, MAX_MATCH) and tokens[end - 1 - match] == tokens[last - 1 - match]:
            match += 1
        return match
