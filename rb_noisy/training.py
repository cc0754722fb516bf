"""The loop that carries out a recipe, and the run folder it leaves.

A run folder holds `run.json` (the recipe, the shape of the data, their digest), `metrics.jsonl` (one line per epoch),
`best.safetensors` and `final.safetensors` (weights) and `state.safetensors` (what `resume` continues from, see
`rb_noisy.checkpoint`). Each file is whole or absent. Random numbers are drawn from (seed, epoch, process), so that a
resumed epoch draws what the uninterrupted one would have drawn.

The training images lie on the device as bytes where they are bytes. Within an epoch the host never waits for the
device, but for checkpoints and the clock of several processes, and where a target decides anew which label to attack
(`kgr`, `annotator`).

Which passes move the BatchNorm statistics: the training pass on x̃, then the one on x where the method has one (so
that natural statistics come last, as in the released SGLR code); the attack only with `attack_mode="train"`; with AWP
only the passes at the perturbed weights. SWA estimates them anew on natural training images, WA averages them. Several
processes each keep their own statistics within an epoch; at its end they are averaged over the processes.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rb_noisy.checkpoint import Checkpoint, Progress
from rb_noisy.convolutions import PARTS, apply_plan, make_plan
from rb_noisy.data import Dataset, from_bytes, to_bytes
from rb_noisy.device import gather, to_device
from rb_noisy.errors import InputError
from rb_noisy.fast import fast_form
from rb_noisy.files import atomic_path, only_writer, remove_left_by_killed, tensors_digest, write_json
from rb_noisy.placement import SECONDS_TO_END, Threads, bf16_slowdown
from rb_noisy.processes import MEETING, be_patient, leave_group_at_exit, lost_process
from rb_noisy.recipes import Recipe
from rb_noisy.record import SampleRecord
from rb_noisy.runs import (
    CHECKPOINTS,
    Run,
    check_folder,
    history_file,
    load_teacher,
    read_metrics,
    save_tensors,
    save_weights,
)
from rb_noisy.same_data import check_classes, check_digest
from rb_noisy.step import Step
from rb_noisy.tracking import Tracker
from rb_noisy.training_data import data_digest, training_set
from rb_noisy.weights import Averager, kept_buffers

# Several processes ask each other for the time only every so many steps: the answer has to be waited for.
CLOCK_STEPS = 20
LARGEST_BATCH = 2**31 - 1


class TrainingDiverged(RuntimeError):
    """The loss is no longer a number. The message names the epoch, the batch and the last good checkpoint."""


def train(
    recipe: Recipe,
    run_dir: str | Path,
    resume: bool = False,
    *,
    checkpoint_minutes: float = 10.0,
    max_minutes: float | None = None,
    compiled: bool = False,
    data_root: str | Path | None = None,
    threads: int | Literal["measured"] | None = None,
    tune: bool = False,
    on_batch: Callable[[int, int, int], None] | None = None,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> Run:
    """Carry out a recipe and leave a run folder, whose `finished` says whether the time was enough.

    Device, bf16 and several processes come from Accelerate: start with `accelerate launch` (GPUs) or `torchrun` for
    more than one. On a CPU the same recipe on the same number of processes and threads gives the same weights bit by
    bit, also when it was killed and resumed in between.

    Args:
        run_dir: the folder to write; must not hold a run unless `resume`.
        resume: continue from the last checkpoint of the run there (or start, if there is none), on any number of
            processes.
        checkpoint_minutes: a checkpoint is written after every epoch, and within one after so many minutes.
        max_minutes: after so many minutes, finish the step under way (the epoch, if it is its last), write a checkpoint
            and return; None for no limit. Several processes look at the clock every `CLOCK_STEPS` steps only.
        compiled: attack through `torch.compile`, see `rb_noisy.fast.fast_form`; for `attack_mode="eval"`.
        data_root: where data sets are kept, see `rb_noisy.data.load_data`.
        threads: of PyTorch, on a CPU. None leaves their number as it is. "measured" chooses it by a short measurement
            and anew when steps begin to stall (`rb_noisy.placement.Threads`); a resumed run keeps the number that it
            had. A number is kept, however long steps take. Those in use are in the metrics of every epoch.
        tune: on a CPU, measure first which parts of which convolutions are faster as matrix products
            (`rb_noisy.convolutions`), and compute them so. The weights then depend on what was chosen; a resumed run
            keeps it.
        on_batch: called with (epoch, batches done, batches in the epoch).
        on_epoch: called with the metrics of each finished epoch.
        on_note: called with a line about the threads that were chosen, or bf16 that is slow on this CPU.

    Raises:
        InputError: the folder holds another run or another training is under way there, or the recipe cannot be
            carried out.
        TrainingDiverged: the loss became NaN or infinite.
    """
    limit = math.inf if max_minutes is None else max_minutes
    for name, minutes in (("checkpoint_minutes", checkpoint_minutes), ("max_minutes", limit)):
        if minutes is None or not minutes > 0:
            raise InputError(f"{name} is {minutes}; give a number above 0")
    if isinstance(threads, int) and threads < 1:
        raise InputError(f"threads is {threads}; give a number from 1 up")
    trainer = _Trainer(recipe, Path(run_dir), resume, data_root, checkpoint_minutes, limit, compiled)
    with trainer.hold_folder():
        trainer.place(threads, tune, on_note or (lambda _: None))
        return trainer.run(on_batch, on_epoch)


class _Trainer:
    def __init__(
        self,
        recipe: Recipe,
        path: Path,
        resume: bool,
        data_root: str | Path | None,
        checkpoint_minutes: float = 10.0,
        max_minutes: float = math.inf,
        compiled: bool = False,
    ):
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

        from rb_noisy.backbones import FIXED_SIZE, build_backbone

        self.recipe, self.path, self.started = recipe, path, time.monotonic()
        self.checkpoint_minutes, self.max_minutes = checkpoint_minutes, max_minutes
        self.next_checkpoint = checkpoint_minutes
        # Two forward passes before one backward pass: the buffers must not be broadcast in between.
        handlers = [DistributedDataParallelKwargs(broadcast_buffers=False), InitProcessGroupKwargs(timeout=MEETING)]
        # Accelerate keeps the precision of a process' first Accelerator; the next run may want another.
        AcceleratorState._reset_state()
        # Several processes without a GPU talk to each other only if the CPU is asked for.
        cpu = not torch.accelerator.is_available()
        self.accelerator = Accelerator(cpu=cpu, mixed_precision=recipe.precision, kwargs_handlers=handlers)
        be_patient()
        self.device = self.accelerator.device
        targets = recipe.make_targets()

        data, labels = training_set(recipe, data_root)
        images = to_bytes(data.x_train)
        self.data_sha256 = data_digest(images, labels.given, data.x_test, data.y_test)
        x, y = images.to(self.device), labels.given.to(self.device)
        self.tracker = Tracker(recipe, data, labels, _seed)

        torch.manual_seed(_seed(recipe.seed, 0))
        statistics = _statistics(data.x_train) if recipe.normalize else {}
        size = {"img_size": data.image_size[0]} if recipe.backbone in FIXED_SIZE else {}
        own = dict(recipe.backbone_options)
        pretrained = own.pop("pretrained", False)  # not kept: what the run comes to has weights of its own
        self.model_options = {
            "name": recipe.backbone,
            "num_classes": data.num_classes,
            "in_chans": data.in_chans,
            **statistics,
            **size,
            **own,
        }
        model = build_backbone(**self.model_options, pretrained=pretrained)
        self.model = model.to(memory_format=torch.channels_last)
        self._try_forward(data)
        self.least = self._check_batches()
        # What Accelerate makes of the network cannot be copied.
        objective = recipe.make_objective()
        attacks = objective.attack_loss is not None and not objective.trains_start
        in_eval_mode = recipe.attack_mode == "eval" and attacks
        half = recipe.precision == "bf16"
        attacked = fast_form(self.model, compiled=compiled, half=half) if in_eval_mode else None
        if attacked is not None:
            attacked.verify(data.x_train[:4])  # now: what Accelerate makes of the network may be in half precision
            attacked.to(self.device)
        # Drawn from the seed alone, also where the run is resumed.
        self.tracker.start = {n: p.detach().clone().to(self.device) for n, p in self.model.named_parameters()}
        self.class_names, self.image_shape = data.class_names, tuple(data.x_train.shape[1:])
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=recipe.lr,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            fused=self.device.type == "cuda",
        )
        self.wrapped, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        averaging = recipe.make_averaging()
        self.averager = None if averaging is None else Averager(self.model, averaging)
        teachers = {
            name: load_teacher(name, data.x_train[:2], data.num_classes, path, data.class_names).to(self.device)
            for name in targets.teachers
            if name != "average"
        }
        self.record = SampleRecord(y, data.num_classes, targets.start_average)
        self.step = Step(
            *(recipe, self.accelerator, self.model, self.wrapped, attacked, self.optimizer),
            *(self.averager, teachers, self.record, x, y),
        )
        state = path / "state.safetensors"
        parts = (self.accelerator, self.model, self.optimizer, self.averager, self.record)
        taught_by = {name: tensors_digest(teacher.state_dict().items()) for name, teacher in teachers.items()}
        self.checkpoint = Checkpoint(state, *parts, data=(data.name, self.data_sha256), teachers=taught_by)
        self.threads: Threads | None = None
        self.threads_used: set[int] = set()  # in the epoch under way
        self.plan: dict[str, list[str]] | None = None
        self.progress = self._begin(resume)
        self.saved = "no checkpoint was written" if self.progress == Progress() else f"{state} ({self.progress})"

    @property
    def evaluated(self) -> nn.Module:
        """The network that is measured and saved: with weight averaging the averaged one."""
        return self.model if self.averager is None else self.averager.model

    def place(self, threads: int | str | None, tune: bool, say: Callable[[str], None]) -> None:
        """Choose PyTorch's number of threads, and how convolutions are computed, as `train` says."""
        if self.device.type != "cpu":
            return
        if threads is not None:
            self._choose_threads(threads, say)
        self.plan = self.progress.plan
        if tune and self.plan is None:
            from accelerate.utils import broadcast_object_list

            self.plan = make_plan(self.model, self._trial_pass)
            (self.plan,) = broadcast_object_list([self.plan])  # each process has measured its own
            parts = Counter(part for parts in self.plan.values() for part in parts)
            chosen = ", ".join(f"{part} of {parts[part]}" for part in PARTS if parts[part])
            say(f"convolutions as matrix products: {chosen or 'none, the library is as fast'}")
        apply_plan(self.model, self.plan or {})

    def _choose_threads(self, threads: int | str, say: Callable[[str], None]) -> None:
        if self.recipe.precision == "bf16" and (slowdown := bf16_slowdown()) > 1:
            say(f"this CPU computes in bf16 {slowdown:.1f} times as long as in fp32; precision=no would be faster")
        measured = threads == "measured"
        count = self.progress.threads if measured else threads
        self.threads = Threads(self._trial_pass, count, fixed=not measured, say=say)

    def _trial_pass(self) -> None:
        """A training pass over a batch that leaves no trace."""
        x = from_bytes(self.step.x[: self.recipe.batch_size]).contiguous(memory_format=torch.channels_last)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        with torch.random.fork_rng(devices=[]), kept_buffers(self.model):
            loss = F.cross_entropy(self.model.train()(x).float(), self.step.y[: len(x)])
            torch.autograd.grad(loss, parameters, allow_unused=True)

    @contextlib.contextmanager
    def hold_folder(self) -> Iterator[None]:
        """Let go of the folder at the end; what fails before anything was trained leaves no run in it."""
        with self.held:
            try:
                yield
            except Exception as error:
                if not (isinstance(error, RuntimeError) and lost_process(error)):  # that is no fault of the recipe
                    self._leave_nothing()
                raise

    def _leave_nothing(self) -> None:
        """Remove what `_begin` wrote, which would stand in the way of the corrected recipe, if it is all there is."""
        if self.fresh and self.accelerator.is_main_process and not any(file.exists() for file in self._written()):
            (self.path / "run.json").unlink(missing_ok=True)
            if self.made_folder:
                with contextlib.suppress(OSError):  # somebody else has put something there
                    self.path.rmdir()

    def _written(self) -> list[Path]:
        """What training writes, but for `run.json`."""
        weights = [self.path / f"{name}.safetensors" for name in CHECKPOINTS]
        return [*weights, self.path / "state.safetensors", self.path / "metrics.jsonl"]

    def run(
        self,
        on_batch: Callable[[int, int, int], None] | None,
        on_epoch: Callable[[dict[str, Any]], None] | None,
    ) -> Run:
        began = self.progress
        while self.progress.epoch < self.recipe.epochs:
            trained = self._train_epoch(on_batch)
            if trained is None:
                break
            before = self.progress
            metrics = {"epoch": before.epoch, **trained, "processes": self.accelerator.num_processes}
            if self.device.type == "cpu":
                metrics["threads"] = sorted(self.threads_used)
            if self.plan:
                metrics["matrix_products"] = sum(map(len, self.plan.values()))
            if self.accelerator.is_main_process:
                metrics |= self.tracker.measure(self.evaluated, before.epoch, self.device)
                metrics["seconds"] = round(before.seconds + time.perf_counter() - self.epoch_started, 3)
                self._save_epoch(metrics)
            # The state comes last: a kill before it repeats the epoch, and the metrics are cut back to it.
            self._save(Progress(before.epoch + 1, best=before.best))
            if self.threads is not None:
                self.threads.between_epochs()
            if on_epoch is not None and self.accelerator.is_main_process:
                on_epoch(metrics)
            self.accelerator.wait_for_everyone()
            if self._minutes(0) >= self.max_minutes:
                break
        done = self.progress.epoch == self.recipe.epochs
        final = self.path / "final.safetensors"
        if done and self.accelerator.is_main_process and (began is not self.progress or not final.is_file()):
            save_weights(self.evaluated, final)
        self.accelerator.wait_for_everyone()
        if self.accelerator.num_processes > 1:
            leave_group_at_exit()
        return Run.open(self.path)

    def _train_epoch(self, on_batch: Callable[[int, int, int], None] | None) -> dict[str, float] | None:
        """The rest of the epoch under way; None where the time is up within it."""
        recipe, rank, world = self.recipe, self.accelerator.process_index, self.accelerator.num_processes
        progress, self.epoch_started = self.progress, time.perf_counter()
        epoch, chunk = progress.epoch, recipe.batch_size * world
        fresh = (progress.done,) if progress.done else ()  # for as many processes as before, the states go on
        torch.manual_seed(_seed(recipe.seed, 2, epoch, rank, *fresh))  # dropout
        draws = torch.Generator().manual_seed(_seed(recipe.seed, 3, epoch, rank, *fresh))  # crops, flips, random starts
        _set_random(progress.random, draws, self.device)
        self.step.load_state_dict(progress.random)
        shared = torch.Generator().manual_seed(_seed(recipe.seed, 4, epoch))  # the same order on every process
        train_index = self.tracker.train_index
        order = to_device(train_index[torch.randperm(len(train_index), generator=shared)], self.device)
        batches = self._own_batches(order[progress.done :])
        first = progress.done / chunk  # not a whole number where another number of processes began the epoch
        total = first + len(batches)
        if not progress.done:
            self.threads_used = set()
            self.step.targets.begin_epoch(self.record, epoch)
            self.record.forget_epoch()
        for step, batch in enumerate(batches):
            share = epoch + (first + step) / total
            for group in self.optimizer.param_groups:
                group["lr"] = recipe.learning_rate(share)
            began = time.perf_counter()
            self.threads_used.add(torch.get_num_threads())
            try:
                loss, norm = self.step(batch, epoch, share, draws, round(first) + step)
            except RuntimeError:  # to draw a label from a NaN, say, before anyone has looked at the losses
                self._check_losses()
                self._check_weights()
                raise
            if self.averager is not None:
                self.averager.after_step(self.model)
            if self.threads is not None:
                self.threads.after_step(time.perf_counter() - began)
            progress.losses.append(loss)
            progress.norms.append(norm)
            progress.done += chunk
            if self.device.type == "cpu" and not loss.isfinite():  # elsewhere it would have to be waited for
                self._check_losses()
            if on_batch is not None:
                on_batch(epoch, round(first) + step + 1, round(total))
            if step + 1 < len(batches) and self._pause(step + 1, draws):
                return None
        self._check_losses()
        self._average_buffers(self.model)
        if self.averager is not None:
            self.averager.after_epoch(self.model, (epoch + 1) / recipe.epochs)
            images = (from_bytes(self.step.x[batch]) for batch in self._own_batches(order))
            self.averager.refresh_statistics(x.contiguous(memory_format=torch.channels_last) for x in images)
            self._average_buffers(self.averager.model)
        self._check_weights()
        return {
            "learning_rate": recipe.learning_rate(epoch),
            "train_loss": self._mean(progress.losses),
            "gradient_norm": self._mean(progress.norms),
        }

    def _own_batches(self, order: Tensor) -> list[Tensor]:
        """This process' share of each global batch; as many batches, of the same sizes, on every process."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        own = order[: len(order) // world * world][rank::world]
        return [batch for batch in own.split(self.recipe.batch_size) if len(batch) >= self.least]

    def _check_batches(self) -> int:
        """The samples that a batch needs: BatchNorm has no statistics of one; smaller last batches are left out."""
        if self.recipe.batch_size > LARGEST_BATCH:
            raise InputError(f"recipe: batch_size is {self.recipe.batch_size}; give {LARGEST_BATCH} at most")
        normed = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self.model.modules())
        if normed and self.recipe.batch_size == 1:
            raise InputError(
                f"batch_size is 1, but {self.recipe.backbone!r} has BatchNorm, which normalises over a batch: give 2 "
                "or more, or a backbone without BatchNorm"
            )
        count, world, least = len(self.tracker.train_index), self.accelerator.num_processes, 2 if normed else 1
        if count < least * world:
            each = f" of a network with BatchNorm, which needs {least} each" if normed else ""
            raise InputError(f"{count} training samples are too few for {world} processes{each}")
        return least

    def _pause(self, step: int, draws: torch.Generator) -> bool:
        """Write a checkpoint within the epoch if one is due; whether the time is up."""
        minutes = self._minutes(step)
        if minutes < min(self.next_checkpoint, self.max_minutes):
            return False
        self._check_losses()
        self._check_weights()
        now = time.perf_counter()
        self.progress.seconds += now - self.epoch_started
        self.epoch_started = now
        self.progress.random = _get_random(draws, self.device) | self.step.state_dict()
        self._save(self.progress)
        self.next_checkpoint = minutes + self.checkpoint_minutes
        return minutes >= self.max_minutes

    def _minutes(self, step: int) -> float:
        """Minutes since the start, the same on every process; −inf where they do not ask each other at this step."""
        minutes = (time.monotonic() - self.started) / 60
        if self.accelerator.num_processes == 1:
            return minutes
        if step % CLOCK_STEPS:
            return -math.inf
        return gather(self.accelerator, torch.tensor([minutes], device=self.device)).max().item()

    def _mean(self, values: list[Tensor]) -> float:
        """Over the steps and the processes."""
        return gather(self.accelerator, torch.stack(values).mean()[None]).mean().item()

    def _average_buffers(self, model: nn.Module) -> None:
        if self.accelerator.num_processes > 1:
            for buffer in model.buffers():
                if buffer.is_floating_point():
                    buffer.copy_(self.accelerator.reduce(buffer, reduction="mean"))

    def _check_losses(self) -> None:
        losses = torch.stack(self.progress.losses or [torch.zeros(())])
        if not losses.isfinite().all():
            batch = int((~losses.isfinite()).nonzero()[0])
            raise self._diverged(f"the loss is {losses[batch].item()}", batch)

    def _check_weights(self) -> None:
        """The last step may have broken what its loss did not show yet; such weights are never saved."""
        if not all(torch.isfinite(v).all() for v in self.model.state_dict().values() if v.is_floating_point()):
            raise self._diverged("the weights are no longer finite", len(self.progress.losses) - 1)

    def _diverged(self, what: str, batch: int) -> TrainingDiverged:
        return TrainingDiverged(
            f"{what} in epoch {self.progress.epoch + 1}, batch {batch + 1}; the last good checkpoint: {self.saved}; "
            "lower the learning rate (lr) or raise eps_warmup"
        )

    @torch.no_grad()
    def _try_forward(self, data: Dataset) -> None:
        """Find out before anything is written that the network cannot take these images."""
        try:
            self.model.eval()(data.x_train[:2])
        except (RuntimeError, AssertionError, ValueError) as error:
            shape = "x".join(str(side) for side in data.x_train.shape[1:])
            raise InputError(
                f"backbone {self.recipe.backbone!r} cannot take the {shape} images of {data.name} ({error}); "
                "choose another, or set its size in backbone_options"
            ) from error

    def _begin(self, resume: bool) -> Progress:
        """Lock the folder, look into it, and write `run.json`, or take up the run that is there: how far it is.

        The lock comes first: of two trainings that begin at once, one would else leave its recipe with the other's
        weights. The main process does it and tells the others, which must not wait for one that has failed.
        """
        from accelerate.utils import broadcast_object_list

        self.held, found = contextlib.ExitStack(), [None]
        if self.accelerator.is_main_process:
            try:
                self._hold(resume)
                found = [self.fresh]
            except (InputError, OSError) as error:
                found = [error]
        (answer,) = broadcast_object_list(found)
        if isinstance(answer, Exception):
            raise answer
        self.fresh = answer
        try:
            return Progress() if self.fresh or not self.checkpoint.file.exists() else self.checkpoint.load()
        except BaseException:
            self.held.close()
            raise

    def _hold(self, resume: bool) -> None:
        self.made_folder = not self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as held:
            held.enter_context(only_writer(self.path, SECONDS_TO_END))  # of one that has just been killed
            self.fresh = check_folder(self.path, self.recipe, resume)
            if not self.fresh:
                self._check_same_data()
            for file in (self.path / "run.json", *self._written()):
                remove_left_by_killed(file)
            if self.fresh:
                about = {"model_options": self.model_options, "class_names": self.class_names}
                about |= {"image_shape": self.image_shape, "data_sha256": self.data_sha256}
                try:
                    write_json(self.path / "run.json", {"recipe": self.recipe.to_dict(), **about})
                except BaseException:
                    self._leave_nothing()
                    raise
            self.held = held.pop_all()

    def _check_same_data(self) -> None:
        """Raise `InputError` where the run in the folder is on other images, labels or classes."""
        run, data = Run.open(self.path), self.recipe.data
        check_digest(run.data_sha256, self.data_sha256, data, str(self.path))
        way_out = "put them back, or train into another folder"
        check_classes(run.class_names, self.class_names, str(self.path), data, way_out)

    def _save_epoch(self, metrics: dict[str, Any]) -> None:
        """What an epoch leaves, but for the state."""
        epoch = metrics["epoch"]
        if metrics["selection_pgd_acc"] > self.progress.best:
            self.progress.best = metrics["selection_pgd_acc"]
            save_weights(self.evaluated, self.path / "best.safetensors")
        history = {
            "kappa": self.record.kappa.to(torch.int16),
            "loss": self.record.loss,
            "prediction": self.record.prediction.to(torch.int16),
        }
        save_tensors(history, history_file(self.path, epoch), {})
        lines = [*read_metrics(self.path)[:epoch], metrics]
        with atomic_path(self.path / "metrics.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    def _save(self, progress: Progress) -> None:
        self.progress = progress
        progress.threads = torch.get_num_threads() if self.device.type == "cpu" else None
        progress.plan = self.plan
        self.checkpoint.save(progress)
        self.saved = f"{self.checkpoint.file} ({progress})"


def _statistics(x: Tensor) -> dict[str, list[float]]:
    variance, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    return {"mean": mean.tolist(), "std": variance.sqrt().clamp_min(1e-3).tolist()}


def _seed(*keys: int) -> int:
    """An independent stream for each purpose, epoch and process, from the recipe's one seed."""
    return int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _get_random(draws: torch.Generator, device: torch.device) -> dict[str, Tensor]:
    states = {"draws": draws.get_state(), "cpu": torch.get_rng_state()}
    return states | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else states


def _set_random(states: dict[str, Tensor], draws: torch.Generator, device: torch.device) -> None:
    if states:
        draws.set_state(states["draws"].cpu())
        torch.set_rng_state(states["cpu"].cpu())
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)
