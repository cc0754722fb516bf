"""Many recipes as many run folders: the grid, its names, and processes that carry it out side by side."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rb_noisy.errors import InputError
from rb_noisy.files import write_json
from rb_noisy.recipes import Recipe, flatten, merge
from rb_noisy.runs import Run

NOISE_FIELDS = ("noise", "noise_rate", "noise_seed", "noise_options")
NOISES_WITHOUT_RATE = ("human", "matrix")
SECONDS_TO_END = 10.0  # for a run that is asked to end, before it is killed


@dataclass(frozen=True)
class Outcome:
    """How one recipe of a sweep ended.

    Attributes:
        name: the name of its run folder.
        run: the finished run; None if it failed.
        problem: why it failed; "" if it did not.
    """

    name: str
    run: Run | None
    problem: str = ""


def expand_grid(
    axes: Mapping[str, Sequence[Any]], entries: Sequence[Mapping[str, Any]] | None = None
) -> dict[str, Recipe]:
    """The recipes that a grid spans, by the names of their run folders.

    A name says method, label noise and seed, and whatever else varies, so that a grid with more methods, rates or
    seeds finds the runs of the smaller one. Noise at rate 0 is no noise: one run, whatever its kind. Where there are
    several kinds of noise, those that take no rate (none, human, matrix) are one run for all rates.

    Args:
        axes: recipe field, or option ("target_options.r") → its values; every combination is a recipe.
        entries: recipe fields as dicts, each of them merged over every combination.

    Raises:
        InputError: a value that no recipe can have; two different recipes with one name.
    """
    points = []
    for values in itertools.product(*axes.values()):
        point: dict[str, Any] = {}
        for name, value in zip(axes, values, strict=True):
            field, dot, option = name.partition(".")
            point = merge(point, {field: {option: value}} if dot else {field: value})
        points += [merge(point, dict(entry)) for entry in (entries or [{}])]
    several = len({_noise_kind(point) for point in points}) > 1
    points = [_name_teachers(_settle_noise(point, several)) for point in points]
    flat = [flatten(point) for point in points]
    fields = sorted({name for point in flat for name in point}, key=_field_order)
    always = {"method", "seed", *NOISE_FIELDS[:2]}
    if "noise_seed" not in axes and not any("noise_seed" in entry for entry in entries or []):
        # Another seed is another repetition of the whole experiment: its labels are drawn anew too.
        always.add("noise_seed")
        noisy = [point for point in points if point.get("noise", "none") != "none"]
        for point in noisy:
            point["noise_seed"] = point.get("seed", 0)
        flat = [flatten(point) for point in points]
    varying = [name for name in fields if name not in always and _varies(name, flat)]
    recipes: dict[str, Recipe] = {}
    for point, values in zip(points, flat, strict=True):
        recipe = Recipe.from_dict(point)
        name = _run_name(recipe, {name: values[name] for name in varying if name in values})
        if recipes.setdefault(name, recipe) != recipe:
            raise InputError(
                f"two recipes of the sweep share the name {name!r} and differ in "
                f"{', '.join(_differing(recipe, recipes[name]))}; run them into two folders"
            )
    return recipes


def find_runs(recipes: Mapping[str, Recipe], out: str | Path) -> dict[str, Run | None]:
    """The runs that are in `out` already, finished or not, by name; None where there is none.

    Raises:
        InputError: a folder of that name holds a run of another recipe.
    """
    found: dict[str, Run | None] = {}
    for name, recipe in recipes.items():
        folder = Path(out) / name
        found[name] = run = Run.open(folder) if (folder / "run.json").is_file() else None
        if run is not None and run.recipe != recipe:
            raise InputError(
                f"{folder} holds a run of another recipe ({', '.join(_differing(recipe, run.recipe))} differ); "
                "sweep into another folder, or move that run away"
            )
    return found


def run_sweep(
    recipes: Mapping[str, Recipe],
    out: str | Path,
    *,
    jobs: int = 1,
    data_root: str | Path | None = None,
    on_done: Callable[[Outcome], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> list[Outcome]:
    """Carry out recipes, each as a run folder `out`/name, `jobs` at a time, each in a process of its own.

    Finished runs are left alone, half-done ones continued. A run that fails does not stop the others. Each process has
    its share of the CPU cores unless OMP_NUM_THREADS says otherwise, and writes to `train.log` in its folder.

    Args:
        data_root: where data sets are kept, see `rb_noisy.data.load_data`.
        on_done: called with the outcome of each run as it ends.
        stop: asked several times a second; once it says True, or on any exception, the processes are ended.

    Returns:
        The outcomes in the order of `recipes`; without those that `stop` prevented.

    Raises:
        InputError: a folder holds a run of another recipe (nothing has been started then).
    """
    if jobs < 1:
        raise InputError(f"jobs is {jobs}; give the number of runs at a time, from 1 up")
    found = find_runs(recipes, out)
    outcomes = {name: Outcome(name, run) for name, run in found.items() if run is not None and run.finished}
    waiting = [name for name in recipes if name not in outcomes]
    running: dict[str, _Job] = {}
    try:
        while (waiting or running) and not (stop is not None and stop()):
            while waiting and len(running) < jobs:
                name = waiting.pop(0)
                running[name] = _start(recipes[name], Path(out) / name, jobs, data_root)
            for name in [name for name, job in running.items() if job.process.poll() is not None]:
                outcomes[name] = _outcome(name, running.pop(name))
                if on_done is not None:
                    on_done(outcomes[name])
            time.sleep(0.1)
    finally:
        _end([job.process for job in running.values()])
    return [outcomes[name] for name in recipes if name in outcomes]


@dataclass(frozen=True)
class _Job:
    process: subprocess.Popen
    folder: Path
    log_start: int  # what is before it in the log was written by an earlier attempt


def _start(recipe: Recipe, folder: Path, jobs: int, data_root: str | Path | None) -> _Job:
    write_json(folder / "recipe.json", recipe.to_dict())
    command = [sys.executable, "-m", "rb_noisy", "train", "--recipe", folder / "recipe.json", "--out", folder]
    command += ["--resume", *([] if data_root is None else ["--data-root", data_root])]
    threads = {"OMP_NUM_THREADS": str(max(1, _cores() // jobs))}
    with open(folder / "train.log", "ab") as log:
        start = log.tell()
        process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=threads | dict(os.environ),
        )
    return _Job(process, folder, start)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _outcome(name: str, job: _Job) -> Outcome:
    code = job.process.returncode
    if code == 0:
        return Outcome(name, Run.open(job.folder))
    file = job.folder / "train.log"
    with open(file, "rb") as log:
        log.seek(job.log_start)
        lines = log.read().decode("utf-8", "replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
    ended = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    return Outcome(name, None, f"{last} ({ended}; see {file})")


def _end(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + SECONDS_TO_END
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _noise_kind(point: Mapping[str, Any]) -> str:
    return str(point.get("noise", "none")).partition(":")[0]


def _settle_noise(point: dict[str, Any], several: bool) -> dict[str, Any]:
    """`point` without the noise fields that have no effect; `several`: the grid has several kinds of noise."""
    kind, rate = _noise_kind(point), point.get("noise_rate")
    if kind in NOISES_WITHOUT_RATE:
        dropped = ("noise_rate",) if several or rate == 0 else ()
    elif kind == "none" and rate and not several:
        raise InputError(f"the noise rate is {rate} but no noise is named; name one, such as symmetric")
    else:
        dropped = NOISE_FIELDS if kind == "none" or rate == 0 else ()
    return {name: value for name, value in point.items() if name not in dropped}


def _name_teachers(point: dict[str, Any]) -> dict[str, Any]:
    """`point` with its data set's name for {data} in the names of teachers."""
    options = point.get("target_options")
    if not options:
        return point
    named = {k: v.replace("{data}", str(point.get("data"))) if isinstance(v, str) else v for k, v in options.items()}
    return point | {"target_options": named}


def _varies(name: str, flat: Sequence[Mapping[str, Any]]) -> bool:
    """Whether points differ in a field; the other fields of a noise only among those that have noise."""
    points = [point for point in flat if point.get("noise", "none") != "none"] if name.startswith("noise_") else flat
    return len({repr(point.get(name)) for point in points}) > 1


def _field_order(name: str) -> tuple[int, str]:
    known = [field.name for field in dataclasses.fields(Recipe)]
    field = name.partition(".")[0]
    return (known.index(field) if field in known else len(known), name)


def _run_name(recipe: Recipe, varying: Mapping[str, Any]) -> str:
    """`varying`: the values to name besides method, noise and seed, by field."""
    varying = dict(varying)
    data = [_slug(varying.pop("data"))] if "data" in varying else []
    noise = "clean" if recipe.noise == "none" else _slug(recipe.noise)
    noise += "" if recipe.noise_rate is None else _slug(recipe.noise_rate)
    if recipe.noise == "human" and recipe.noise_options.get("key"):
        noise += f"-{_slug(recipe.noise_options['key'])}"  # several sets of one file, as CIFAR-N has them
    rest = [_slug(value) if name == "backbone" else _named_slug(name, value) for name, value in varying.items()]
    return "_".join([*data, _slug(recipe.method), noise, *rest, f"seed{recipe.seed}"])


def _named_slug(name: str, value: Any) -> str:
    short = name.rpartition(".")[2]
    return f"{short}{'-' if isinstance(value, bool | str) else ''}{_slug(value)}"


def _slug(value: Any) -> str:
    """A value as part of a file name: letters, figures and . + - _, with no path of a file."""
    if isinstance(value, float):
        text = f"{value:g}" if float(f"{value:g}") == value else repr(value)
    elif isinstance(value, str) and not re.fullmatch(r"[\d.]+/[\d.]+", value):  # 8/255 is no file
        kind, *places = value.split(":")  # npz:/data/mine.npz
        text = "-".join([kind, *(Path(place).stem for place in places)])
    else:
        text = str(value).lower()
    return re.sub(r"[^\w.+-]+", "-", text).strip("-") or "none"


def _differing(one: Recipe, other: Recipe) -> list[str]:
    theirs = other.to_dict()
    return [name for name, value in one.to_dict().items() if value != theirs[name]]
