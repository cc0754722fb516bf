"""What the papers' figures are drawn from: entropy around a sample, the loss landscape, information in weights.

Networks are taken in eval mode and left as they were; nothing here changes weights or BatchNorm statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn import functional as F

from rb_noisy.attacks import Norm, check_attack, generator_of, logits_of, pgd, start_of
from rb_noisy.errors import InputError
from rb_noisy.forward import ask, in_mode, outside_inference

BATCH = 500


def entropy(logits: Tensor) -> Tensor:
    """Entropy of the softmax of logits (N, K): (N,) in nats, 0 (certain) to log K (no idea)."""
    log_p = logits.log_softmax(1)
    return -(log_p.exp() * log_p).sum(1)


@outside_inference
def neighbourhood_entropy(
    model: nn.Module,
    x: Tensor,
    *,
    eps: float | str,
    points: int = 100,
    norm: Norm = "Linf",
    seed: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Mean entropy of the predictions at random points of the ε-ball around each sample ([NL] eq. 3, Figure 2).

    Low around a mislabeled sample: the network has learnt the wrong label, and a cluster around it.

    Args:
        x: images (N, C, H, W) in [0, 1]; the points are uniform in the ball, cut to [0, 1].
        points: how many around each sample.
        progress: called with the number of samples finished since the last call.

    Returns:
        (N,) in nats, 0..log K.

    Raises:
        InputError: a setting out of range, images outside [0, 1].
    """
    eps, _ = check_attack(eps=eps, alpha=0, steps=0, norm=norm)
    if points < 1:
        raise InputError(f"points is {points}; give at least 1")
    asked = ask(model, x, batch_size=BATCH)
    model, x = asked.model, asked.x
    generator, found = generator_of(seed, None), [x.new_zeros(0)]
    with in_mode(model, "eval"):
        for batch in x.split(BATCH):
            total = x.new_zeros(len(batch))
            for _ in range(points):
                total += entropy(logits_of(model, start_of(batch, eps, norm, True, generator)).float())
            found.append(total / points)
            if progress is not None:
                progress(len(batch))
    return torch.cat(found)


@outside_inference
def adversarial_entropy(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | str,
    alpha: float | str,
    norm: Norm = "Linf",
    seed: int | None = None,
) -> Tensor:
    """Entropy of the prediction at the PGD-1 variant of each sample ([NL] Figure 12b): (N,) in nats, 0..log K.

    Arguments and errors as in `pgd`.
    """
    asked = ask(model, x, y, batch_size=BATCH)
    model, x, y = asked.model, asked.x, asked.y
    found, generator = [x.new_zeros(0)], generator_of(seed, None)
    for xb, yb in zip(x.split(BATCH), y.split(BATCH), strict=True):
        x_adv = pgd(model, xb, yb, eps=eps, alpha=alpha, steps=1, norm=norm, generator=generator, check=False).x_adv
        with in_mode(model, "eval"):
            found.append(entropy(logits_of(model, x_adv).float()))
    return torch.cat(found)


def filter_normalised_direction(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """A random direction in weight space, scaled filter by filter (Li et al. 2018, §4).

    Each row along the first axis of a weight with more than one axis (a filter; a neuron's weights) gets the norm of
    that row of the weights, so that networks of different scale are comparable. Biases and BatchNorm's weights, which
    have one axis, are not moved (as in the authors' code).
    """
    direction = {}
    for name, weight in model.named_parameters():
        if weight.dim() < 2:
            direction[name] = torch.zeros_like(weight)
            continue
        drawn = torch.randn(weight.shape, generator=generator).to(weight)
        scale = weight.detach().flatten(1).norm(dim=1) / drawn.flatten(1).norm(dim=1).clamp_min(1e-12)
        direction[name] = drawn * scale.view(-1, *[1] * (weight.dim() - 1))
    return direction


@outside_inference
def loss_landscape(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    directions: Sequence[Mapping[str, Tensor]],
    steps: Sequence[float] | Tensor,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Mean cross entropy at w + a·d₁ + b·d₂ for all a, b in `steps` ([NL] Figure 17; Li et al. 2018).

    Args:
        x, y: images (N, C, H, W) and labels (N,) that the loss is of.
        directions: two, by the names of the parameters (see `filter_normalised_direction`).
        steps: S values, in units of the directions; 0 is the network itself.
        progress: called with the number of points finished since the last call.

    Returns:
        (S, S), rows by a and columns by b.
    """
    asked, names = ask(model, x, y, batch_size=BATCH), [name for name, _ in model.named_parameters()]
    model, x, y = asked.model, asked.x, asked.y
    asked_names = [name for name, _ in model.named_parameters()]  # what stands for a network may call them otherwise
    first, second = ({new: way[old] for old, new in zip(names, asked_names, strict=True)} for way in directions)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    values = torch.empty(len(steps), len(steps))
    with in_mode(model, "eval"), torch.no_grad():
        for i, a in enumerate(torch.as_tensor(steps).tolist()):
            for j, b in enumerate(torch.as_tensor(steps).tolist()):
                moved = {name: w + a * first[name] + b * second[name] for name, w in weights.items()}
                total = 0.0
                for xb, yb in zip(x.split(BATCH), y.split(BATCH), strict=True):
                    logits = functional_call(model, moved, (xb,)).float()
                    total += F.cross_entropy(logits, yb, reduction="sum").item()
                values[i, j] = total / len(x)
                if progress is not None:
                    progress(1)
    return values


@outside_inference
def gradient_norm(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """‖∇_w L‖₂ of the mean cross entropy on images x (N, C, H, W) with labels y (N,) ([SGLR] §2), in eval mode.

    On x̃ it is the gradient norm of adversarial training; training records that of its own mini-batches.
    """
    asked = ask(model, x, y, batch_size=BATCH)
    model, x, y = asked.model, asked.x, asked.y
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise InputError(f"{type(model).__name__} has no weight that takes a gradient; let it: model.requires_grad_()")
    total = [torch.zeros_like(p) for p in parameters]
    with in_mode(model, "eval"), torch.enable_grad():
        for xb, yb in zip(x.split(BATCH), y.split(BATCH), strict=True):
            loss = F.cross_entropy(model(xb), yb, reduction="sum") / len(x)
            for sum_, gradient in zip(total, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
                if gradient is not None:
                    sum_ += gradient
    return torch.stack([gradient.norm() for gradient in total]).norm().item()


@outside_inference
def loss_slopes(model: nn.Module, start: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Δwᵀ∇_wℓᵢ of every sample, with Δw = w − start: (N,), by one forward-mode pass in eval mode.

    Args:
        start: weights by the names of the parameters.
        x, y: images (N, C, H, W) and labels (N,).
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    moved = {name: weight - start[name].to(weight) for name, weight in weights.items()}
    found = [x.new_zeros(0)]
    # The fused attention kernels have no forward-mode derivative.
    with in_mode(model, "eval"), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        for xb, yb in zip(x.split(BATCH), y.split(BATCH), strict=True):

            def losses(w: dict[str, Tensor], xb: Tensor = xb, yb: Tensor = yb) -> Tensor:
                return F.cross_entropy(functional_call(model, w, (xb,)).float(), yb, reduction="none")

            found.append(jvp(losses, (weights,), (moved,))[1])
    return torch.cat(found)


def information_in_weights(slopes_squared: float | Tensor, n: int) -> float:
    """The information in weights I(w; S) in nats, at least 0, as [SGLR] Figure 1 draws it (Wang et al. 2022, PIB).

    It is KL(q(w|S) ‖ p(w)) with q = N(w, Σ) and p = N(w₀, Σ), that is ½·ΔwᵀΣ⁻¹Δw with Δw = w − w₀, where
    Σ⁻¹ = n·F and F = mean over samples of ∇ℓᵢ∇ℓᵢᵀ, so that it is ½·n·mean((Δwᵀ∇ℓᵢ)²). Approximated are: both
    distributions as Gaussians with one covariance; that covariance by the inverse of the empirical Fisher information
    at w (Wang et al.'s bootstrap argument); w₀, the mean of the prior, by the initial weights; the mean over the
    training set by one over the samples given. Weight decay and BatchNorm's statistics are not accounted for. Take it
    as a curve, not as a number of nats. The code of Wang et al. has another scale: for each layer's weights the square
    of Δwᵀ times a mean of batch gradients, without ½ and n, so that gradients of opposite directions cancel.

    Args:
        slopes_squared: mean of the squares of `loss_slopes`, or the squares themselves, (N,).
        n: number of training samples.
    """
    return 0.5 * n * torch.as_tensor(slopes_squared, dtype=torch.float64).mean().item()


@dataclass(frozen=True)
class Trajectory:
    """How sure a network was over training ([SGLR] Figure 3); each (E,), NaN where an epoch has no such prediction.

    Attributes:
        right, wrong: mean max-softmax (0..1) of the right and of the wrong predictions; wrong ones should be low.
        accuracy: 0..1.
    """

    right: np.ndarray
    wrong: np.ndarray
    accuracy: np.ndarray


def confidence_trajectory(metrics: Sequence[Mapping[str, Any]], kind: str, of: str = "test") -> Trajectory | None:
    """The trajectory that a run's metrics hold; None where it did not record it.

    Args:
        kind: "natural" or "pgd".
        of: "test", "train_correct" or "train_incorrect".
    """
    names = [f"{of}_{kind}_{what}" for what in ("conf_right", "conf_wrong", "acc")]
    if not metrics or any(name not in line for line in metrics for name in names):
        return None
    return Trajectory(*(np.array([line[name] for line in metrics], dtype=float) for name in names))


@outside_inference
def penultimate_features(model: nn.Module, x: Tensor) -> Tensor:
    """What the network's last linear layer is given ([SGLR] Figure 5): (N, D), in eval mode.

    Raises:
        InputError: the network has no linear layer.
    """
    asked = ask(model, x, batch_size=BATCH)
    model, x = asked.model, asked.x
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise InputError(f"{type(model).__name__} has no linear layer whose input could be drawn; draw another model")
    seen: list[Tensor] = []
    handle = layers[-1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().flatten(1)))
    try:
        with in_mode(model, "eval"):
            for batch in x.split(BATCH):
                logits_of(model, batch)
    finally:
        handle.remove()
    return torch.cat(seen)
