"""The schedule of a recipe: milestones in epochs or shares of the run, and what the learning rate falls by."""

import json

import pytest

from rb_noisy.errors import InputError
from rb_noisy.recipes import Recipe, based_on


def rates(recipe, *epochs):
    return [recipe.learning_rate(epoch) for epoch in epochs]


def test_milestones_may_be_shares_of_the_run():
    shares = {"data": "cifar10", "milestones": [0.3, 0.6]}
    assert Recipe(**shares, epochs=100).milestones == (30, 60)
    assert Recipe(**shares, epochs=10).milestones == (3, 6)
    assert Recipe(**shares, epochs=2).milestones == (1, 1), "never before the first epoch is over"
    assert Recipe(data="cifar10", milestones=[3, 0.5], epochs=8).milestones == (3, 4)
    # Shares whose decimals fall just short of an epoch: 0.29 * 100 and 0.57 * 100 are below 29 and 57.
    assert Recipe(data="cifar10", milestones=[0.29, 0.57], epochs=100).milestones == (29, 57)


@pytest.mark.parametrize(
    ("data", "epochs", "milestones"),
    [
        ("cifar10", None, (100, 150)),
        ("npz:mine.npz", 7, (3, 5)),
        ("digits", None, (30, 45)),
        ("digits", 1, (1, 1)),
        ("mnist", None, (3, 6)),
        ("mnist", 100, (30, 60)),
    ],
)
def test_the_default_milestones_are_shares_of_the_run(data, epochs, milestones):
    assert Recipe(data=data, epochs=epochs).milestones == milestones


def test_each_milestone_has_its_own_factor():
    recipe = Recipe(data="cifar10", epochs=12, milestones=[6, 9, 11], decays=[0.1, 0.1, 0.5])
    assert rates(recipe, 0, 5.99, 6, 9, 11) == pytest.approx([0.1, 0.1, 0.01, 0.001, 0.0005])
    assert Recipe.from_json(json.dumps(recipe.to_dict())) == recipe
    assert recipe.changes()["decays"] == [0.1, 0.1, 0.5]
    assert Recipe.from_dict(recipe.changes()) == recipe


def test_recipes_from_before_there_were_decays_have_the_very_same_learning_rates():
    old = Recipe(data="cifar10", epochs=8, milestones=[1, 2, 3, 4, 5, 6, 7]).to_dict()
    assert old.pop("decays") is None
    recipe = Recipe.from_dict(old)
    assert rates(recipe, *range(8)) == [0.1 * 0.1**n for n in range(8)]
    assert "decays" not in recipe.changes()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"decays": [0.1]}, "1 decays for 2 milestones"),
        ({"decays": [0.1, 0]}, "decays holds 0"),
        ({"decays": [0.1, 10]}, "decays holds 10"),
        ({"decays": [0.1, "half"]}, "decays holds 'half'"),
        ({"decays": [0.1, True]}, "decays holds True"),
        ({"decays": 0.1}, "decays is 0.1"),
        ({"milestones": [-1, 5]}, "milestones holds -1"),
        ({"milestones": [float("nan"), 5]}, "milestones holds nan"),
        ({"milestones": ["5", 6]}, "milestones holds '5'"),
    ],
)
def test_bad_schedules_are_named(fields, words):
    with pytest.raises(InputError) as error:
        Recipe(data="cifar10", **fields)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("method", "epochs", "expected"),
    [
        # SGLR's released main_adv.py: `for epoch in range(args.start_epoch, args.epochs + 1)` with start_epoch 1, ES=90
        # and EPOCHS=200 in its script, and in losses/loss.py hard labels while `epoch < self.es`.
        ("pgd-at+sglr-released", 200, {"start_epoch": 89}),
        ("pgd-at+sglr", 200, {"start_epoch": 89}),
        ("pgd-at+sglr", 20, {"start_epoch": 8}),
        # TE's released train_te.py: `for epoch in range(1, args.epochs + 1)`, start-es 90, end-es 150.
        ("pgd-at+te", 200, {"start_epoch": 89, "ramp_end": 149}),
        # SAT's released main.py counts from 0: ES=60, EPOCHS=200.
        ("pgd-at+sat", 200, {"start_epoch": 60}),
        # [NL E.1]: "we use the same generation method with PGD-based annotator as previous mentioned before Epoch 40".
        ("pgd-at+annotator", 120, {"start_epoch": 40}),
        ("pgd-at+annotator", 3, {"start_epoch": 1}),
    ],
)
def test_targets_start_where_the_released_code_starts_counted_from_0(method, epochs, expected):
    assert Recipe(data="cifar10", method=method, epochs=epochs).target_options == expected


def test_cifar_images_are_not_standardised_by_default():
    """As in [SGLR]'s released transforms, and in [NL App. C.1]: "Each pixel is scaled by 1/255"."""
    assert [Recipe(data=data).normalize for data in ("cifar10", "cifar100", "npz:mine.npz")] == [False] * 3


def test_another_length_moves_what_was_named_by_epoch():
    base = Recipe(
        data="digits",
        method="pgd-at+sglr",
        epochs=60,
        milestones=[20, 40],
        target_options={"r": 0.4, "start_epoch": 27},
    )
    longer = Recipe.from_dict(based_on(base, {"epochs": 100}))
    assert longer.milestones == (33, 66)
    assert longer.target_options == {"r": 0.4, "start_epoch": 45}
    chosen = Recipe.from_dict(based_on(base, {"epochs": 100, "target_options": {"start_epoch": 3}, "milestones": [9]}))
    assert (chosen.milestones, chosen.target_options["start_epoch"]) == ((9,), 3)
    assert Recipe.from_dict(based_on(base, {"lr": 0.05})).target_options["start_epoch"] == 27
