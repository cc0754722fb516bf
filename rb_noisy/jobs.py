"""A list of trainings and evaluations, carried out in order, some at a time, each in a process of its own."""

from __future__ import annotations

import math
import os
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rb_noisy.errors import InputError, unknown_name
from rb_noisy.files import only_writer, sha256, write_json
from rb_noisy.placement import end as end_all
from rb_noisy.placement import module_command, placed, shares, usable_cores
from rb_noisy.recipes import Recipe
from rb_noisy.runs import CHECKPOINTS, Run, read_results, results_file
from rb_noisy.sweep import differing
from rb_noisy.sweep_teachers import taught_by

EVALUATIONS = {"pgd": "pgd-20", "autoattack": "autoattack", "calibration": "calibration"}
"""The evaluations of a list, and the names of their figures."""
EVALUATION_OPTIONS = {"n": int, "batch_size": int, "seed": int, "checkpoint": str}


@dataclass(frozen=True)
class Training:
    """A recipe, to be carried out into a run folder.

    Attributes:
        name: of the folder in the list's folder.
        needs: names of the trainings that must be finished first: its teachers.
        tune: see `rb_noisy.train`.
    """

    name: str
    recipe: Recipe
    folder: Path
    needs: tuple[str, ...] = ()
    tune: bool = False

    @property
    def log(self) -> Path:
        return self.folder / "train.log"

    def run(self) -> Run | None:
        """The run in its folder, finished or not; None where there is none.

        Raises:
            InputError: it is of another recipe.
        """
        if not (self.folder / "run.json").is_file():
            return None
        run = Run.open(self.folder)
        if run.recipe != self.recipe:
            fields = ", ".join(differing(self.recipe, run.recipe))
            raise InputError(
                f"{self.folder} holds a run of another recipe ({fields} differ); "
                "sweep into another folder, or move that run away"
            )
        return run

    def done(self) -> bool:
        run = self.run()
        return run is not None and run.finished

    def state(self) -> str:
        """How far it is, for people."""
        run = self.run()
        if run is None:
            return "to do"
        return "finished" if run.finished else f"{len(run.metrics)} of {self.recipe.epochs} epochs"

    def command(self, data_root: str | Path | None) -> list[str]:
        write_json(self.folder / "recipe.json", self.recipe.to_dict())
        arguments = ["train", "--recipe", self.folder / "recipe.json", "--out", self.folder, "--resume"]
        return _command("rb_noisy", [*arguments, *(["--tune"] if self.tune else [])], data_root)


@dataclass(frozen=True)
class Evaluation:
    """An evaluation of a run folder of the list, whose figures go into that folder.

    Attributes:
        kind: one of `EVALUATIONS`.
        model: the name of the training; it is what this needs.
        folder: that run's folder.
        options: for the command, by the names of `EVALUATION_OPTIONS`.
        out: where verdicts and what resumes the evaluation are kept.
    """

    kind: str
    model: str
    folder: Path
    out: Path
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        given = "".join(f" {name}={value}" for name, value in self.options.items())
        return f"{self.kind} of {self.model}{given}"

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.model,)

    @property
    def log(self) -> Path:
        return self.folder / f"{self.kind}.log"

    @property
    def checkpoint(self) -> str:
        return self.options.get("checkpoint", "final")

    def figures(self) -> dict[str, Any] | None:
        """Those of these weights and options in the run's folder, over as many images; None where there are none."""
        weights = self.folder / f"{self.checkpoint}.safetensors"
        found = read_results(results_file(self.folder, self.checkpoint)).get(EVALUATIONS[self.kind])
        if found is None or not weights.is_file() or found["weights_sha256"] != sha256(weights):
            return None
        alike = all(found[name] == self.options[name] for name in ("seed", "batch_size") if name in self.options)
        return found if alike and found["n"] >= self.options.get("n", found["of"]) else None

    def done(self) -> bool:
        return self.figures() is not None

    def state(self) -> str:
        """How far it is, for people."""
        return "to do" if self.figures() is None else "finished"

    def command(self, data_root: str | Path | None) -> list[str]:
        # What is there already is not what was asked for.
        arguments = ["--model", self.folder, "--out", self.out, "--replace"]
        for name, value in self.options.items():
            arguments += [f"--{name.replace('_', '-')}", value]
        return _command(f"eval.{self.kind}", arguments, data_root)


Job = Training | Evaluation


def _command(module: str, arguments: list[Any], data_root: str | Path | None) -> list[str]:
    root = [] if data_root is None else ["--data-root", data_root]
    return module_command(module, [str(argument) for argument in (*arguments, *root)])


@dataclass(frozen=True)
class Outcome:
    """How one job ended; `problem` says why it failed and is "" if it did not."""

    job: Job
    problem: str = ""


def make_jobs(
    recipes: Mapping[str, Recipe],
    out: str | Path,
    evaluations: Sequence[Mapping[str, Any]] = (),
    *,
    tune: bool = False,
) -> list[Job]:
    """The jobs of a list: every recipe, and every evaluation right behind the run that it is of.

    Args:
        recipes: by the names of their run folders.
        out: the folder of the run folders.
        evaluations: each with "evaluate" (one of `EVALUATIONS`), "model" (a name among `recipes`; without one, all of
            them) and options.
        tune: see `rb_noisy.train`.

    Raises:
        InputError: an evaluation that cannot be had, or two whose figures would be one; teachers that teach each other;
            a folder that holds a run of another recipe.
    """
    out = Path(out)
    for entry in evaluations:
        if not isinstance(entry.get("model", ""), str) or ("model" in entry and entry["model"] not in recipes):
            raise unknown_name("model to evaluate (a run of the list)", str(entry["model"]), recipes)
    jobs: list[Job] = []
    for name, recipe in recipes.items():
        needs = tuple(teacher for teacher in taught_by(recipe) if teacher in recipes)
        jobs.append(Training(name, recipe, out / name, needs, tune))
        jobs[-1].run()  # another recipe's run is refused before anything is done
        jobs += [_evaluation(dict(entry), name, out) for entry in evaluations if entry.get("model", name) == name]
    _check_teachers({job.name: job.needs for job in jobs if isinstance(job, Training)})
    places = Counter((job.model, job.kind, job.checkpoint) for job in jobs if isinstance(job, Evaluation))
    for (model, kind, checkpoint), count in places.items():
        if count > 1:
            raise InputError(
                f"{kind} of {model} ({checkpoint}) is in the list {count} times; its folder keeps the figures of one: "
                "drop the others"
            )
    return jobs


def _check_teachers(needs: Mapping[str, Sequence[str]]) -> None:
    """Raise `InputError` if a run waits for itself."""
    for name in needs:
        seen, ahead = set(), list(needs[name])
        while ahead:
            if (teacher := ahead.pop()) == name:
                raise InputError(f"run {name} waits for itself, by way of its teachers; name another teacher")
            if teacher not in seen:
                seen.add(teacher)
                ahead += needs[teacher]


def _evaluation(entry: dict[str, Any], name: str, out: Path) -> Evaluation:
    kind, options = entry.pop("evaluate"), {k: v for k, v in entry.items() if k != "model"}
    if not isinstance(kind, str) or kind not in EVALUATIONS:
        raise unknown_name("evaluation", str(kind), EVALUATIONS)
    for option, value in options.items():
        if option not in EVALUATION_OPTIONS:
            raise unknown_name(f"option of {kind}", option, EVALUATION_OPTIONS)
        wanted = EVALUATION_OPTIONS[option]
        if not isinstance(value, wanted) or isinstance(value, bool):
            raise InputError(f"{option} of {kind} of {name} is {value!r}; give {wanted.__name__}")
        least = 0 if option == "seed" else 1
        if wanted is int and value < least:
            raise InputError(f"{option} of {kind} of {name} is {value}; give {least} or more")
    if options.get("checkpoint", "final") not in CHECKPOINTS:
        raise unknown_name(f"checkpoint of {name}", options["checkpoint"], CHECKPOINTS)
    return Evaluation(kind, name, out / name, out / "eval-results", options)


def carry_out(
    jobs: Sequence[Job],
    out: str | Path,
    *,
    at_a_time: int = 1,
    data_root: str | Path | None = None,
    on_done: Callable[[Outcome], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> list[Outcome]:
    """Carry out jobs in their order, `at_a_time` of them, each in a process of its own.

    What is done is left alone, what was cut off goes on. A job that fails does not stop the others, but for those that
    need it. Each process has its share of the CPU cores to itself and gives way to all other work; with one core it
    computes on one thread, with more it measures what is best (unless OMP_NUM_THREADS says it). All end with this one.

    Args:
        out: the folder of the run folders, which this process keeps to itself meanwhile.
        data_root: where data sets are kept, see `rb_noisy.data.load_data`.
        on_done: called with the outcome of each job as it ends.
        stop: asked several times a second; once it says True, or on any exception, the processes are ended.

    Returns:
        The outcomes in the order of `jobs`; without those that `stop` prevented.

    Raises:
        InputError: another process carries out jobs in this folder.
    """
    if at_a_time < 1:
        raise InputError(f"jobs is {at_a_time}; give the number of runs at a time, from 1 up")
    Path(out).mkdir(parents=True, exist_ok=True)
    outcomes = {job.name: Outcome(job) for job in jobs if job.done()}
    waiting = [job for job in jobs if job.name not in outcomes]
    free = shares(usable_cores(), at_a_time)
    running: dict[str, _Process] = {}

    def end(outcome: Outcome) -> None:
        outcomes[outcome.job.name] = outcome
        if on_done is not None:
            on_done(outcome)

    with only_writer(out):
        try:
            while (waiting or running) and not (stop is not None and stop()):
                for job in [job for job in waiting if _failed(job, outcomes)]:
                    waiting.remove(job)
                    end(Outcome(job, f"it needs {_failed(job, outcomes)}, which failed"))
                for job in _ready(waiting, outcomes, running)[: len(free)]:
                    waiting.remove(job)
                    running[job.name] = _Process.start(job, free.pop(0), data_root)
                for name in [name for name, process in running.items() if process.popen.poll() is not None]:
                    process = running.pop(name)
                    free.append(process.cores)
                    end(process.outcome())
                time.sleep(0.1)
        finally:
            end_all([process.popen for process in running.values()])
    return [outcomes[job.name] for job in jobs if job.name in outcomes]


def _failed(job: Job, outcomes: Mapping[str, Outcome]) -> str:
    return next((name for name in job.needs if name in outcomes and outcomes[name].problem), "")


def _ready(waiting: Sequence[Job], outcomes: Mapping[str, Outcome], running: Mapping[str, _Process]) -> list[Job]:
    """Those that need nothing more, one for each folder: two evaluations would write to the same file of figures."""
    busy, ready = {process.job.folder for process in running.values()}, []
    for job in waiting:
        if job.folder not in busy and all(name in outcomes for name in job.needs):
            ready.append(job)
            busy.add(job.folder)
    return ready


@dataclass(frozen=True)
class _Process:
    job: Job
    popen: subprocess.Popen
    cores: list[int]
    log_start: int  # what is before it in the log was written by an earlier attempt

    @classmethod
    def start(cls, job: Job, cores: list[int], data_root: str | Path | None) -> _Process:
        command = placed(job.command(data_root), cores)
        threads = {"OMP_NUM_THREADS": "1"} if len(cores) == 1 else {}
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with open(job.log, "ab") as log:
            start = log.tell()
            environment = threads | dict(os.environ)
            streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
            return cls(job, subprocess.Popen(command, env=environment, **streams), cores, start)

    def outcome(self) -> Outcome:
        code = self.popen.returncode
        if code == 0 and self.job.done():
            return Outcome(self.job)
        with open(self.job.log, "rb") as log:
            log.seek(self.log_start)
            lines = log.read().decode("utf-8", "replace").split("\n")
        spoken = [line.strip() for line in lines if line.strip()]
        named = [line for line in spoken if line.startswith(("error:", "diverged:"))]
        last = next(reversed(named or spoken), "it said nothing")
        ended = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        return Outcome(self.job, f"{last} ({ended}; see {self.job.log})")


def seconds_left(jobs: Sequence[Job]) -> dict[str, float | None]:
    """How long each job will still take alone on its cores, by its name; 0 for a finished one, None if nothing tells.

    A run tells by its own last epochs, else by those of the runs of the same network and data, in proportion to the
    passes that a step of each method takes. An evaluation tells nothing before one of its kind has been finished.
    """
    paces = [pace for job in jobs if isinstance(job, Training) and (pace := _pace(job)) is not None]
    return {job.name: _left(job, paces) for job in jobs}


def _left(job: Job, paces: Sequence[tuple[Recipe, float]]) -> float | None:
    if job.done():
        return 0.0
    if isinstance(job, Evaluation):
        return None
    run = job.run()
    epochs = job.recipe.epochs - (0 if run is None else len(run.metrics))
    own = _pace(job)
    if own is None:
        alike = [(r, s) for r, s in paces if _network(r) == _network(job.recipe)]
        if not alike:
            return None
        recipe, seconds = min(alike, key=lambda pace: abs(math.log(passes(pace[0]) / passes(job.recipe))))
        return epochs * seconds * passes(job.recipe) / passes(recipe)
    return epochs * own[1]


def _pace(job: Training) -> tuple[Recipe, float] | None:
    """Its recipe and the mean seconds of its last three epochs."""
    run = job.run()
    if run is None or not run.metrics:
        return None
    last = [line["seconds"] for line in run.metrics[-3:]]
    return job.recipe, sum(last) / len(last)


def _network(recipe: Recipe) -> tuple[Any, ...]:
    return recipe.data, recipe.train_size, recipe.backbone, repr(recipe.backbone_options), recipe.precision


def passes(recipe: Recipe) -> int:
    """Forward and backward passes, each counted as one, that a training step takes for an image.

    A trained pass is three (forward, and back to the weights and to the maps), an attack step two.
    """
    objective = recipe.make_objective()
    attack = 0 if objective.attack_loss is None else 2 * recipe.steps
    targets = recipe.make_targets()
    natural = objective.uses_natural or targets.trains_natural
    trained = 3 * (natural + (objective.attack_loss is not None))
    if objective.trains_start:
        trained += 2  # its forward pass is the attack's
    mode = targets.natural_mode(recipe.epochs)
    guiding = 1 if mode == "eval" or (mode == "train" and not natural) else 0
    return attack + guiding + trained * (2 if recipe.make_awp() is not None else 1)
