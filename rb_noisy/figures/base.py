"""What every figure is made of: where its data come from, one style, and three files (PNG, SVG, CSV)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from rb_noisy.csv_files import write_csv
from rb_noisy.data import Dataset
from rb_noisy.files import atomic_path
from rb_noisy.noise import NoisyLabels
from rb_noisy.recipes import Recipe
from rb_noisy.runs import Run
from rb_noisy.same_data import check_classes
from rb_noisy.training_data import run_data, same_training_set

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito 2008. The first two mean the same in every figure: correct and incorrect labels (or predictions).
CORRECT, INCORRECT = "#0072B2", "#D55E00"
COLOURS = ("#009E73", "#E69F00", "#56B4E9", "#CC79A7", "#000000", "#0072B2", "#D55E00", "#8C7A00")
GREY = "#777777"
MARKERS = "os^DvPX*"
DPI = 110


class NotDrawn(Exception):
    """A figure that the given runs have no data for: why, and the command that would provide them."""

    def __init__(self, reason: str, command: str):
        super().__init__(reason)
        self.reason, self.command = reason, command


@dataclass(frozen=True)
class Source:
    """A run folder, a shipped record of one, or a zoo model.

    Attributes:
        recipe: what it was trained by.
        class_names: names of the K classes.
        metrics: one dict per epoch; empty for a zoo model.
        run: None for a zoo model.
        load: gives the final network; None where there are no weights.
    """

    name: str
    recipe: Recipe
    class_names: tuple[str, ...]
    metrics: tuple[dict[str, Any], ...] = ()
    run: Run | None = None
    load: Callable[[], nn.Module] | None = None

    @classmethod
    def from_run(cls, run: Run) -> Source:
        # The name, not the weights: a folder of results may be drawn without its weights.
        load = run.load if (run.path / "final.safetensors").is_file() else None
        return cls(run.path.name, run.recipe, run.class_names, run.metrics, run, load)

    def trained_on(self, data_root: Path | None) -> tuple[Dataset, NoisyLabels]:
        """What it was trained on; `InputError` where the images, labels or classes are others now."""
        if self.run is not None:
            return run_data(self.run, data_root)
        return same_training_set(self.recipe, self.class_names, None, self.name, data_root)

    def check_classes(self, data: Dataset) -> None:
        """Raise `InputError` where these are not the classes that it was trained on."""
        way_out = "give them their names and order back"
        check_classes(self.class_names, data.class_names, self.name, data.name, way_out)

    @property
    def noisy(self) -> bool:
        return self.recipe.noise != "none" and self.recipe.noise_rate != 0

    @property
    def rate(self) -> str:
        """The noise rate asked for, "0" for clean labels; the kind of noise where it has no rate ("human")."""
        if not self.noisy:
            return "0"
        return self.recipe.noise if self.recipe.noise_rate is None else f"{self.recipe.noise_rate:g}"

    @property
    def attacks(self) -> bool:
        return self.recipe.make_objective().attack_loss is not None


@dataclass(frozen=True)
class Drawing:
    """A figure and its data.

    Attributes:
        name: of its files, without ending.
        rows: the numbers drawn, one dict per line of the CSV, all with the same keys.
    """

    name: str
    figure: Figure
    rows: list[dict[str, Any]]

    def save(self, folder: Path) -> list[Path]:
        """Write PNG, SVG and CSV, each whole or not at all, the same bytes from the same data."""
        from matplotlib import rc_context

        for axis in self.figure.axes:  # only now, because set_title sets the size back
            axis.set_title(wrapped(axis.get_title(), 34), fontsize=9.5, parse_math=False)
        files = [folder / f"{self.name}.{kind}" for kind in ("png", "svg", "csv")]
        with rc_context({"svg.hashsalt": "rb-noisy", "svg.fonttype": "path"}):
            for file, metadata in zip(files, ({"Software": None}, {"Date": None}), strict=False):
                with atomic_path(file) as temporary:
                    self.figure.savefig(temporary, format=file.suffix[1:], dpi=DPI, metadata=metadata)
                self.figure.set_layout_engine("none")  # the second file keeps the places found for the first
        columns = list(self.rows[0])
        write_csv(files[2], columns, ([_cell(row[name]) for name in columns] for row in self.rows))
        return files


def _cell(value: Any) -> Any:
    if isinstance(value, float | np.floating):
        return "" if np.isnan(value) else f"{float(value):.6g}"
    return "" if value is None else value


@dataclass(frozen=True)
class Context:
    """What a figure is drawn from.

    Attributes:
        data_root: where data sets are kept.
        seed: of every random choice: samples, directions, starts.
        progress: called with what is being computed.
    """

    sources: Sequence[Source]
    data_root: Path | None = None
    seed: int = 0
    progress: Callable[[str], None] = field(default=lambda text: None)


def sheet(rows: int, columns: int, title: str, width: float = 3.6, height: float = 3.0) -> tuple[Figure, np.ndarray]:
    """A figure with (rows, columns) axes and room for a legend below (see `legend`); sizes in inches per panel."""
    from matplotlib.figure import Figure

    # A title longer than its figure is wide is broken rather than cut.
    size = (max(columns * width, 4.8), rows * height + 0.9)
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    axes = np.array(figure.subplots(rows, columns, squeeze=False))
    figure.suptitle(wrapped(title, int(size[0] * 11)), fontsize=11, parse_math=False)
    for axis in axes.flat:
        axis.grid(color="#DDDDDD", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=8)
        axis.xaxis.label.set_size(9)
        axis.yaxis.label.set_size(9)
    return figure, axes


def wrapped(text: str, width: int) -> str:
    """Text in lines of at most so many characters."""
    import textwrap

    return "\n".join(textwrap.wrap(text, width))


def legend(figure: Figure, axes: Iterable[Axes], sort: bool = False, markerscale: float = 1) -> None:
    """One legend for all panels, below them, each label once, in the order drawn or of the alphabet."""
    found: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if sort:
        found = dict(sorted(found.items()))
    longest = max((len(label) for label in found), default=1)
    fits = max(1, int(figure.get_size_inches()[0] / (0.085 * longest + 0.75)))
    options = {"loc": "outside lower center", "fontsize": 8.5, "frameon": False, "markerscale": markerscale}
    figure.legend(found.values(), found.keys(), ncols=min(fits, len(found) or 1), **options)


def epochs_axis(axis: Axes, count: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_xlabel("epoch")
    axis.set_xlim(0.5 if count > 1 else 0, count + 0.5)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))


def same_scale(axes: Iterable[Axes]) -> None:
    """Let panels that are compared reach from 0 to the same height."""
    axes = list(axes)
    top = max(axis.get_ylim()[1] for axis in axes)
    for axis in axes:
        axis.set_ylim(0, top)


def percent_axis(axis: Axes, label: str) -> None:
    axis.set(ylabel=label, ylim=(-3, 103))


def noise_title(recipe: Recipe) -> str:
    """ "40% symmetric noise", "clean labels"."""
    if recipe.noise == "none":
        return "clean labels"
    return f"{recipe.noise} noise" if recipe.noise_rate is None else f"{recipe.noise_rate:.0%} {recipe.noise} noise"


def title(source: Source) -> str:
    """Data set, noise, method and model of one source."""
    recipe = source.recipe
    return f"{data_title(recipe)}, {noise_title(recipe)}, {recipe.method}, {recipe.backbone}"


def data_title(recipe: Recipe) -> str:
    kind, _, place = recipe.data.partition(":")
    return Path(place).stem if place else kind


def file_part(source: Source) -> str:
    """A source's name as part of a file's."""
    return "".join(c if c.isalnum() or c in "+-._" else "-" for c in source.name)


def evenly(values: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the values, evenly spread, the last among them."""
    if len(values) <= count:
        return list(values)
    return [values[round((i + 1) * len(values) / count) - 1] for i in range(count)]
