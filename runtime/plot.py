"""Draws the TTFT distribution of each class, a line a policy; the suffix of the file decides."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from plans.errors import UsageError
from runtime.executor.base import Floats

FORMATS = (".pdf", ".png", ".svg")
Distributions = Mapping[str, Mapping[str, Floats]]
"""Class name to policy to TTFT samples, infinite where there was no first token."""


def check_format(path: Path) -> None:
    """Raises UsageError where the suffix is none of FORMATS; call it before a long run."""
    if path.suffix not in FORMATS:
        raise UsageError(f"--plot {path}: the file ends in one of {', '.join(FORMATS)}")


def draw_ttft(path: Path, classes: Distributions, *, title: str) -> None:
    """Writes one panel a class: share of the offered requests with a first token by then.

    A line that ends below 1 says that the rest never had a first token.
    """
    import matplotlib as mpl  # noqa: PLC0415 - half a second, and few runs draw
    from matplotlib.figure import Figure  # noqa: PLC0415

    with mpl.rc_context({"svg.hashsalt": "medha"}):  # the same run draws the same bytes
        figure = Figure(figsize=(5 * len(classes), 3.6), layout="constrained")
        panels = figure.subplots(1, len(classes), squeeze=False)[0]
        for panel, (name, policies) in zip(panels, classes.items(), strict=True):
            for policy, samples in policies.items():
                ordered = np.sort(samples)
                share = np.arange(1, len(ordered) + 1) / len(ordered)
                came = np.isfinite(ordered)
                panel.step(ordered[came], share[came], where="post", label=policy)
            count = max(len(samples) for samples in policies.values())
            panel.set(title=f"{name} ({count})", xscale="log", xlabel="TTFT, s", ylim=(0, 1.02))
            panel.grid(visible=True, alpha=0.3)
        panels[0].set_ylabel("share of offered requests")
        panels[0].legend()
        figure.suptitle(title)
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
