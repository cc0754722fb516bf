"""What training learns about every training sample, kept by its index in the training set."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from rb_noisy.errors import InputError

MEMORY = 0.7  # of the running averages: about the last three epochs
# An other label that has this running share of the predictions is taken for the prediction.
PERSISTENT = 0.75
_TINY = 1e-6
# Where a fitted temperature of p̄ is looked for, each 1.26 times the last.
TEMPERATURES = tuple(round(10 ** (i / 10), 3) for i in range(-12, 3))


class SampleRecord:
    """Per-sample state on the device, row i for training sample i; saved and restored with the run.

    Attributes:
        average: (N, K) float32, the running average p̄ of the targets that keep one ([SGLR] eq. 8).
        kappa: (N,) int64, κ against the given label from the last training attack, −1 before the first (small =
            suspicious).
        loss: (N,) float32, cross entropy with the given label in the last training pass (on x̃ where the method
            attacks, else on x), NaN before the first (large = suspicious).
        prediction: (N,) int64, the predicted label of the last attack's random start (of x where the method does not
            attack), −1 before the first: what the network takes the sample for, which x̃ would not say.
        kappa_average: (N,) float32, running average of κ over the epochs, NaN before the first.
        votes: (N, K) float32, running average of the one-hot predictions, zero before the first.
        noise_rate: () float32, the share of wrong labels that a target estimated, 0 before.
        transition: (K, K) float32, the label transition matrix T(true, given) by `judge`, the identity before.
        temperature: () float32, the temperature that `judge` gave to p̄, 1 before.
    """

    def __init__(self, labels: Tensor, num_classes: int, start_average: str = "onehot"):
        self.labels = labels
        self.average = F.one_hot(labels, num_classes).float() * (start_average == "onehot")
        self.kappa = torch.full_like(labels, -1)
        self.prediction = torch.full_like(labels, -1)
        self.loss = torch.full_like(labels, torch.nan, dtype=torch.float32)
        self.kappa_average = self.loss.clone()
        self.votes = torch.zeros_like(self.average)
        self.noise_rate = torch.tensor(0.0, device=labels.device)
        self.transition = torch.eye(num_classes, device=labels.device)
        self.temperature = torch.tensor(
            1.0
        )  # on the CPU: it is read for every batch, which must not wait for the device

    def observe(self, index: Tensor, kappa: Tensor | None, loss: Tensor, prediction: Tensor) -> None:
        """Enter what a training pass showed of the samples in `index`, each (B,)."""
        self.loss[index], self.prediction[index] = loss, prediction
        new = self.votes[index].sum(1) == 0
        vote = F.one_hot(prediction, self.votes.shape[1]).float()
        self.votes[index] = _moved(self.votes[index], vote, new[:, None])
        if kappa is not None:
            self.kappa[index] = kappa
            self.kappa_average[index] = _moved(self.kappa_average[index], kappa.float(), new)

    def update_average(self, index: Tensor, mix: Tensor, momentum: float) -> None:
        """p̄ ← α·p̄ + (1−α)·mix for the rows in `index` [SGLR eq. 8]."""
        self.average[index] = momentum * self.average[index] + (1 - momentum) * mix.to(self.average)

    def prior(self, index: Tensor | slice = slice(None)) -> Tensor:
        """p̄ of the rows in `index` at the record's temperature τ, (B, K): p̄^(1/τ), normalised."""
        return _tempered(self.average[index], float(self.temperature))

    @torch.no_grad()
    def judge(
        self, iterations: int = 20, temperatures: tuple[float, ...] = (1.0,), among: Tensor | None = None
    ) -> None:
        """Estimate the label transition matrix and the noise rate by expectation maximisation, p̄ every sample's prior.

        E: qᵢ(k) ∝ p̄ᵢ(k)·T(k, ỹᵢ); M: T(k, j) ∝ Σ qᵢ(k)·[ỹᵢ = j] (Dawid & Skene 1979, with a classifier's prior).
        Of `temperatures`, p̄ takes the one under which the given labels are likeliest, Σᵢ log Σₖ p̄ᵢ(k)·T(k, ỹᵢ), since a
        network is less sure than it could be while it is trained towards wrong labels, and surer once they are refined.
        Samples that training has not seen do not count, nor those outside `among`, (N,) bool.
        """
        seen = self.votes.sum(1) > 0  # of the others p̄ is but the given label
        if among is not None:
            seen &= among
        if not seen.any():
            return
        labels, best = self.labels[seen], None
        given = F.one_hot(labels, self.average.shape[1]).to(self.average)
        for temperature in temperatures:
            joint = prior = _tempered(self.average[seen], temperature)
            for _ in range(iterations + 1):
                posterior = joint / joint.sum(1, keepdim=True).clamp_min(_TINY)
                transition = posterior.T @ given
                transition = transition / transition.sum(1, keepdim=True).clamp_min(_TINY)
                joint = prior * transition[:, labels].T
            likelihood = joint.sum(1).clamp_min(_TINY).log().mean()
            if best is None or likelihood > best:
                best = likelihood
                self.transition.copy_(transition)
                self.temperature.fill_(temperature)
                self.noise_rate.copy_(1 - _given_is_right(joint, labels).mean())

    def contradiction(self, index: Tensor) -> Tensor:
        """(B,) 0..1, (1 − q)/(1 − p̄(ỹ)), q the probability of the given label by p̄ and T: how far p̄ contradicts it."""
        prior, labels = self.prior(index), self.labels[index]
        right = _given_is_right(prior * self.transition[:, labels].T, labels)
        return ((1 - right) / (1 - prior.gather(1, labels[:, None])[:, 0]).clamp_min(_TINY)).clamp(0, 1)

    def estimate_noise_rate(self) -> float:
        """The share (0..1) of samples that lately had κ near 0 and one and the same other label predicted.

        It needs a network that has learnt the task: what it still gets wrong counts as noise, what it has memorised
        does not. `rb_noisy.label_issues.estimate_noise_rate` does the same with the whole history.
        """
        seen = self.votes.sum(1) > 0
        if not seen.any():
            return 0.0
        vote, voted = self.votes[seen].max(1)
        broken = ~(self.kappa_average[seen] >= 0.5)  # NaN without an attack: the predictions alone decide
        return float(((voted != self.labels[seen]) & (vote >= PERSISTENT) & broken).float().mean())

    def state_dict(self) -> dict[str, Tensor]:
        return dict(vars(self))

    def forget_epoch(self) -> None:
        """Before an epoch: what it does not see of a sample is not there. The running averages stay."""
        self.kappa.fill_(-1)
        self.prediction.fill_(-1)
        self.loss.fill_(torch.nan)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        own = self.state_dict()
        if missing := sorted(own.keys() - state.keys()):
            raise InputError(f"the saved record has no {missing[0]!r}: another version wrote it; start the run over")
        for name, tensor in own.items():
            if state[name].shape != tensor.shape:
                shapes = f"{tuple(state[name].shape)}, not {tuple(tensor.shape)}"
                raise InputError(f"the per-sample record {name!r} has {shapes}: other data?")
        if not torch.equal(state["labels"].to(self.labels), self.labels):
            raise InputError("the run was started on other labels: give back its data and label file, or start over")
        for name, tensor in own.items():
            tensor.copy_(state[name])


def _moved(average: Tensor, value: Tensor, new: Tensor) -> Tensor:
    return torch.where(new, value, MEMORY * average + (1 - MEMORY) * value)


def _tempered(probabilities: Tensor, temperature: float) -> Tensor:
    if temperature == 1:
        return probabilities
    powered = (probabilities / probabilities.amax(1, keepdim=True).clamp_min(_TINY)) ** (1 / temperature)
    return powered / powered.sum(1, keepdim=True)


def _given_is_right(joint: Tensor, labels: Tensor) -> Tensor:
    """(B,) q of the given label, from the (B, K) p̄(k)·T(k, ỹ)."""
    return joint.gather(1, labels[:, None])[:, 0] / joint.sum(1).clamp_min(_TINY)
