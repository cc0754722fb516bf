"""Convolutions of a training pass as matrix products, where that is faster on this CPU.

The library's kernels are far from the machine's speed for small feature maps of many channels, weight gradients above
all: there a copy of every pixel's neighbourhood (im2col) and one matrix product take less time. Which of forward pass,
input gradient and weight gradient wins differs by shape, precision, threads and CPU, so each is measured.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from rb_noisy.errors import InputError

PARTS = ("forward", "input", "weight")
GAIN = 0.85  # of the library's time: what a matrix product may take at most to be chosen
LEAST = 2e-3  # seconds of the library's kernel from which on it is worth a choice
ROUNDS = 3


class PlannedConv2d(nn.Conv2d):
    """A convolution of which the parts named in `plan` are matrix products, in training mode.

    Made of an `nn.Conv2d` by `apply_plan`; its weights and state dict stay the same.
    """

    plan: str = ""  # text, because autocast would make something else of a set

    def forward(self, input: Tensor) -> Tensor:
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(input)
        return _Convolution.apply(input, self.weight, self.bias, self.stride[0], self.padding[0], self.plan)


_of_inputs_only = False


@contextlib.contextmanager
def input_gradients_only() -> Iterator[None]:
    """For a backward pass on the CPU that is asked for the gradient of images alone.

    Autograd tells a function of its own that its weights take gradients, whether they are asked for or not.
    """
    global _of_inputs_only
    before, _of_inputs_only = _of_inputs_only, True
    try:
        yield
    finally:
        _of_inputs_only = before


class _Convolution(torch.autograd.Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.bfloat16)
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, plan: str
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding, ctx.plan = stride, padding, plan
        if "forward" in plan:
            out = forward_product(x, weight, stride, padding)
            return out if bias is None else out + bias[:, None, None]
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    @once_differentiable
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_input, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        if _of_inputs_only:
            wants_weight = wants_bias = False
        native = (wants_input and "input" not in ctx.plan, wants_weight and "weight" not in ctx.plan)
        of_input, of_weight = library_gradients(gradient, x, weight, ctx.stride, ctx.padding, native)
        if wants_input and "input" in ctx.plan:
            of_input = input_product(gradient, weight, ctx.padding)
        if wants_weight and "weight" in ctx.plan:
            of_weight = weight_product(gradient, x, weight, ctx.stride, ctx.padding)
        of_bias = gradient.sum((0, 2, 3)) if wants_bias else None
        return of_input, of_weight, of_bias, None, None, None


def library_gradients(
    gradient: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The library's gradients of input and weight, those that are wanted."""
    if not any(wanted):
        return None, None
    sizes = [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1
    return torch.ops.aten.convolution_backward(gradient, x, weight, None, *sizes, [*wanted, False])[:2]


def columns(x: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """(N·H'·W', kernel²·C): the neighbourhood of every output pixel of images x (N, C, H, W), kernel rows first."""
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding, padding, padding, padding))
    height, width = _sides(x, kernel, stride, padding)
    parts = [
        padded[:, i : i + stride * (height - 1) + 1 : stride, j : j + stride * (width - 1) + 1 : stride]
        for i in range(kernel)
        for j in range(kernel)
    ]
    return torch.cat(parts, 3).reshape(-1, kernel * kernel * x.shape[1])


def _sides(x: Tensor, kernel: int, stride: int, padding: int) -> list[int]:
    """[H', W'] of what a convolution makes of x (N, C, H, W)."""
    return [(side + 2 * padding - kernel) // stride + 1 for side in x.shape[2:]]


def forward_product(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """The convolution of x (N, C, H, W) with a square kernel (O, C, k, k), in channels_last."""
    kernel = weight.shape[2]
    height, width = _sides(x, kernel, stride, padding)
    out = columns(x, kernel, stride, padding) @ weight.permute(2, 3, 1, 0).reshape(-1, weight.shape[0])
    return out.reshape(len(x), height, width, -1).permute(0, 3, 1, 2)


def input_product(gradient: Tensor, weight: Tensor, padding: int) -> Tensor:
    """The gradient of the input of a convolution of stride 1: that with the flipped kernel."""
    flipped = weight.flip(2, 3).transpose(0, 1)
    return forward_product(gradient, flipped, 1, weight.shape[2] - 1 - padding)


def weight_product(gradient: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """The gradient of the kernel."""
    count, _, kernel, _ = weight.shape
    rows = gradient.permute(0, 2, 3, 1).reshape(-1, count)
    product = columns(x, kernel, stride, padding).T @ rows
    return product.reshape(kernel, kernel, -1, count).permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last)


def make_plan(model: nn.Module, run_pass: Callable[[], Any]) -> dict[str, list[str]]:
    """Measure every convolution of a network: the parts of each that are to be matrix products, by its name.

    Those of one signature are measured once, at the present number of threads. A part is chosen where it saves 15% of
    at least two milliseconds. Convolutions with groups, dilation, oblong kernels or padding by name stay the library's.

    Args:
        run_pass: a training pass of the network on a batch, whose shapes and precision are measured.
    """
    seen: dict[str, Tensor] = {}

    def look(name: str, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        x = inputs[0] if inputs else named["input"]
        half = torch.is_autocast_enabled("cpu")
        seen.setdefault(name, x.detach().to(torch.get_autocast_dtype("cpu") if half else x.dtype))

    handles = [
        module.register_forward_pre_hook(lambda _, *given, name=name: look(name, *given), with_kwargs=True)
        for name, module in model.named_modules()
        if _can_be_planned(module)
    ]
    try:
        run_pass()
    finally:
        for handle in handles:
            handle.remove()
    measured: dict[Any, list[str]] = {}
    plan = {}
    for name, x in seen.items():
        conv = model.get_submodule(name)
        key = (tuple(x.shape), x.dtype, tuple(conv.weight.shape), conv.stride, conv.padding)
        if key not in measured:
            measured[key] = _faster_parts(x, conv.weight.detach().to(x.dtype), conv.stride[0], conv.padding[0])
        if measured[key]:
            plan[name] = measured[key]
    return plan


def apply_plan(model: nn.Module, plan: Mapping[str, list[str]]) -> None:
    """Let the convolutions named in a plan compute as it says, in training passes of this network.

    Raises:
        InputError: the network has no such convolution, or there is no such way.
    """
    modules = dict(model.named_modules())
    for name, parts in plan.items():
        module = modules.get(name)
        if not isinstance(module, nn.Conv2d) or not set(parts) <= set(PARTS):
            raise InputError(f"the plan for {name!r} is of another network; delete state.safetensors to start over")
        module.__class__ = PlannedConv2d
        module.plan = " ".join(parts)


def _can_be_planned(module: nn.Module) -> bool:
    if type(module) is not nn.Conv2d or isinstance(module.padding, str) or module.padding_mode != "zeros":
        return False
    square = all(len(set(sizes)) == 1 for sizes in (module.kernel_size, module.stride, module.padding))
    return square and module.groups == 1 and module.dilation == (1, 1)


def _faster_parts(x: Tensor, weight: Tensor, stride: int, padding: int) -> list[str]:
    with torch.no_grad():
        gradient = torch.randn_like(F.conv2d(x, weight, None, stride, padding))
        ways: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
            "forward": (
                lambda: F.conv2d(x, weight, None, stride, padding),
                lambda: forward_product(x, weight, stride, padding),
            ),
            "weight": (
                lambda: library_gradients(gradient, x, weight, stride, padding, (False, True)),
                lambda: weight_product(gradient, x, weight, stride, padding),
            ),
        }
        if stride == 1 and padding < weight.shape[2]:
            ways["input"] = (
                lambda: library_gradients(gradient, x, weight, stride, padding, (True, False)),
                lambda: input_product(gradient, weight, padding),
            )
        return [part for part in PARTS if part in ways and _wins(*ways[part])]


def _wins(library: Callable[[], Any], product: Callable[[], Any]) -> bool:
    """Whether the second takes clearly less time, measured in turn."""
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(ROUNDS + 1):
        for way, seconds in zip((library, product), times, strict=True):
            began = time.perf_counter()
            way()
            if number:  # the first of each warms up
                seconds.append(time.perf_counter() - began)
            elif way is library and time.perf_counter() - began < LEAST:
                return False
    usual, other = map(statistics.median, times)
    return usual >= LEAST and other <= GAIN * usual
