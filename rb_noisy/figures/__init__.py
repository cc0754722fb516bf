"""The figures of both papers, redrawn from run folders, shipped records of runs, and zoo models.

Each figure is a function of a `Context` that returns its `Drawing`s or raises `NotDrawn`. A new one is a function and
an entry in `FIGURES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from rb_noisy.errors import unknown_name
from rb_noisy.figures import annotators, curves, kappa, networks, refinement, toy
from rb_noisy.figures.base import Context, Drawing, NotDrawn, Source

__all__ = ["FIGURES", "Context", "Drawing", "NotDrawn", "Source", "draw"]


@dataclass(frozen=True)
class Figure:
    """How a figure is drawn, and its number in the papers."""

    papers: str
    draw: Callable[[Context], list[Drawing]]


FIGURES: dict[str, Figure] = {
    "toy": Figure("NL 1, 11", toy.toy),
    "learning-curves": Figure("NL 4, 15, 16, 19, 20", curves.learning_curves),
    "train-accuracy": Figure("NL 3, 13, 14, 18", curves.train_accuracy),
    "kappa-over-epochs": Figure("NL 5, 21, 22", curves.kappa_over_epochs),
    "neighbourhood-entropy": Figure("NL 2, 12", curves.neighbourhood_entropy),
    "densities": Figure("NL 7, 23, 24", kappa.densities),
    "kappa-against-loss": Figure("NL 6, 27, 28", kappa.kappa_against_loss),
    "gallery": Figure("NL 8, 25, 26", kappa.gallery),
    "accuracy-by-kappa": Figure("NL 10", kappa.accuracy_by_kappa),
    "annotators": Figure("NL 9", annotators.annotators),
    "loss-landscape": Figure("NL 17", networks.loss_landscapes),
    "gradient-norm": Figure("SGLR 1", refinement.gradient_norm),
    "label-assignment": Figure("SGLR 2", refinement.label_assignment),
    "confidence": Figure("SGLR 3", refinement.confidence),
    "memorisation": Figure("SGLR 4", refinement.memorisation),
    "features": Figure("SGLR 5", networks.features),
}
NEEDS_NO_RUN = ("toy",)


def check_names(names: Sequence[str]) -> None:
    """Raise `InputError` for a name that is no figure's."""
    for name in names:
        if name not in FIGURES:
            raise unknown_name("figure", name, FIGURES)


def draw(names: Sequence[str], context: Context) -> Iterator[tuple[str, list[Drawing] | NotDrawn]]:
    """Each figure's drawings, or why there are none, one figure at a time.

    Raises:
        InputError: an unknown name; data or weights that a figure needs are damaged or cannot be had.
    """
    check_names(names)
    seen: dict[str, int] = {}

    def own_name(drawing: Drawing) -> Drawing:
        """Runs of other sizes or lengths make figures of the same name; the second is .2 then."""
        seen[drawing.name] = seen.get(drawing.name, 0) + 1
        return drawing if seen[drawing.name] == 1 else replace(drawing, name=f"{drawing.name}.{seen[drawing.name]}")

    for name in names:
        try:
            yield name, [own_name(drawing) for drawing in FIGURES[name].draw(context)]
        except NotDrawn as reason:
            yield name, reason
