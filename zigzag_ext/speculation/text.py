"""Text: the tokens of every row of a call, on the host and, where something looks at them there, on the device."""

import torch
from torch import Tensor

from ..cache.tokens import to_device


class Text:
    """Rows of different widths: `prompt` [batch, n] and what each row has emitted behind it.

    limits: widths that rows end at, None while nothing has stopped them. on_device: keep `ids` [batch, columns] there.
    """

    def __init__(self, prompt: Tensor, on_device: bool):
        self.prompt, self.start = prompt, prompt.shape[1]
        self.emitted: list[list[int]] = [[] for _ in range(len(prompt))]
        self.limits: list[int | None] = [None] * len(prompt)
        self.ids = prompt if on_device else None

    @property
    def widths(self) -> list[int]:
        return [self.start + len(tokens) for tokens in self.emitted]

    def note_drafts(self, tokens: Tensor, counts: list[int]) -> None:
        """Writes the drafts among `tokens` [batch, q_len], right-aligned, behind each row on the device."""
        self._write(tokens, [max(0, n - 1) for n in counts])

    def append(self, new: list[list[int]]) -> None:
        for tokens, more in zip(self.emitted, new, strict=True):
            tokens.extend(more)

    def note_new(self, new: list[list[int]]) -> None:
        """Writes tokens that may come next behind each row on the device."""
        most = max(map(len, new))
        if self.ids is not None and most:
            padded = torch.tensor([[0] * (most - len(tokens)) + tokens for tokens in new])
            self._write(to_device(padded.numpy(), self.ids.device), [len(tokens) for tokens in new])

    def _write(self, tokens: Tensor, counts: list[int]) -> None:
        """The last counts[i] of `tokens` [batch, n] go behind row i; what stands behind others is anything."""
        if self.ids is None:
            return
        n, widths = tokens.shape[1], self.widths
        room = max(widths) + n - self.ids.shape[1]
        if room > 0:
            more = max(room, 256)
            self.ids = torch.cat([self.ids, self.ids.new_zeros(len(self.ids), more)], 1)
        starts, new = to_device(torch.tensor([widths, counts]).numpy(), self.ids.device)[:, :, None]
        column = torch.arange(n, device=self.ids.device)
        left = tokens.gather(1, (column + n - new) % n)
        places = starts + column
        self.ids.scatter_(1, places, torch.where(column < new, left, self.ids.gather(1, places)))

    def sequences(self, pad: int) -> Tensor:
        """[batch, width of the longest row] on the device of the prompt, shorter rows padded on the right."""
        most = max(map(len, self.emitted))
        rows = torch.tensor([tokens + [pad] * (most - len(tokens)) for tokens in self.emitted], dtype=self.prompt.dtype)
        return torch.cat([self.prompt, rows.to(self.prompt.device)], 1)


class ColumnStreamer:
    """Hands a streamer what plain decoding would: the prompt, then a column of all rows at a time."""

    def __init__(self, streamer, prompt: Tensor, pad: int):
        self.streamer, self.pad, self.done = streamer, pad, 0
        if streamer is not None:
            streamer.put(prompt.cpu())

    def put(self, emitted: list[list[int]], active: list[bool]) -> None:
        """Columns that every row has reached, or has ended before."""
        if self.streamer is None:
            return
        waiting = [len(tokens) for tokens, on in zip(emitted, active, strict=True) if on]
        for column in range(self.done, min(waiting, default=max(map(len, emitted)))):
            self.streamer.put(torch.tensor([row[column] if column < len(row) else self.pad for row in emitted]))
            self.done = column + 1

    def end(self) -> None:
        if self.streamer is not None:
            self.streamer.end()
