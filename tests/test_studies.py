"""The studies have the papers' own settings. Beside what is expected stands the paper's line."""

import pytest
import typer
from typer.testing import CliRunner

from rb_noisy.commands.sweep import parse_axes, read_grid, sweep
from rb_noisy.errors import InputError
from rb_noisy.studies import study
from rb_noisy.sweep import expand_grid

CIFAR = ["cifar10", "cifar100", "npz:cifar10_jpeg.npz"]
app = typer.Typer()
app.command()(sweep)


def recipes_of(name, *options):
    """What `rb-noisy sweep --grid NAME --set OPTION ...` would run."""
    axes = parse_axes(list(options))
    grid = read_grid(name, axes.get("data", []))
    return list(expand_grid({**grid.axes, **axes}, grid.recipes).values())


def settings_of(recipe, names):
    return {name: getattr(recipe, name) for name in names}


def learning_rates(recipe, *epochs):
    return pytest.approx([recipe.learning_rate(epoch) for epoch in epochs])


# [NL C.1]: "we normalize it into [0, 1]: Each pixel is scaled by 1/255. We perform the standard CIFAR-10 data
# augmentation: a random 4 pixel crop followed by a random horizontal flip. [...] We train ResNet-18 in ST and AT
# using SGD with 0.9 momentum for 100 epochs on CIFAR-10 dataset. The initial learning rate is 0.1 divided by 10 at
# Epoch 30 and 60 respectively. The weight decay=0.0005. [...] In AT, we set the perturbation bound ε = 0.031, the PGD
# step size α = 0.007, and PGD step numbers K = 10. [...] PGD-20 attack with the same perturbation bound ε = 0.031 and
# the step size α = 0.031/4 [...] All PGD generation have a random start, i.e, the uniformly random perturbation of
# [−ε, ε]". The batch size of 128 is E.1's.
NL_NOISE = {
    "backbone": "resnet18_cifar",
    "epochs": 100,
    "schedule": "multistep",
    "milestones": (30, 60),
    "decays": None,
    "lr": 0.1,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "batch_size": 128,
    "eps": 0.031,
    "alpha": 0.007,
    "steps": 10,
    "track_steps": 20,
    "track_alpha": 0.031 / 4,
    "norm": "Linf",
    "augment": True,
    "normalize": False,
}


@pytest.mark.parametrize("data", CIFAR)
def test_nl_noise_on_cifar(data):
    for recipe in recipes_of("nl-noise", f"data={data}"):
        assert settings_of(recipe, NL_NOISE) == NL_NOISE
        assert learning_rates(recipe, 29.9, 30, 59.9, 60) == [0.1, 0.01, 0.01, 0.001]
        assert recipe.make_objective().random_start is (recipe.method == "pgd-at")


def test_nl_noise_on_mnist():
    """[NL C.1]: "For MNIST dataset, we use SmallCNN (Zhang et al., 2019a), and set the initial learning rate as 0.01.
    The rest of the settings remain the same as training on CIFAR-10." [NL D.2]: "On MNIST, the geometry value κ is
    calculated by PGD-40 attack with the perturbation bound ε = 0.3 and the step size α = 0.01."
    """
    expected = {"backbone": "small_cnn", "lr": 0.01, "epochs": 100, "milestones": (30, 60), "normalize": False}
    expected |= {"eps": 0.3, "alpha": 0.01, "steps": 40, "track_steps": 40, "track_alpha": 0.01, "augment": False}
    expected |= {"weight_decay": 5e-4, "momentum": 0.9, "batch_size": 128}
    for recipe in recipes_of("nl-noise", "data=mnist"):
        assert settings_of(recipe, expected) == expected


@pytest.mark.parametrize("data", CIFAR)
def test_nl_annotator_on_cifar(data):
    """[NL E.1]: "For all annotators, we train WRN-32-10 [...] for 120 epochs using SGD with 0.9 momentum. The initial
    learning rate is 0.1 reduced to 0.01, 0.001 and 0.0005 at epoch 60, 90 and 110. The weight decay is 0.0002. [...]
    the perturbation bound ε_train = 0.031, the PGD step is fixed to 10, and the step size is fixed to 0.007. [...]
    before Epoch 40. After that, we use our Algorithm 2 to train our robust annotator. We set the threshold for
    geometry value K = 2 and the threshold for loss value L to the loss value of 20% · m largest natural data in each
    mini-batch, where the m = 128 is batch size. [...] The perturbation bound ε_test = 0.031, the step number is 20,
    and the step size α = ε_test/4".
    """
    expected = NL_NOISE | {"backbone": "wrn_32_10", "epochs": 120, "weight_decay": 2e-4}
    expected |= {"milestones": (60, 90, 110), "decays": (0.1, 0.1, 0.5)}
    recipes = recipes_of("nl-annotator", f"data={data}")
    for recipe in recipes:
        assert settings_of(recipe, expected) == expected
        reached = learning_rates(recipe, 0, 59.9, 60, 89.9, 90, 109.9, 110, 119.9)
        assert reached == [0.1, 0.1, 0.01, 0.01, 0.001, 0.001, 0.0005, 0.0005]
    (annotator,) = [recipe.make_targets() for recipe in recipes if recipe.method == "pgd-at+annotator"]
    assert (annotator.start_epoch, annotator.kappa_threshold, annotator.noise_rate) == (40, 2, 0.2)


# [SGLR §4]: "We set the perturbation budget to ε = 8/255 under the ℓ∞ norm-bounded constraint. We use ResNet-18 [15]
# as our default network architecture unless otherwise specified. For all experiments, the model is trained using SGD
# with a momentum of 0.9, weight decay of 5 × 10⁻⁴, and an initial learning rate of 0.1 for a total of 200 epochs. The
# learning rate is decayed by a factor of 0.1 at the 100-th and 150-th epochs". The released code adds ARCH=resnet18
# (its post-activation ResNet), NUM_STEPS=10, --step-size 2.0/255.0, BATCH_SIZE=128, and transforms without
# normalisation.
SGLR = {
    "backbone": "resnet18_cifar",
    "epochs": 200,
    "schedule": "multistep",
    "milestones": (100, 150),
    "decays": None,
    "lr": 0.1,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "batch_size": 128,
    "eps": 8 / 255,
    "alpha": 2 / 255,
    "steps": 10,
    "norm": "Linf",
    "augment": True,
    "normalize": False,
}


@pytest.mark.parametrize("data", CIFAR)
@pytest.mark.parametrize("name", ["sglr-table2", "sglr-table3", "sglr-table4", "sglr-noise"])
def test_sglr_studies_on_cifar(name, data):
    for recipe in recipes_of(name, f"data={data}"):
        assert settings_of(recipe, SGLR) == SGLR
        assert learning_rates(recipe, 99.9, 100, 149.9, 150) == [0.1, 0.01, 0.01, 0.001]


def test_what_the_user_gives_overrides_a_studys_setting_and_milestones_move_with_the_length():
    options = ["data=cifar10", "backbone=small_cnn", "epochs=12", "weight_decay=0"]
    for recipe in recipes_of("nl-annotator", *options):
        assert (recipe.backbone, recipe.weight_decay, recipe.milestones) == ("small_cnn", 0, (6, 9, 11))
        assert recipe.eps == 0.031
    lengths = [recipe.milestones for recipe in recipes_of("nl-noise", "data=cifar10", "method=st", "epochs=10,50")]
    assert set(lengths) == {(3, 6), (15, 30)}


def test_a_study_without_settings_for_a_data_set_has_its_defaults():
    grid = study("nl-noise", ["digits"])
    assert set(grid.axes) == {"method", "noise", "noise_rate"}
    assert {recipe.eps for recipe in recipes_of("nl-noise", "data=digits")} == {0.2}
    assert {recipe.backbone for recipe in recipes_of("sglr-table3", "data=mnist")} == {"small_cnn"}


def test_data_sets_with_one_setting_span_a_grid_and_others_are_refused():
    recipes = recipes_of("sglr-table3", "data=cifar10,cifar100")
    assert [recipe.data for recipe in recipes].count("cifar100") == 4
    with pytest.raises(InputError, match="nl-noise has other settings for mnist than for cifar10; sweep them into two"):
        recipes_of("nl-noise", "data=cifar10,mnist")


def test_the_command_takes_a_studys_settings(tmp_path):
    done = CliRunner().invoke(
        app, ["--grid", "nl-noise", "--data", "cifar10", "--epochs", "10", "--dry-run", "--out", str(tmp_path)]
    )
    assert done.exit_code == 0, done.output
    # What a study sets once is no part of a name.
    assert "pgd-at_symmetric0.4_seed0" in done.output.split()
