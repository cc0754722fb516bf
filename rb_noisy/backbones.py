"""CIFAR-form networks of the two papers, written on timm's layers and registered with timm.

Every network takes images in [0, 1], shape (N, C, H, W), and returns logits (N, K). Normalisation is the first
layer of the network (`Normalize`, buffers saved with the weights; the identity until `mean` and `std` are given).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import timm
import torch
from timm.layers import ClassifierHead
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock
from torch import Tensor, nn
from torch.nn import functional as F

from rb_noisy.errors import InputError, unknown_name
from rb_noisy.schemas import is_plain
from rb_noisy.timm_models import architecture_options, is_backbone, pretrained_network


class Normalize(nn.Module):
    """(x - mean) / std per channel, with the statistics as buffers so that they travel with the weights."""

    def __init__(self, in_chans: int, mean: Sequence[float] | None = None, std: Sequence[float] | None = None):
        super().__init__()
        for name, value, default in (("mean", mean, 0.0), ("std", std, 1.0)):
            values = torch.full((in_chans,), default) if value is None else torch.tensor(value, dtype=torch.float32)
            if values.shape != (in_chans,):
                raise InputError(f"{name} has {values.numel()} values for {in_chans} channels; give one per channel")
            self.register_buffer(name, values.view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class PreActBlock(nn.Module):
    """Pre-activation basic block (He et al. 2016b); its shortcut branches off after the first activation."""

    def __init__(self, in_chs: int, out_chs: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_chs)
        self.conv1 = nn.Conv2d(in_chs, out_chs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_chs)
        self.conv2 = nn.Conv2d(out_chs, out_chs, 3, 1, 1, bias=False)
        changes = stride != 1 or in_chs != out_chs
        self.shortcut = nn.Conv2d(in_chs, out_chs, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = self.conv1(out)
        return self.conv2(F.relu(self.bn2(out))) + shortcut


def _post_act_block(in_chs: int, out_chs: int, stride: int) -> BasicBlock:
    downsample = None
    if stride != 1 or in_chs != out_chs:
        downsample = nn.Sequential(nn.Conv2d(in_chs, out_chs, 1, stride, bias=False), nn.BatchNorm2d(out_chs))
    return BasicBlock(in_chs, out_chs, stride, downsample)


class CifarResNet(nn.Module):
    """Residual network in CIFAR form: a 3x3 stem without pooling, then stages of which all but the first halve.

    Args:
        depths: blocks in each stage.
        widths: channels of each stage.
        stem: channels of the stem.
        preact: pre-activation blocks (and one BatchNorm after the last), else timm's `BasicBlock`.
        width: multiplies the channels of stem and stages, rounded; half of them take a quarter of the arithmetic.
        stem_stride: 2 halves the image at once and takes a quarter of the time, for trials on a CPU.
        mean, std: per-channel statistics of images in [0, 1]; None leaves the input as it is.
    """

    def __init__(
        self,
        depths: Sequence[int],
        widths: Sequence[int],
        stem: int,
        preact: bool,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        width: float = 1.0,
        stem_stride: int = 1,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ):
        super().__init__()
        stem, *widths = (round(width * channels) for channels in (stem, *widths))
        if min(stem, *widths) < 1:
            raise InputError(f"width is {width}, which leaves a layer without channels; give a larger share")
        self.num_classes, self.num_features = num_classes, widths[-1]
        self.head_hidden_size = self.num_features
        self.normalize = Normalize(in_chans, mean, std)
        self.stem = nn.Conv2d(in_chans, stem, 3, stem_stride, 1, bias=False)
        self.stem_norm = nn.Identity() if preact else nn.Sequential(nn.BatchNorm2d(stem), nn.ReLU())
        block: Callable[[int, int, int], nn.Module] = PreActBlock if preact else _post_act_block
        stages, in_chs, reduction = [], stem, stem_stride
        self.feature_info = []
        for index, (depth, channels) in enumerate(zip(depths, widths, strict=True)):
            strides = [1 if index == 0 else 2] + [1] * (depth - 1)
            blocks = []
            for stride in strides:
                blocks.append(block(in_chs, channels, stride))
                in_chs = channels
            reduction *= strides[0]
            stages.append(nn.Sequential(*blocks))
            self.feature_info.append({"num_chs": channels, "reduction": reduction, "module": f"stages.{index}"})
        self.stages = nn.Sequential(*stages)
        self.norm = nn.Sequential(nn.BatchNorm2d(in_chs), nn.ReLU()) if preact else nn.Identity()
        self.head = ClassifierHead(in_chs, num_classes, pool_type=global_pool, drop_rate=drop_rate)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map, (N, num_features, h, w)."""
        return self.norm(self.stages(self.stem_norm(self.stem(self.normalize(x)))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (N, K) of a feature map, or with `pre_logits` the penultimate features (N, num_features)."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class SmallCNN(nn.Module):
    """The four-convolution, three-linear network of TRADES (Zhang et al. 2019) for 28x28 images.

    Convolutions start from Kaiming's normal distribution and the last linear layer at zero, as there. `img_size` must
    be at least 16 (two unpadded pairs of 3x3 convolutions, each followed by a pooling).
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 1,
        img_size: int = 28,
        drop_rate: float = 0.5,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ):
        super().__init__()
        side = ((img_size - 4) // 2 - 4) // 2
        if side < 1:
            raise InputError(f"small_cnn needs images of at least 16x16 pixels, not {img_size}x{img_size}")
        self.num_classes, self.num_features, self.head_hidden_size = num_classes, 200, 200
        self.normalize = Normalize(in_chans, mean, std)
        self.stages = nn.Sequential(
            nn.Sequential(nn.Conv2d(in_chans, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.MaxPool2d(2)),
            nn.Sequential(nn.Conv2d(32, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.MaxPool2d(2)),
        )
        self.feature_info = [
            {"num_chs": 32, "reduction": 2, "module": "stages.0"},
            {"num_chs": 64, "reduction": 4, "module": "stages.1"},
        ]
        self.fc1, self.drop = nn.Linear(64 * side * side, 200), nn.Dropout(drop_rate)
        self.fc2 = nn.Linear(200, 200)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
                nn.init.zeros_(module.bias)
        self.reset_classifier(num_classes)

    def get_classifier(self) -> nn.Module:
        return self.fc3

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        self.fc3 = nn.Linear(200, num_classes) if num_classes else nn.Identity()
        if num_classes:
            nn.init.zeros_(self.fc3.weight)
            nn.init.zeros_(self.fc3.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map, (N, 64, h, w)."""
        return self.stages(self.normalize(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (N, K) of a feature map, or with `pre_logits` the penultimate features (N, 200)."""
        x = self.drop(F.relu(self.fc1(x.flatten(1))))
        x = F.relu(self.fc2(x))
        return x if pre_logits else self.fc3(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class StridedCNN(nn.Module):
    """Two strided convolutions and two linear layers: the small network of Wong & Kolter (2018), `width` times as wide.

    16 and 32 channels of 4x4 convolutions with stride 2, 100 hidden units. It does 4% of the arithmetic of `SmallCNN`,
    which is what experiments with many runs on a CPU need. `img_size` must be at least 2 to the power of `depth`.

    Args:
        depth: convolutions; each has twice the channels of the one before.
        batch_norm: BatchNorm after every convolution. On CIFAR-10 the network learns next to nothing without it.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 1,
        img_size: int = 28,
        width: int = 1,
        depth: int = 2,
        batch_norm: bool = False,
        drop_rate: float = 0.0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ):
        super().__init__()
        if width < 1 or depth < 1 or img_size < 2**depth:
            raise InputError(
                "strided_cnn needs width >= 1, depth >= 1 and img_size >= 2**depth, "
                f"not width {width}, depth {depth} and img_size {img_size}"
            )
        side = img_size // 2**depth
        channels = [in_chans, *(16 * width * 2**i for i in range(depth))]
        self.num_classes, self.num_features, self.head_hidden_size = num_classes, 100 * width, 100 * width
        self.normalize = Normalize(in_chans, mean, std)
        self.stages = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(before, after, 4, 2, 1, bias=not batch_norm),
                    *([nn.BatchNorm2d(after)] if batch_norm else []),
                    nn.ReLU(),
                )
                for before, after in pairwise(channels)
            )
        )
        self.feature_info = [
            {"num_chs": chs, "reduction": 2 ** (i + 1), "module": f"stages.{i}"} for i, chs in enumerate(channels[1:])
        ]
        self.fc1, self.drop = nn.Linear(channels[-1] * side * side, 100 * width), nn.Dropout(drop_rate)
        self.reset_classifier(num_classes)

    def get_classifier(self) -> nn.Module:
        return self.fc2

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        self.fc2 = nn.Linear(self.head_hidden_size, num_classes) if num_classes else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map, (N, 16·width·2^(depth-1), h, w)."""
        return self.stages(self.normalize(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (N, K) of a feature map, or with `pre_logits` the penultimate features (N, 100·width)."""
        x = self.drop(F.relu(self.fc1(x.flatten(1))))
        return x if pre_logits else self.fc2(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _cfg(channels: int, size: int, **kwargs: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 10,
        "input_size": (channels, size, size),
        "pool_size": None,
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        # Normalisation lives inside the network: what is fed in stays in [0, 1].
        "mean": (0.0,) * channels,
        "std": (1.0,) * channels,
        **kwargs,
    }


_STEM = {"first_conv": "stem", "classifier": "head.fc"}
_RESNETS = {  # name: depths, widths, stem, preact
    "preact_resnet18": ((2, 2, 2, 2), (64, 128, 256, 512), 64, True),
    "preact_resnet8_narrow": ((1, 1, 1), (16, 32, 64), 16, True),
    "resnet8_narrow": ((1, 1, 1), (16, 32, 64), 16, False),
    "resnet10_cifar": ((1, 1, 1, 1), (64, 128, 256, 512), 64, False),
    "resnet18_cifar": ((2, 2, 2, 2), (64, 128, 256, 512), 64, False),
    "resnet26_cifar": ((3, 3, 3, 3), (64, 128, 256, 512), 64, False),
    "resnet34_cifar": ((3, 4, 6, 3), (64, 128, 256, 512), 64, False),
    "wrn_28_10": ((4, 4, 4), (160, 320, 640), 16, True),
    # Madry et al. and GAIRAT count WRN-32-10 without the two shortcut convolutions that WRN-34-10 counts:
    # both names mean five blocks a stage, 46.2 M parameters.
    "wrn_32_10": ((5, 5, 5), (160, 320, 640), 16, True),
    "wrn_34_10": ((5, 5, 5), (160, 320, 640), 16, True),
}
default_cfgs = generate_default_cfgs(
    {name: _cfg(3, 32, **_STEM) for name in _RESNETS}
    | {
        "small_cnn": _cfg(1, 28, first_conv="stages.0.0", classifier="fc3"),
        "strided_cnn": _cfg(1, 28, first_conv="stages.0.0", classifier="fc2"),
    }
)
FIXED_SIZE = ("small_cnn", "strided_cnn")  # their linear layers depend on `img_size`
NETWORKS = dict.fromkeys(_RESNETS, CifarResNet) | {"small_cnn": SmallCNN, "strided_cnn": StridedCNN}
BACKBONES = tuple(NETWORKS)


def _residual(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    depths, widths, stem, preact = _RESNETS[name]
    shape = {"depths": depths, "widths": widths, "stem": stem, "preact": preact}
    features = {"feature_cls": "hook", "out_indices": tuple(range(len(depths)))}
    return build_model_with_cfg(CifarResNet, name, pretrained, feature_cfg=features, **shape, **kwargs)


@register_model
def preact_resnet18(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PreAct-ResNet-18, 11.17 M parameters (He et al. 2016b; the network of Rice et al. and of [SGLR] Figure 1)."""
    return _residual("preact_resnet18", pretrained, **kwargs)


@register_model
def preact_resnet8_narrow(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Three stages of one pre-activation block, 16-32-64 channels: for 8x8 digits and quick trials."""
    return _residual("preact_resnet8_narrow", pretrained, **kwargs)


@register_model
def resnet8_narrow(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Three stages of one post-activation block, 16-32-64 channels."""
    return _residual("resnet8_narrow", pretrained, **kwargs)


@register_model
def resnet10_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-10 in CIFAR form [NL, App. C.3]; timm's own `resnet10t` is the ImageNet form."""
    return _residual("resnet10_cifar", pretrained, **kwargs)


@register_model
def resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-18 in CIFAR form [NL, App. C.1; SGLR §4]; timm's own `resnet18` is the ImageNet form."""
    return _residual("resnet18_cifar", pretrained, **kwargs)


@register_model
def resnet26_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-26 in CIFAR form [NL, App. C.3], basic blocks; timm's own `resnet26` has bottlenecks."""
    return _residual("resnet26_cifar", pretrained, **kwargs)


@register_model
def resnet34_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-34 in CIFAR form [NL, App. C.3]; timm's own `resnet34` is the ImageNet form."""
    return _residual("resnet34_cifar", pretrained, **kwargs)


@register_model
def wrn_28_10(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Wide ResNet-28-10, 36.5 M parameters (Zagoruyko & Komodakis 2016)."""
    return _residual("wrn_28_10", pretrained, **kwargs)


@register_model
def wrn_32_10(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Wide ResNet-32-10 in Madry et al.'s counting [NL, App. E], 46.2 M parameters."""
    return _residual("wrn_32_10", pretrained, **kwargs)


@register_model
def wrn_34_10(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Wide ResNet-34-10, 46.2 M parameters (Zagoruyko & Komodakis 2016; the network of TRADES)."""
    return _residual("wrn_34_10", pretrained, **kwargs)


@register_model
def small_cnn(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SmallCNN of TRADES for MNIST: four convolutions, three linear layers."""
    kwargs.setdefault("in_chans", 1)
    features = {"feature_cls": "hook", "out_indices": (0, 1)}
    return build_model_with_cfg(SmallCNN, "small_cnn", pretrained, feature_cfg=features, **kwargs)


@register_model
def strided_cnn(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Strided convolutions, two linear layers (the small network of Wong & Kolter 2018): for quick trials."""
    kwargs.setdefault("in_chans", 1)
    features = {"feature_cls": "hook", "out_indices": tuple(range(kwargs.get("depth", 2)))}
    return build_model_with_cfg(StridedCNN, "strided_cnn", pretrained, feature_cfg=features, **kwargs)


def build_backbone(
    name: str,
    *,
    num_classes: int,
    in_chans: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    pretrained: bool = False,
    **options: Any,
) -> nn.Module:
    """A fresh network by its timm name, ours or any other, that takes images in [0, 1].

    Args:
        name: one of `BACKBONES`, or any name that `timm.is_model` knows, with or without a tag.
        num_classes: K, the width of the logits.
        in_chans: channels of the images.
        mean, std: per-channel statistics for the normalisation inside the network; None for none.
        pretrained: with the weights that timm has for it, from the Hub's safetensors.
        options: of its architecture (`drop_rate`, `img_size`, …): numbers, words, and lists of them.

    Raises:
        InputError: unknown name, an option that the network does not take, no such weights.
    """
    if not is_backbone(name):
        raise unknown_name("backbone", str(name), timm.list_models())
    known = architecture_options(name)
    for option, value in options.items():
        if option not in known:
            takes = ", ".join(sorted(known)) or "none"
            raise InputError(f"backbone {name!r} does not take the option {option!r}; it takes {takes}")
        if not is_plain(value):
            raise InputError(f"backbone {name!r}: {option} is {value!r}; give a number, a word or a list of them")
    if pretrained not in (True, False):
        raise InputError(f"pretrained is {pretrained!r}; give true or false")
    options |= {"num_classes": num_classes, "in_chans": in_chans}
    try:
        if name in BACKBONES and not pretrained:
            return timm.create_model(name, mean=mean, std=std, **options)
        model = pretrained_network(name, **options) if pretrained else timm.create_model(name, **options)
    except InputError:
        raise
    except Exception as error:  # whatever a network makes of a number it was not written for
        raise InputError(f"backbone {name!r} cannot be built with {options}: {error}") from error
    normalized = nn.Sequential()  # names instead of numbers: the state dict stays readable
    normalized.add_module("normalize", Normalize(in_chans, mean, std))
    normalized.add_module("model", model)
    return normalized
