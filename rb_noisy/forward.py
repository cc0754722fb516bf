"""What a network is given and what it answers: the contract, in one place, for all who ask one.

*Given*: images (N, C, H, W) in [0, 1], of the shape that it was trained on where that is known (`image_shape`, which
`load_model` sets; a network with global pooling would take others, and label them by chance). Float32, or float64;
half precision is taken as float32, and values that rounding put outside of [0, 1] by 1e-6 at most are cut. Labels (N,)
int64 in 0..K-1.

*Answered*: logits (N, K), K at least 2, as one tensor, finite on natural images. Where they are not finite on an
attacked image, that counts as broken. A network in half precision is asked in float32, on a copy of its weights,
because its gradients would vanish where it is sure; one in another precision than the images is asked in its own. One
that alters its images gets copies.

*Warned of* (`NetworkWarning`): answers that look like probabilities, that differ from one time to the next or with the
other images of the batch, and gradients that are zero or not finite, which hide from an attack what it looks for.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from rb_noisy.errors import InputError, NetworkWarning
from rb_noisy.weights import kept_buffers

P, R = ParamSpec("P"), TypeVar("R")

_FEW = 16  # images of the checks that ask twice
_ROUNDING = 1e-6  # that much outside of [0, 1] is rounding
_APART = 1e-3  # logits further apart, as a share of the largest, are different
MASKED_SHARE = 0.05  # of images without a usable gradient, from which on there is a warning


@dataclass(frozen=True, eq=False)
class Asked:
    """A network, images and labels that keep the contract.

    Attributes:
        model: takes `x` as it is, returns finite logits (N, K) on natural images.
        x: (N, C, H, W) float32 or float64 in [0, 1].
        y: (N,) int64 in 0..K-1, or None.
        logits: (N, K) on the device of x, of the natural images in eval mode.
    """

    model: nn.Module
    x: Tensor
    y: Tensor | None
    logits: Tensor


def outside_inference(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function take gradients where the caller is inside `torch.inference_mode()`: the same as outside."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return call


@outside_inference
def ask(
    model: nn.Module,
    x: Tensor,
    y: Tensor | None = None,
    *,
    mode: str = "eval",
    batch_size: int = 256,
    warn: bool = True,
) -> Asked:
    """Check images, labels and what the network answers, and make of them what an attack can use.

    It takes one forward pass of every image, and with `warn` four of the first few.

    Args:
        model: see this module.
        x: (N, C, H, W) natural images.
        y: (N,) int64 labels, or None.
        mode: "keep" asks the network as it is, unless the whole of it is in training mode; else in eval mode.
        batch_size: images at a time.
        warn: say what does not forbid a measurement but speaks against trusting it.

    Raises:
        InputError: any of them does not keep the contract.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"the network is a {type(model).__name__}; wrap it in a torch.nn.Module")
    x = checked_images(x, image_shape_of(model))
    y = None if y is None else checked_labels(y, x)
    mode = "keep" if mode == "keep" and not in_training(model) else "eval"
    network = _convertible(model, x)
    if not len(x):
        return Asked(network, x, y, x.new_zeros(0, 2))
    first, *others = x.split(max(1, batch_size))
    with _apart(network, x, mode) as device:
        network, answer = _first_answer(network, first.to(device))
        if y is not None:  # before the rest takes its time
            checked_classes(y, answer.shape[1])
        answers = [answer, *(_answer(network, part.to(device)) for part in others)]
        logits = all_finite(torch.cat([answer.to(x.device) for answer in answers]))
        for doubt in doubts(network, x[:_FEW].to(device)) if warn else ():
            warnings.warn(doubt, NetworkWarning, stacklevel=4)
    return Asked(network, x, y, logits)


def checked_images(x: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
    """The images as float32 or float64 in [0, 1], as they are where they are that; never the caller's to write to.

    Args:
        x: (N, C, H, W) in [0, 1].
        shape: (C, H, W) that the network was trained on, where that is known.

    Raises:
        InputError: other values, another shape, no floating point.
    """
    if not isinstance(x, Tensor) or x.layout != torch.strided or x.device.type == "meta":
        raise InputError(f"the images are {_kind(x)}; give a dense tensor (N, C, H, W), e.g. torch.as_tensor(images)")
    if x.dim() != 4:
        raise InputError(f"the images have shape {tuple(x.shape)}; give (N, C, H, W)")
    if not x.is_floating_point():
        raise InputError(f"the images are {x.dtype}; give floating point in [0, 1], e.g. x.float() / 255")
    if shape is not None and tuple(x.shape[1:]) != tuple(shape):
        raise InputError(
            f"the images are {_sides(x.shape[1:])} but the network was trained on {_sides(shape)} "
            "(channels x height x width); give such images, or another network"
        )
    # Half precision cannot hold a step of an attack; a tensor of inference mode takes no gradients.
    x = x.detach().float() if x.dtype in (torch.float16, torch.bfloat16) else x.detach()
    x = x.clone() if x.is_inference() else x
    if not len(x):
        return x
    low, high = (value.item() for value in x.aminmax())
    if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):
        raise InputError(f"the images span [{low:.9g}, {high:.9g}]; scale them to [0, 1], without NaN")
    return x if low >= 0 and high <= 1 else x.clamp(0.0, 1.0)


def checked_labels(y: Tensor, x: Tensor, what: str = "labels") -> Tensor:
    """Labels (N,) int64, one for each image, from 0 on; `what` names them.

    Raises:
        InputError: another shape or type, or a label below 0.
    """
    if not isinstance(y, Tensor) or y.shape != x.shape[:1]:
        shape = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise InputError(f"{shape} {what} for {len(x)} images; give one integer per image")
    if y.dtype != torch.int64:
        raise InputError(f"the {what} are {y.dtype}; give torch.int64")
    y = y.detach()
    if len(y) and int(y.min()) < 0:
        raise InputError(f"the {what} begin at {int(y.min())}; give classes from 0 on")
    return y.clone() if y.is_inference() else y


def checked_classes(y: Tensor, classes: int, what: str = "labels") -> None:
    """Raise an `InputError` where a label (N,) is none of the network's classes 0..classes-1."""
    low, high = (int(value) for value in y.aminmax())
    if low < 0 or high >= classes:
        raise InputError(f"the {what} reach from {low} to {high}; the model knows 0 to {classes - 1}")


@torch.no_grad()
def natural_logits(model: nn.Module, x: Tensor) -> Tensor:
    """Logits (N, K) of natural images (N, C, H, W), which have to be there, and finite.

    Raises:
        InputError: the network cannot take the images, answers otherwise, or the logits of some are not finite.
    """
    return all_finite(_answer(model, x))


def all_finite(logits: Tensor) -> Tensor:
    """The logits (N, K) of natural images.

    Raises:
        InputError: those of some images are not finite.
    """
    spoiled = ~finite(logits)
    if spoiled.any():
        raise InputError(
            f"the network's logits of {int(spoiled.sum())} of {len(logits)} natural images are not finite (image "
            f"{int(spoiled.int().argmax())} is the first); look at its weights (a training that diverged?) and at the "
            "images"
        )
    return logits


def finite(logits: Tensor) -> Tensor:
    """(N,) bool: all of an image's logits (N, K) are finite numbers."""
    return logits.isfinite().all(1)


def is_right(logits: Tensor, y: Tensor) -> Tensor:
    """(N,) bool: logits (N, K) that are finite, with the greatest at the label (N,)."""
    return (logits.argmax(1) == y) & finite(logits)


def masked(gradient: Tensor) -> Tensor:
    """(N,) bool: the gradient (N, C, H, W) of an image is zero throughout or not finite: it leads an attack nowhere."""
    largest = gradient.flatten(1).abs().amax(1)  # NaN where one is
    return ~((largest > 0) & (largest < torch.inf))


def doubts(model: nn.Module, x: Tensor) -> list[str]:
    """What speaks against trusting a measurement of this network, from a few images (N, C, H, W) on its device."""
    found = []
    with torch.random.fork_rng([x.device] if x.device.type == "cuda" else []):
        logits, again = natural_logits(model, x), natural_logits(model, x)
    if looks_like_probabilities(logits):
        found.append(
            "the network's answers look like probabilities (each row sums to 1), not logits: its confidence is then "
            "wrong and its gradients vanish; leave the softmax out"
        )
    if differ(logits, again):
        found.append(
            "the network gives the same images other logits each time: a single attack says too much for it; attack "
            "the mean of its answers (expectation over transformation)"
        )
    elif depends_on_batch(model, x):
        found.append("the logits of an image depend on the other images of its batch, and so do the figures")
    return found


def looks_like_probabilities(logits: Tensor) -> bool:
    """Whether all rows (N, K) are in 0..1 and sum to 1."""
    inside = bool((logits >= 0).all() and (logits <= 1).all())
    return inside and bool(((logits.sum(1) - 1).abs() < 1e-3).all())


@torch.no_grad()
def depends_on_batch(model: nn.Module, x: Tensor) -> bool:
    """Whether the logits of the first of the images (N, C, H, W) change with the others of its batch."""
    return len(x) > 1 and differ(natural_logits(model, x)[:1], natural_logits(model, x[:1]))


def warn_of_attack(hidden: Tensor, spoiled: Tensor) -> None:
    """Warn of what `attack_doubts` says."""
    for doubt in attack_doubts(hidden, spoiled):
        warnings.warn(doubt, NetworkWarning, stacklevel=4)


def attack_doubts(hidden: Tensor, spoiled: Tensor) -> list[str]:
    """What speaks against the figures of an attack on N images.

    Args:
        hidden: (N,) bool, the images without a usable gradient (`masked`); told from `MASKED_SHARE` of them on.
        spoiled: (N,) bool, the images with an iterate whose logits are not finite.
    """
    found, share = [], hidden.double().mean().item() if len(hidden) else 0.0
    if share > MASKED_SHARE:
        found.append(
            f"the gradient of {share:.0%} of the images is zero or not finite: attacks that follow it are blind there, "
            "and the network looks more robust than it is; believe AutoAttack (Square needs no gradients), not this "
            "figure"
        )
    if count := int(spoiled.sum()):
        found.append(spoiled_doubt(count))
    return found


def spoiled_doubt(count: int) -> str:
    return f"the network's logits of {count} attacked images are not finite; these images count as broken"


def image_shape_of(model: nn.Module) -> tuple[int, ...] | None:
    """(C, H, W) of the images that a network was trained on; None where it does not say."""
    while isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel | AveragedModel):
        model = model.module
    return getattr(model, "image_shape", None)


def device_of(model: nn.Module, x: Tensor) -> torch.device:
    """Where the weights are; of a network without any, where x is."""
    return next((tensor.device for tensor in chain(model.parameters(), model.buffers())), x.device)


@contextmanager
def in_mode(model: nn.Module, mode: str) -> Iterator[None]:
    """Put the whole model in `mode`, then every module back into its own (frozen BatchNorms stay frozen).

    What has no mode, as exported and frozen networks have none, stays as it is.
    """
    if mode not in ("eval", "train", "keep"):
        raise InputError(f"attack mode is {mode!r}; give 'eval', 'train' or 'keep'")
    before = [(module, module.training) for module in model.modules() if hasattr(module, "training")]
    if mode != "keep":
        try:
            model.train(mode == "train")
        except (NotImplementedError, AttributeError, RuntimeError):
            if mode == "train":
                raise InputError("the network has no training mode; attack it in eval mode") from None
    try:
        yield
    finally:
        for module, training in before:
            if module.training != training:
                module.training = training


def in_training(model: nn.Module) -> bool:
    """Whether the network is in training mode; what cannot leave it, as an exported network, has no modes."""
    network = model.module if isinstance(model, nn.DataParallel) else model
    if not getattr(network, "training", False):
        return False
    with in_mode(network, "eval"):
        return not network.training


class _Bridge(nn.Module):
    """A network asked in its own precision, with images of its own to alter, or as a module that can be watched."""

    def __init__(self, model: nn.Module, dtype: torch.dtype | None, own_images: bool):
        super().__init__()
        self.model, self.dtype, self.own_images = model, dtype, own_images
        self.training = in_training(model)

    def forward(self, x: Tensor) -> Tensor:
        given = x.to(self.dtype or x.dtype)
        return self.model(given.clone() if self.own_images else given).to(x.dtype)


@outside_inference
def usable(model: nn.Module, x: Tensor, mode: str = "eval") -> tuple[nn.Module, Tensor]:
    """The network, or what stands for it, so that it takes images x (N, C, H, W), leaves them, and has gradients.

    And its logits (n, K) of the first few of them, on the CPU; of one that draws at random, for one seed.

    Raises:
        InputError: it cannot take them, or answers with something else than logits (N, K).
    """
    network = _convertible(model, x)
    with _apart(network, x, mode) as device:
        torch.manual_seed(0)
        network, logits = _first_answer(network, x[:_FEW].to(device))
    return network, logits.cpu()


@contextmanager
def _apart(model: nn.Module, x: Tensor, mode: str) -> Iterator[torch.device]:
    """Passes in the block leave nothing behind, neither gradients nor random numbers drawn; yields the device."""
    device = device_of(model, x)
    random = torch.random.fork_rng([device] if device.type == "cuda" else [])
    statistics = kept_buffers(model) if mode == "keep" else contextlib.nullcontext()  # of a part left in training
    with random, torch.no_grad(), statistics, in_mode(model, mode):
        yield device


def _convertible(model: nn.Module, x: Tensor) -> nn.Module:
    """The network, or what stands for it so that it takes the type of x and has gradients."""
    tensors = list(chain(model.parameters(), model.buffers()))
    precision = next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), x.dtype)
    half = precision in (torch.float16, torch.bfloat16)
    if half or any(tensor.is_inference() for tensor in tensors):
        try:
            model = copy.deepcopy(model)
        except Exception as error:  # whatever its parts raise
            kind = "is in half precision" if half else "was made in inference mode"
            way_out = "give it in float32: model.float()" if half else "make it outside"
            raise InputError(f"the network {kind} and cannot be copied ({error}); {way_out}") from error
        model = model.float() if half else model
        precision = torch.float32 if half else precision
    if precision != x.dtype or isinstance(model, torch.jit.ScriptModule):
        return _Bridge(model, precision, own_images=False)
    return model


def _first_answer(model: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
    """The network, or one that gives it copies if it alters its images; and its answer to x (N, C, H, W)."""
    given = x.clone()
    version = given._version
    answer = _answer(model, given)
    # The count of changes tells of those too that were undone, which a gradient forbids all the same.
    altered = given._version > version or not torch.equal(given, x)
    return (_Bridge(model, None, own_images=True) if altered else model), answer


def _answer(model: nn.Module, x: Tensor) -> Tensor:
    """What the network answers to images (N, C, H, W), if it is logits (N, K); in a tensor of their own."""
    try:
        answer = model(x)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, AssertionError, IndexError, TypeError, NotImplementedError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        images = f"{len(x)} images of {_sides(x.shape[1:])} in {x.dtype}"
        raise InputError(f"the network cannot take {images} ({reason}); give what it was made for") from error
    return _logits(answer, len(x)).clone()  # some answer in one and the same tensor each time


def _logits(answer: Any, count: int) -> Tensor:
    """The answer, if it is logits (count, K)."""
    if not isinstance(answer, Tensor):
        raise InputError(f"the network answers with {_described(answer)}; wrap it in a module that returns these alone")
    if answer.dim() == 1 or answer.shape[1:] == (1,):
        raise InputError(
            f"the network answers with one logit per image, {tuple(answer.shape)}; wrap it so that it returns two: "
            "z = model(x).flatten(), then torch.stack([torch.zeros_like(z), z], 1)"
        )
    if answer.dim() != 2 or len(answer) != count or not answer.is_floating_point():
        raise InputError(
            f"the network answers {count} images with {answer.dtype} of shape {tuple(answer.shape)}; want floating "
            f"point logits ({count}, K)"
        )
    return answer


def _described(answer: Any) -> str:
    kind = type(answer).__name__
    if isinstance(getattr(answer, "logits", None), Tensor):
        return f"{kind}, whose .logits are wanted"
    if isinstance(answer, Mapping):
        return f"{kind} of {', '.join(map(str, answer))}, of which one tensor of logits (N, K) is wanted"
    if isinstance(answer, tuple | list):
        return f"{kind} of {len(answer)}, of which one tensor of logits (N, K) is wanted, perhaps its [0]"
    return f"{kind}, where a tensor of logits (N, K) is wanted"


def differ(a: Tensor, b: Tensor, tolerance: float = _APART) -> bool:
    """Whether logits (N, K) are further apart than a share of the largest, for each class: one may be switched off."""
    scale = column_scale(a)
    return a.shape != b.shape or not torch.allclose(a / scale, b / scale, rtol=0, atol=tolerance, equal_nan=True)


def column_scale(logits: Tensor) -> Tensor:
    """(1, K) the largest size of each class's finite logits (N, K), at least 1."""
    return logits.nan_to_num(0.0, 0.0, 0.0).abs().amax(0, keepdim=True).clamp_min(1.0)


def _kind(x: Any) -> str:
    return f"a {x.layout} tensor on {x.device}" if isinstance(x, Tensor) else type(x).__name__


def _sides(shape: Any) -> str:
    return "x".join(map(str, shape))
