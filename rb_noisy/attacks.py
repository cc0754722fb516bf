"""PGD, FGSM and the geometry value κ: one loop.

The iterates are x⁽⁰⁾ = x + start and x⁽ᵗ⁺¹⁾ = Π(x⁽ᵗ⁾ + α·direction(∇ℓ(f(x⁽ᵗ⁾), y))), with Π the projection on the
ε-ball around x, cut to [0, 1] (Madry et al. 2018; [NL] eq. 2). A PGD-n attack evaluates f at x⁽⁰⁾ … x⁽ⁿ⁻¹⁾ to take
its steps, so κ falls out of it with no further forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rb_noisy.convolutions import input_gradients_only
from rb_noisy.device import to_device
from rb_noisy.errors import InputError, unknown_name
from rb_noisy.forward import (
    ask,
    checked_classes,
    checked_labels,
    finite,
    in_mode,
    is_right,
    masked,
    outside_inference,
    warn_of_attack,
)
from rb_noisy.radius import radius, step_size, whole_number

Norm = Literal["Linf", "L2"]
Definition = Literal["first", "count"]
NORMS = ("Linf", "L2")
DEFINITIONS = ("first", "count")

AttackLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logits of the iterate, logits of the natural image, labels) -> what the attack raises, summed over the batch."""


def _cross_entropy(logits: Tensor, natural: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits, y, reduction="sum")


def _kl(logits: Tensor, natural: Tensor, y: Tensor) -> Tensor:
    """KL(f(x) ‖ f(x̃)), what TRADES raises (Zhang et al. 2019)."""
    return F.kl_div(logits.log_softmax(1), natural.log_softmax(1), reduction="sum", log_target=True)


def _margin(logits: Tensor, natural: Tensor, y: Tensor) -> Tensor:
    """max over other classes of z_j − z_y (Carlini & Wagner 2017)."""
    return -margin_of(logits, y).sum()


def margin_of(logits: Tensor, y: Tensor) -> Tensor:
    """(N,) z_y less the greatest other logit: below 0 where the prediction is not y."""
    true = logits.gather(1, y[:, None]).squeeze(1)
    return true - logits.scatter(1, y[:, None], -torch.inf).amax(1)


ATTACK_LOSSES: dict[str, AttackLoss] = {"ce": _cross_entropy, "kl": _kl, "margin": _margin}


@dataclass(frozen=True)
class AttackResult:
    """What an attack found.

    Attributes:
        x_adv: (N, C, H, W), the final iterate x⁽ⁿ⁾, inside the ε-ball (unless `project` is off) and [0, 1], in the
            order of the input.
        kappa: (N,) int64 in 0..n, the geometry value κ against y (small = easily attacked = suspicious label).
        broken: (N,) bool, whether any of the iterates x⁽⁰⁾ … x⁽ⁿ⁾ was misclassified; None unless asked for,
            because f(x⁽ⁿ⁾) costs one more forward pass.
        final_correct: (N,) bool, whether x⁽ⁿ⁾ is classified as y; None unless asked for.
        start_prediction: (N,) int64, the predicted class of x⁽⁰⁾; None for an attack without steps.
        masked: (N,) bool, whether the gradient at x⁽⁰⁾ is zero or not finite, so that it leads nowhere; None for an
            attack without steps.
        spoiled: (N,) bool, whether the logits of an iterate are not finite, which counts as misclassified.
        natural: (N, K), the logits of x in eval mode; None unless `check`.
    """

    x_adv: Tensor
    kappa: Tensor
    broken: Tensor | None = None
    final_correct: Tensor | None = None
    start_prediction: Tensor | None = None
    masked: Tensor | None = None
    spoiled: Tensor | None = None
    natural: Tensor | None = None


@outside_inference
def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | str,
    alpha: float | str,
    steps: int,
    norm: Norm = "Linf",
    loss: str | AttackLoss = "ce",
    random_start: bool | Literal["gaussian"] = True,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    mode: Literal["eval", "train", "keep"] = "eval",
    definition: Definition = "first",
    evaluate_final: bool = False,
    start_radius: float | None = None,
    project: bool = True,
    kappa_labels: Tensor | None = None,
    check: bool = True,
) -> AttackResult:
    """PGD-n, with κ at no forward pass of its own.

    Args:
        model: takes images in [0, 1] (N, C, H, W), returns logits (N, K), as `rb_noisy.forward` says. Its parameters
            get no gradient.
        x: natural images (N, C, H, W) in [0, 1].
        y: labels (N,) int64: what the attack moves away from and what κ is measured against.
        eps: radius of the ball, in units of the image range [0, 1]; also as text, "8/255".
        alpha: step size, same unit.
        steps: n; 0 returns the start point. FGSM is `steps=1, alpha=eps, random_start=False`.
        norm: "Linf" or "L2".
        loss: "ce", "kl" (against the prediction on x; TRADES), "margin", or a callable (`AttackLoss`).
        random_start: True for a uniform point of the ball; "gaussian" for x + 0.001·N(0, 1) (TRADES); False for x.
        seed: seeds the random start on the CPU; `generator` (a CPU generator) instead continues a stream.
        mode: BatchNorm and dropout during the attack: "eval" ([NL]'s lineage), "train" (Rice et al.), or "keep".
            The model's own mode is restored afterwards.
        definition: of κ, see `kappa`.
        evaluate_final: also classify x⁽ⁿ⁾ (one more forward pass) and fill `broken` and `final_correct`.
        start_radius: radius of a uniform Linf start where it is not ε (N-FGSM's is 2ε), same unit.
        project: False leaves out the projection onto the ε-ball, not the cut to [0, 1] (N-FGSM).
        kappa_labels: labels (N,) int64 that κ, `broken` and `final_correct` are measured against instead of y; y
            stays what the attack moves away from.
        check: see that images, labels and the network's answers are such as `rb_noisy.forward` says, and warn of what
            speaks against the figures. It takes a forward pass, and on a GPU waits for all work that is queued there;
            False is for callers that have looked before.

    Raises:
        InputError: a setting out of range; images, labels or answers of another kind.
    """
    eps, alpha = check_attack(eps=eps, alpha=alpha, steps=steps, norm=norm, definition=definition)
    judged, natural_logits = y if kappa_labels is None else kappa_labels, None
    if check:
        asked = ask(model, x, y, mode=mode)
        model, x, y, natural_logits = asked.model, asked.x, asked.y, asked.logits
        if kappa_labels is None:
            judged = y
        elif len(checked_labels(kappa_labels, x, "kappa_labels")):
            checked_classes(kappa_labels, asked.logits.shape[1], "kappa_labels")
    if not len(x):
        none = torch.zeros_like(judged, dtype=torch.bool)
        return AttackResult(x.clone(), torch.zeros_like(judged), *([none] * 2 if evaluate_final else [None] * 2))
    if start_radius is not None and not (0 <= start_radius < math.inf and norm == "Linf" and random_start is True):
        raise InputError(
            f"start_radius is {start_radius} with norm {norm!r} and random_start={random_start!r}; give a number of at "
            "least 0 for a uniform Linf start, or leave it out"
        )
    attack_loss = _attack_loss(loss)
    start = start_of(
        x, eps if start_radius is None else start_radius, norm, random_start, generator_of(seed, generator)
    )
    with in_mode(model, mode):
        natural = logits_of(model, x) if loss == "kl" or callable(loss) else x.new_empty(0)
        x_adv, predictions, correct, hidden = start, [], [], None
        spoiled = torch.zeros_like(judged, dtype=torch.bool)
        for step in range(steps):
            gradient, logits = gradient_of(model, x_adv, y, natural, attack_loss)
            if step == 0:
                hidden = masked(gradient)
            x_adv = moved(x_adv, x, gradient, eps, alpha, norm, project)
            predictions.append(logits.argmax(1))
            spoiled |= ~finite(logits)
            correct.append(is_right(logits, judged))
        final_correct = None
        if evaluate_final:
            logits = logits_of(model, x_adv)
            spoiled |= ~finite(logits)
            final_correct = is_right(logits, judged)
    if check:
        warn_of_attack(spoiled[:0] if hidden is None else hidden, spoiled)
    return AttackResult(
        x_adv,
        kappa_of(correct, y, definition),
        None if final_correct is None else ~torch.stack([*correct, final_correct]).all(0),
        final_correct,
        predictions[0] if predictions else None,
        hidden,
        spoiled,
        natural_logits,
    )


def kappa_of(correct: list[Tensor], y: Tensor, definition: Definition) -> Tensor:
    if not correct:
        return torch.zeros_like(y)
    right = torch.stack(correct).long()  # (n, N)
    return right.sum(0) if definition == "count" else right.cumprod(0).sum(0)


def gradient_of(
    model: nn.Module, x: Tensor, y: Tensor, natural: Tensor, attack_loss: AttackLoss
) -> tuple[Tensor, Tensor]:
    """Of the attack's loss with respect to x, shaped like it, and the logits (N, K)."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(x)
        # Only the input's gradient: autograd then skips the weight gradients altogether.
        raised, gradient = attack_loss(logits, natural, y), None
        if raised.requires_grad:
            with input_gradients_only():
                (gradient,) = torch.autograd.grad(raised, x, allow_unused=True)
    # A network that lets none through is `masked`, and no error.
    return torch.zeros_like(x) if gradient is None else gradient, logits.detach()


def moved(
    x_adv: Tensor, x: Tensor, gradient: Tensor, eps: float, alpha: float, norm: str, project: bool = True
) -> Tensor:
    """x_adv a step of α along the gradient, back in the ε-ball around x (if `project`) and in [0, 1].

    A gradient that is no number says nothing: the image stays where it is, instead of becoming no number too.
    """
    x_adv, gradient = x_adv.detach(), gradient.nan_to_num()
    if norm == "Linf":
        further = x_adv + alpha * gradient.sign()
        if project:
            further = torch.minimum(torch.maximum(further, x - eps), x + eps)
    else:
        # By the largest first: the squares of a very small or large gradient are 0 or infinite.
        gradient = gradient / gradient.abs().amax((1, 2, 3), keepdim=True).clamp_min(torch.finfo(gradient.dtype).tiny)
        further = x_adv + alpha * gradient / _l2(gradient).clamp_min(1e-12)
        if project:
            delta = further - x
            further = x + delta * (eps / _l2(delta).clamp_min(1e-12)).clamp_max(1.0)
    return further.clamp(0.0, 1.0)


def start_of(
    x: Tensor, radius: float, norm: Norm, random_start: bool | str, generator: torch.Generator | None
) -> Tensor:
    if random_start is False:
        return x.clone()

    # Drawn on the CPU so that one seed means the same start on every device.
    def draw(sampler: Callable[..., Tensor], shape: torch.Size) -> Tensor:
        return to_device(sampler(shape, generator=generator, dtype=x.dtype), x.device)

    if random_start == "gaussian":
        delta = 0.001 * draw(torch.randn, x.shape)
    elif random_start is not True:
        raise InputError(f"random_start is {random_start!r}; give True, False or 'gaussian'")
    elif norm == "Linf":
        delta = radius * (2 * draw(torch.rand, x.shape) - 1)
    else:
        # The first d coordinates of a uniform point on the sphere in d + 2 dimensions are uniform in the d-ball. One
        # row of uniform numbers per sample keeps the start independent of the batch size, which randn would not.
        d = math.prod(x.shape[1:])
        uniform = draw(torch.rand, torch.Size((len(x), d + 2))).clamp(1e-6, 1 - 1e-6)
        sphere = F.normalize(torch.special.ndtri(uniform), dim=1)
        delta = radius * sphere[:, :d].reshape(x.shape)
    return (x + delta).clamp(0.0, 1.0)


def _l2(v: Tensor) -> Tensor:
    return v.flatten(1).norm(dim=1).view(-1, *[1] * (v.dim() - 1))


@torch.no_grad()
def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).clone()  # a network may answer in one and the same tensor each time


def generator_of(seed: int | None, generator: torch.Generator | None) -> torch.Generator | None:
    if seed is not None and generator is not None:
        raise InputError("both seed and generator are given; give one of them")
    return torch.Generator().manual_seed(whole_number(seed, "seed", most=2**63 - 1)) if seed is not None else generator


def _attack_loss(loss: str | AttackLoss) -> AttackLoss:
    if callable(loss):
        return loss
    if loss not in ATTACK_LOSSES:
        raise unknown_name("attack loss", str(loss), ATTACK_LOSSES)
    return ATTACK_LOSSES[loss]


def check_attack(
    *, eps: float | str, alpha: float | str, steps: int, norm: str, definition: str = "first"
) -> tuple[float, float]:
    """ε and α as numbers.

    Raises:
        InputError: a setting of an attack out of range.
    """
    if norm not in NORMS:
        raise unknown_name("norm", norm, NORMS)
    if definition not in DEFINITIONS:
        raise unknown_name("definition of κ", definition, DEFINITIONS)
    whole_number(steps, "steps")
    eps = radius(eps, "eps", norm)
    return eps, step_size(alpha, eps, "alpha", norm)
