"""Where the lines, marks and bars of a card's plots stand; the page's template draws them as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

CURVES = {
    "uncalibrated": ("uncalibrated", "s1", "circle"),
    "temperature": ("temperature", "s0", "square"),
    "isotonic_kappa": ("isotonic on κ", "s2", "triangle"),
}
LEFT, RIGHT = 52, 330


def reliability(part: dict[str, Any], inputs: str) -> dict[str, Any]:
    """Coordinates of the reliability diagram, in a box of 340 × 270."""
    top, bottom = 26, 226
    curves = []
    for name, (text, colour, shape) in CURVES.items():
        bins = part["reliability"][name]
        points = [
            # The area of a mark says how many samples stand behind it.
            (_x(confidence), _y(accuracy, top, bottom), round(1.8 + 4.5 * math.sqrt(count / part["n"]), 1))
            for confidence, accuracy, count in zip(bins["confidence"], bins["accuracy"], bins["count"], strict=True)
            if count
        ]
        text = f"{text}, ECE {three(part['calibrated'][name]['ece']['mean'])}"
        curves.append({"text": text, "colour": colour, "shape": shape, "points": points, "path": _path(points)})
    fifths = [i / 5 for i in range(6)]
    return {
        **{"inputs": inputs, "curves": curves, "left": LEFT, "right": RIGHT, "top": top, "bottom": bottom},
        "label": f"Reliability diagram, {inputs}: " + "; ".join(curve["text"] for curve in curves),
        "x_ticks": [(_x(share), f"{share:g}") for share in fifths],
        "y_ticks": [(_y(share, top, bottom), f"{share:g}") for share in fifths],
    }


def by_kappa(part: dict[str, Any], inputs: str) -> dict[str, Any]:
    """Coordinates of accuracy and counts by κ, one above the other, in a box of 340 × 310."""
    counts, steps = part["by_kappa"], len(part["by_kappa"]["kappa"]) - 1
    top, middle, low_top, bottom = 26, 146, 176, 268
    place = lambda kappa: _x((kappa + 0.5) / (steps + 1))  # noqa: E731
    points = [
        (place(kappa), *(_y(share, top, middle) for share in (mean, max(0, mean - std), min(1, mean + std))))
        for kappa, mean, std in zip(
            counts["kappa"], counts["subset_accuracy_mean"], counts["subset_accuracy_std"], strict=True
        )
        if mean is not None
    ]
    most = max(1, *counts["count"])
    height = lambda count: (bottom - low_top) * math.log1p(count) / math.log1p(most)  # noqa: E731
    width = round(0.42 * (RIGHT - LEFT) / (steps + 1), 1)
    bars = []
    for kappa, count, right in zip(counts["kappa"], counts["count"], counts["right"], strict=True):
        for colour, number, start in (("s0", right, place(kappa) - width), ("s1", count - right, place(kappa))):
            if number:
                bars.append(
                    (colour, round(start, 1), round(bottom - height(number), 1), width, round(height(number), 1))
                )
    step = next(size for size in (1, 2, 5, 10, 20, 50, 100, 1000) if steps / size <= 10)
    x_ticks = [(place(kappa), str(kappa)) for kappa in range(0, steps + 1, step)]
    powers = [10**power for power in range(len(str(most)))]
    return {
        "inputs": inputs,
        "label": f"Accuracy by κ, {inputs}: AUROC of κ {three(part['scores']['kappa']['auroc'])}",
        **{"points": points, "path": _path(points), "overall": _y(part["accuracy"], top, middle), "bars": bars},
        "accuracy": {
            **{"left": LEFT, "right": RIGHT, "top": top, "bottom": middle, "x_ticks": []},
            "y_ticks": [(_y(share, top, middle), f"{share:g}") for share in (0, 0.25, 0.5, 0.75, 1)],
        },
        "counts": {
            **{"left": LEFT, "right": RIGHT, "top": low_top, "bottom": bottom, "x_ticks": x_ticks},
            "y_ticks": [(bottom, "0")] + [(round(bottom - height(power), 1), str(power)) for power in powers],
        },
    }


def _x(share: float) -> float:
    return round(LEFT + (RIGHT - LEFT) * share, 1)


def _y(share: float, top: float, bottom: float) -> float:
    return round(bottom - (bottom - top) * share, 1)


def _path(points: Sequence[tuple]) -> str:
    return "M" + "L".join(f"{point[0]} {point[1]}" for point in points) if points else ""


def three(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
