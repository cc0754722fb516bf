"""AutoAttack's own attacks with fewer passes through the network, and the same verdicts.

What is spared was counted on the reference code (Croce & Hein 2020), whose loops, parameters and random numbers stay:

* APGD goes on for all its iterations with samples that it has broken. Here they leave the batch that goes through the
  network; their place in the loop is kept.
* FAB classifies every iterate, then passes it through the network again for the next step's gradient. Here both are
  one pass, unless FAB has moved the iterate in between.
* Square (Linf) often proposes the image it has already: a square whose pixels lie at that corner of the ball. Such a
  query cannot change anything, and is not made. For the others, most of the first feature maps are known
  (`rb_noisy.local_forward`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rb_noisy.fast import FastForm
from rb_noisy.forward import differ
from rb_noisy.local_forward import LocalForward

# Multiplications per image; below, a network is so small that cutting and pasting takes longer.
_WORTH_CUTTING = 2_000_000
# Share of the images of a batch.
_NEARLY_ALL = 0.8
# Queries of a batch, of so many of its images, that the whole network answers too, and what the two may differ by,
# relative to the largest logit; on a GPU convolutions may round to TF32.
_CHECKED, _FEW = 3, 4
_ROUNDING = {"cpu": 1e-5, "cuda": 3e-3}
# Images; fewer are sooner passed through the network twice than in a batch of their own.
_WORTH_A_PASS = 4


def spare_passes(adversary: Any, model: FastForm) -> None:
    """Make the attacks of a reference `AutoAttack` object use `model`, as seldom as they can."""
    for apgd in (adversary.apgd, adversary.apgd_targeted):
        # With `use_largereps` (L1) what is broken in a larger ball still has to move on in it.
        apgd.model = model if apgd.use_largereps else _Undecided(apgd, model)
    adversary.fab.predict = model
    _OnePass(adversary.fab)
    adversary.square.predict = model
    if adversary.square.norm == "Linf":
        _NewQueries(adversary.square, model)


class _Undecided:
    """The network of one APGD attack: what is broken is passed through it no more until the next run begins."""

    def __init__(self, apgd: Any, model: nn.Module):
        self.model, self.run = model, apgd.attack_single_run
        self.y: Tensor | None = None
        apgd.attack_single_run = self.attack_single_run

    def attack_single_run(self, x: Tensor, y: Tensor, x_init: Tensor | None = None) -> Any:
        self.y, self.active = y, torch.ones_like(y, dtype=torch.bool)
        try:
            return self.run(x, y, x_init)
        finally:
            self.y = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.y is None:
            return self.model(x)
        if self.active.all():
            logits = self.model(x)
            # To the attack, broken samples are right from now on: it keeps the iterate that broke them.
            self.right = F.one_hot(self.y, logits.shape[1]).to(logits)
        else:
            # The sum keeps the logits a function of x; its gradient, zero, does not move what is broken.
            logits = self.right + 0 * x.flatten(1).sum(1, keepdim=True)
            if self.active.any():
                logits = logits.index_put((self.active,), self.model(x[self.active]))
        self.active = self.active & (logits.detach().argmax(1) == self.y)
        return logits


class _OnePass:
    """Keeps the pass that classified FAB's last iterate, to take the next step's gradient from it.

    An iterate that is adversarial FAB moves back towards the image, where it needs a new pass. Which these will be is
    foreseen, and they are classified without a graph: the way back through a graph costs what its whole batch costs,
    however few of its gradients are wanted.
    """

    def __init__(self, fab: Any):
        self.predict, self.run, self.single_run = fab.predict, fab.perturb, fab.attack_single_run
        self._forget()
        self.stay: Tensor | None = None
        fab.perturb, fab.attack_single_run = self.perturb, self.attack_single_run
        fab._predict_fn = self.logits
        fab._get_predicted_label = lambda x: self.logits(x).max(1)[1]
        fab.get_diff_logits_grads_batch_targeted = self.differences

    def perturb(self, x: Tensor, y: Tensor) -> Tensor:
        try:
            return self.run(x, y)
        finally:
            self._forget()

    def attack_single_run(self, *args: Any, **kwargs: Any) -> Tensor:
        self.stay = self.moved = None
        return self.single_run(*args, **kwargs)

    def _forget(self) -> None:
        self.x: Tensor | None = None
        self.kept: Tensor | None = None

    def logits(self, x: Tensor) -> Tensor:
        if self.x is None or self.x.shape != x.shape or not torch.equal(self.x, x):
            self._forget()  # before there is a second graph in memory
            self.x = x.detach().clone()
            self.rows = torch.ones_like(x[:, 0, 0, 0], dtype=torch.bool)
            if self.stay is not None and len(self.stay) == len(x):
                self.rows = self.stay if self.stay.sum() >= _WORTH_A_PASS else torch.zeros_like(self.rows)
            self.answer = None
            if self.rows.any():
                with torch.enable_grad():
                    self.start = self.x[self.rows].requires_grad_()
                    self.kept = self.predict(self.start)
                self.answer = self.kept.detach()
            if not self.rows.all():
                rest = self.predict(self.x[~self.rows])
                whole = rest.new_empty(len(x), rest.shape[1])
                whole[~self.rows] = rest
                if self.answer is not None:
                    whole[self.rows] = self.answer
                self.answer = whole
        return self.answer

    def differences(self, x: Tensor, label: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """z_target − z_label and its gradient, (B, 1) and (B, 1, C, H, W)."""
        if self.x is None or self.x.shape != x.shape:
            difference, gradient = self._differences(x, label, target)
        else:
            moved = (self.x != x).flatten(1).any(1)
            self._foresee(moved)
            known = self.rows & ~moved
            difference, gradient = x.new_empty(len(x)), torch.empty_like(x)
            if known.any():
                found = self._of(self.kept, self.start, label[self.rows], target[self.rows])
                difference[known], gradient[known] = (value[known[self.rows]] for value in found)
            self._forget()
            if not known.all():
                difference[~known], gradient[~known] = self._differences(x[~known], label[~known], target[~known])
        return difference.unsqueeze(1), gradient.unsqueeze(1)

    def _foresee(self, moved: Tensor) -> None:
        """Most iterates are adversarial every time, the others every second time, and the first one seldom."""
        if self.moved is None:
            self.stay = self.moved = torch.ones_like(moved)
        else:
            self.stay, self.moved = moved & ~self.moved, moved

    def _differences(self, x: Tensor, label: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().clone().requires_grad_()
            logits = self.predict(x)
        return self._of(logits, x, label, target)

    def _of(self, logits: Tensor, x: Tensor, label: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            row = torch.arange(len(x), device=x.device)
            difference = logits[row, target] - logits[row, label]
            (gradient,) = torch.autograd.grad(difference.sum(), x)
        return difference.detach(), gradient


class _NewQueries:
    """Follows Square's best images, by its own rule of what is better; asks the network only of what is new in them."""

    def __init__(self, square: Any, network: FastForm):
        self.run, self.ask, self.network = square.attack_single_run, square.margin_and_loss, network
        self.local: LocalForward | None = None
        self.may_be_local, self.answer = not network.half, network
        square.attack_single_run, square.margin_and_loss = self.attack_single_run, self.margin_and_loss
        square.predict = lambda x: self.answer(x)

    def attack_single_run(self, x: Tensor, y: Tensor) -> Any:
        self.best: Tensor | None = None
        self.network.verify(x)
        self._try_local(x)
        try:
            return self.run(x, y)
        finally:
            self.answer, self.best = self.network, None
            if self.local is not None:
                self.local.forget()

    def margin_and_loss(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if self.best is None:
            self.answer = self.network if self.local is None else self._remember
            self.margin, self.loss = (value.clone() for value in self.ask(x, y))
            self.best = x.clone()
            return self.margin.clone(), self.loss.clone()
        if len(x) < len(self.best):  # Square asks no more of what it has broken
            self._keep((self.margin > 0).nonzero(as_tuple=True)[0])
        moved = x != self.best
        new = moved.flatten(1).any(1)
        margin, loss = self.margin.clone(), self.loss.clone()
        if new.any():
            # To take all is sooner than to take nearly all.
            all_asked = new.double().mean() > _NEARLY_ALL
            asked = torch.ones_like(new) if all_asked else new
            if self.local is None:
                self.answer = self.network
            else:
                rows, window = None if all_asked else asked.nonzero(as_tuple=True)[0], _bounds(moved.any(0).any(0))
                self.answer = lambda x: self._local(x, rows, window)
            found = self.ask(x, y) if all_asked else self.ask(x[asked], y[asked])
            margin[new], loss[new] = (value[new[asked]] for value in found)
        # Square's own arithmetic: of a margin that is not finite it makes NaN, and asks no more of that image.
        closer = (loss < self.loss).to(loss)
        self.loss = closer * loss + (1 - closer) * self.loss
        better = torch.maximum(closer, (margin <= 0).to(closer))
        self.margin = better * margin + (1 - better) * self.margin
        better = new & (better > 0)
        self.best = torch.where(better.view(-1, 1, 1, 1), x, self.best)
        if self.local is not None and new.any():
            self.local.accept(better[asked])
        return margin, loss

    def _keep(self, rows: Tensor) -> None:
        self.best, self.margin, self.loss = self.best[rows], self.margin[rows], self.loss[rows]
        if self.local is not None:
            self.local.keep(rows)

    # --- from known feature maps, as long as that goes well

    def _try_local(self, x: Tensor) -> None:
        if not self.may_be_local or self.network.graph is None:
            return
        with self._or_else():
            if self.local is None:
                self.local = LocalForward(self.network.graph)
                if self.local.saved(x) < _WORTH_CUTTING:
                    self._do_without()
            self.unchecked = _CHECKED

    def _remember(self, x: Tensor) -> Tensor:
        with self._or_else():
            wanted = self.network(x[:_FEW])  # before the maps are in memory
            logits = self.local.remember(x)
            if _near(logits[:_FEW], wanted):
                return logits
            self._do_without()
        return self.network(x)

    def _local(self, x: Tensor, rows: Tensor | None, window: tuple[int, int, int, int]) -> Tensor:
        with self._or_else():
            logits = self.local(x, rows, window)
            if not self.unchecked:
                return logits
            self.unchecked -= 1
            if _near(logits[:_FEW], self.network(x[:_FEW])):
                return logits
            self._do_without()
        return self.network(x)

    @contextlib.contextmanager
    def _or_else(self) -> Iterator[None]:
        """What a network does that `LocalForward` does not foresee costs time, and not a run of hours."""
        try:
            yield
        except Exception:
            self._do_without()

    def _do_without(self) -> None:
        self.local, self.may_be_local = None, False


def _near(found: Tensor, wanted: Tensor) -> bool:
    return not differ(wanted, found, _ROUNDING.get(wanted.device.type, 1e-5))


def _bounds(moved: Tensor) -> tuple[int, int, int, int]:
    """First and past-the-last row and column of what is true in (H, W)."""
    rows, columns = (moved.any(axis).nonzero() for axis in (1, 0))
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
