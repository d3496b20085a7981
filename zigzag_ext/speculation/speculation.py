"""speculate(...): drafts tokens, verifies them in one forward, and emits what plain decoding would."""

from dataclasses import dataclass

from transformers.generation.utils import GenerateDecoderOnlyOutput

from ..attention.ops import MAX_DECODE_QUERIES
from ..cache import ZigzagCache
from ..hf.cache_argument import split_cache
from ..hf.session import session_of
from ..planning.plan import token_count
from .loop import Decoding
from .report import Report

DRAFTS = ("auto", "lookup", "streaming", "off")
# Options of generate() that another loop than this one serves, with the value that leaves them out.
_OTHER_LOOPS = {"num_beams": 1, "penalty_alpha": None, "dola_layers": None, "prefill_chunk_size": None, "constraints": None}
_OTHER_LOOPS |= {"prompt_lookup_num_tokens": None, "assistant_early_exit": None, "force_words_ids": None}
_NOT_KEPT = ("output_scores", "output_logits", "output_hidden_states", "output_attentions")


@dataclass
class SpeculativeOutput(GenerateDecoderOnlyOutput):
    """What generate() returns with `return_dict_in_generate`: its sequences and cache, and the `report` of the call."""

    report: Report | None = None


class Speculation:
    """`model.generate(**inputs, custom_generate=zz.speculate())` on an enabled model; see `speculate` for the options.

    report: of the last call, `Report`. rollback: tokens that a cache must be able to take back.
    """

    def __init__(self, draft: str, tokens: int, window: int, min_match: int, streamer):
        if draft not in DRAFTS:
            raise ValueError(f"draft must be one of {', '.join(DRAFTS)}; got {draft!r}")
        self.draft, self.streamer, self.report = draft, streamer, None
        self.tokens = _between("tokens", tokens, 1, MAX_DECODE_QUERIES - 1)
        self.window = _between("window", window, 1, 1 << 30)
        self.min_match = _between("min_match", min_match, 1, 64)
        self.rollback = 0 if draft == "off" else self.tokens

    def __call__(self, model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        session = session_of(model)
        if session is None:
            raise RuntimeError("speculate needs a model with zigzag attention: call zigzag_ext.enable(model, plan) first")
        _check_config(generation_config)
        cache, inputs = split_cache(model_kwargs)
        if cache is None:
            raise ValueError("speculate needs a KV cache: leave use_cache on")
        if not isinstance(cache, ZigzagCache):
            raise TypeError(f"speculate takes a ZigzagCache or no cache, got a {type(cache).__name__}")
        if self.rollback:
            cache.refuse_states([states.index for states in cache.states], "speculate()")
        if cache.rollback < self.rollback and any(store.window for store in cache.stores):
            raise ValueError(
                f"tokens={self.tokens} drafts may have to be taken back, and the rings of this ZigzagCache can take back "
                f"{cache.rollback}: make it with rollback={self.rollback}, or draft fewer"
            )
        decoding = Decoding(session, cache, self, logits_processor, stopping_criteria, generation_config)
        self.report = decoding.report
        sequences = decoding.run(input_ids, inputs)
        if not generation_config.return_dict_in_generate:
            return sequences
        return SpeculativeOutput(sequences=sequences, report=self.report, **_cache_field(cache))


def speculate(draft: str = "auto", tokens: int = 7, window: int = 1024, min_match: int = 3, streamer=None) -> Speculation:
    """Speculative decoding: `model.generate(**inputs, custom_generate=zz.speculate())` emits the tokens of plain generate().

    A round drafts up to `tokens` tokens per row and verifies them in one forward. Every row of the batch keeps as many as are
    right and one more; greedy tokens are those of plain decoding up to the rounding of forwards of several tokens, samples have
    its distribution (rejection sampling). Logits processors and stopping criteria see each position with the tokens before it.

    Args:
        draft: where drafts come from. "lookup": what followed the last time that the row's latest `min_match` tokens stood in its
            prompt or output; no match, no draft. "streaming": the model itself, every layer reading its sink and window only, on
            the same cache. "auto": lookups where there is a match, the streaming draft where a step reads at least twice as many
            bytes of KV as of weights; neither while measured times and acceptance say that it does not pay. "off": plain steps.
        tokens: most tokens of a draft, 1 to 15.
        window: tokens that the streaming draft reads of retrieval layers, besides the plan's sink.
        min_match: tokens that a lookup matches at least. A draft is no longer than its match.
        streamer: as in generate(), which does not hand its own to a `custom_generate`. It gets the tokens of plain decoding,
            column by column, once every row has that column.

    Any batch size, left padding, several turns on one cache. A cache made by generate() has the slots to take drafts back; make
    your own with `rollback=tokens`. Rows that are finished hold their last token's predecessors only: in the next turn the
    attention mask has zeros at the padding behind them.

    Returns:
        A `Speculation`. Its `report` is that of the last call, also in the returned object with `return_dict_in_generate=True`.

    Raises:
        TypeError, ValueError: an option is of the wrong type or out of range. From generate(): beams, contrastive search,
            classifier-free guidance or anything else that needs another loop; scores or hidden states are asked for; the cache
            cannot take `tokens` tokens back.
        RuntimeError: from generate(): the model is not enabled, or has layers with states, which take nothing back.

    Sources: MagicDec (https://arxiv.org/abs/2408.11049) drafts with a streaming cache of its own, here the target's is read;
    prompt lookup decoding (https://github.com/apoorvumang/prompt-lookup-decoding).
    """
    return Speculation(draft, tokens, window, min_match, streamer)


def _between(name: str, value, least: int, most: int) -> int:
    if not least <= (number := token_count(name, value)) <= most:
        raise ValueError(f"{name} must be {least} to {most}, got {value}")
    return number


def _check_config(config) -> None:
    """Raises ValueError for what this loop does not do."""
    for name, without in _OTHER_LOOPS.items():
        if (given := getattr(config, name, None)) not in (None, without):
            raise ValueError(f"speculate does not serve {name}={given!r}: leave it {without}")
    for name in _NOT_KEPT:
        if config.return_dict_in_generate and getattr(config, name, None):
            raise ValueError(f"speculate does not return what {name} asks for: leave it False")


def _cache_field(cache) -> dict:
    """The cache by the name that the output of this transformers has for it."""
    name = next(name for name in ("cache", "past_key_values") if name in SpeculativeOutput.__dataclass_fields__)
    return {name: cache}
