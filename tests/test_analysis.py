import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rb_noisy.analysis import (
    adversarial_entropy,
    confidence_trajectory,
    entropy,
    filter_normalised_direction,
    gradient_norm,
    information_in_weights,
    loss_landscape,
    loss_slopes,
    neighbourhood_entropy,
    penultimate_features,
)
from rb_noisy.errors import InputError


class FirstPixel(nn.Module):
    """Logits (a·(first pixel − ½), 0): all that an attack or a random point changes is known in closed form."""

    def __init__(self, a):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(float(a)))

    def forward(self, x):
        z = self.a * (x[:, 0, 0, 0] - 0.5)
        return torch.stack([z, torch.zeros_like(z)], 1)


def binary_entropy(z):
    p = 1 / (1 + np.exp(-z))
    return -(p * np.log(p) + (1 - p) * np.log1p(-p))


def small_network():
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)
    return nn.Sequential(*layers)


def test_entropy_spans_zero_to_log_k():
    logits = torch.tensor([[0.0, 0.0, 0.0], [200.0, 0.0, 0.0], [0.0, math.log(3.0), -math.inf]])
    expected = [math.log(3), 0.0, -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))]
    assert entropy(logits[:2]).tolist() == pytest.approx(expected[:2], abs=1e-6)
    assert entropy(logits[2:, :2]).tolist() == pytest.approx(expected[2:], abs=1e-6)


def test_neighbourhood_entropy_is_the_mean_over_the_ball():
    x = torch.full((3, 1, 2, 2), 0.5)
    x[1:, 0, 0, 0] = torch.tensor([0.7, 0.0])
    found = neighbourhood_entropy(FirstPixel(10), x, eps=0.1, points=4000, seed=0)
    # Uniform in the interval around each first pixel, cut to [0, 1].
    around = [np.clip(np.linspace(c - 0.1, c + 0.1, 20001), 0, 1) for c in (0.5, 0.7, 0.0)]
    expected = [binary_entropy(10 * (points - 0.5)).mean() for points in around]
    assert found.tolist() == pytest.approx(expected, abs=0.01)
    assert neighbourhood_entropy(FirstPixel(10), x, eps=0.0, points=1).tolist() == pytest.approx(
        binary_entropy(10 * (x[:, 0, 0, 0].numpy() - 0.5)), abs=1e-5
    )


def test_neighbourhood_entropy_tells_its_progress_and_refuses_no_points():
    finished = []
    neighbourhood_entropy(FirstPixel(1), torch.rand(7, 1, 2, 2), eps=0.1, points=2, progress=finished.append)
    assert sum(finished) == 7
    with pytest.raises(InputError, match="points is 0"):
        neighbourhood_entropy(FirstPixel(1), torch.rand(2, 1, 2, 2), eps=0.1, points=0)
    with pytest.raises(InputError, match=r"scale them to \[0, 1\]"):
        neighbourhood_entropy(FirstPixel(1), 2 + torch.rand(2, 1, 2, 2), eps=0.1)


def test_adversarial_entropy_is_that_of_one_step_towards_the_boundary():
    x, y = torch.full((1, 1, 2, 2), 0.8), torch.tensor([0])  # class 0 where the first pixel is above a half
    found = adversarial_entropy(FirstPixel(10), x, y, eps=0.1, alpha=1.0, seed=0)
    # A step longer than the ball ends on its near side, wherever it began.
    assert found.item() == pytest.approx(binary_entropy(10 * (0.7 - 0.5)), abs=1e-5)


def test_directions_have_the_norm_of_each_filter_and_leave_biases_alone():
    model = small_network()
    direction = filter_normalised_direction(model, torch.Generator().manual_seed(1))
    for name, weight in model.named_parameters():
        if weight.dim() < 2:
            assert not direction[name].any()
        else:
            norms = [row.norm().item() for row in direction[name]]
            assert norms == pytest.approx([row.norm().item() for row in weight], rel=1e-5)
    other = filter_normalised_direction(model, torch.Generator().manual_seed(2))
    assert not torch.allclose(direction["0.weight"], other["0.weight"])


def test_the_landscape_is_the_loss_at_moved_weights_and_leaves_the_network_alone():
    model, x, y = small_network(), torch.rand(9, 1, 4, 4), torch.arange(9) % 3
    before = {name: value.clone() for name, value in model.state_dict().items()}
    directions = [filter_normalised_direction(model, torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    steps, finished = [-0.5, 0.0, 1.0], []
    found = loss_landscape(model, x, y, directions=directions, steps=steps, progress=finished.append)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert sum(finished) == 9
    model.eval()
    for i, a in enumerate(steps):
        for j, b in enumerate(steps):
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    weight.copy_(before[name] + a * directions[0][name] + b * directions[1][name])
                expected = F.cross_entropy(model(x), y).item()
            assert found[i, j].item() == pytest.approx(expected, rel=1e-5), (a, b)


def test_the_landscape_of_a_known_loss_has_its_closed_form():
    # Logits (z, 0) with label 0: the loss is log(1 + exp(−z)), and z moves linearly with the one weight.
    model, x = FirstPixel(2.0), torch.ones(1, 1, 1, 1)
    directions = [{"a": torch.tensor(1.0)}, {"a": torch.tensor(3.0)}]
    found = loss_landscape(model, x, torch.tensor([0]), directions=directions, steps=[0.0, 1.0])
    expected = [[math.log1p(math.exp(-0.5 * (2 + a + 3 * b))) for b in (0, 1)] for a in (0, 1)]
    assert found.tolist() == [pytest.approx(row, rel=1e-5) for row in expected]


def test_the_gradient_norm_is_that_of_one_backward_pass():
    model, x, y = small_network(), torch.rand(1203, 1, 4, 4), torch.arange(1203) % 3
    found = gradient_norm(model, x, y)  # in three batches
    F.cross_entropy(model.eval()(x), y).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    assert found == pytest.approx(expected, rel=1e-4)


def test_slopes_are_each_samples_gradient_along_the_way_from_the_start():
    model, x, y = small_network().eval(), torch.rand(5, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1])
    start = {name: p.detach() + 0.1 * torch.randn_like(p) for name, p in model.named_parameters()}
    found = loss_slopes(model, start, x, y)
    for i in range(5):
        model.zero_grad()
        F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()
        expected = sum((p.grad * (p.detach() - start[name])).sum() for name, p in model.named_parameters())
        assert found[i].item() == pytest.approx(expected.item(), rel=1e-3, abs=1e-6)


def test_information_in_weights_is_the_kl_of_two_gaussians_with_the_inverse_fisher_as_covariance():
    # A linear model: with samples' gradients g_i the Fisher information is their mean outer product F. KL(N(w, Σ) ‖
    # N(w₀, Σ)) with Σ⁻¹ = nF is computed by torch, independently of the formula.
    torch.manual_seed(0)
    model, n = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False)).double(), 40
    x, y = torch.rand(n, 1, 1, 2, dtype=torch.float64), torch.arange(n) % 2
    start = {"1.weight": torch.randn(2, 2, dtype=torch.float64)}
    gradients = []
    for i in range(n):
        model.zero_grad()
        F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()
        gradients.append(model[1].weight.grad.flatten().clone())
    fisher = torch.stack(gradients).T @ torch.stack(gradients) / n
    # Two classes leave a flat direction (both rows moved alike); a little precision there changes nothing that counts.
    precision = n * fisher + 1e-9 * torch.eye(4, dtype=torch.float64)
    w, w0 = model[1].weight.detach().flatten(), start["1.weight"].flatten()
    q, p = (torch.distributions.MultivariateNormal(mean, precision_matrix=precision) for mean in (w, w0))
    expected = torch.distributions.kl_divergence(q, p).item()
    slopes = loss_slopes(model, start, x, y)
    assert information_in_weights(slopes.square(), n) == pytest.approx(expected, rel=1e-3)
    assert information_in_weights(float(slopes.square().mean()), n) == pytest.approx(expected, rel=1e-3)


def test_weights_that_never_moved_hold_no_information():
    model = small_network()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    slopes = loss_slopes(model, start, torch.rand(4, 1, 4, 4), torch.tensor([0, 1, 2, 0]))
    assert information_in_weights(slopes.square(), 4) == 0


def test_a_confidence_trajectory_is_what_the_metrics_hold():
    line = {"test_pgd_conf_right": 0.7, "test_pgd_conf_wrong": None, "test_pgd_acc": 0.5}
    found = confidence_trajectory([line, line | {"test_pgd_conf_wrong": 0.4}], "pgd")
    assert found.right.tolist() == [0.7, 0.7]
    assert math.isnan(found.wrong[0])
    assert found.wrong[1] == 0.4
    assert confidence_trajectory([{"test_pgd_acc": 0.5}], "pgd") is None
    assert confidence_trajectory([], "pgd") is None


def test_penultimate_features_are_what_the_last_linear_layer_takes():
    model, x = small_network(), torch.rand(6, 1, 4, 4)
    found = penultimate_features(model, x)
    assert torch.allclose(model[4](found), model.eval()(x), atol=1e-6)
    with pytest.raises(InputError, match="no linear layer"):
        penultimate_features(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten()), x)
