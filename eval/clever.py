"""CLEVER (Weng et al. 2018), by the Adversarial Robustness Toolbox (ART) where it is installed: a score beside κ."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from eval import common
from eval.confidence_splits import measured
from rb_noisy.errors import InputError

# The paper takes 500 maxima of 1024 points each, which no one could wait for here.
SETTINGS = {"nb_batches": 10, "batch_size": 5, "pool_factor": 10}


def measure(subject: common.Subject, *, seed: int, batch_size: int, out: Path) -> dict[str, Tensor]:
    """`clever` (N,): the estimated distance (in units of ε, at most 2) to the decision boundary towards the likeliest
    other class, on points drawn within 2ε; `clever_passes` (N, 2) of the network, forth and back.

    Raises:
        InputError: ART is not installed.
    """
    try:
        from art.estimators.classification import PyTorchClassifier
        from art.metrics import clever_t
    except ImportError as error:
        raise InputError(f"--clever needs ART ({error}): pip install adversarial-robustness-toolbox") from error

    counted = _Counted(subject.fast)
    classifier = PyTorchClassifier(
        counted,
        nn.CrossEntropyLoss(),
        input_shape=tuple(subject.x.shape[1:]),
        nb_classes=len(subject.class_names),
        clip_values=(0.0, 1.0),
        device_type="gpu" if subject.device.type == "cuda" else "cpu",
    )
    norm = math.inf if subject.norm == "Linf" else 2
    radius = 2 * subject.eps

    def compute(x: Tensor, y: Tensor, batch_seed: int) -> dict[str, Tensor]:
        with torch.no_grad():
            runner_up = subject.fast(x).topk(2, dim=1).indices[:, 1].tolist()
        state = np.random.get_state()  # noqa: NPY002 - the one that ART draws from
        np.random.seed(batch_seed)  # noqa: NPY002
        scores, cost = [], []
        try:
            for image, target in zip(x.cpu().numpy(), runner_up, strict=True):
                counted.rows[:] = 0, 0
                scores.append(float(clever_t(classifier, image, target, radius=radius, norm=norm, **SETTINGS)))
                cost.append(list(counted.rows))
        finally:
            np.random.set_state(state)  # noqa: NPY002
        return {"clever": torch.tensor(scores) / subject.eps, "clever_passes": torch.tensor(cost)}

    return measured(subject, "clever", {"seed": seed, **SETTINGS}, batch_size, out, compute)


class _Counted(nn.Module):
    """The network, and how many images went through it forth and back."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network, self.rows = network, [0, 0]

    def forward(self, x: Tensor) -> Tensor:
        self.rows[0] += len(x)
        logits = self.network(x)
        if logits.requires_grad:
            logits.register_hook(self._back)
        return logits

    def _back(self, gradient: Tensor) -> None:
        self.rows[1] += len(gradient)
