"""Plans for tests that compare an enabled model with the model's own attention."""

import zigzag_ext as zz
from zigzag_ext.planning.native import whole_plan


def streaming_plan(model) -> zz.Plan:
    """Every other full layer streams, the first one too, with a sink of 2 and a window of 5."""
    windows = zz.native_windows(model.config)
    kinds = ["retrieval" if place % 2 else "streaming" for place in range(windows.count(None))]
    return zz.Plan(kinds, sink=2, window=5).with_native(windows) if kinds else whole_plan(windows)
