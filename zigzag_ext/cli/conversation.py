"""Several turns with a model on one cache, token for token: nothing that is held is tokenised again."""

import time
from collections.abc import Callable

import torch

from ..cache import ZigzagCache
from ..hf.cache_argument import cache_argument
from ..planning.plan import Plan
from .timing import Clock


class Conversation:
    """Questions and answers of one chat with an enabled model.

    The answer's tokens stay as they were generated; of the next turn only what the chat template puts behind them is tokenised.
    Where a template changes earlier turns (some drop a model's reasoning), the conversation is read again from its start.

    Args:
        system: the first message, None for none.
        options: of `model.generate`.

    Raises:
        ValueError: the tokenizer has no chat template.
    """

    def __init__(self, model, tokenizer, plan: Plan, system: str | None = None, **options):
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("the model's tokenizer has no chat template: use zigzag generate")
        self.model, self.tokenizer, self.options, self.cache = model, tokenizer, options, ZigzagCache(model.config, plan)
        self.first = [] if system is None else [{"role": "system", "content": system}]
        self.reset()

    def reset(self) -> None:
        self.messages, self.text, self.ids = list(self.first), "", None
        self.cache.reset()

    @torch.inference_mode()
    def say(self, question: str, show: Callable[[str], None]) -> str:
        """Answers, piece by piece to `show`, and returns a line on what it took. An interrupt ends it as if it had not begun."""
        messages = [*self.messages, {"role": "user", "content": question}]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        held, clock = self.cache.get_seq_length(), Clock(self.tokenizer, show)
        if self.ids is None or not text.startswith(self.text):
            self.cache.reset()
            held, ids = 0, self._tokens(text)
        else:
            ids = torch.cat([self.ids, self._tokens(text[len(self.text) :])], 1)
        start = time.perf_counter()
        try:
            output = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), streamer=clock, **self.options, **cache_argument(self.model, self.cache)
            )
        except KeyboardInterrupt:
            self.cache.reset()  # it holds a part of an answer, which rings cannot take back
            return "interrupted: the question is forgotten, the next one reads the conversation again"
        answer = output[0, ids.shape[1] :]
        self.messages = [*messages, {"role": "assistant", "content": self.tokenizer.decode(answer, skip_special_tokens=True)}]
        self.ids, self.text = output, text + self.tokenizer.decode(answer, skip_special_tokens=False)
        speed = len(answer) / (clock.arrivals[-1] - start)
        return (
            f"{ids.shape[1] - held} tokens read, {len(answer)} generated, {speed:.1f} tokens/s; "
            f"{self.cache.get_seq_length()} held in {self.cache.memory_bytes() / 2**20:.1f} MiB"
        )

    def _tokens(self, text: str) -> torch.Tensor:
        return self.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"].long().to(self.model.device)
