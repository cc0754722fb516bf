"""One optimiser step: attack, passes, target, loss, update."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rb_noisy.attacks import ATTACK_LOSSES, AttackLoss, AttackResult, pgd
from rb_noisy.data import augment, from_bytes
from rb_noisy.device import gather
from rb_noisy.fast import FastForm
from rb_noisy.recipes import Recipe
from rb_noisy.record import SampleRecord
from rb_noisy.targets import Assignment, Batch
from rb_noisy.weights import Averager, kept_buffers

if TYPE_CHECKING:
    from accelerate import Accelerator


class Step:
    """What a recipe does with a batch.

    Attributes:
        x, y: all training images (N, C, H, W) as `to_bytes` gives them, and their given labels (N,), on the device.
        model, wrapped: the network, and what Accelerate made of it for several processes.
        attacked: its fast form, for attacks in eval mode; None for others.
        averager: of the averaged weights, which may be a teacher; None without.
        teachers: networks by their names in the recipe.
    """

    def __init__(
        self,
        recipe: Recipe,
        accelerator: Accelerator,
        model: nn.Module,
        wrapped: nn.Module,
        attacked: FastForm | None,
        optimizer: torch.optim.Optimizer,
        averager: Averager | None,
        teachers: dict[str, nn.Module],
        record: SampleRecord,
        x: Tensor,
        y: Tensor,
    ):
        self.recipe, self.accelerator = recipe, accelerator
        self.model, self.wrapped, self.attacked, self.optimizer = model, wrapped, attacked, optimizer
        self.averager, self.teachers, self.record, self.x, self.y = averager, teachers, record, x, y
        self.objective, self.targets = recipe.make_objective(), recipe.make_targets()
        self.criterion, self.awp = recipe.make_criterion(), recipe.make_awp()

    def __call__(self, index: Tensor, epoch: int, progress: float, draws: torch.Generator) -> tuple[Tensor, Tensor]:
        """Step on the samples in `index`, (B,), `progress` epochs into the run.

        Returns:
            The loss and the gradient norm, both () on the device.
        """
        recipe = self.recipe
        x, y = from_bytes(self.x[index]), self.y[index]
        if recipe.augment:
            x = augment(x, generator=draws)
        x = x.contiguous(memory_format=torch.channels_last)
        grown = min(1.0, progress / (recipe.eps_warmup * recipe.epochs)) if recipe.eps_warmup else 1.0
        batch = Batch(
            index=index,
            x=x,
            y=y,
            hard=F.one_hot(y, self.record.average.shape[1]).to(self.record.average),
            epoch=epoch,
            share=progress / recipe.epochs,
            supervises=self.objective.supervises,
            eps=recipe.eps * grown,
            alpha=recipe.alpha * grown,
            steps=recipe.steps,
            norm=recipe.norm,
            draws=draws,
            gather=self._gather,
            teach=self._teach,
        )
        if self.targets.natural_mode(epoch) == "eval":
            batch.guiding = self._without_gradient(self.model.eval(), x)
        self.wrapped.train()
        self.targets.before_attack(batch, self.record)
        batch.labels = self.targets.attack_labels(self.model, batch, self.record)
        attack = self._attack(batch)
        self.optimizer.zero_grad()
        if self.awp is None or epoch < self.awp.warmup:
            assignment, loss = self._forward(batch, attack, self.wrapped)
            self.accelerator.backward(loss)
        else:
            # Of the two passes only the one at the perturbed weights may move the BatchNorm statistics.
            with kept_buffers(self.model):
                assignment, loss = self._forward(batch, attack, self.model)
                gradients = self._gradients(loss)
            with self.awp.perturbed(self.model, gradients):
                self._passes(batch, self.wrapped)
                loss = self._loss(batch, assignment)
                self.accelerator.backward(loss)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.stack([g.norm() for g in gradients]).norm()
        self.optimizer.step()
        return loss.detach(), norm

    def _attack(self, batch: Batch) -> AttackResult | None:
        """Put x̃ into the batch; κ is against the given labels. None where the method does not attack."""
        recipe, objective = self.recipe, self.objective
        if objective.attack_loss is None:
            return None
        loss: str | AttackLoss = objective.attack_loss
        penalty = self.targets.penalty(batch, self.record) if self.targets.attack_penalty else None
        if penalty is not None:
            raised = ATTACK_LOSSES[objective.attack_loss]

            def loss(logits: Tensor, natural: Tensor, y: Tensor) -> Tensor:
                return objective.attack_weight * raised(logits, natural, y) + len(y) * penalty(logits)

        if self.attacked is not None:
            self.attacked.update(self.model)
        attack = pgd(
            self.model if self.attacked is None else self.attacked,
            batch.x,
            batch.labels,
            eps=batch.eps,
            alpha=batch.alpha,
            steps=recipe.steps,
            norm=recipe.norm,
            loss=loss,
            random_start=objective.random_start,
            start_radius=None if objective.start_ratio == 1 else objective.start_ratio * batch.eps,
            project=objective.project,
            generator=batch.draws,
            mode=recipe.attack_mode,
            kappa_labels=batch.y,
            check_images=False,  # they are the data set's; to look at them is to wait for the device
        )
        batch.x_adv = attack.x_adv
        return attack

    def _passes(self, batch: Batch, network: nn.Module) -> None:
        """The passes that the objective supervises; x̃ first, so that natural BatchNorm statistics come last."""
        if batch.x_adv is not None:
            batch.adversarial = network(batch.x_adv)
        if self.objective.uses_natural:
            batch.natural = network(batch.x)

    def _forward(self, batch: Batch, attack: AttackResult | None, network: nn.Module) -> tuple[Assignment, Tensor]:
        """All passes of the batch, what it is trained towards, and the loss; the record learns of it."""
        self._passes(batch, network)
        if self.targets.natural_mode(batch.epoch) == "train" and not self.objective.uses_natural:
            batch.guiding = self._without_gradient(network, batch.x)
        with torch.no_grad():
            logits = batch.natural if batch.adversarial is None else batch.adversarial
            per_sample = F.cross_entropy(logits.float(), batch.y, reduction="none")
            kappa, prediction = (None, None) if attack is None else (attack.kappa, attack.start_prediction)
            seen = (batch.index, kappa, per_sample, logits.argmax(1) if prediction is None else prediction)
            self.record.observe(*(None if value is None else self._gather(value) for value in seen))
            assignment = self.targets(batch, self.record)
        return assignment, self._loss(batch, assignment)

    @torch.no_grad()
    def _without_gradient(self, network: nn.Module, x: Tensor) -> Tensor:
        return network(x)

    def _loss(self, batch: Batch, assignment: Assignment) -> Tensor:
        loss = self.objective(batch.natural, batch.adversarial, assignment.target, assignment.weight, self.criterion)
        return loss if assignment.penalty is None else loss + assignment.penalty(batch.supervised)

    def _gradients(self, loss: Tensor) -> list[Tensor | None]:
        """Of the loss by every parameter, the mean over the processes."""
        parameters = list(self.model.parameters())
        trained = [p for p in parameters if p.requires_grad]
        found = dict(zip(trained, torch.autograd.grad(loss, trained, allow_unused=True), strict=True))
        gradients = [found.get(p) for p in parameters]
        if self.accelerator.num_processes > 1:
            gradients = [g if g is None else self.accelerator.reduce(g, reduction="mean") for g in gradients]
        return gradients

    @torch.no_grad()
    def _teach(self, name: str, x: Tensor) -> Tensor:
        return (self.averager.model if name == "average" else self.teachers[name])(x)

    def _gather(self, tensor: Tensor) -> Tensor:
        return gather(self.accelerator, tensor)
