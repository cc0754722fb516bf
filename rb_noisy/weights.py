"""What is done to the weights besides stepping: adversarial perturbation (AWP) and averaging (WA, SWA)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

from rb_noisy.errors import InputError


@dataclass(frozen=True)
class AWP:
    """Adversarial weight perturbation (Wu et al. 2020): the training step is taken at w + γ·‖w‖·g/‖g‖.

    Attributes:
        gamma: size of the perturbation, a share of each tensor's norm; 0.01 for PGD-AT, 0.005 for TRADES.
        warmup: epochs before the first perturbed one; 0 for PGD-AT, 10 for TRADES.
    """

    gamma: float = 0.01
    warmup: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.gamma < math.inf:
            raise InputError(f"gamma is {self.gamma}; give a number of at least 0")
        if self.warmup < 0:
            raise InputError(f"warmup is {self.warmup}; give 0 or more epochs")

    @torch.no_grad()
    def perturb(self, model: nn.Module, gradients: Iterable[Tensor | None]) -> list[Tensor]:
        """w ← w + γ·‖w‖/(‖g‖ + 1e-20)·g for every parameter of more than one dimension (Wu et al. 2020, eq. 8).

        Biases and the parameters of BatchNorm have one dimension and stay.

        Args:
            gradients: of the training loss at w, one for each of `model.parameters()`, in their order; a parameter
                whose gradient is None stays.

        Returns:
            What was added to each perturbed parameter, in their order.
        """
        differences = []
        for w, g in zip(model.parameters(), gradients, strict=True):
            if w.dim() > 1 and g is not None:
                differences.append(self.gamma * w.norm() / (g.norm() + 1e-20) * g)
                w.add_(differences[-1])
        return differences

    @contextmanager
    def perturbed(self, model: nn.Module, gradients: Iterable[Tensor | None]) -> Iterator[list[Tensor]]:
        """`perturb` within the block, the very same weights as before after it.

        Forward and backward pass belong inside: autograd refuses a backward pass through weights that have changed.
        The optimiser's step belongs after it, so that weight decay sees w.
        """
        before = [w.detach().clone() for w in model.parameters()]
        try:
            yield self.perturb(model, gradients)
        finally:
            _restore(model.parameters(), before)


@contextmanager
def kept_buffers(model: nn.Module) -> Iterator[None]:
    """Passes within the block leave no trace in the BatchNorm statistics (backward pass inside, as above).

    For the pass that finds AWP's gradients: the released code makes it on a copy of the network.
    """
    before = [buffer.clone() for buffer in model.buffers()]
    try:
        yield
    finally:
        _restore(model.buffers(), before)


@torch.no_grad()
def _restore(tensors: Iterable[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


@dataclass(frozen=True)
class WeightAverage:
    """WA: a running average of the weights, one update per optimiser step; BatchNorm's statistics are averaged alike.

    The t-th update (from 0) uses min(decay, (1+t)/(10+t)), the first of all copies: else a short run would still be
    dominated by its initial weights. Its horizon, 1/(1 − decay) steps, has to fit the run: the FastAT benchmark (arXiv
    2604.22853) has 0.9995 for 100 epochs of 383 steps, a twentieth of them, which is 0.998 for 25 such epochs.
    """

    decay: float = 0.999

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise InputError(f"decay is {self.decay}; give a number from 0 to below 1")

    def kept(self, count: int) -> float:
        """The share of itself that the average keeps in the update after `count` updates, 0..1."""
        return min(self.decay, (1 + count) / (10 + count)) if count else 0.0


@dataclass(frozen=True)
class SWA:
    """The equal average of the epoch-end weights from the share `start` of the run on (Izmailov et al. 2018)."""

    start: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.start <= 1:
            raise InputError(f"start is {self.start}; give a share of the run, from 0 to 1")


AveragingRule = WeightAverage | SWA
AVERAGING: dict[str, Callable[..., AveragingRule]] = {"wa": WeightAverage, "swa": SWA}


class Averager:
    """A second network that follows the trained one by a rule; equal to it until the rule's average has started.

    Args:
        model: the trained network, not wrapped for several processes. It is copied.
        rule: one of `AVERAGING`.
    """

    def __init__(self, model: nn.Module, rule: AveragingRule):
        self.rule = rule
        self._average = AveragedModel(model)
        self._average.requires_grad_(False).eval()

    @property
    def model(self) -> nn.Module:
        """The averaged network, in eval mode: what is measured and saved."""
        return self._average.module

    @property
    def started(self) -> bool:
        """Whether `model` is an average yet, not a copy of the plain weights."""
        return bool(self._average.n_averaged > 0)

    @torch.no_grad()
    def after_step(self, model: nn.Module) -> None:
        """WA's update; SWA waits for the end of the epoch."""
        if not isinstance(self.rule, WeightAverage):
            return
        # Not by AveragedModel, which takes its counter to the device and back in every step. Here it stays on the CPU.
        kept = self.rule.kept(int(self._average.n_averaged))
        averages, current = ([*network.parameters(), *network.buffers()] for network in (self.model, model))
        pairs = [(a.detach(), c.detach()) for a, c in zip(averages, current, strict=True)]
        moving = [pair for pair in pairs if kept and pair[0].is_floating_point()]
        if moving:
            torch._foreach_lerp_(*map(list, zip(*moving, strict=True)), 1 - kept)
        for average, value in pairs:
            if not (kept and average.is_floating_point()):  # counters and index tables cannot be averaged
                average.copy_(value)
        self._average.n_averaged += 1

    def after_epoch(self, model: nn.Module, share: float) -> None:
        """SWA's update. `share` is the share of the run that is done, this epoch included, 0..1."""
        if isinstance(self.rule, SWA):
            self._average.update_parameters(model)
            if share < self.rule.start:
                self._average.n_averaged.zero_()  # so the next one replaces this one

    def refresh_statistics(self, batches: Iterable[Tensor]) -> None:
        """Estimate the BatchNorm statistics of an SWA network anew, as plain means over these batches of images.

        Nothing is done for WA (it averages its statistics), before the average has started, and without BatchNorm.

        Args:
            batches: (B, C, H, W) training images on the network's device, B at least 2.
        """
        if isinstance(self.rule, SWA) and self.started:
            update_bn(batches, self.model)

    def state_dict(self) -> dict[str, Tensor]:
        return self._average.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on where `state_dict` was taken, bit by bit.

        Raises:
            InputError: the state is of another network.
        """
        try:
            self._average.load_state_dict(state)
        except RuntimeError as error:
            raise InputError(f"the averaged weights are not of this network ({error}); start the run over") from error
