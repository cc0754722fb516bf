import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from rb_noisy.attacks import ATTACK_LOSSES, pgd
from rb_noisy.errors import InputError
from rb_noisy.geometry import kappa


def small_net(seed=0, batchnorm=False, classes=4):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 6, 3, padding=1)] + ([nn.BatchNorm2d(6)] if batchnorm else [])
    # Double precision, and a non-monotone activation so that predictions also flip back along the attack.
    return nn.Sequential(*layers, nn.SiLU(), nn.Flatten(), nn.Linear(6 * 25, classes)).double().eval()


def samples(seed=0, n=24, classes=4):
    torch.manual_seed(seed)
    return torch.rand(n, 1, 5, 5).double(), torch.randint(0, classes, (n,))


def literal_pgd(model, x, y, start, eps, alpha, steps, norm):
    """The definition, one sample and one step at a time."""
    finals, first, count, ever = [], [], [], []
    for xi, yi, point in zip(x, y, start, strict=True):
        hits = []
        for _ in range(steps):
            point = point.detach().requires_grad_()
            logits = model(point[None])
            hits.append(int(logits.argmax()) == int(yi))
            F.cross_entropy(logits, yi[None]).backward()
            g = point.grad
            if norm == "Linf":
                delta = (point.detach() + alpha * g.sign() - xi).clamp(-eps, eps)
            else:
                delta = point.detach() + alpha * g / g.norm() - xi
                if delta.norm() > eps:
                    delta = delta * eps / delta.norm()
            point = (xi + delta).clamp(0, 1)
        finals.append(point.detach())
        first.append(next((t for t, hit in enumerate(hits) if not hit), steps))
        count.append(sum(hits))
        ever.append(not all(hits) or int(model(point[None]).argmax()) != int(yi))
    return torch.stack(finals), torch.tensor(first), torch.tensor(count), torch.tensor(ever)


def start_of(model, x, y, **settings):
    return pgd(model, x, y, alpha=0.1, steps=0, **settings).x_adv


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("random_start", [True, False])
def test_attack_and_both_kappas_match_a_literal_per_sample_loop(norm, random_start):
    model, (x, y) = small_net(), samples()
    y = torch.where(torch.arange(len(y)) % 3 == 0, y, model(x).argmax(1))  # some right, some wrong
    eps, alpha = (0.25, 0.07) if norm == "Linf" else (0.9, 0.3)
    common = {"eps": eps, "norm": norm, "random_start": random_start, "seed": 5}
    start = start_of(model, x, y, **common)
    x_adv, first, count, ever = literal_pgd(model, x, y, start, eps, alpha, 8, norm)
    result = pgd(model, x, y, alpha=alpha, steps=8, evaluate_final=True, **common)
    torch.testing.assert_close(result.x_adv, x_adv)
    assert result.kappa.tolist() == first.tolist()
    assert result.broken.tolist() == ever.tolist()
    assert result.final_correct.tolist() == (model(x_adv).argmax(1) == y).tolist()
    counted = pgd(model, x, y, alpha=alpha, steps=8, definition="count", **common).kappa
    assert counted.tolist() == count.tolist()
    assert len(first.unique()) > 2, "the case must not be trivial"
    for definition, expected in (("first", first), ("count", count)):
        values = kappa(model, x, y, alpha=alpha, steps=8, definition=definition, batch_size=7, **common)
        assert values.tolist() == expected.tolist(), definition


def test_the_two_definitions_differ_only_where_a_prediction_flips_back():
    class Flips(nn.Module):  # right at the start, wrong after one step, right again after two
        def forward(self, x):
            wrong = (x.mean((1, 2, 3)) - 0.5).abs().round(decimals=4) == 0.1
            score = torch.where(wrong, -1.0, 1.0) + 0 * x.sum((1, 2, 3))
            return torch.stack([score, -score + x.mean((1, 2, 3))], 1)

    x, y = torch.full((1, 1, 2, 2), 0.5), torch.zeros(1, dtype=torch.int64)
    settings = {"eps": 0.3, "alpha": 0.1, "steps": 3, "random_start": False}
    assert kappa(Flips(), x, y, **settings).item() == 1
    assert kappa(Flips(), x, y, definition="count", **settings).item() == 2


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@settings(max_examples=20, deadline=None)
@given(eps=st.floats(0, 0.6), alpha=st.floats(0, 0.5), steps=st.integers(0, 4), seed=st.integers(0, 99))
def test_adversarial_images_stay_in_the_ball_and_in_range(norm, eps, alpha, steps, seed):
    model, (x, y) = small_net(), samples(seed, 6)
    x_adv = pgd(model, x, y, eps=eps, alpha=alpha, steps=steps, norm=norm, seed=seed).x_adv
    delta = (x_adv - x).flatten(1)
    size = delta.abs().amax(1) if norm == "Linf" else delta.norm(dim=1)
    assert (size <= eps + 1e-9).all()
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1


def test_more_steps_raise_the_loss_under_each_loss():
    model, (x, _) = small_net(), samples(n=64)
    y = model(x).argmax(1)
    for name, loss in ATTACK_LOSSES.items():
        start = "gaussian" if name == "kl" else True
        values = []
        for steps in (1, 10):
            x_adv = pgd(model, x, y, eps=0.1, alpha=0.02, steps=steps, loss=name, random_start=start, seed=0).x_adv
            values.append(loss(model(x_adv), model(x), y).item())
        assert values[1] > values[0] > loss(model(x), model(x), y).item(), name


def test_a_callable_loss_gets_the_natural_logits():
    model, (x, y) = small_net(), samples()
    seen = []

    def loss(logits, natural, labels):
        seen.append(natural)
        return ATTACK_LOSSES["ce"](logits, natural, labels)

    x_adv = pgd(model, x, y, eps=0.1, alpha=0.02, steps=2, loss=loss, seed=0).x_adv
    torch.testing.assert_close(seen[0], model(x))
    assert torch.equal(x_adv, pgd(model, x, y, eps=0.1, alpha=0.02, steps=2, seed=0).x_adv)


def test_fgsm_is_one_full_step_from_the_image():
    model, (x, y) = small_net(), samples()
    gradient = torch.autograd.grad(F.cross_entropy(model(x.requires_grad_()), y), x)[0]
    x = x.detach()
    x_adv = pgd(model, x, y, eps=0.1, alpha=0.1, steps=1, random_start=False).x_adv
    torch.testing.assert_close(x_adv, (x + 0.1 * gradient.sign()).clamp(0, 1))


def test_kappa_comes_with_the_attack_at_no_further_forward_pass():
    model, (x, y) = small_net(), samples()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    pgd(model, x, y, eps=0.1, alpha=0.02, steps=7, check=False)
    assert len(calls) == 7


def test_the_prediction_at_the_start_comes_for_nothing_too():
    model, (x, y) = small_net(), samples()
    attack = pgd(model, x, y, eps=0.3, alpha=0.1, steps=3, seed=5)
    assert torch.equal(attack.start_prediction == y, attack.kappa > 0)
    start = pgd(model, x, y, eps=0.3, alpha=0.1, steps=0, seed=5).x_adv
    assert torch.equal(attack.start_prediction, model(start).argmax(1))


def test_kappa_alone_drops_a_sample_once_it_is_misclassified():
    model, (x, y) = small_net(), samples(n=64)
    y = torch.where(torch.arange(64) % 2 == 0, y, model(x).argmax(1))
    seen = []
    model.register_forward_hook(lambda module, inputs, _: seen.append(len(inputs[0])))
    values = kappa(model, x, y, eps=0.1, alpha=0.03, steps=10, batch_size=64, random_start=False, check=False)
    assert seen == [int((values >= t).sum()) for t in range(len(seen))]
    assert seen[-1] < 64


def test_unlabelled_kappa_is_taken_against_the_prediction():
    model, (x, _) = small_net(), samples()
    settings = {"eps": 0.1, "alpha": 0.03, "steps": 10, "seed": 3}
    assert torch.equal(kappa(model, x, **settings), kappa(model, x, model(x).argmax(1), **settings))
    assert (kappa(model, x, eps=0.1, alpha=0.03, steps=10, random_start=False) > 0).all()


def test_random_start_depends_on_the_seed_and_not_on_the_batch_size():
    model, (x, y) = small_net(), samples()
    settings = {"eps": 0.3, "alpha": 0.03, "steps": 10}
    assert torch.equal(
        kappa(model, x, y, seed=1, batch_size=5, **settings), kappa(model, x, y, seed=1, batch_size=24, **settings)
    )
    same, other = (pgd(model, x, y, seed=s, **settings).x_adv for s in (1, 2))
    assert torch.equal(same, pgd(model, x, y, seed=1, **settings).x_adv)
    assert not torch.equal(same, other)


def test_attack_mode_decides_whether_batchnorm_statistics_move_and_is_undone():
    x, y = samples()
    for mode, moves in (("eval", False), ("train", True)):
        model = small_net(batchnorm=True).train()
        model[2].eval()  # a part that its owner froze must stay so
        before = model[1].running_mean.clone()
        pgd(model, x, y, eps=0.1, alpha=0.02, steps=2, mode=mode)
        assert (not torch.equal(before, model[1].running_mean)) == moves
        assert model.training
        assert model[1].training
        assert not model[2].training


def test_attack_leaves_parameters_without_gradient_and_works_under_no_grad():
    model, (x, y) = small_net(), samples()
    with torch.no_grad():
        x_adv = pgd(model, x, y, eps=0.1, alpha=0.02, steps=2).x_adv
    assert all(p.grad is None for p in model.parameters())
    assert not x_adv.requires_grad


def test_n_fgsm_matches_its_definition():
    model, (x, y) = small_net(), samples()
    eps = 0.1
    noise = 2 * eps * (2 * torch.rand(x.shape, generator=torch.Generator().manual_seed(7), dtype=x.dtype) - 1)
    start = (x + noise).clamp(0, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(start), y, reduction="sum"), start)
    expected = (start.detach() + eps * gradient.sign()).clamp(0, 1)  # never back to the ball
    settings = {"eps": eps, "alpha": eps, "steps": 1, "start_radius": 2 * eps, "seed": 7}
    result = pgd(model, x, y, project=False, **settings)
    torch.testing.assert_close(result.x_adv, expected)
    assert result.kappa.tolist() == (model(start).argmax(1) == y).long().tolist()
    assert (result.x_adv - x).abs().max() > 2 * eps
    projected = pgd(model, x, y, **settings).x_adv
    torch.testing.assert_close(projected, expected.clamp(x - eps, x + eps))


@settings(max_examples=20)
@given(radius=st.floats(0, 0.6), seed=st.integers(0, 99))
def test_a_start_radius_bounds_the_start_and_nothing_else(radius, seed):
    model, (x, y) = small_net(), samples(seed, 6)
    start = start_of(model, x, y, eps=0.1, start_radius=radius, seed=seed)
    assert (start - x).abs().max() <= radius + 1e-9
    assert torch.equal(start, start_of(model, x, y, eps=radius, seed=seed))
    x_adv = pgd(model, x, y, eps=0.1, alpha=0.02, steps=2, start_radius=radius, seed=seed).x_adv
    assert (x_adv - x).abs().max() <= 0.1 + 1e-9


def test_without_projection_l2_steps_keep_their_length():
    model, (x, y) = small_net(), samples()
    x = 0.4 + 0.2 * x  # away from 0 and 1
    x_adv = pgd(model, x, y, eps=0.01, alpha=0.1, steps=1, norm="L2", random_start=False, project=False).x_adv
    torch.testing.assert_close((x_adv - x).flatten(1).norm(dim=1), torch.full((24,), 0.1, dtype=x.dtype))


@pytest.mark.parametrize("definition", ["first", "count"])
def test_kappa_labels_judge_an_attack_on_other_labels(definition):
    model, (x, y) = small_net(), samples(n=48)
    attacked = model(x).argmax(1)
    judged = torch.where(torch.arange(48) % 2 == 0, y, attacked)
    common = {"eps": 0.25, "alpha": 0.07, "steps": 8, "seed": 5, "definition": definition, "evaluate_final": True}
    result = pgd(model, x, attacked, kappa_labels=judged, **common)
    plain = pgd(model, x, attacked, **common)
    assert torch.equal(result.x_adv, plain.x_adv)
    assert not torch.equal(result.kappa, plain.kappa)
    # The iterates one by one: PGD-t from the same start is x⁽ᵗ⁾.
    iterates = [pgd(model, x, attacked, **common | {"steps": t}).x_adv for t in range(9)]
    hits = [[int(p) == int(j) for p, j in zip(model(i).argmax(1), judged, strict=True)] for i in iterates]
    for n in range(48):
        seen = [hits[t][n] for t in range(8)]
        first = next((t for t, hit in enumerate(seen) if not hit), 8)
        assert result.kappa[n] == (first if definition == "first" else sum(seen))
        assert result.final_correct[n] == hits[8][n]
        assert result.broken[n] == (not all([*seen, hits[8][n]]))
    same = pgd(model, x, attacked, kappa_labels=attacked, **common)
    assert torch.equal(same.kappa, plain.kappa)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"eps": -0.1}, "eps is -0.1"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"steps": -1}, "steps is -1"),
        ({"norm": "L7"}, "unknown norm 'L7'"),
        ({"loss": "cee"}, "did you mean ce"),
        ({"mode": "test"}, "attack mode is 'test'"),
        ({"random_start": "yes"}, "random_start is 'yes'"),
        ({"x": torch.full((24, 1, 5, 5), 255.0)}, "scale them to"),
        ({"x": torch.full((24, 1, 5, 5), float("nan"))}, "scale them to"),
        ({"x": torch.zeros(24, 25)}, "give (N, C, H, W)"),
        ({"y": torch.zeros(3, dtype=torch.int64)}, "(3,) labels for 24 images; give one integer per image"),
        ({"kappa_labels": torch.zeros(3, dtype=torch.int64)}, "(3,) kappa_labels for 24 images"),
        ({"y": torch.zeros(24)}, "the labels are torch.float32; give torch.int64"),
        ({"y": torch.full((24,), -1)}, "the labels begin at -1; give classes from 0 on"),
        ({"start_radius": -0.1}, "start_radius is -0.1"),
        ({"start_radius": 0.1, "norm": "L2"}, "leave it out"),
        ({"start_radius": 0.1, "random_start": "gaussian"}, "leave it out"),
    ],
)
def test_bad_settings_are_named(change, words):
    x, y = samples()
    arguments = {"x": x, "y": y, "eps": 0.1, "alpha": 0.02, "steps": 2} | change
    with pytest.raises(InputError) as error:
        pgd(small_net(), **arguments)
    assert words in str(error.value)
