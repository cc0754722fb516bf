"""Runs side by side: which belong into one figure, and the mean over seeds of what they recorded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rb_noisy.figures.base import NotDrawn, Source, data_title
from rb_noisy.recipes import Recipe

MOST_METHODS = 5  # beside each other in one figure
Values = Callable[[dict], float | None]


@dataclass(frozen=True)
class Line:
    """Runs that differ in their seed only."""

    method: str
    rate: str
    sources: tuple[Source, ...]

    def values(self, of: Values) -> np.ndarray:
        """The mean over seeds in every epoch, (E,), NaN where there is nothing to draw."""
        epochs = min(len(source.metrics) for source in self.sources)
        table = [[_number(of(line)) for line in source.metrics[:epochs]] for source in self.sources]
        return np.array(table).mean(0)


@dataclass(frozen=True)
class Group:
    """Runs for one figure: one data set and length, one kind of noise at several rates; several methods.

    Attributes:
        noise: kind of label noise; "none" where no run has any.
        name: for its files.
    """

    recipe: Recipe
    noise: str
    lines: tuple[Line, ...]
    name: str

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(line.method for line in self.lines))

    @property
    def rates(self) -> list[str]:
        """See `Source.rate`; numbers first, in their order."""
        return sorted({line.rate for line in self.lines}, key=rate_order)

    @property
    def epochs(self) -> int:
        return max(len(source.metrics) for line in self.lines for source in line.sources)

    @property
    def title(self) -> str:
        networks = list(dict.fromkeys(s.recipe.backbone for line in self.lines for s in line.sources))
        noise = "clean labels" if self.noise == "none" else f"{self.noise} noise"
        seeds = max(len(line.sources) for line in self.lines)
        mean = f" (mean of up to {seeds} seeds)" if seeds > 1 else ""
        part = "" if self.recipe.train_size is None else f" ({self.recipe.trained_on})"
        return f"{data_title(self.recipe)}{part}, {noise}, {' and '.join(map(str, networks))}{mean}"


def grouped(sources: Sequence[Source], needs: Sequence[str] = (), methods: int = MOST_METHODS) -> list[Group]:
    """The groups, of at most so many methods each, of all runs whose metrics have the names in `needs`.

    Clean runs join every kind of noise as its rate 0.

    Raises:
        NotDrawn: no run has metrics, or none has these.
    """
    able = [s for s in sources if s.metrics and all(name in line for line in s.metrics for name in needs)]
    if not able:
        what = f"the runs given recorded no {', '.join(needs)}" if needs else "no run with metrics is given"
        raise NotDrawn(what, "rb-noisy train --data DATA --noise symmetric --noise-rate 0.4 --out RUN")
    settings: dict[tuple, list[Source]] = {}
    for source in able:
        r = source.recipe
        settings.setdefault((r.data, r.train_size, r.train_images, r.epochs, r.eps, r.norm), []).append(source)
    groups = []
    for members in settings.values():
        kinds = list(dict.fromkeys(s.recipe.noise for s in members if s.noisy)) or ["none"]
        for kind in kinds:
            name = f"{data_title(members[0].recipe)}-{'clean' if kind == 'none' else kind}"
            lines = _lines([s for s in members if not s.noisy or s.recipe.noise == kind])
            groups.append(Group(members[0].recipe, kind, lines, name))
    return [part for group in groups for part in _parts(group, methods)]


def _parts(group: Group, most: int) -> list[Group]:
    if len(group.methods) <= most:
        return [group]
    chunks = [group.methods[at : at + most] for at in range(0, len(group.methods), most)]
    return [
        replace(group, lines=tuple(line for line in group.lines if line.method in chunk), name=f"{group.name}-{number}")
        for number, chunk in enumerate(chunks, 1)
    ]


def _lines(sources: list[Source]) -> tuple[Line, ...]:
    several = len({s.recipe.backbone for s in sources}) > 1
    lines: dict[tuple[str, str, str], list[Source]] = {}
    for source in sources:
        method = f"{source.recipe.method}, {source.recipe.backbone}" if several else source.recipe.method
        lines.setdefault((method, source.rate, _seedless(source.recipe)), []).append(source)
    names: dict[tuple[str, str], int] = {}
    found = []
    for (method, rate, _), members in sorted(
        lines.items(), key=lambda item: (order(item[0][0]), rate_order(item[0][1]))
    ):
        # Two settings of one method, a temperature, say, are told apart by the names of their runs.
        names[method, rate] = names.get((method, rate), 0) + 1
        label = method if names[method, rate] == 1 else f"{method} ({members[0].name})"
        found.append(Line(label, rate, tuple(members)))
    return tuple(found)


def order(method: str) -> tuple[int, str]:
    first = ("st", "pgd-at")
    return (first.index(method) if method in first else len(first), method)


def rate_order(rate: str) -> tuple[float, str]:
    return (float(rate), "") if rate.replace(".", "").isdigit() else (float("inf"), rate)


def _seedless(recipe: Recipe) -> str:
    return repr(sorted((k, str(v)) for k, v in recipe.to_dict().items() if k not in ("seed", "noise_seed")))


def _number(value: float | None) -> float:
    return np.nan if value is None else value


def mean_of(group_line: Line, name: str, scale: float = 1.0) -> np.ndarray:
    """One metric of a line, (E,), times `scale`."""
    return scale * group_line.values(lambda line: line.get(name))
