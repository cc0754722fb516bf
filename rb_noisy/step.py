"""One optimiser step: attack, passes, target, loss, update."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rb_noisy.attacks import ATTACK_LOSSES, AttackLoss, AttackResult, moved, pgd
from rb_noisy.convolutions import input_gradients_only
from rb_noisy.data import augment, from_bytes
from rb_noisy.device import gather
from rb_noisy.fast import FastForm
from rb_noisy.forward import in_mode
from rb_noisy.recipes import Recipe
from rb_noisy.record import SampleRecord
from rb_noisy.targets import Assignment, Batch, Penalty
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
        self.label_signs: Tensor | None = None  # of `LIET`

    def state_dict(self) -> dict[str, Tensor]:
        """What the next step within an epoch takes from those before it."""
        return {} if self.label_signs is None else {"label_signs": self.label_signs}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        signs = state.get("label_signs")
        self.label_signs = None if signs is None else signs.to(self.x.device)

    def __call__(
        self, index: Tensor, epoch: int, progress: float, draws: torch.Generator, number: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Step on the samples in `index`, (B,), `progress` epochs into the run; `number` steps were made in its epoch.

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
            epochs=recipe.epochs,
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
        if self.objective.trains_start:
            self._start(batch, number)
        else:
            self._attack(batch)
        self.optimizer.zero_grad()
        if self.awp is None or epoch < self.awp.warmup:
            assignment, loss = self._forward(batch, self.wrapped)
            self.accelerator.backward(loss)
        else:
            # Of the two passes only the one at the perturbed weights may move the BatchNorm statistics.
            with kept_buffers(self.model):
                assignment, loss = self._forward(batch, self.model)
                gradients = self._gradients(loss)
            with self.awp.perturbed(self.model, gradients):
                self._passes(batch, self.wrapped)
                loss = self._loss(batch, assignment)
                self.accelerator.backward(loss)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.stack([g.norm() for g in gradients]).norm()
        self.optimizer.step()
        return loss.detach(), norm

    def _start(self, batch: Batch, number: int) -> None:
        """Put the start of the attack into the batch, for objectives that train there."""
        objective = self.objective
        if self.label_signs is None or number % objective.refresh == 0:
            with in_mode(self.model, "eval"):
                self.label_signs = objective.label_signs(self.model, batch.hard.shape[1], batch.x, batch.draws)
        signs = self.label_signs[batch.labels].to(memory_format=torch.channels_last)
        batch.x_start = objective.start(batch.x, signs, batch.eps, objective.wide(self.recipe.eps), batch.draws)

    def _step_from_start(self, batch: Batch) -> None:
        """Put x̃ into the batch, a step from the start, whose pass has been made and is trained too."""
        objective, penalty = self.objective, self._attack_penalty(batch)
        raised = objective.start_loss(batch.start, batch.labels, batch.draws)
        if penalty is not None:
            raised = raised + len(batch.y) * penalty(batch.start)
        with input_gradients_only():
            (gradient,) = torch.autograd.grad(raised, batch.x_start, retain_graph=True)
        project = not objective.wide(self.recipe.eps)
        batch.x_adv = moved(batch.x_start, batch.x, gradient, batch.eps, batch.alpha, "Linf", project)
        prediction = batch.start.detach().argmax(1)
        batch.attack = AttackResult(batch.x_adv, (prediction == batch.y).long(), start_prediction=prediction)

    def _attack_penalty(self, batch: Batch) -> Penalty | None:
        """What the attack raises beside its loss."""
        return self.targets.penalty(batch, self.record) if self.targets.attack_penalty else None

    def _attack(self, batch: Batch) -> None:
        """Put x̃ into the batch, and what the attack found, κ against the given labels; nothing without an attack."""
        recipe, objective = self.recipe, self.objective
        if objective.attack_loss is None:
            return
        loss: str | AttackLoss = self.targets.attack_loss(batch) or objective.attack_loss
        penalty = self._attack_penalty(batch)
        if penalty is not None:
            raised = ATTACK_LOSSES[objective.attack_loss]

            def loss(logits: Tensor, natural: Tensor, y: Tensor) -> Tensor:
                return objective.attack_weight * raised(logits, natural, y) + len(y) * penalty(logits)

        if self.attacked is not None:
            self.attacked.update(self.model)
        batch.attack = pgd(
            self.model if self.attacked is None else self.attacked,
            batch.x,
            batch.labels,
            eps=batch.eps,
            alpha=batch.alpha,
            steps=recipe.steps,
            norm=recipe.norm,
            loss=loss,
            random_start=self.targets.attack_start or objective.random_start,
            start_radius=None if objective.start_ratio == 1 else objective.start_ratio * batch.eps,
            project=objective.project,
            generator=batch.draws,
            mode=recipe.attack_mode,
            kappa_labels=batch.y,
            check=False,  # they are the data set's; to look at them is to wait for the device
        )
        batch.x_adv = batch.attack.x_adv

    def _passes(self, batch: Batch, network: nn.Module) -> None:
        """The passes that are trained; x̃ first, so that natural BatchNorm statistics come last.

        Where the start of the attack is trained too, x̃ comes of its first pass.
        """
        if batch.x_start is not None:
            batch.start = network(batch.x_start.requires_grad_(batch.x_adv is None))
            if batch.x_adv is None:
                self._step_from_start(batch)
        if batch.x_adv is not None:
            batch.adversarial = network(batch.x_adv)
        if self.objective.uses_natural or self.targets.trains_natural:
            batch.natural = network(batch.x)

    def _forward(self, batch: Batch, network: nn.Module) -> tuple[Assignment, Tensor]:
        """All passes of the batch, what it is trained towards, and the loss; the record learns of it."""
        self._passes(batch, network)
        if self.targets.natural_mode(batch.epoch) == "train" and not self.objective.uses_natural:
            batch.guiding = self._without_gradient(network, batch.x)
        attack = batch.attack
        with torch.no_grad():
            logits = batch.natural if batch.adversarial is None else batch.adversarial
            per_sample = F.cross_entropy(logits.float(), batch.y, reduction="none")
            kappa, prediction = (None, None) if attack is None else (attack.kappa, attack.start_prediction)
            seen = (batch.index, kappa, per_sample, logits.argmax(1) if prediction is None else prediction)
            self.record.observe(*(None if value is None else self._gather(value) for value in seen))
            assignment = self.targets(batch, self.record)
            if self.objective.trains_start:
                softened = self.objective.soften(assignment.target, batch.labels, batch.draws)
                assignment = replace(assignment, target=softened)
        return assignment, self._loss(batch, assignment)

    @torch.no_grad()
    def _without_gradient(self, network: nn.Module, x: Tensor) -> Tensor:
        return network(x)

    def _loss(self, batch: Batch, assignment: Assignment) -> Tensor:
        loss = self.objective(batch.natural, batch.adversarial, assignment.target, assignment.weight, self.criterion)
        if self.objective.trains_start:
            loss = loss + self.objective.compared(batch.start, batch.adversarial, (batch.epoch + 1) / batch.epochs)
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
