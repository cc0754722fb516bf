"""Teachers that a sweep trains itself, and those that it takes from the zoo."""

import pytest
import torch
import typer
from typer.testing import CliRunner

from rb_noisy.commands.sweep import parse_axes, sweep
from rb_noisy.errors import InputError
from rb_noisy.jobs import carry_out, make_jobs
from rb_noisy.runs import Run, check_teacher, load_teacher
from rb_noisy.studies import study
from rb_noisy.sweep import expand_grid
from rb_noisy.sweep_teachers import taught_by, with_teachers
from rb_noisy.targets import TAUGHT
from rb_noisy.training import train

app = typer.Typer()
app.command()(sweep)


def call(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})


def recipes_of(name, *options):
    axes = parse_axes(list(options))
    grid = study(name, axes["data"])
    return with_teachers(expand_grid({**grid.axes, **axes}, grid.recipes))


def teachers_of(name, *options):
    """Method and teachers of the rows that have any."""
    rows = [recipe for recipe in recipes_of(name, *options).values() if recipe.targets_name in TAUGHT]
    return [(recipe.method, *recipe.make_targets().teachers) for recipe in rows]


@pytest.mark.parametrize("name", ["sglr-table2", "methods"])
def test_where_the_zoo_has_no_teacher_it_is_a_run_of_the_sweep(name):
    """The zoo's at_cifar10 is of a JPEG copy, and of another method."""
    robust, standard = "../pgd-at_clean_seed0", "../st_clean_seed0"
    assert teachers_of(name, "data=cifar10") == [
        ("pgd-at+kd", robust),
        ("pgd-at+kd+swa", robust, standard),
        ("pgd-at+ard", robust),
        ("pgd-at+rslad", robust),
    ]
    recipes = recipes_of(name, "data=cifar10")
    names = list(recipes)
    for student, recipe in recipes.items():
        for teacher in taught_by(recipe):
            assert names.index(teacher) < names.index(student), "so that it is trained before"


def test_the_zoos_teacher_is_taken_where_it_was_trained_on_the_same_images_and_labels():
    assert teachers_of("sglr-table2", "data=digits", "epochs=40")[1] == ("pgd-at+kd+swa", "at_digits", "st_digits")
    noisy = ["data=digits", "noise=symmetric"]
    assert teachers_of("sglr-table2", *noisy, "noise_rate=0.4")[0][1] == "at_digits_sym40"
    assert teachers_of("sglr-table2", *noisy, "noise_rate=0.3")[0][1] == "../pgd-at_symmetric0.3_seed0"
    assert teachers_of("sglr-table2", *noisy, "noise_rate=0.4", "seed=1")[0][1] == "../pgd-at_symmetric0.4_seed1"
    assert teachers_of("sglr-table2", "data=digits", "train_size=500")[0][1] == "../pgd-at_clean_seed0"


def test_of_several_runs_the_one_most_like_the_student_teaches_it():
    recipes = recipes_of("sglr-table2", "data=mnist", "noise=pair", "noise_rate=0,0.4", "seed=0,1", "lr=0.01,0.02")
    taught = {name: taught_by(recipe) for name, recipe in recipes.items() if recipe.method == "pgd-at+rslad"}
    assert len(taught) == 8
    for name, (teacher,) in taught.items():
        one, other = recipes[name], recipes[teacher]
        assert other.method == "pgd-at"
        for field in ("noise", "noise_rate", "noise_seed", "seed", "lr"):
            assert getattr(one, field) == getattr(other, field)


def test_only_teachers_are_looked_up():
    grid = [{"method": "st"}, {"method": "pgd-at+rslad", "target_options": {"robust": "resnet18.a1_in1k"}}]
    grid += [{"method": "pgd-at+adr+wa"}, {"method": "pgd-at+sglr", "target_options": {"natural_pass": "eval"}}]
    recipes = expand_grid({"data": ["digits"]}, grid)
    assert with_teachers(recipes) == recipes


def test_table_2_would_run_on_cifar_and_a_teacher_that_nobody_trains_is_refused(tmp_path):
    out = ["--dry-run", "--out", tmp_path / "table2"]
    done = call("--grid", "sglr-table2", "--data", "cifar10", *out)
    assert done.exit_code == 0, done.output
    assert "pgd-at+kd_clean_robust-pgd-at_seed0  to do" in done.output
    for missing in ("../nobody", "pgd-at"):
        alone = ["--data", "cifar10", "--method", "pgd-at+rslad", "--set", f"target_options.robust={missing}"]
        refused = call(*alone, *out)
        assert refused.exit_code == 2
        assert f"teacher '{missing}' is neither a run folder" in refused.output


def test_students_learn_from_the_runs_beside_them(tiny_recipe, tmp_path, monkeypatch):
    fields = tiny_recipe(epochs=1, noise="none", noise_rate=None).changes()
    entries = [{"method": "pgd-at"}, {"method": "st"}]
    entries.append({"method": "pgd-at+kd", "target_options": {"robust": "pgd-at", "standard": "st"}})
    recipes = with_teachers(expand_grid({name: [value] for name, value in fields.items()}, entries))
    jobs = make_jobs(recipes, tmp_path / "sweep")
    assert set(jobs[-1].needs) == {jobs[0].name, jobs[1].name}
    outcomes = carry_out(list(reversed(jobs)), tmp_path / "sweep", at_a_time=2)  # the student waits all the same
    assert [outcome.problem for outcome in outcomes] == ["", "", ""]
    # The folder may move, and be named from anywhere: the teacher's name is relative to the student's folder.
    (tmp_path / "sweep").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    assert all(job.done() for job in make_jobs(recipes, "."))
    student = next(name for name, recipe in recipes.items() if recipe.method == "pgd-at+kd")
    images = torch.rand(2, 1, 8, 8)
    network = load_teacher("../pgd-at_clean_seed0", images, 4, tmp_path / "moved" / student)
    torch.testing.assert_close(network(images), Run.open("pgd-at_clean_seed0").load()(images))


def test_a_teacher_beside_the_student_is_found_from_anywhere_once_it_is_finished(tiny_recipe, tmp_path):
    train(tiny_recipe(epochs=1), tmp_path / "teacher")
    check_teacher("../teacher", tmp_path / "student")  # which is not there yet
    check_teacher(str(tmp_path / "teacher"))
    with pytest.raises(InputError, match="neither a run folder"):
        check_teacher("../teacher", tmp_path / "elsewhere" / "student")
    (tmp_path / "teacher" / "final.safetensors").unlink()
    with pytest.raises(InputError, match="has no final weights yet"):
        train(tiny_recipe(method="pgd-at+rslad", target_options={"robust": "../teacher"}), tmp_path / "student")
