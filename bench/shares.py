"""Share of time per operation, from one profiled call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from torch.autograd.profiler import profile

# What torch shows for work that no named range covers; anything else is "other".
TORCH_NAMES = {
    "aten::addmm": "linear",
    "aten::mm": "linear",
    "aten::mkldnn_convolution": "linear",
    "aten::gelu": "gelu",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "attention (SDPA)",
    "aten::native_layer_norm": "layer norm",
    "aten::rms_norm": "rms norm",
    "aten::_fused_rms_norm": "rms norm",
}
OTHER = "other"


def shares(names: Iterable[str], call: Callable[[], object]) -> dict[str, float]:
    """Seconds of `call` by operation: a record_function range of `names`, else a torch kernel, else OTHER.

    The outermost range of `names` that encloses an event takes its time. The profiler slows small kernels down, so
    these seconds are for shares only.
    """
    names = set(names)
    with profile(use_kineto=False) as watch:
        call()
    seconds: Counter[str] = Counter()
    for event in watch.function_events:
        label, parent = OTHER, event
        while parent is not None:
            if parent.name in names:
                label = parent.name
            elif label == OTHER and parent.name in TORCH_NAMES:
                label = TORCH_NAMES[parent.name]
            parent = parent.cpu_parent
        seconds[label] += event.self_cpu_time_total * 1e-6
    return dict(seconds)


def share_table(columns: dict[str, dict[str, float]]) -> str:
    """Rows of operations, columns of runs; each cell the share of that run's time and its seconds."""
    totals = {title: sum(seconds.values()) for title, seconds in columns.items()}
    weight = Counter()
    for title, seconds in columns.items():
        for name, value in seconds.items():
            weight[name] += value / max(totals[title], 1e-12)
    rows = [name for name, value in weight.most_common() if value >= 0.005]
    width = max(len(name) for name in [*rows, "total"]) + 2
    lines = [" " * width + "".join(f"{title:>22}" for title in columns)]
    for name in rows:
        cells = (f"{s.get(name, 0.0) / totals[t]:>11.1%}{s.get(name, 0.0):>9.3f} s" for t, s in columns.items())
        lines.append(f"{name:<{width}}" + "".join(cells))
    lines.append(f"{'total':<{width}}" + "".join(f"{'':>11}{totals[t]:>9.3f} s" for t in columns))
    return "\n".join(lines)
