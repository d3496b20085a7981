"""Figures from results: decode time against context length, and latency of a streaming layer. One of each per CSV file."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .records import Record

# Okabe-Ito: told apart by colour-blind readers (https://jfly.uni-koeln.de/color/).
OURS, FLOOR = "#D55E00", "#000000"
PEER_COLORS = ("#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F7F7F", "#8C6D31")
PEER_MARKERS = "sD^vPX*"
LABELS = {
    "zigzag": "zigzag_ext",
    "read": "pure read of the KV bytes",
    "torch_sdpa_flash": "torch SDPA flash",
    "torch_sdpa_cudnn": "torch SDPA cuDNN",
    "torch_sdpa_gqa": "torch SDPA",
    "torch_sdpa_packed": "torch SDPA, heads packed by hand",
    "flashinfer_tc": "FlashInfer tensor core",
    "flashinfer_cc": "FlashInfer CUDA core",
    "flashinfer_xqa": "FlashInfer XQA",
    "fa3": "FlashAttention-3",
    "flex_attention": "FlexAttention",
}
STYLE = {
    "figure.figsize": (7.2, 4.2),
    "figure.dpi": 160,
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "axes.axisbelow": True,
    "legend.frameon": False,
}
Sources = dict[Path, list[Record]]


MAX_RATIO = 3.0  # top of the panel of ratios


def plain(row: Record) -> bool:
    """One row of a batch, grouped heads, one new token: the shape that the figures follow."""
    return (row.batch, row.num_q_heads, row.num_kv_heads, row.head_dim, row.q_len, row.kv_format) == (1, 32, 8, 128, 1, "bf16")


def draw_all(sources: Sources, folder: Path) -> list[Path]:
    """Draws what each file has enough rows for; returns the files written."""
    floors = [row for rows in sources.values() for row in rows if row.impl == "read"]
    written = []
    for path, rows in sources.items():
        if not any(row.impl not in ("zigzag", "read") for row in rows):
            continue
        floor = [row for row in floors if row.gpu == rows[0].gpu]
        for draw, name in ((draw_lengths, path.stem), (draw_ring, f"{path.stem}_ring")):
            target = folder / f"{name}.png"
            with plt.rc_context(STYLE):
                figure = draw([row for row in rows if plain(row)], [row for row in floor if plain(row)])
                if figure is None:
                    continue
                folder.mkdir(parents=True, exist_ok=True)
                figure.savefig(target, bbox_inches="tight", facecolor="white", metadata={"Software": None})
                plt.close(figure)
            written.append(target)
    return written


def draw_lengths(rows: list[Record], floor: list[Record]) -> plt.Figure | None:
    """Time of one call over the number of keys, above; below, the same times as multiples of ours."""
    rows = sorted((row for row in rows if row.op == "decode_full"), key=lambda row: row.kv_len)
    ours = {row.kv_len: row.p50_us for row in rows if row.impl == "zigzag"}
    if len(ours) < 2:
        return None
    floor = sorted((row for row in floor if row.op == "decode_full" and row.kv_len in ours), key=lambda row: row.kv_len)
    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(7.2, 6.6), height_ratios=(3, 2), layout="constrained")
    line((above, below), rows, "zigzag", ours, color=OURS, marker="o", markersize=6, linewidth=2.4, zorder=3)
    for index, impl in enumerate(sorted({row.impl for row in rows} - {"zigzag", "read"})):
        color, marker = PEER_COLORS[index % len(PEER_COLORS)], PEER_MARKERS[index % len(PEER_MARKERS)]
        line((above, below), rows, impl, ours, color=color, marker=marker, markersize=4.5, linewidth=1.2)
    line((above, below), floor, "read", ours, color=FLOOR, linestyle="--", linewidth=1.4)
    below.set_xscale("log", base=2)
    below.set_xticks(list(ours), [f"{n // 1024}K" if n % 1024 == 0 else str(n) for n in ours])
    below.set_xlabel("keys in the cache")
    below.set_ylabel("time / time of zigzag_ext")
    # A peer that is many times slower would flatten all others: it leaves the lower panel, the upper one shows it.
    below.set_ylim(0.4, MAX_RATIO)
    above.set_yscale("log")
    above.yaxis.set_major_locator(matplotlib.ticker.LogLocator(base=10, subs=(1, 2, 5)))
    above.yaxis.set_major_formatter(
        matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:,g}" if value < 1e6 else f"{value:g}")
    )
    above.set_ylabel("time of one call, µs")
    above.set_title(f"Full-cache decode attention, batch 1, 32/8 heads, d128, bf16\n{rows[0].gpu}", fontsize=11, loc="left")
    figure.legend(*above.get_legend_handles_labels(), fontsize=9, loc="outside lower center", ncols=3)
    for axes in (above, below):
        axes.minorticks_off()
    return figure


def line(panels: tuple, rows: list[Record], impl: str, ours: dict[int, float], **style) -> None:
    points = [(row.kv_len, row.p50_us) for row in rows if row.impl == impl and row.kv_len in ours]
    if points:
        panels[0].plot(*zip(*points, strict=True), label=LABELS.get(impl, impl), **style)
        panels[1].plot(*zip(*((n, time / ours[n]) for n, time in points), strict=True), **style)


def draw_ring(rows: list[Record], floor: list[Record]) -> plt.Figure | None:
    """Bars of the time of one streaming layer, ours and every peer, one panel per window, fastest on top."""
    rows = [row for row in rows if row.op == "decode_stream"]
    windows = sorted({(row.sink, row.window) for row in rows if row.impl == "zigzag"})
    if not windows:
        return None
    count = max(sum((row.sink, row.window) == window for row in rows) for window in windows)
    figure, panels = plt.subplots(
        len(windows), 1, squeeze=False, figsize=(7.2, (0.34 * count + 1.0) * len(windows)), layout="constrained"
    )
    for axes, window in zip(panels[:, 0], windows, strict=True):
        bars = sorted((row for row in rows if (row.sink, row.window) == window), key=lambda row: -row.p50_us)
        colors = [OURS if row.impl == "zigzag" else "#9AA5B1" for row in bars]
        drawn = axes.barh([LABELS.get(row.impl, row.impl) for row in bars], [row.p50_us for row in bars], color=colors)
        axes.bar_label(drawn, [f"{row.p50_us:,.1f}" for row in bars], padding=4, fontsize=9)
        for row in floor:
            if (row.sink, row.window) == window:
                axes.axvline(row.p50_us, color=FLOOR, linestyle="--", linewidth=1.2, label=LABELS["read"])
                axes.legend(fontsize=9, loc="upper right")
        axes.grid(False, axis="y")
        axes.margins(x=0.12)
        axes.set_title(f"sink {window[0]} + window {window[1]}", fontsize=11, loc="left")
    panels[-1, 0].set_xlabel("time of one attention call, µs (zigzag_ext: append included; peers: attention only)")
    figure.suptitle(f"Streaming-layer decode, batch 1, 32/8 heads, d128, bf16\n{rows[0].gpu}", fontsize=11, x=0.02, ha="left")
    return figure
