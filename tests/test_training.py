import functools
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rb_noisy.data import from_bytes, load_data
from rb_noisy.errors import InputError
from rb_noisy.objectives import OBJECTIVES
from rb_noisy.recipes import PARTS, Recipe
from rb_noisy.runs import Run
from rb_noisy.targets import TAUGHT
from rb_noisy.tracking import MEASURES
from rb_noisy.training import TrainingDiverged, _Trainer, train
from rb_noisy.training_data import noisy_labels
from rb_noisy.weights import AWP

MEASURED = ("natural_acc", "pgd_acc", "loss", "kappa")


def weights(run, checkpoint="final"):
    return load_file(run.path / f"{checkpoint}.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


LAUNCHERS = {  # the two ways to start several processes
    "accelerate": ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
    "torchrun": ("torch.distributed.run", "--nproc_per_node", "2"),
}


def two_processes(launcher, *arguments):
    """Run them on the CPU to their end; what became of them."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", *LAUNCHERS[launcher], *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


def succeed(done):
    assert done.returncode == 0, done.stderr[-3000:]


METHODS = [
    *OBJECTIVES,
    *(f"pgd-at+{part}" for parts in PARTS.values() for part in parts if part not in ("hard", "adr", "ce", *TAUGHT)),
    *("st+sglr", "st+sat+wa", "trades+ls", "trades+sglr", "trades+te", "trades+sat", "trades+sglr+awp+swa"),
    *(
        "pgd-at+sglr+awp",
        "pgd-at+annotator+sce",
        "trades+te+swa",
        "mart+sglr+wa",
        "nrat+elr",
        "n-fgsm+sglr+wa",
        "pgd-at+adr+wa+awp",
    ),
]


@pytest.mark.parametrize("method", METHODS)
def test_methods_train_and_compose(method, tiny_recipe, tmp_path):
    # A schedule that starts at epoch 90 of 200 must start within a short run too.
    fast = {"steps": None, "alpha": None} if "fgsm" in method or "liet" in method else {}
    run = train(tiny_recipe(method=method, epochs=3, **fast), tmp_path / "run")
    losses = [line["train_correct_loss"] for line in run.metrics]
    # Not the loss that is minimised, which may hold a penalty that grows. The annotator trusts a network of one epoch
    # here, and re-labels by it.
    assert min(losses[1:]) < losses[0] or "annotator" in method
    assert run.finished
    assert all(v.isfinite().all() for v in weights(run).values() if v.is_floating_point())


def test_a_run_folder_holds_recipe_metrics_and_weights(tiny_recipe, tmp_path):
    recipe = tiny_recipe(method="pgd-at+sglr", epochs=3)
    seen = []
    run = train(recipe, tmp_path / "run", on_epoch=seen.append)
    assert Recipe.from_dict(json.loads((run.path / "run.json").read_text())["recipe"]) == recipe
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert lines == seen == list(run.metrics)
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    for line in lines:
        for part in ("train_correct", "train_incorrect", "test"):
            for measure in MEASURED:
                assert line[f"{part}_{measure}"] >= 0, (part, measure)
        assert line["gradient_norm"] > 0
        assert line["seconds"] > 0
    best = max(range(3), key=lambda e: lines[e]["test_pgd_acc"])
    assert run.best_epoch == best
    model = run.load("best")
    assert not model.training
    data = load_data(recipe.data)
    assert model(data.x_test).shape == (60, 4)


def test_tracked_accuracies_are_those_of_the_saved_model(tiny_recipe, tmp_path):
    run = train(tiny_recipe(epochs=2, track=0), tmp_path / "run")
    data, model, last = load_data(run.recipe.data), run.load("final"), run.metrics[-1]
    labels = noisy_labels(run.recipe, data)
    with torch.no_grad():
        hits = model(data.x_train).argmax(1) == labels.given
        assert last["train_correct_natural_acc"] == pytest.approx(hits[~labels.is_wrong].double().mean().item())
        assert last["train_incorrect_natural_acc"] == pytest.approx(hits[labels.is_wrong].double().mean().item())
        test_hits = model(data.x_test).argmax(1) == data.y_test
        assert last["test_natural_acc"] == pytest.approx(test_hits.double().mean().item())


def test_kappa_and_loss_of_incorrect_labels_are_worse_after_training(tiny_recipe, tmp_path):
    last = train(tiny_recipe(epochs=6, lr=0.1), tmp_path / "run").metrics[-1]
    assert last["test_natural_acc"] > 0.8
    assert last["train_incorrect_kappa"] < last["train_correct_kappa"]
    assert last["train_incorrect_loss"] > last["train_correct_loss"]


def test_same_seed_same_weights_and_another_seed_others(tiny_recipe, tmp_path):
    options = {"method": "trades+sglr", "augment": True}
    first, second = (train(tiny_recipe(**options), tmp_path / name) for name in ("a", "b"))
    other = train(tiny_recipe(**options, seed=1), tmp_path / "c")
    assert same(weights(first), weights(second))
    assert not same(weights(first), weights(other))


@pytest.mark.parametrize("moment", ["in the middle of an epoch", "while the second epoch is being saved"])
def test_a_sigkilled_run_resumes_to_the_same_weights_bit_by_bit(moment, tiny_recipe, tmp_path):
    """Momentum, running label averages, random numbers and the best checkpoint must all survive."""
    options = {"augment": True, "validation": 20, "backbone_options": {"drop_rate": 0.2}}
    recipe = tiny_recipe(method="pgd-at+sglr", epochs=4, **options)
    whole = train(recipe, tmp_path / "whole")
    (tmp_path / "recipe.json").write_text(json.dumps(recipe.to_dict()))
    if moment == "in the middle of an epoch":
        dying = "on_batch=lambda e, b, n: e == 2 and b == 2 and os.kill(os.getpid(), signal.SIGKILL)"
        setup = ""
    else:  # between writing the metrics and writing the state
        dying = ""
        setup = (
            "import rb_noisy.checkpoint as t; real = t.save_tensors; calls = []\n"
            "def save(tensors, file, metadata):\n"
            "    calls.append(file.name) if file.name.startswith('state') else None\n"
            "    os.kill(os.getpid(), signal.SIGKILL) if len(calls) == 2 else real(tensors, file, metadata)\n"
            "t.save_tensors = save\n"
        )
    program = (
        f"import os, signal, torch; torch.set_num_threads(1)\n{setup}"
        "from rb_noisy import Recipe, train\n"
        f"recipe = Recipe.from_json(open({str(tmp_path / 'recipe.json')!r}).read())\n"
        f"train(recipe, {str(tmp_path / 'run')!r}, {dying})"
    )
    killed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "run" / "final.safetensors").exists()
    resumed = train(recipe, tmp_path / "run", resume=True)
    assert same(weights(whole), weights(resumed))
    assert same(weights(whole, "best"), weights(resumed, "best"))
    for a, b in zip(whole.metrics, resumed.metrics, strict=True):
        assert a | {"seconds": 0} == b | {"seconds": 0}


def test_the_command_resumes_after_a_real_sigkill_and_no_sooner(tiny_recipe, tmp_path):
    recipe = tiny_recipe(method="pgd-at+sglr", epochs=20)  # seconds, so that it is not over when it is stopped
    (tmp_path / "recipe.json").write_text(json.dumps(recipe.to_dict()))
    whole = train(recipe, tmp_path / "whole")
    command = [sys.executable, "-m", "rb_noisy", "train", "--out", str(tmp_path / "run")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--recipe", str(tmp_path / "recipe.json")],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 90
    while not (tmp_path / "run" / "state.safetensors").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)
    second = subprocess.run([*command, "--resume"], env=environment, capture_output=True, text=True, timeout=120)
    assert second.returncode == 2
    assert "another process writes to" in second.stderr + second.stdout
    process.send_signal(signal.SIGKILL)
    process.wait()
    (tmp_path / "run" / ".state.1.tmp.safetensors").write_bytes(b"what a kill in the midst of writing leaves")
    again = subprocess.run([*command, "--resume"], env=environment, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    assert not list((tmp_path / "run").glob(".*"))
    assert same(weights(whole), weights(Run.open(tmp_path / "run")))


def test_resuming_a_finished_run_changes_nothing(tiny_recipe, tmp_path):
    run = train(tiny_recipe(), tmp_path / "run")
    before = {file: file.read_bytes() for file in run.path.rglob("*.*")}
    train(tiny_recipe(), tmp_path / "run", resume=True)
    assert before == {file: file.read_bytes() for file in run.path.rglob("*.*")}


def test_a_loss_that_is_no_number_names_epoch_batch_and_checkpoint(tiny_recipe, tmp_path):
    trainer = _Trainer(tiny_recipe(epochs=3), tmp_path / "run", False, None)

    def poison(epoch, batch, batches):
        if (epoch, batch) == (1, 2):  # the third batch of the second epoch sees it
            with torch.no_grad():
                trainer.model.head.fc.weight.fill_(float("nan"))

    with pytest.raises(TrainingDiverged) as error:
        trainer.run(poison, None)
    for words in ("loss is nan", "epoch 2, batch 3", str(tmp_path / "run" / "state.safetensors"), "(epoch 1)"):
        assert words in str(error.value)
    state = load_file(tmp_path / "run" / "state.safetensors")
    assert all(torch.isfinite(v).all() for v in state.values() if v.is_floating_point())


def test_weights_that_the_last_step_broke_are_never_saved(tiny_recipe, tmp_path):
    trainer = _Trainer(tiny_recipe(epochs=3), tmp_path / "run", False, None)

    def poison(epoch, batch, batches):
        if epoch == 1 and batch == batches:
            with torch.no_grad():
                trainer.model.head.fc.weight.fill_(float("inf"))

    with pytest.raises(TrainingDiverged, match=r"no longer finite in epoch 2.*\(epoch 1\)"):
        trainer.run(poison, None)
    for file in ("state", "best"):
        state = load_file(tmp_path / "run" / f"{file}.safetensors")
        assert all(torch.isfinite(v).all() for v in state.values() if v.is_floating_point())
    assert not (tmp_path / "run" / "final.safetensors").exists()


def test_every_setting_of_the_recipe_reaches_the_training_step(tiny_recipe, tmp_path, monkeypatch):
    import rb_noisy.step as module

    seen, real = [], module.pgd

    def attack(*args, **kwargs):
        seen.append(kwargs | {"images": args[1]})
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "pgd", attack)
    recipe = tiny_recipe(
        method="trades",
        augment=True,
        eps_warmup=0.5,
        epochs=4,
        norm="L2",
        eps=1.0,
        alpha=0.4,
        attack_mode="train",
        momentum=0.7,
        weight_decay=0.01,
        schedule="cosine",
    )
    trainer = _Trainer(recipe, tmp_path / "run", False, None)
    rates = []
    measured = [f"{of}_{what}" for of in ("test", "train_correct", "train_incorrect") for what in MEASURES[:4]]
    trainer.tracker.measure = lambda *_: dict.fromkeys([*measured, "selection_pgd_acc"], 0.0)
    trainer.run(lambda *_: rates.append(trainer.optimizer.param_groups[0]["lr"]), None)
    batches = len(seen) // 4
    assert [s["eps"] for s in seen[::batches]] == pytest.approx([0, 0.5, 1, 1])
    assert [s["alpha"] for s in seen[::batches]] == pytest.approx([0, 0.2, 0.4, 0.4])
    settings = {"norm": "L2", "loss": "kl", "random_start": "gaussian", "mode": "train", "steps": 3}
    assert all(s[name] == value for s in seen for name, value in settings.items())
    assert rates == pytest.approx([recipe.learning_rate(i / batches) for i in range(4 * batches)])
    group = trainer.optimizer.param_groups[0]
    assert (group["momentum"], group["weight_decay"]) == (0.7, 0.01)
    plain = load_data(recipe.data).x_train
    unchanged = [(image == plain).flatten(1).all(1).any().item() for image in seen[0]["images"]]
    assert sum(unchanged) < len(unchanged) / 4, "augmented"


def test_which_passes_move_the_batchnorm_statistics(tiny_recipe, tmp_path):
    """PGD-AT: the pass on x̃ alone. With SGLR: then the one on x. An attack in train mode: its own passes too."""

    def passes(name, **fields):
        trainer = _Trainer(tiny_recipe(**fields), tmp_path / name, False, None)
        norm = next(m for m in trainer.model.modules() if isinstance(m, nn.BatchNorm2d))
        trainer.step(torch.arange(16), 0, 0.0, torch.Generator().manual_seed(0))
        return int(norm.num_batches_tracked)

    assert passes("a", method="pgd-at") == 1
    assert passes("b", method="pgd-at+sglr") == 2
    assert passes("c", method="trades") == 2
    assert passes("d", method="pgd-at", attack_mode="train") == 1 + 3
    assert passes("e", method="st") == 1
    assert passes("g", method="pgd-at+awp") == 1, "the pass at the perturbed weights"
    assert passes("h", method="trades+sglr+awp", awp_options={"warmup": 0}) == 2
    assert passes("i", method="pgd-at+te", target_options={"start_epoch": 0}) == 1, "the guiding pass is in eval mode"
    assert passes("f", method="pgd-at+sglr-released", epochs=200) == 1, "no clean pass before the start epoch"


def test_the_record_takes_kappa_and_loss_from_training_for_nothing(tiny_recipe, tmp_path):
    trainer = _Trainer(tiny_recipe(epochs=1), tmp_path / "run", False, None)
    forwards = []
    for network in (trainer.model, trainer.step.attacked):
        network.register_forward_hook(lambda *_: forwards.append(1))
    index = torch.arange(16)
    trainer.step(index, 0, 0.0, torch.Generator().manual_seed(0))
    assert len(forwards) == 3 + 1, "three attack steps and one training pass"
    assert ((trainer.record.kappa[index] >= 0) & (trainer.record.kappa[index] <= 3)).all()
    assert torch.isfinite(trainer.record.loss[index]).all()
    assert (trainer.record.kappa[16:] == -1).all()


def test_best_is_chosen_on_held_out_training_images_when_asked(tiny_recipe, tmp_path):
    trainer = _Trainer(tiny_recipe(validation=30), tmp_path / "run", False, None)
    tracker = trainer.tracker
    assert not set(tracker.held_out.tolist()) & set(tracker.train_index.tolist())
    assert len(tracker.train_index) == 130
    run = trainer.run(None, None)
    scores = [line["validation_pgd_acc"] for line in run.metrics]
    assert [line["selection_pgd_acc"] for line in run.metrics] == scores
    assert run.best_epoch == scores.index(max(scores))


def test_history_keeps_what_every_epoch_showed_of_every_sample(tiny_recipe, tmp_path):
    run = train(tiny_recipe(epochs=3, validation=30), tmp_path / "run")
    history = run.history()
    assert history.kappa.shape == history.loss.shape == history.prediction.shape == (3, 160)
    unseen = history.kappa[0] == -1
    assert unseen.sum() == 30
    for part, missing in ((history.kappa, -1), (history.prediction, -1)):
        assert (part[:, unseen] == missing).all()
        assert (part[:, ~unseen] >= 0).all()
    assert history.loss[:, unseen].isnan().all()
    assert history.loss[:, ~unseen].isfinite().all()
    assert not torch.equal(history.kappa[0], history.kappa[2])
    standard = train(tiny_recipe(epochs=1, method="st"), tmp_path / "st").history()
    assert (standard.kappa == -1).all(), "standard training attacks nothing"
    assert standard.loss.isfinite().all()


def test_train_size_trains_on_the_first_images_only(tiny_recipe, tmp_path):
    run = train(tiny_recipe(epochs=1, train_size=100), tmp_path / "run")
    assert run.history().kappa.shape == (1, 100)
    with pytest.raises(InputError, match="train_size is 161 but"):
        train(tiny_recipe(train_size=161), tmp_path / "more")


def test_averaged_weights_are_what_is_measured_and_saved(tiny_recipe, tmp_path):
    plain = train(tiny_recipe(epochs=4), tmp_path / "plain")
    swa = train(tiny_recipe(epochs=4, method="pgd-at+swa"), tmp_path / "swa")
    # The trained weights are the same; what is saved is the mean of the last epochs' weights.
    state, again = (load_file(run.path / "state.safetensors") for run in (plain, swa))
    assert all(torch.equal(again[name], value) for name, value in state.items() if name.startswith("model."))
    two = train(tiny_recipe(epochs=4, milestones=(2, 3)), tmp_path / "two", on_epoch=lambda line: None)
    assert same(weights(two), weights(plain)), "the default milestones"
    assert not same(weights(swa), weights(plain))
    model, data = swa.load(), load_data(swa.recipe.data)
    measured = (model(data.x_test).argmax(1) == data.y_test)[trained_on(swa)].float().mean()
    assert swa.metrics[-1]["test_natural_acc"] == pytest.approx(measured.item())


def trained_on(run):
    """The test images that a run tracks."""
    trainer = _Trainer(run.recipe, run.path, True, None)
    images, data = trainer.tracker.sets["test"][0], load_data(run.recipe.data).x_test
    return [next(i for i in range(len(data)) if torch.equal(data[i], image)) for image in images]


@pytest.mark.parametrize("method", ["pgd-at+wa+awp", "trades+te+swa", "pgd-at+kgr", "pgd-at+annotator"])
def test_every_part_resumes_to_the_same_weights(method, tiny_recipe, tmp_path):
    recipe = tiny_recipe(method=method, epochs=4)
    whole = train(recipe, tmp_path / "whole")

    class Stop(Exception):
        pass

    def stop(line):
        if line["epoch"] == 2:
            raise Stop

    with pytest.raises(Stop):
        train(recipe, tmp_path / "parts", on_epoch=stop)
    parts = train(recipe, tmp_path / "parts", resume=True)
    assert same(weights(whole), weights(parts))
    assert same(weights(whole, "best"), weights(parts, "best"))


def test_teachers_are_run_folders_or_models_of_the_zoo_for_the_same_data(tiny_recipe, tmp_path):
    teacher = train(tiny_recipe(epochs=2), tmp_path / "teacher")
    taught = tiny_recipe(method="pgd-at+kd+swa", target_options={"robust": str(teacher.path)}, epochs=2)
    assert train(taught, tmp_path / "student").finished
    for name, words in (("nobody", "neither a run folder"), ("at_digits", "tells 10 classes apart, not 4")):
        with pytest.raises(InputError, match=words):
            train(tiny_recipe(method="pgd-at+kd", target_options={"robust": name}), tmp_path / name)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"method": "sglr"}, "objective"),
        ({"method": "pgd-at+sglrr"}, "did you mean sglr"),
        ({"method": "pgd-at+sglr+ls"}, "two parts of one kind, sglr and ls"),
        ({"method": "pgd-at+wa+swa"}, "two parts of one kind"),
        ({"method": "pgd-at+adr"}, "write pgd-at+adr+wa"),
        ({"method": "pgd-at", "awp_options": {"gamma": 0.1}}, "has no awp"),
        ({"method": "pgd-at", "averaging_options": {"decay": 0.9}}, "neither wa nor swa"),
        ({"method": "n-fgsm", "norm": "L2", "steps": 1}, "Linf only"),
        ({"method": "fgsm-rs", "steps": 10}, "steps is 10 but fgsm-rs takes 1"),
        ({"method": "pgd-at+awp", "awp_options": {"warmup": 2}}, "fills the run of 2"),
        ({"method": "mart+kd", "target_options": {"robust": "at_digits"}}, "plain cross entropy"),
        ({"noise": "human:labels.npy", "noise_options": {"file": "others.npy"}}, "both give file"),
        ({"method": "pgd-at+awp", "awp_options": {"gamma": -1}}, "gamma is -1"),
        ({"method": "pgd-at+kd"}, "kd has no teacher"),
    ],
)
def test_methods_that_make_no_sense_are_refused(fields, words, tiny_recipe):
    with pytest.raises(InputError) as error:
        tiny_recipe(**fields)
    assert words in str(error.value)


def test_fast_training_fixes_its_steps_and_trades_awp_its_gamma(tiny_recipe):
    fast = tiny_recipe(method="fgsm-rs", steps=None, alpha=None)
    assert (fast.steps, fast.alpha, fast.track_alpha) == (1, pytest.approx(0.125), pytest.approx(0.025))
    assert tiny_recipe(method="trades+awp", epochs=200).make_awp() == AWP(gamma=0.005, warmup=10)
    assert tiny_recipe(method="trades+awp").make_awp() == AWP(gamma=0.005, warmup=0)
    assert tiny_recipe(method="trades+awp", awp_options={"warmup": 1}).make_awp() == AWP(gamma=0.005, warmup=1)
    assert tiny_recipe(method="pgd-at+awp").make_awp() == AWP(gamma=0.01, warmup=0)
    assert Recipe.from_dict(fast.to_dict()) == fast


@pytest.mark.parametrize("method", ["pgd-at", "trades", "pgd-at+sglr"])
def test_an_awp_step_takes_the_gradient_at_the_perturbed_weights(method, tiny_recipe, tmp_path):
    """w + v, v = γ·‖w‖·g/‖g‖ by tensor, g the gradient of the very same step without AWP."""
    fields = {"backbone": "strided_cnn", "lr": 1e-9}
    fields |= {"target_options": {"start_epoch": 0}} if "sglr" in method else {}

    def step(name, weights=None, x_adv=None, **more):
        """The gradients of one step from these weights, on these adversarial images if given; and both."""
        made = _Trainer(tiny_recipe(method=name, **fields, **more), tmp_path / str(len(made_so_far)), False, None)
        made_so_far.append(made)
        before = [p.detach().clone() for p in made.model.parameters()] if weights is None else weights
        with torch.no_grad():
            for p, w in zip(made.model.parameters(), before, strict=True):
                p.copy_(w)
        real, images = made.step._attack, []

        def attack(batch):
            real(batch)
            batch.x_adv = batch.attack.x_adv if x_adv is None else x_adv
            images.append(batch.x_adv)

        made.step._attack = attack
        made.step(torch.arange(16), 0, 0.0, torch.Generator().manual_seed(0))
        return [p.grad.clone() for p in made.model.parameters()], before, images[0]

    made_so_far = []
    first, weights, x_adv = step(method)
    found, _, same_images = step(f"{method}+awp", weights, awp_options={"gamma": 0.05, "warmup": 0})
    assert torch.equal(x_adv, same_images), "the attack is made at the unperturbed weights"
    moved = [w + 0.05 * w.norm() * g / g.norm() if w.dim() > 1 else w for w, g in zip(weights, first, strict=True)]
    expected, _, _ = step(method, moved, x_adv)
    if "sglr" not in method:  # whose target follows the weights: there the step must only differ
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
    assert not all(torch.allclose(a, b, rtol=1e-3) for a, b in zip(found, first, strict=True))


def test_without_noise_there_are_no_incorrect_samples_to_measure(tiny_recipe, tmp_path):
    run = train(tiny_recipe(noise="none", noise_rate=None, epochs=1), tmp_path / "run")
    assert all(run.metrics[0][f"train_incorrect_{measure}"] is None for measure in MEASURED)


def test_normalisation_is_learnt_from_the_training_set_and_saved_inside(tiny_recipe, tmp_path):
    run = train(tiny_recipe(normalize=True, epochs=1), tmp_path / "run")
    x = load_data(run.recipe.data).x_train
    state = weights(run)
    assert state["normalize.mean"].item() == pytest.approx(x.mean().item(), abs=1e-6)
    assert state["normalize.std"].item() == pytest.approx(x.std(correction=0).item(), abs=1e-6)


def test_bf16_and_any_timm_network_train(tiny_recipe, tmp_path):
    recipe = tiny_recipe(
        backbone="vit_tiny_patch16_224",
        backbone_options={"img_size": 8, "patch_size": 4, "depth": 1},
        precision="bf16",
        epochs=1,
    )
    run = train(recipe, tmp_path / "run")
    assert run.load()(torch.rand(2, 1, 8, 8)).shape == (2, 4)


def test_two_processes_train_one_model(tiny_recipe, tmp_path):
    """Whole, and stopped after an epoch and resumed: the same weights; each process has seen the samples of both."""
    recipe = tiny_recipe(method="pgd-at+kgr+awp+wa", batch_size=16, epochs=3)
    (tmp_path / "recipe.json").write_text(json.dumps(recipe.to_dict()))
    (tmp_path / "program.py").write_text(
        "import atexit, glob, os, sys, time, torch\nfrom pathlib import Path\nfrom rb_noisy import Recipe\n"
        "from rb_noisy.training import _Trainer\n"
        "def threads():\n    return [open(name).read().strip() for name in glob.glob('/proc/self/task/*/comm')]\n"
        "def check():  # the last to be called at exit\n"
        "    if any('gloo' in name for name in threads()): print(threads(), file=sys.stderr, flush=True); os._exit(7)\n"
        "atexit.register(check)\n"
        f"recipe = Recipe.from_json(open({str(tmp_path / 'recipe.json')!r}).read())\n"
        "time.sleep(int(os.environ['RANK']))  # the late one must not take the folder for another run's\n"
        "def stop(line):\n    if len(sys.argv) > 2: os._exit(9)\n"
        "def run():\n"
        "    trainer = _Trainer(recipe, Path(sys.argv[1]), True, None)\n"
        "    trainer.run(None, stop)\n"
        "    states = (trainer.model.state_dict(), trainer.evaluated.state_dict(), {'votes': trainer.record.votes})\n"
        "    state = torch.cat([v.double().flatten() for part in states for v in part.values()])[None]\n"
        "    both = trainer.accelerator.gather(state)\n"
        "    assert len(both) == 2 and torch.equal(both[0], both[1]), 'the processes have drifted apart'\n"
        "    assert sys.platform != 'linux' or any('gloo' in name for name in threads())\n"
        "run()\n"
    )
    launch = functools.partial(two_processes, "torchrun", tmp_path / "program.py")
    succeed(launch(tmp_path / "whole"))
    assert launch(tmp_path / "parts", "stop").returncode != 0
    assert len((tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()) == 1
    succeed(launch(tmp_path / "parts"))
    whole, parts = Run.open(tmp_path / "whole"), Run.open(tmp_path / "parts")
    assert same(weights(whole), weights(parts))
    state = load_file(whole.path / "state.safetensors")
    assert (state["record.kappa"] >= 0).all()
    assert not same(weights(whole), weights(train(recipe, tmp_path / "one"))), "twice the batch, half the steps"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: (path / "state.safetensors").write_bytes(b"no"), "state.safetensors is damaged"),
        (lambda path: (path / "run.json").write_text("{"), "run.json is damaged"),
        (lambda path: (path / "metrics.jsonl").write_text("{"), "metrics.jsonl is damaged"),
        (lambda path: (path / "metrics.jsonl").unlink(), "has 0 lines but 1 epochs are finished"),
        (lambda path: save_file({"a.b": torch.zeros(1)}, path / "state.safetensors"), "state.safetensors is damaged"),
    ],
)
def test_damaged_run_files_are_named(damage, words, tiny_recipe, tmp_path):
    run = train(tiny_recipe(epochs=1), tmp_path / "run")
    damage(run.path)
    with pytest.raises(InputError) as error:
        train(tiny_recipe(epochs=1), run.path, resume=True)
    assert words in str(error.value)


def test_another_run_is_never_overwritten(tiny_recipe, tmp_path):
    train(tiny_recipe(epochs=1), tmp_path / "run")
    with pytest.raises(InputError, match="already holds a run"):
        train(tiny_recipe(epochs=1), tmp_path / "run")
    with pytest.raises(InputError, match="another recipe \\(lr differ\\)"):
        train(tiny_recipe(epochs=1, lr=0.2), tmp_path / "run", resume=True)
    with pytest.raises(InputError, match="no run folder"):
        Run.open(tmp_path / "nothing")


def test_recipes_survive_json_and_fill_in_their_data_sets_defaults():
    noise = {"noise": "asymmetric", "noise_rate": 0.3, "noise_options": {"class_map": {9: 1}}}
    recipe = Recipe(data="mnist", method="trades+ls", **noise)
    assert Recipe.from_json(json.dumps(recipe.to_dict())) == recipe
    assert (recipe.backbone, recipe.eps) == ("small_cnn", 0.3)
    cifar = Recipe(data="cifar10")
    assert (cifar.eps, cifar.alpha, cifar.steps, cifar.epochs, cifar.milestones) == (
        8 / 255,
        2 / 255,
        10,
        200,
        (100, 150),
    )


def test_schedules_follow_their_definition():
    steps = Recipe(data="cifar10")
    assert [steps.learning_rate(e) for e in (0, 99.9, 100, 150)] == pytest.approx([0.1, 0.1, 0.01, 0.001])
    cycle = Recipe(data="cifar10", schedule="onecycle", epochs=10)
    assert [cycle.learning_rate(e) for e in (0, 1.5, 3, 10)] == pytest.approx([0, 0.05, 0.1, 0])
    cosine = Recipe(data="cifar10", schedule="cosine", epochs=10)
    assert [cosine.learning_rate(e) for e in (0, 5, 10)] == pytest.approx([0.1, 0.05, 0])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"method": "pgd-at+sgrl"}, "did you mean sglr"),
        ({"method": "trade"}, "did you mean trades"),
        ({"epochs": 0}, "epochs is 0"),
        ({"epochs": 1.5}, "epochs is 1.5"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"eps": -1}, "eps is -1"),
        ({"eps": "8 of 255"}, "recipe: eps is '8 of 255'; give a number such as 0.2 or 8/255"),
        ({"alpha": "1/0"}, "recipe: alpha is '1/0'"),
        ({"schedule": "onecycl"}, "did you mean onecycle"),
        ({"eps_warmup": 2}, "eps_warmup is 2"),
        ({"target_options": {"q": 1}}, "does not take"),
    ],
)
def test_bad_recipes_are_named(fields, words):
    with pytest.raises(InputError) as error:
        Recipe(data="digits", **fields)
    assert words in str(error.value)


def test_what_a_recipe_changes_is_what_was_given():
    given = {"data": "digits", "method": "pgd-at+sglr", "epochs": 30, "lr": 0.05, "target_options": {"r": 0.4}}
    assert Recipe(**given).changes() == given
    assert Recipe.from_dict(Recipe(**given).changes()) == Recipe(**given)
    assert Recipe(data="digits").changes() == {"data": "digits", "method": "pgd-at"}


def test_radii_are_read_as_the_papers_write_them():
    recipe = Recipe(data="digits", eps="8/255", alpha="0.01", track_alpha="2/255")
    assert (recipe.eps, recipe.alpha, recipe.track_alpha) == (8 / 255, 0.01, 2 / 255)


def test_options_that_are_no_json_are_named(tmp_path):
    with pytest.raises(InputError, match="noise_options cannot be written as JSON"):
        Recipe(data="digits", noise="human", noise_options={"file": tmp_path / "labels.npy"})


def test_unknown_recipe_fields_are_named():
    with pytest.raises(InputError, match="unknown recipe field 'epoch'; did you mean epochs"):
        Recipe.from_dict({"data": "digits", "epoch": 3})


def test_a_checkpoint_within_an_epoch_survives_a_sigkill_bit_by_bit(tiny_recipe, tmp_path):
    """Dropout, augmentation, averaged weights and the record go on in the middle of an epoch."""
    options = {"augment": True, "backbone_options": {"drop_rate": 0.2}, "schedule": "onecycle"}
    recipe = tiny_recipe(method="pgd-at+sglr+wa", epochs=3, target_options={"start_epoch": 1}, **options)
    whole = train(recipe, tmp_path / "whole")
    (tmp_path / "recipe.json").write_text(json.dumps(recipe.to_dict()))
    program = (
        "import os, signal, torch; torch.set_num_threads(1)\n"
        "from rb_noisy import Recipe, train\n"
        f"recipe = Recipe.from_json(open({str(tmp_path / 'recipe.json')!r}).read())\n"
        "dying = lambda e, b, n: (e, b) == (1, 4) and os.kill(os.getpid(), signal.SIGKILL)\n"
        f"train(recipe, {str(tmp_path / 'run')!r}, checkpoint_minutes=1e-9, on_batch=dying)"
    )
    killed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    steps = []
    resumed = train(recipe, tmp_path / "run", resume=True, on_batch=lambda *step: steps.append(step))
    assert steps[0] == (1, 4, 5), "the three steps that were saved are not made again"
    assert same(weights(whole), weights(resumed))
    for a, b in zip(whole.metrics, resumed.metrics, strict=True):
        assert a | {"seconds": 0} == b | {"seconds": 0}


def test_training_stops_when_its_time_is_up_and_goes_on_where_it_was(tiny_recipe, tmp_path):
    recipe = tiny_recipe(method="pgd-at+sglr", epochs=2, target_options={"start_epoch": 0})
    whole = train(recipe, tmp_path / "whole")
    steps = []
    for _ in range(40):  # each call makes one step, then its time is up
        run = train(recipe, tmp_path / "run", True, max_minutes=1e-9, on_batch=lambda *step: steps.append(step))
        if run.finished:
            break
    assert steps == [(epoch, step, 5) for epoch in range(2) for step in range(1, 6)]
    assert same(weights(whole), weights(run))
    assert [line | {"seconds": 0} for line in whole.metrics] == [line | {"seconds": 0} for line in run.metrics]
    for minutes in (0, -1, float("nan")):
        with pytest.raises(InputError, match="max_minutes"):
            train(recipe, tmp_path / "other", max_minutes=minutes)
    with pytest.raises(InputError, match="checkpoint_minutes is None"):
        train(recipe, tmp_path / "other", checkpoint_minutes=None)
    assert not (tmp_path / "other").exists()


def test_the_command_stops_in_time_and_says_how_to_go_on(tiny_recipe, tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps(tiny_recipe().to_dict()))
    command = [sys.executable, "-m", "rb_noisy", "train", "--out", str(tmp_path / "run")]
    first = [*command, "--recipe", str(tmp_path / "recipe.json"), "--max-minutes", "1e-9"]
    stopped = subprocess.run(first, capture_output=True, text=True, timeout=120)
    assert stopped.returncode == 0, stopped.stderr
    assert "0 of 2 epochs finished; continue with: rb-noisy train --out" in stopped.stdout
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert Run.open(tmp_path / "run").finished


class NoWaiting(TorchDispatchMode):
    """Fails where the host reads a value off the device, or where a shape depends on one."""

    def __init__(self, on_cpu, monkeypatch):
        super().__init__()
        self.on_cpu = {tensor.data_ptr() for tensor in on_cpu}
        for name in ("cpu", "tolist", "numpy"):  # which do nothing to be seen below where the tensor is on the CPU
            monkeypatch.setattr(torch.Tensor, name, self.refused)

    @staticmethod
    def refused(*_):
        raise AssertionError("a value was read off the device")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        waiting = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "multinomial")
        assert name not in waiting or args[0].data_ptr() in self.on_cpu, func
        if name in ("index", "index_put", "index_put_"):
            assert not any(index is not None and index.dtype == torch.bool for index in args[1]), "a mask as index"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["pgd-at", "trades+sglr+awp+wa", "n-fgsm+sglr", "mart+te", "pgd-at+sat"])
def test_no_step_waits_for_the_device(method, tiny_recipe, tmp_path, monkeypatch):
    """One wait per step would keep a GPU from being given its next step in time."""
    fast = {"steps": None, "alpha": None} if "fgsm" in method or "liet" in method else {}
    trainer = _Trainer(tiny_recipe(method=method, augment=True, **fast), tmp_path / "run", False, None)
    # On a CPU, though not on a GPU, one_hot looks at its labels.
    monkeypatch.setattr(torch.nn.functional, "one_hot", lambda y, classes: torch.eye(classes, dtype=torch.int64)[y])
    trainer.step.targets.begin_epoch(trainer.record, 1)
    draws, averager = torch.Generator().manual_seed(0), trainer.averager
    # These two are kept on the CPU also where the network is not.
    on_cpu = [trainer.record.temperature, *([averager._average.n_averaged] if averager else [])]
    with NoWaiting(on_cpu, monkeypatch):
        for step in range(2):
            trainer.step(torch.arange(16) + 16 * step, 1, 1.0, draws)
            if averager is not None:
                averager.after_step(trainer.model)


def test_a_step_that_waits_for_the_device_would_be_seen(tiny_recipe, tmp_path, monkeypatch):
    """κ-guided refinement draws its labels on the CPU, and says so."""
    recipe = tiny_recipe(method="pgd-at+kgr", target_options={"start_epoch": 0})
    trainer = _Trainer(recipe, tmp_path / "run", False, None)
    monkeypatch.setattr(torch.nn.functional, "one_hot", lambda y, classes: torch.eye(classes, dtype=torch.int64)[y])
    with NoWaiting([trainer.record.temperature], monkeypatch), pytest.raises(AssertionError, match="off the device"):
        trainer.step(torch.arange(16), 1, 1.0, torch.Generator().manual_seed(0))


def test_images_lie_on_the_device_as_bytes_where_they_are_bytes(tiny_recipe, tmp_path):
    trainer = _Trainer(tiny_recipe(), tmp_path / "bytes", False, None)
    assert trainer.step.x.dtype == torch.uint8
    x = load_data(trainer.recipe.data).x_train
    assert torch.equal(from_bytes(trainer.step.x), x)
    trainer = _Trainer(tiny_recipe(data="digits"), tmp_path / "floats", False, None)
    assert trainer.step.x.dtype == torch.float32, "sixteenths are no bytes"


def test_two_processes_do_what_one_does_with_twice_the_batch(tiny_recipe, tmp_path):
    """The same samples in every step, the same running averages. No random starts and no BatchNorm, which differ."""
    fields = {"method": "st+sglr+wa", "backbone": "strided_cnn", "epochs": 3, "target_options": {"start_epoch": 0}}
    recipe = tiny_recipe(batch_size=16, **fields)
    (tmp_path / "recipe.json").write_text(json.dumps(recipe.to_dict()))
    command = ("-m", "rb_noisy", "train", "--recipe", tmp_path / "recipe.json", "--out", tmp_path / "two")
    succeed(two_processes("accelerate", *command))
    two, one = Run.open(tmp_path / "two"), train(tiny_recipe(batch_size=32, **fields), tmp_path / "one")
    states = [load_file(run.path / "state.safetensors") for run in (one, two)]
    for name in (*(f"model.{n}" for n in weights(one)), "record.average", "record.votes", "record.loss"):
        torch.testing.assert_close(states[0][name], states[1][name], rtol=1e-3, atol=1e-5)
    for a, b in zip(one.metrics, two.metrics, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-3)


def test_an_epoch_begun_by_one_process_is_ended_by_two(tiny_recipe, tmp_path):
    """Every sample of the epoch is trained on once, whoever does it."""
    recipe = tiny_recipe(method="pgd-at+sglr+wa", batch_size=16, epochs=2)
    (tmp_path / "recipe.json").write_text(json.dumps(recipe.to_dict()))

    class Killed(Exception):
        pass

    def die(epoch, step, steps):
        if (epoch, step) == (1, 4):
            raise Killed

    with pytest.raises(Killed):
        train(recipe, tmp_path / "run", checkpoint_minutes=1e-9, on_batch=die)
    state = load_file(tmp_path / "run" / "state.safetensors")
    seen = state["record.kappa"] >= 0
    assert seen.sum() == 3 * 16
    succeed(two_processes("accelerate", "-m", "rb_noisy", "train", "--out", tmp_path / "run", "--resume"))
    run = Run.open(tmp_path / "run")
    assert run.finished
    assert [line["processes"] for line in run.metrics] == [1, 2]
    history = run.history()
    assert (history.kappa[1] >= 0).all()
    assert torch.equal(history.loss[1][seen], state["record.loss"][seen]), "they are not trained on again"


def test_two_processes_stop_within_an_epoch_and_go_on_bit_by_bit(tiny_recipe, tmp_path):
    """Each has BatchNorm statistics and random numbers of its own; one process takes the run over as well."""
    options = {"augment": True, "backbone_options": {"drop_rate": 0.2}, "batch_size": 8}
    recipe = tiny_recipe(method="trades+sglr+awp+wa", epochs=2, awp_options={"warmup": 0}, **options)
    (tmp_path / "recipe.json").write_text(json.dumps(recipe.to_dict()))
    (tmp_path / "program.py").write_text(
        "import sys, torch\nimport rb_noisy.training as training\nfrom rb_noisy import Recipe\n"
        "training.CLOCK_STEPS = 3\n"
        f"recipe = Recipe.from_json(open({str(tmp_path / 'recipe.json')!r}).read())\n"
        "minutes = float(sys.argv[2])\n"
        "while not training.train(recipe, sys.argv[1], True, max_minutes=minutes).finished:\n"
        "    if len(sys.argv) > 3: break\n"
    )
    launch = functools.partial(two_processes, "torchrun", tmp_path / "program.py")
    succeed(launch(tmp_path / "whole", "1e9"))
    succeed(launch(tmp_path / "parts", "1e-9"))
    whole, parts = Run.open(tmp_path / "whole"), Run.open(tmp_path / "parts")
    assert same(weights(whole), weights(parts))
    for a, b in zip(whole.metrics, parts.metrics, strict=True):
        assert a | {"seconds": 0} == b | {"seconds": 0}
    succeed(launch(tmp_path / "begun", "1e-9", "once"))
    assert not Run.open(tmp_path / "begun").finished
    assert train(recipe, tmp_path / "begun", resume=True).finished


def test_a_step_that_fails_on_a_broken_network_is_told_as_a_divergence(tiny_recipe, tmp_path):
    """κ-guided refinement cannot draw a label from a NaN; on a GPU it is the first to notice."""
    recipe = tiny_recipe(method="pgd-at+kgr", target_options={"start_epoch": 0}, epochs=3)
    trainer = _Trainer(recipe, tmp_path / "run", False, None)

    def poison(epoch, batch, batches):
        if (epoch, batch) == (1, 2):
            with torch.no_grad():
                trainer.model.head.fc.weight.fill_(float("nan"))

    with pytest.raises(TrainingDiverged, match="weights are no longer finite in epoch 2"):
        trainer.run(poison, None)


def test_a_state_of_another_version_is_named_and_kept(tiny_recipe, tmp_path):
    train(tiny_recipe(epochs=1), tmp_path / "run")
    file = tmp_path / "run" / "state.safetensors"
    save_file(load_file(file), file, {"epoch": "0", "best": "0.5"})
    with pytest.raises(InputError, match="written by another version"):
        train(tiny_recipe(epochs=1), tmp_path / "run", resume=True)
    assert file.is_file()
