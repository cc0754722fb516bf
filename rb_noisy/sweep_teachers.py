"""Which network teaches whom in a sweep: a teacher that is named by its method is the zoo's, or another of the runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from rb_noisy.recipes import Recipe
from rb_noisy.sweep import differing

BESIDE = "../"  # begins the name of a teacher whose run folder lies beside its student's
# What a teacher must have in common with its student: one that saw other labels would tell them.
TRAINED_ON = ("data", "train_size", "train_images", "noise", "noise_rate", "noise_seed", "noise_options")


def with_teachers(recipes: Mapping[str, Recipe]) -> dict[str, Recipe]:
    """Recipes by the names of their run folders, in which no teacher is named by its method any more.

    Where a teacher's name is a method, as in {"robust": "pgd-at"}, it is the zoo's model of that method that was
    trained on the same images and labels. Where there is none it is the run among `recipes`; of several, the one most
    like the student. Its name is then "../NAME" (see `rb_noisy.runs.check_teacher`), and it has to be finished before
    the student begins, see `taught_by`. The name of a run among `recipes` stands for that run. What is none of these
    stays as it is.
    """
    return {
        name: _with_teachers(recipe, {other: r for other, r in recipes.items() if other != name})
        for name, recipe in recipes.items()
    }


def taught_by(recipe: Recipe) -> list[str]:
    """The names of the run folders beside its own that a recipe's teachers are in."""
    return [name.removeprefix(BESIDE) for name in recipe.make_targets().teachers if name.startswith(BESIDE)]


def _with_teachers(student: Recipe, recipes: Mapping[str, Recipe]) -> Recipe:
    found = {}
    for option, method in student.target_options.items():
        if method not in student.make_targets().teachers:
            continue
        if method in recipes:
            found[option] = BESIDE + method
            continue
        able = [n for n, r in recipes.items() if r.method == method and _trained_alike(r, student)]
        if (model := _of_the_zoo(method, student)) is not None:
            found[option] = model
        elif able:
            found[option] = BESIDE + min(able, key=lambda name: len(differing(recipes[name], student)))
    return dataclasses.replace(student, target_options=student.target_options | found)


def _of_the_zoo(method: str, student: Recipe) -> str | None:
    from model_zoo.registry import read_cards

    cards = (card for card in read_cards() if card["method"] == method)
    return next((card["name"] for card in cards if _trained_alike(Recipe.recorded(card["recipe"]), student)), None)


def _trained_alike(one: Recipe, other: Recipe) -> bool:
    return all(getattr(one, name) == getattr(other, name) for name in TRAINED_ON)
