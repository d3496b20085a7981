"""Tiny random-weight image-text models and prompts with images for them, made by hand, with no download and no processor."""

import functools

import torch
from tiny_models import prompt
from transformers import AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

IMAGE = 7  # the id that stands for every token of an image
_TEXT = {
    "vocab_size": 199,
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_TOWER = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_TOWER |= {"patch_size": 4, "image_size": 16}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]}
_QWEN = {"depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 128, "patch_size": 4}
_ALTERNATE = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
_GEMMA4 = {"hidden_size_per_layer_input": 0, "global_head_dim": 64, "vocab_size_per_layer_input": 199, **_ALTERNATE}

# What differs in the text config, in the vision config, in the config of both; how many tokens an image takes.
FAMILIES: dict[str, tuple[dict, dict, dict, int]] = {
    "gemma3": (_ALTERNATE, _TOWER, {"mm_tokens_per_image": 4}, 4),
    "gemma4": (_GEMMA4, _TOWER | {"num_key_value_heads": 2, "head_dim": 16, "pooling_kernel_size": 2}, {}, 4),
    "internvl": ({"model_type": "qwen2"}, _TOWER, {"downsample_ratio": 0.5}, 4),
    "llava": ({"model_type": "llama"}, _TOWER | {"projection_dim": 32}, {}, 16),
    "mistral3": ({"model_type": "mistral", "sliding_window": None}, _TOWER | {"head_dim": 16}, {"spatial_merge_size": 2}, 4),
    "qwen2_5_vl": (
        {"rope_parameters": _MROPE},
        _QWEN | {"window_size": 16, "fullatt_block_indexes": [1]},
        {"vision_start_token_id": 9, "vision_end_token_id": 10},
        8,
    ),
    "qwen3_vl": (
        {"rope_parameters": _MROPE | {"mrope_interleaved": True}},
        _QWEN | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
        {"vision_start_token_id": 9, "vision_end_token_id": 10},
        8,
    ),
    "smolvlm": ({"model_type": "llama"}, _TOWER, {"scale_factor": 2, "pad_token_id": 0}, 4),
}
if "gemma4" not in CONFIG_MAPPING:  # older transformers
    del FAMILIES["gemma4"]
MROPE = ("qwen2_5_vl", "qwen3_vl")


def new_image_model(family: str, **text):
    """A model of its own with random weights, the same every time."""
    own, vision, both, _ = FAMILIES[family]
    tokens = {"image_token_id": IMAGE, "video_token_id": 8, "tie_word_embeddings": False}
    if family in ("gemma3", "llava", "mistral3"):
        tokens["image_token_index"] = tokens.pop("image_token_id")
    if family not in (*MROPE, "gemma4"):
        del tokens["video_token_id"]
    config = CONFIG_MAPPING[family](text_config=_TEXT | own | text, vision_config=dict(vision), **tokens, **both)
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()


@functools.lru_cache(maxsize=2)
def image_model(family: str):
    """Tests share it, so they must restore it."""
    return new_image_model(family)


def image_prompt(family: str, images: int, padding: tuple[int, ...] = (0,), length: int = 60, seed: int = 1) -> dict:
    """Arguments of generate(): a row for each `padding`, left-padded by that, each with `images` images of its own."""
    ids = prompt(length, len(padding), seed).clamp_min(11)
    tokens = FAMILIES[family][3]
    for image in range(images):
        start = 12 + image * (tokens + 5)
        ids[:, start], ids[:, start + tokens + 1], ids[:, start + 1 : start + tokens + 1] = 9, 10, IMAGE
    mask = (torch.arange(length) >= torch.tensor(padding)[:, None]).long()
    given = {"input_ids": ids * mask, "attention_mask": mask}
    types = {"gemma3": "token_type_ids", "gemma4": "mm_token_type_ids", **dict.fromkeys(MROPE, "mm_token_type_ids")}
    if family in types:
        given[types[family]] = (ids == IMAGE).long()
    if images:
        given |= _pixels(family, len(padding), images, torch.Generator().manual_seed(seed))
    return given


def _pixels(family: str, batch: int, images: int, generator: torch.Generator) -> dict:
    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    count = batch * images
    if family in MROPE:  # every other image is as tall as the others are wide
        grid = [[1, 4, 8] if image % 2 else [1, 8, 4] for image in range(count)]
        return {"pixel_values": noise(32 * count, 3 * 2 * 4 * 4), "image_grid_thw": torch.tensor(grid)}
    if family == "gemma4":
        place = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), -1).reshape(1, 16, 2)
        return {"pixel_values": noise(count, 16, 3 * 4 * 4), "image_position_ids": place.repeat(count, 1, 1)}
    if family == "smolvlm":
        return {"pixel_values": noise(batch, images, 3, 16, 16)}
    sizes = {"image_sizes": torch.tensor([[16, 16]] * count)} if family == "mistral3" else {}
    return {"pixel_values": noise(count, 3, 16, 16)} | sizes
