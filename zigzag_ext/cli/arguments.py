"""Options that several commands have."""

from typing import Annotated

import typer

from ..planning.kv_format import FORMATS

Model = Annotated[str, typer.Argument(help="Model folder (safetensors or GGUF), a .gguf file, or a Hugging Face model name.")]
_FORMAT_HELP = f"How retrieval layers hold keys and values: {', '.join(FORMATS)}, or keys/values: int8/int4."
KvFormat = Annotated[str | None, typer.Option("--kv-format", help=_FORMAT_HELP)]
RingKvFormat = Annotated[str | None, typer.Option("--ring-kv-format", help="The same for streaming layers.")]
KeySmoothing = Annotated[
    bool | None, typer.Option("--key-smoothing/--no-key-smoothing", help="Quantise keys less the mean of the first ones.")
]
Compress = Annotated[
    str | None,
    typer.Option("--compress", help="What retrieval layers keep of a prompt once it is read: a share, 0.12, or tokens."),
]
CompressMethod = Annotated[
    str | None, typer.Option("--compress-method", help="Which tokens: windows (default), snapkv, pyramidkv, chunkkv or recent.")
]
CompressWindow = Annotated[
    int | None, typer.Option("--compress-window", help="Of windows and chunkkv: tokens that stay or go together; default 8, 10.")
]
CompressObserve = Annotated[
    int | None, typer.Option("--compress-observe", help="Last tokens of a prompt, whose attention decides; default 32.")
]
Weights = Annotated[
    str | None,
    typer.Option(help="Quantise linear layers: int8, or in bfloat16 int4 with an output head of int8 (needs torchao)."),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:<number>.")]
Dtype = Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")]
DeviceMap = Annotated[
    str | None, typer.Option(help="Spread the layers over all GPUs: auto, balanced or sequential (needs accelerate).")
]
TensorParallel = Annotated[
    bool, typer.Option("--tp", help="Share heads and weights out over the processes that torchrun has started, a GPU for each.")
]
