"""What is measured after every epoch: fixed samples of correct, incorrect and test data, natural and under PGD."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rb_noisy.analysis import entropy, loss_slopes
from rb_noisy.attacks import pgd
from rb_noisy.data import Dataset
from rb_noisy.errors import InputError
from rb_noisy.forward import is_right
from rb_noisy.noise import NoisyLabels
from rb_noisy.recipes import Recipe

MEASURES = ("natural_acc", "pgd_acc", "loss", "kappa", "entropy_random", "entropy_adversarial")
CONFIDENCES = ("natural_conf_right", "natural_conf_wrong", "pgd_conf_right", "pgd_conf_wrong")


class Tracker:
    """The measurements of one run, on the same samples in every epoch and every run of its seed.

    Attributes:
        start: the initial weights, which the information in weights is counted from; None measures none.
        train_index, held_out: training samples that are trained on, and that are not (None if all are), (M,).
        selection: "test", or "validation" where the recipe holds training images out: what *best* is chosen on.
    """

    def __init__(self, recipe: Recipe, data: Dataset, labels: NoisyLabels, seed: Callable[..., int]):
        self.recipe, self.seed = recipe, seed
        self.start: dict[str, Tensor] | None = None
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
        """What each set shows, all in eval mode; None where there is nothing to take a mean of.

        * natural and PGD accuracy, mean loss and mean κ;
        * mean confidence (max-softmax, 0..1) in right and in wrong predictions, natural and under PGD;
        * mean entropy (nats, 0..log K) of the prediction at a random point of the ε-ball (the start of the PGD) and one
          step from it ([NL] Figures 2 and 12: 100 points around each sample there, one around each of many here);
        * on training data `slope_squared`, the mean over samples of (Δwᵀ∇ℓ)² on the PGD's x̃, see
          `rb_noisy.analysis.information_in_weights`; None for a network without forward-mode derivatives. It takes one
          further pass; all else comes of the PGD's own.
        """
        recipe, metrics = self.recipe, {}
        for name, (x, y) in self.sets.items():
            if not len(x):  # no sample is wrong without noise
                metrics |= dict.fromkeys(f"{name}_{m}" for m in (*MEASURES, *CONFIDENCES))
                metrics |= {f"{name}_slope_squared": None} if name.startswith("train_") else {}
                continue
            sums = torch.zeros(len(MEASURES), dtype=torch.float64)
            confidences = torch.zeros(len(CONFIDENCES), 2, dtype=torch.float64)  # sum and count
            starts = torch.Generator().manual_seed(self.seed(recipe.seed, 5, epoch))
            slopes = [] if self.start is not None and name.startswith("train_") else None
            for xb, yb in zip(x.split(500), y.split(500), strict=True):
                xb, yb = xb.to(device), yb.to(device)
                with _outputs(model) as iterates:
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
                        check=False,
                    )
                logits = model.eval()(xb).float()
                sums[0] += is_right(logits, yb).sum().item()
                sums[1] += attack.final_correct.sum().item()
                sums[2] += F.cross_entropy(logits, yb, reduction="sum").item()
                sums[3] += attack.kappa.sum().item()
                sums[4] += entropy(iterates[0]).sum().item()
                sums[5] += entropy(iterates[min(1, len(iterates) - 1)]).sum().item()
                if slopes is not None:
                    try:
                        slopes.append(loss_slopes(model, self.start, attack.x_adv, yb).double())
                    except (RuntimeError, NotImplementedError):
                        # An operation without a forward-mode derivative; a run must not end for want of a figure.
                        slopes = self.start = None
                confidences += torch.cat([_confidences(logits, yb), _confidences(iterates[-1], yb)])
            metrics |= {f"{name}_{m}": v for m, v in zip(MEASURES, (sums / len(x)).tolist(), strict=True)}
            if name.startswith("train_"):
                metrics[f"{name}_slope_squared"] = None
            if slopes is not None:
                metrics[f"{name}_slope_squared"] = torch.cat(slopes).square().mean().item()
            for measure, (total, count) in zip(CONFIDENCES, confidences.tolist(), strict=True):
                metrics[f"{name}_{measure}"] = total / count if count else None
        metrics["selection_pgd_acc"] = metrics[f"{self.selection}_pgd_acc"]
        return metrics


@contextmanager
def _outputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """The logits of every pass in the block: an attack makes those of its iterates x⁽⁰⁾ … x⁽ⁿ⁾ anyway."""
    seen: list[Tensor] = []
    handle = model.register_forward_hook(lambda module, inputs, output: seen.append(output.detach().float()))
    try:
        yield seen
    finally:
        handle.remove()


def _confidences(logits: Tensor, y: Tensor) -> Tensor:
    """(2, 2): of the right and of the wrong predictions the sum of their max-softmax, and their number."""
    confidence, prediction = logits.softmax(1).max(1)
    return (
        torch.stack([torch.stack([confidence[rows].sum(), rows.sum()]) for rows in (prediction == y, prediction != y)])
        .double()
        .cpu()
    )
