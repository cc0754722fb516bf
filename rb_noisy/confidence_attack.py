"""An attacker who knows that confidence is reported, and wants a wrong answer to be believed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from rb_noisy.attacks import ATTACK_LOSSES, check_attack, gradient_of, moved, start_of
from rb_noisy.forward import ask, in_mode, outside_inference


def believed_attack(
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    *,
    eps: float | str,
    norm: str = "Linf",
    steps: int = 50,
    inner_steps: int = 5,
    inner_eps: float | str | None = None,
    every: int = 10,
    seed: int | None = None,
) -> Iterator[Tensor]:
    """Look within ε of x for inputs that are classified as `target` and stay so under the attack that κ is made of.

    Each step attacks the present point as κ does (PGD within `inner_eps` of it, away from `target`) and moves it by the
    sum of the cross entropy's gradients at all inner iterates, whose offsets are held fixed, down towards `target`:
    adversarial training of the input in place of the weights. That raises the class probability, the margins along the
    attack's way, and so κ, together. `inner_steps=0` raises the probability at the point alone, which is all that a
    confidence made of softmax asks for.

    Args:
        model: takes images in [0, 1] (N, C, H, W), returns logits (N, K); used in eval mode.
        x, target: images (N, C, H, W) in [0, 1], and the wrong class (N,) that each shall be taken for.
        eps, norm: the ball around x, in units of [0, 1]; "Linf" or "L2".
        steps: of size 2.5·ε/steps, from a random start.
        inner_steps, inner_eps: of the attack in each step (α = 2.5·inner_eps/inner_steps); None for ε.
        every: so many steps apart a point is handed out.
        seed: of the random start.

    Yields:
        (N, C, H, W) within ε of x and in [0, 1]; whether they fool anyone is for the caller to see.
    """
    eps, inner_eps = check_attack(eps=eps, alpha=eps if inner_eps is None else inner_eps, steps=steps, norm=norm)
    asked = ask(model, x, target)
    model, x, target = asked.model, asked.x, asked.y
    loss, nothing = ATTACK_LOSSES["ce"], x.new_empty(0)
    generator = None if seed is None else torch.Generator().manual_seed(seed)

    @outside_inference  # not around the generator, between whose steps its caller may be inside
    def begun() -> Tensor:
        return start_of(x, eps, norm, True, generator)

    @outside_inference
    def one_further(point: Tensor) -> Tensor:
        with in_mode(model, "eval"):
            gradient, _ = gradient_of(model, point, target, nothing, loss)
            total, inner = gradient, point
            for _ in range(inner_steps):
                inner = moved(inner, point, gradient, inner_eps, 2.5 * inner_eps / inner_steps, norm)
                gradient, _ = gradient_of(model, inner, target, nothing, loss)
                total = total + gradient
        return moved(point, x, -total, eps, 2.5 * eps / steps, norm)

    point = begun()
    for step in range(1, steps + 1):
        point = one_further(point)
        if step % every == 0 or step == steps:
            yield point
