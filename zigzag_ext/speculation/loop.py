"""Decoding: the rounds of one call. A round drafts, verifies all drafts in one forward, and keeps what is right, row by row."""

import inspect
import time

import torch
from torch import Tensor

from ..cache import ZigzagCache
from ..cache.tokens import to_device
from ..hf.cache_argument import cache_argument
from ..hf.images import tensors_in
from ..hf.session import Session
from .accept import accept_greedy, accept_sampled
from .chain import StreamingDraft, weight_bytes
from .lookup import Lookup
from .policy import Policy
from .report import SOURCES, Report
from .scores import Criteria, Processors
from .text import ColumnStreamer, Text

BUCKETS = (1, 4, 8, 16)  # columns of compiled forwards: as many graphs
KV_ROUNDS = 64  # after which the bytes of KV are added up again
_OF_A_PROMPT = ("attention_mask", "position_ids", "inputs_embeds", "cache_position", "logits_to_keep", "use_cache")


class Decoding:
    """One call: `run` returns the sequences. options: a `Speculation`; processors, criteria, config: what generate() prepared."""

    def __init__(self, session: Session, cache: ZigzagCache, options, processors, criteria, config):
        self.session, self.model, self.cache, self.options = session, session.model, cache, options
        self.processors, self.criteria = Processors(processors), Criteria(criteria)
        self.samples, pad = config.do_sample, config._pad_token_tensor
        self.pad = 0 if pad is None else int(pad)
        self.policy = Policy(options.draft, options.tokens)
        self.report = Report(options.draft, weight_bytes=weight_bytes(self.model))
        self.streaming = StreamingDraft(session, cache, options.window)
        self.settled = True  # whether the cache holds what was emitted, and nothing else

    @torch.no_grad()
    def run(self, input_ids: Tensor, inputs: dict) -> Tensor:
        """input_ids [batch, n], the whole conversation; inputs: other arguments for the model. Returns [batch, n + new]."""
        self.others = self._constant_inputs(inputs)
        self.text = Text(input_ids, on_device=not self.processors.anywhere or bool(self.criteria.others))
        self.streamer = ColumnStreamer(self.options.streamer, input_ids, self.pad)
        started = time.perf_counter()
        logits = self._prompt(input_ids, inputs)
        self._set_up_lookups(input_ids, inputs.get("attention_mask"))
        batch = len(input_ids)
        tokens = input_ids.new_zeros(batch, 1)
        self._emit(self._decide(logits, tokens, [1] * batch, None, None), [1] * batch)
        self.report.prompt_ms = (time.perf_counter() - started) * 1e3
        while any(self.active):
            self._round()
        self._hold_last_tokens()
        self.streamer.end()
        self.report.tokens, self.report.prompts = sum(map(len, self.text.emitted)), batch
        self.report.kv_bytes = self.cache.kv_bytes()
        self.policy.summarise(self.report)
        return self.text.sequences(self.pad)

    def _constant_inputs(self, inputs: dict) -> dict:
        """Arguments that every forward gets. Raises ValueError for those that would have to grow with the text."""
        if "position_ids" not in inspect.signature(self.session.behind("forward")).parameters:
            raise ValueError(f"speculate needs a model that takes position_ids, which {type(self.model).__name__} does not")
        others = {name: value for name, value in inputs.items() if name not in _OF_A_PROMPT and value is not None}
        if tensors := [name for name, value in others.items() if any(True for _ in tensors_in(value))]:
            raise ValueError(f"speculate does not serve the argument {', '.join(tensors)}")
        return others

    def _prompt(self, input_ids: Tensor, inputs: dict) -> Tensor:
        """Reads what the cache does not hold; logits [batch, 1, vocab] of the last column."""
        given, mask, positions = dict(inputs), inputs.get("attention_mask"), inputs.get("position_ids")
        tokens = inputs.get("inputs_embeds") if inputs.get("inputs_embeds") is not None else input_ids
        held = self.cache.get_seq_length()
        new = tokens.shape[1] - held if mask is None or mask.shape[1] == tokens.shape[1] else tokens.shape[1]
        given |= {"inputs_embeds": tokens[:, -new:]} if tokens is not input_ids else {"input_ids": input_ids[:, -new:]}
        if positions is not None:
            given["position_ids"] = positions[..., -new:]
        given = {name: value for name, value in given.items() if value is not None and name != "cache_position"}
        logits = self.model(**given, **cache_argument(self.model, self.cache), return_dict=True).logits[:, -1:]
        if positions is not None and positions.dim() == 3:  # of M-RoPE, [n, batch, tokens]: behind images all rows are alike
            positions = positions[0]
        lengths = self.cache.seq_lens.long()
        self.offset = torch.zeros_like(lengths) if positions is None else positions[..., -1].to(lengths) + 1 - lengths
        return logits

    def _set_up_lookups(self, input_ids: Tensor, mask: Tensor | None) -> None:
        """One per row, over its prompt without padding, if lookups may be asked for."""
        self.lookups = None
        if self.options.draft in ("lookup", "auto"):
            if mask is not None and mask.shape == input_ids.shape:
                input_ids = input_ids.masked_fill(mask == 0, -1)
            texts = [[token for token in row if token >= 0] for row in input_ids.tolist()]
            self.lookups = [Lookup(text, self.options.min_match) for text in texts]

    def _round(self) -> None:
        started, self.settled = time.perf_counter(), False
        looked_up, streamed = self._plan_drafts()
        tokens, counts, probs, drawn = self._draft(looked_up, streamed)
        logits = self._verify(tokens, counts)
        try:
            kept = self._emit(self._decide(logits, tokens, counts, probs, drawn), counts)
        except BaseException:
            if not self.settled:  # a processor or a criterion failed: no draft was accepted, the latest token is held now
                self.cache.crop([min(0, 1 - n) for n in counts])
            raise
        shape = (sum(n > 0 for n in counts), tokens.shape[1])
        ms = (time.perf_counter() - started) * 1e3
        if self.session.ranks is not None and self.options.draft == "auto":  # what is drafted next follows from it
            ms = float(self.session.ranks.of_first(torch.tensor(ms)))
        self._account(ms, shape, looked_up, streamed, kept)

    def _hold_last_tokens(self) -> None:
        """Rows that ended before the longest one hold their last token, too, since the next turn begins behind the longest."""
        widths = self.text.widths
        counts = [int(width < max(widths)) for width in widths]
        if any(counts):
            last = torch.tensor([[row[-1]] for row in self.text.emitted])
            self._verify(to_device(last.numpy(), self.text.prompt.device), counts)

    @property
    def active(self) -> list[bool]:
        """Rows that go on. Those that generate() would not pad go on until all have stopped."""
        limits, widths = self.text.limits, self.text.widths
        if not self.criteria.pads and None not in limits:
            return [width < max(limits) for width in widths]
        return [limit is None for limit in limits]

    def _room(self, row: int) -> int:
        """Most tokens that the row may draft: one less than it may emit."""
        most = self.criteria.most
        if not self.criteria.pads and None not in self.text.limits:
            most = max(self.text.limits)
        return self.options.tokens if most is None else min(self.options.tokens, most - self.text.widths[row] - 1)

    def _plan_drafts(self) -> tuple[list[list[int]], list[int]]:
        """For each row the tokens looked up, and how many the streaming draft is asked for; none for rows that have ended."""
        policy, rows = self.policy, range(len(self.text.emitted))
        room = [self._room(row) if on else 0 for row, on in enumerate(self.active)]
        most = policy.tokens_for("lookup")
        looked_up = [self.lookups[row].draft(min(most, room[row])) if most and room[row] else [] for row in rows]
        if self.report.rounds % KV_ROUNDS == 0:
            self.report.kv_bytes = self.cache.kv_bytes()
        most = policy.tokens_for("streaming", self.report.kv_bytes, self.report.weight_bytes)
        return looked_up, [0 if looked_up[row] else min(most, room[row]) for row in rows]

    def _draft(self, looked_up: list[list[int]], streamed: list[int]) -> tuple:
        """The tokens to verify [batch, q_len], right-aligned; how many each row has; see `accept_sampled` for the others."""
        device, active = self.text.prompt.device, self.active
        counts = [(1 + len(draft) + n) * on for draft, n, on in zip(looked_up, streamed, active, strict=True)]
        q_len = max(counts)
        if self.session.compiled is not None:
            q_len = next(bucket for bucket in BUCKETS if bucket >= q_len)
        texts = [[row[-1]] + draft + [0] * n for row, draft, n in zip(self.text.emitted, looked_up, streamed, strict=True)]
        aligned = torch.tensor([([0] * q_len + text)[-q_len:] for text in texts])
        tokens = to_device(aligned.numpy(), device)
        if not any(streamed):
            return tokens, counts, None, None
        latest = to_device(torch.tensor([row[-1] for row in self.text.emitted]).numpy(), device)
        drafts, probs = self.streaming(latest, streamed, self.offset, self._choose(streamed))
        lengths = to_device(torch.tensor(streamed).numpy(), device)[:, None]
        index = torch.arange(q_len, device=device) - (q_len - lengths)
        place = index.clamp(0, drafts.shape[1] - 1)
        tokens = torch.where((index >= 0), drafts.gather(1, place), tokens)
        if probs is not None:  # those of the token in the next column
            place = (index + 1).clamp(0, drafts.shape[1] - 1)
            probs = probs[torch.arange(len(probs), device=device)[:, None], place]
        return tokens, counts, probs, lengths[:, 0] > 0

    def _choose(self, streamed: list[int]):
        """How the streaming draft picks a token: as the target does, from its own scores."""
        widths = self.text.widths

        def choose(logits: Tensor, drafts: Tensor, step: int) -> tuple[Tensor, Tensor | None]:
            if self.text.ids is not None and step:
                self.text.note_drafts(torch.cat([drafts[:, :1], drafts], 1), [step + 1] * len(drafts))
            asked = [int(step < n) for n in streamed]
            scores = self.processors(logits[:, None], self.text.ids, [width + step for width in widths], asked)[:, 0]
            if not self.samples:
                return scores.argmax(-1), None
            probs = scores.softmax(-1)
            return torch.multinomial(probs, 1)[:, 0], probs

        return choose

    def _verify(self, tokens: Tensor, counts: list[int]) -> Tensor:
        """Logits [batch, q_len, vocab] of one forward."""
        lengths = self.cache.seq_lens.long()[:, None] + self.offset[:, None]
        column = torch.arange(tokens.shape[1], device=tokens.device)
        first = to_device(torch.tensor([tokens.shape[1] - n for n in counts]).numpy(), tokens.device)[:, None]
        positions = lengths + (column - first).clamp(min=0)
        inputs = {"input_ids": tokens, "position_ids": positions, "use_cache": True, "return_dict": True}
        return self.session.step(self.cache, counts, **inputs, **self.others).logits

    def _decide(self, logits: Tensor, tokens: Tensor, counts: list[int], probs: Tensor | None, drawn: Tensor | None) -> list:
        """Per row the drafts that are right and one token more. The one copy to the host, and wait for the device, of a round."""
        scores = logits
        if self.processors or self.samples:
            self.text.note_drafts(tokens, counts)
            scores = self.processors(logits.float(), self.text.ids, self.text.widths, counts)
        lengths = to_device(torch.tensor(counts).numpy(), tokens.device)
        if self.samples:
            decided = accept_sampled(scores.softmax(-1), tokens, lengths, probs, drawn)
        else:
            decided = accept_greedy(scores, tokens, lengths)
        q_len, new = tokens.shape[1], []
        for row, n in zip(decided.tolist(), counts, strict=True):
            *drafts, last, token = row
            new.append([*drafts[q_len - n : last], token] if n else [])
        return new

    def _emit(self, new: list[list[int]], counts: list[int]) -> list[int]:
        """Appends tokens up to the first that stops a row, and takes back what the cache holds beyond. Returns drafts kept."""
        text, widths = self.text, self.text.widths
        right = [max(0, len(tokens) - 1) for tokens in new]
        text.note_new(new)
        ends = [limit is not None for limit in text.limits]
        stops = self.criteria.first_stops(new, text.ids, widths)
        for row, stop in enumerate(stops):
            if stop is not None and not ends[row]:
                text.limits[row] = widths[row] + stop
                del new[row][stop:]
        if not self.criteria.pads and None not in text.limits:
            new = [tokens[: max(text.limits) - width] for tokens, width in zip(new, widths, strict=True)]
        if any(text.emitted):
            self.cache.crop([len(tokens) - n for tokens, n in zip(new, counts, strict=True)])
        self.settled = True
        text.append(new)
        if self.lookups is not None:
            for lookup, tokens in zip(self.lookups, new, strict=True):
                lookup.extend(tokens)
        self.streamer.put(text.emitted, self.active)
        return [min(n, len(tokens)) for n, tokens in zip(right, new, strict=True)]

    def _account(
        self, ms: float, shape: tuple[int, int], looked_up: list[list[int]], streamed: list[int], kept: list[int]
    ) -> None:
        report, lengths = self.report, {"lookup": [len(draft) for draft in looked_up], "streaming": streamed}
        rows = {source: sum(n > 0 for n in lengths[source]) for source in SOURCES}
        right = {source: sum(k for k, n in zip(kept, lengths[source], strict=True) if n) for source in SOURCES}
        used = [source for source in SOURCES if rows[source]]
        kind = "both" if len(used) == 2 else used[0] if used else "plain"
        report.rounds += 1
        report.row_rounds += shape[0]
        report.rounds_ms += ms
        report.kind_rounds[kind] = report.kind_rounds.get(kind, 0) + 1
        report.kind_ms[kind] = report.kind_ms.get(kind, 0.0) + ms
        for source in SOURCES:
            report.drafted[source] += sum(lengths[source])
            report.accepted[source] += right[source]
        self.policy.observe(kind, shape[1], ms, shape[0], rows, right)
