"""Every causal language and image-text model of transformers, and what becomes of it:  python -m benchmarks.report.families

Writes docs/models.md: families with the default config of each, served or refused and why. No weights are made.
"""

import sys
from pathlib import Path

from transformers import logging
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from zigzag_ext.hf.served import Served, served

from .documents import insert, table

TARGET = Path(__file__).resolve().parents[2] / "docs" / "models.md"
# What the default configs of some families leave open.
COMPLETED = {
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "bamba": {"attn_layer_indices": [9, 18, 27]},
    "granitemoehybrid": {"layer_types": (["linear_attention"] * 7 + ["full_attention"]) * 4},
    "lfm2_moe": {"layer_types": (["conv", "conv", "full_attention", "conv"]) * 8},
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral", "nemotron"), {"head_dim": 128, "num_key_value_heads": 8}),
    **dict.fromkeys(("idefics3", "smolvlm"), {"pad_token_id": 0}),
}
HEADER = ["family", "served", "fixed layers", "why not"]


def families() -> list[str]:
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES})


def line(family: str) -> list[str]:
    """The row of a family."""
    try:
        found = served(CONFIG_MAPPING[family](**COMPLETED.get(family, {})))
    except Exception as error:  # whatever a config's constructor raises
        found = Served(f"it has no default config ({type(error).__name__})", ())
    fixed = "" if found.refusal else fixed_layers(found.windows)
    answer = "no" if found.refusal else "text" if found.text_only else "yes"
    limits = "; ".join(filter(None, (found.refusal, found.text_only)))
    return [family, answer, fixed, limits.replace("|", "/")]


def fixed_layers(windows: tuple[int | None, ...]) -> str:
    """Which layers no plan chooses: "24 of 32, 1024 tokens", "24 of 32 without keys"."""
    native, empty = [window for window in windows if window], windows.count(0)
    sizes = " and ".join(str(window) for window in dict.fromkeys(native))
    parts = [f"{len(native)} of {len(windows)}, {sizes} tokens"] if native else []
    return "; ".join(parts + ([f"{empty} of {len(windows)} without keys"] if empty else []))


def main() -> int:
    logging.set_verbosity_error()
    lines = [line(family) for family in families()]
    count = sum(row[1] != "no" for row in lines)
    text = f"{count} of {len(lines)} families are served.\n\n{table(HEADER, lines, len(HEADER))}"
    return 0 if insert(TARGET, "families", text) else 1


if __name__ == "__main__":
    sys.exit(main())
