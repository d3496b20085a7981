"""The model classes: any text decoder that vLLM runs by transformers' code, each layer with the attention of its kind."""

from . import require_tested

require_tested()

from vllm.model_executor.layers.attention import Attention  # noqa: E402
from vllm.model_executor.models.transformers import TransformersForCausalLM, TransformersMoEForCausalLM  # noqa: E402
from vllm.model_executor.models.utils import extract_layer_index  # noqa: E402

from ..hf.families import check_family  # noqa: E402
from .attention import SinkWindowAttention  # noqa: E402
from .plans import plan_of, refusal  # noqa: E402


class _Planned:
    """Raises ValueError, when vLLM builds it, for configurations and families that would not come out as the plan says."""

    def __init__(self, *, vllm_config, prefix: str = "") -> None:
        if reason := refusal(vllm_config):
            raise ValueError(reason)
        self.plan = plan_of(vllm_config.model_config.hf_text_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        check_family(self.model)

    def _get_attn_cls(self):
        """What makes the attention of a layer: vLLM calls it, and asks no more of it."""
        kind = super()._get_attn_cls()
        if kind is not Attention:
            raise ValueError(f"plans are not served with {kind.__name__} by zigzag_ext's plugin for vLLM")
        return self._attention

    def _attention(self, *, prefix: str, per_layer_sliding_window: int | None = None, **options) -> Attention:
        layer = extract_layer_index(prefix)
        sink, window = self.plan.size(layer)
        if window:
            return SinkWindowAttention(sink=sink, prefix=prefix, per_layer_sliding_window=window, **options)
        attention = Attention(prefix=prefix, **options)
        if (own := per_layer_sliding_window or attention.sliding_window) is not None:
            raise ValueError(f"layer {layer} retrieves in the plan, and vLLM gives it a sliding window of {own} tokens")
        return attention


class ZigzagForCausalLM(_Planned, TransformersForCausalLM):
    """Dense models."""


class ZigzagMoEForCausalLM(_Planned, TransformersMoEForCausalLM):
    """Mixtures of experts, which vLLM computes by kernels of its own."""
