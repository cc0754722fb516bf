"""What is measured after every epoch: fixed samples of correct, incorrect and test data, natural and under PGD."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rb_noisy.attacks import pgd
from rb_noisy.data import Dataset
from rb_noisy.errors import InputError
from rb_noisy.noise import NoisyLabels
from rb_noisy.recipes import Recipe

MEASURES = ("natural_acc", "pgd_acc", "loss", "kappa")


class Tracker:
    """The measurements of one run, on the same samples in every epoch and every run of its seed.

    Attributes:
        train_index, held_out: training samples that are trained on, and that are not (None if all are), (M,).
        selection: "test", or "validation" where the recipe holds training images out: what *best* is chosen on.
    """

    def __init__(self, recipe: Recipe, data: Dataset, labels: NoisyLabels, seed: Callable[..., int]):
        self.recipe, self.seed = recipe, seed
        count = len(data.x_train)
        self.train_index, self.held_out, self.selection = torch.arange(count), None, "test"
        if recipe.validation:
            if recipe.validation >= count:
                raise InputError(f"validation is {recipe.validation} but there are {count} training images")
            shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(seed(recipe.seed, 1)))
            self.held_out, self.selection = shuffled[: recipe.validation], "validation"
            self.train_index = shuffled[recipe.validation :].sort().values

        wrong = labels.is_wrong[self.train_index]
        self.sets: dict[str, tuple[Tensor, Tensor]] = {}
        for name, index in (
            ("train_correct", self.train_index[~wrong]),
            ("train_incorrect", self.train_index[wrong]),
        ):
            index = self._some(index)
            self.sets[name] = (data.x_train[index], labels.given[index])
        if self.held_out is not None:
            self.sets["validation"] = (data.x_train[self.held_out], labels.given[self.held_out])
        index = self._some(torch.arange(len(data.x_test)))
        self.sets["test"] = (data.x_test[index], data.y_test[index])

    def _some(self, index: Tensor) -> Tensor:
        if not self.recipe.track or len(index) <= self.recipe.track:
            return index
        generator = torch.Generator().manual_seed(self.seed(self.recipe.seed, 6))
        return index[torch.randperm(len(index), generator=generator)[: self.recipe.track].sort().values]

    @torch.no_grad()
    def measure(self, model: nn.Module, epoch: int, device: torch.device) -> dict[str, Any]:
        """Natural and PGD accuracy, mean loss and mean κ of each set, all in eval mode; None for an empty set."""
        recipe, metrics = self.recipe, {}
        for name, (x, y) in self.sets.items():
            if not len(x):  # no sample is wrong without noise
                metrics |= dict.fromkeys(f"{name}_{m}" for m in MEASURES)
                continue
            sums = torch.zeros(4, dtype=torch.float64)
            starts = torch.Generator().manual_seed(self.seed(recipe.seed, 5, epoch))
            for xb, yb in zip(x.split(500), y.split(500), strict=True):
                xb, yb = xb.to(device), yb.to(device)
                attack = pgd(
                    model,
                    xb,
                    yb,
                    eps=recipe.eps,
                    alpha=recipe.track_alpha,
                    steps=recipe.track_steps,
                    norm=recipe.norm,
                    generator=starts,
                    evaluate_final=True,
                )
                logits = model.eval()(xb).float()
                sums[0] += (logits.argmax(1) == yb).sum().item()
                sums[1] += attack.final_correct.sum().item()
                sums[2] += F.cross_entropy(logits, yb, reduction="sum").item()
                sums[3] += attack.kappa.sum().item()
            metrics |= {f"{name}_{m}": v for m, v in zip(MEASURES, (sums / len(x)).tolist(), strict=True)}
        metrics["selection_pgd_acc"] = metrics[f"{self.selection}_pgd_acc"]
        return metrics
