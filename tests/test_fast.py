"""The fast evaluation form: the same logits and input gradients, another network."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rb_noisy.backbones import BACKBONES, FIXED_SIZE, build_backbone
from rb_noisy.fast import fast_form


def lived_in(model: nn.Module) -> nn.Module:
    """In eval mode, with BatchNorm statistics and weights as training leaves them: none is the identity."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -1, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def gradient(model: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(model(x).logsumexp(1).sum(), x)[0]


def build(name: str) -> tuple[nn.Module, Tensor]:
    options = {"width": 1 / 16} if name not in FIXED_SIZE else {}
    if name == "strided_cnn":
        options = {"batch_norm": True}
    shape = (1, 28, 28) if name in FIXED_SIZE else (3, 32, 32)
    mean, std = ([0.4] * shape[0], [0.25] * shape[0])
    torch.manual_seed(1)
    model = build_backbone(name, num_classes=10, in_chans=shape[0], mean=mean, std=std, **options)
    return lived_in(model), torch.rand(5, *shape)


@pytest.mark.parametrize("name", BACKBONES)
def test_logits_and_gradients_agree_with_the_plain_model(name):
    model, x = build(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fast = fast_form(model)
    with torch.no_grad():
        wanted = model(x)
        scale = wanted.abs().max().clamp_min(1)
        assert torch.allclose(fast(x) / scale, wanted / scale, rtol=0, atol=1e-4)
    wanted = gradient(model, x)
    assert torch.allclose(gradient(fast, x), wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in fast.parameters())


def test_batchnorm_is_folded():
    model, _ = build("resnet8_narrow")
    norms = [sum(isinstance(m, nn.BatchNorm2d) for m in network.modules()) for network in (model, fast_form(model))]
    assert norms == [9, 0]


def test_a_timm_network_has_a_fast_form():
    model = lived_in(timm.create_model("mobilenetv3_small_050", num_classes=3))
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(fast_form(model)(x), model(x), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["preact_resnet8_narrow", "resnet8_narrow", "strided_cnn"])
def test_an_update_brings_it_to_the_weights_of_now(name):
    model, x = build(name)
    fast = fast_form(model)
    fast(x)
    model.train()(x)  # moves the BatchNorm statistics
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3).add_(0.01)
        wanted = model(x)
        assert not torch.allclose(fast(x), wanted, rtol=0, atol=1e-3)
        fast.update(model)
        assert torch.allclose(fast(x), wanted, rtol=1e-4, atol=1e-4)


class Twice(nn.Module):
    """One BatchNorm after two convolutions, and a convolution that two layers read: neither may be folded."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.shared = nn.Conv2d(1, 2, 3), nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)
        self.read, self.norm = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(self.first(x)) + self.shared(self.second(x))
        x = self.read(x)
        return (self.norm(x) + x).mean((2, 3))


def test_what_is_shared_is_not_folded():
    model = lived_in(Twice())
    x = torch.rand(4, 1, 8, 8)
    with torch.no_grad():
        assert torch.allclose(fast_form(model)(x), model(x), rtol=0, atol=1e-5)
    assert not fast_form(model).folded


class Read(nn.Module):
    """ReLUs of what somebody else reads, before or after, of what nobody else does, and of what its maker needs."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)
        self.twice, self.once, self.norm = nn.ReLU(), nn.ReLU(), nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = self.twice(x) - x
        x = self.once(self.norm(self.second(x) + x))
        x = F.relu(self.twice(self.third(x)).tanh())
        return F.relu(x + 0.5 * x.detach()).mean((2, 3))


def test_a_relu_writes_over_nothing_that_is_read():
    model = lived_in(Read())
    x = torch.randn(4, 1, 8, 8)
    fast = fast_form(model)
    with torch.no_grad():
        assert torch.allclose(fast(x), model(x), rtol=0, atol=1e-5)
    assert torch.allclose(gradient(fast, x), gradient(model, x), rtol=1e-4, atol=1e-6)
    assert "inplace = True" in fast.graph.code
    assert [module.inplace for module in (fast.graph.twice, fast.graph.once)] == [False, True]
    assert not model.once.inplace


class Undecided(nn.Module):
    """Its path depends on the values, which nothing that traces can follow."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        return (x if x.sum() > 0 else -x).mean((2, 3))


def test_a_network_that_cannot_be_traced_is_copied():
    model = lived_in(Undecided())
    x = torch.rand(4, 1, 8, 8)
    with torch.no_grad():
        assert torch.allclose(fast_form(model)(x), model(x), rtol=0, atol=1e-5)


def test_compiled_for_any_batch():
    model = lived_in(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)))
    fast, x = fast_form(model, compiled=True), torch.rand(35, 1, 8, 8)
    for count in (35, 16, 1):  # one compilation
        assert torch.allclose(gradient(fast, x[:count]), gradient(model, x[:count]), rtol=1e-3, atol=1e-5)
    assert torch.allclose(fast(x), model(x), rtol=0, atol=1e-4)
