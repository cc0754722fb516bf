"""Logits of images that differ from known ones only inside a rectangle, from that part of the feature maps.

A change of a few pixels moves only a few values of the first convolutions' maps. Here these alone are computed, on
top of the maps of the known image, until the part that has moved is most of a map; from there on, all of it is.
Square (Andriushchenko et al. 2020) asks 5,000 such questions about an image.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

Window = tuple[int, int, int, int]
"""First and past-the-last row, first and past-the-last column."""

_LAST = torch.channels_last
# Above this share of a map, cutting and pasting costs more than it saves.
_MOST = 0.6
_SAME_PLACE = (nn.BatchNorm2d, nn.ReLU, nn.Identity, nn.Dropout, nn.GELU, nn.SiLU, nn.Hardswish, nn.LeakyReLU, nn.ELU)
_SAME_PLACE_FUNCTIONS = {F.relu, torch.relu, F.gelu, F.silu, F.leaky_relu, F.elu, F.dropout}
_SUMS = {operator.add, torch.add}
_IN_PLACE = {"isub", "imul", "itruediv", "ipow", "ifloordiv", "imod", "iand", "ior", "ixor", "setitem"}
_SCALINGS = {operator.sub, operator.mul, operator.truediv, *_SUMS}


@dataclass
class _Patch:
    """What has moved of a node's map: `values` (B, C, h, w) at `window`."""

    node: fx.Node | None
    values: Tensor
    window: Window
    size: tuple[int, int]


class LocalForward:
    """The network, with a memory of N images and their feature maps.

    Args:
        graph: takes images (N, C, H, W), returns logits (N, K); in eval mode.

    Raises:
        NotImplementedError: the graph writes over a map that is read again.
    """

    def __init__(self, graph: fx.GraphModule):
        for node in graph.graph.nodes:
            if _overwrites_what_is_read(node, graph):
                raise NotImplementedError(f"{node} works in place on what others read")
        # Not an fx.Interpreter, whose ways through a node take longer than many a convolution of a few pixels.
        self.graph, self.constant = graph, _constants(graph)
        self.steps = [(node, self._step(node)) for node in graph.graph.nodes]
        self.flat = {node for node, _ in self.steps if _flat(node)}
        last_reader = {before: node for node, _ in self.steps for before in node.all_input_nodes}
        self.spent: dict[fx.Node, list[fx.Node]] = {node: [] for node, _ in self.steps}
        for before, node in last_reader.items():
            self.spent[node].append(before)
        self.maps: dict[fx.Node, Tensor] = {}
        self.needed: set[fx.Node] | None = None
        self.looked_up: set[fx.Node] = set()

    @torch.no_grad()
    def remember(self, x: Tensor) -> Tensor:
        """Logits (N, K) of x (N, C, H, W), whose maps are the memory from now on."""
        if self.needed is None:
            self._find_needed(x[:1])
        return self._run_whole(x)

    def forget(self) -> None:
        """Free the memory."""
        self.maps, self.fresh = {}, {}

    def keep(self, rows: Tensor) -> None:
        """Remember only the images `rows` (M,) from now on, in this order."""
        self.fresh = {}
        for node in self.maps:  # one by one, so that there are never two memories
            self.maps[node] = self.maps[node][rows].contiguous(memory_format=_LAST)

    @torch.no_grad()
    def __call__(self, x: Tensor, rows: Tensor | None, window: Window) -> Tensor:
        """Logits (B, K) of x (B, C, H, W), which differ from the images `rows` (B,) at most inside `window`.

        `rows` None stands for all images, in their order, which is the soonest.
        """
        self.x, self.rows, self.fresh = x, rows, {}
        cut = x[_at(window)].clone(memory_format=_LAST)
        return self._run(_Patch(None, cut, window, tuple(x.shape[2:])))

    @torch.no_grad()
    def saved(self, x: Tensor) -> int:
        """Multiplications that a call spares for an image of x, of which 3x3 pixels change."""
        self._find_needed(x[:1])
        h, w = x.shape[2] // 2, x.shape[3] // 2
        row = torch.zeros(1, dtype=torch.int64, device=x.device)
        with FlopCounterMode(display=False) as whole:
            self._run_whole(x[:1])
        with FlopCounterMode(display=False) as local:
            self(x[:1], row, (h - 1, h + 2, w - 1, w + 2))
        return (whole.get_total_flops() - local.get_total_flops()) // 2

    def accept(self, chosen: Tensor) -> None:
        """Remember the `chosen` (B,) bool of the last call's images instead."""
        chosen = chosen.nonzero(as_tuple=True)[0]
        if not len(chosen):
            return
        rows = chosen if self.rows is None else self.rows[chosen]
        for node, value in self.fresh.items():
            if isinstance(value, _Patch):
                self.maps[node][_at(value.window)][rows] = value.values[chosen]
            else:
                self.maps[node][rows] = value[chosen]

    def _run_whole(self, x: Tensor) -> Tensor:
        self.fresh = {}
        logits = self._run(x.clone(memory_format=_LAST))  # a map may be the argument itself
        self.maps, self.fresh = self.fresh, {}
        return logits

    def _find_needed(self, x: Tensor) -> None:
        """The nodes whose maps are looked up where one pixel changes, in a corner or within.

        No other change moves less; how much one pixel does depends on where the strides begin.
        """
        self._need({node for node, _ in self.steps})
        self._run_whole(x)
        self.looked_up, row = set(), torch.zeros(1, dtype=torch.int64, device=x.device)
        rows, columns = ({0, size // 2, size // 2 - 1, size - 1} for size in x.shape[2:])
        for r, c in product(rows, columns):
            self(x, row, (r, r + 1, c, c + 1))
        self._need(self.looked_up)

    def _need(self, nodes: set[fx.Node]) -> None:
        self.needed, self.overwriting = nodes, set()
        for node, _ in self.steps:
            before = node.args[0] if node.args else None
            if isinstance(before, fx.Node) and len(before.users) == 1 and before not in nodes:
                self.overwriting.add(node)

    # --- through the graph

    def _run(self, x: Tensor | _Patch) -> Tensor:
        values: dict[fx.Node, Any] = {}

        def value_of(argument: Any) -> Any:
            return values[argument] if isinstance(argument, fx.Node) else argument

        for node, step in self.steps:
            if node.op == "placeholder":
                value, x = (node.args[0] if x is None else x), None  # the first is the image, others have their default
            else:
                self.overwrite = node in self.overwriting
                args = tuple(map(value_of, node.args)) if node in self.flat else fx.node.map_arg(node.args, value_of)
                kwargs = fx.node.map_arg(node.kwargs, value_of) if node.kwargs else {}
                value = step(args, kwargs)
            if isinstance(value, _Patch):
                value.node = node
            if node in self.needed and node.op != "placeholder" and (isinstance(value, _Patch) or _is_map(value)):
                self.fresh[node] = value
            values[node] = value
            for before in self.spent[node]:
                del values[before]
        return value

    def _step(self, node: fx.Node) -> Callable[[tuple, dict], Any]:
        """What a node does with its arguments, among them patches; those in lists or by name are made whole."""
        target = operator.add if node.target is operator.iadd else node.target
        hidden = not _flat(node) or _nodes_by_name(node)
        if node.op == "call_function":
            if hidden:
                return lambda args, kwargs: target(*self._all_whole(args), **self._all_whole(kwargs))
            computed = sum(arg not in self.constant for arg in node.args if isinstance(arg, fx.Node))
            return partial(self._function, target, computed)
        if node.op == "call_method":
            return lambda args, kwargs: getattr(self._whole(args[0]), target)(
                *self._all_whole(args[1:]), **self._all_whole(kwargs)
            )
        if node.op == "get_attr":
            return lambda args, kwargs: operator.attrgetter(target)(self.graph)
        if node.op == "output":
            return lambda args, kwargs: self._whole(args[0])
        if node.op == "placeholder":
            return lambda args, kwargs: None
        module = self.graph.get_submodule(target)
        if hidden:
            return lambda args, kwargs: module(*self._all_whole(args), **self._all_whole(kwargs))
        if isinstance(module, nn.ReLU):
            return lambda args, kwargs: self._function(F.relu, 1, args, {"inplace": module.inplace})
        if isinstance(module, nn.Conv2d) and module.padding_mode == "zeros" and not isinstance(module.padding, str):
            return partial(self._convolution, module)
        return partial(self._module, module)

    def _module(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        if getattr(module, "inplace", False) and not self.overwrite:
            args = tuple(
                replace(arg, values=arg.values.clone()) if isinstance(arg, _Patch) else arg.clone() for arg in args
            )
        if isinstance(args[0], _Patch) and isinstance(module, _SAME_PLACE):
            return replace(args[0], values=module(args[0].values))
        return module(*self._all_whole(args), **kwargs)

    def _convolution(self, module: nn.Conv2d, args: tuple, kwargs: dict) -> Any:
        patch = args[0]
        if isinstance(patch, _Patch):
            window = _reached(patch, module)
            size = _output_size(patch.size, module)
            if _area(window) <= _MOST * size[0] * size[1]:
                return _Patch(None, self._convolve(module, patch, window), window, size)
        return module(self._whole(patch))

    def _function(self, target: Any, computed: int, args: tuple, kwargs: dict) -> Any:
        """`computed` of the arguments depend on the image; a map of one value for each channel may, too."""
        if kwargs.get("inplace"):
            kwargs = kwargs | {"inplace": self.overwrite}
        patches = [arg for arg in args if isinstance(arg, _Patch)]
        if not patches:
            return target(*args, **kwargs)
        others = [arg for arg in args if not isinstance(arg, _Patch)]
        if target in _SAME_PLACE_FUNCTIONS and not any(isinstance(arg, Tensor) for arg in others):
            return replace(patches[0], values=target(patches[0].values, *args[1:], **kwargs))
        scaled = len(patches) == computed and all(map(_same_everywhere, others))
        if target in _SCALINGS and not kwargs and len(args) == 2 and scaled:
            if len(patches) == 1:
                values = [arg.values if isinstance(arg, _Patch) else arg for arg in args]
                return replace(patches[0], values=target(*values))
            if target in _SUMS:
                window = _union(patches[0].window, patches[1].window)
                first, second = (self._extended(patch, window) for patch in patches)
                return _Patch(None, first + second, window, patches[0].size)
        return target(*self._all_whole(args), **kwargs)

    # --- between patches and maps

    def _all_whole(self, args: Any) -> Any:
        return fx.node.map_aggregate(args, self._whole)

    def _whole(self, value: Any) -> Any:
        if not isinstance(value, _Patch):
            return value
        return self._extended(value, (0, value.size[0], 0, value.size[1]))

    def _extended(self, patch: _Patch, window: Window) -> Tensor:
        """The map at a larger window: what has moved, pasted into what is remembered."""
        if patch.node is not None and patch.node.op != "placeholder":
            if window == patch.window:
                return patch.values
            self.looked_up.add(patch.node)
            values = self.maps[patch.node][_at(window)]
            values = values.clone(memory_format=_LAST) if self.rows is None else values[self.rows]
        else:
            return self.x[_at(window)].clone(memory_format=_LAST)
        r0, r1, c0, c1 = patch.window
        values[_at((r0 - window[0], r1 - window[0], c0 - window[2], c1 - window[2]))] = patch.values
        return values.contiguous(memory_format=_LAST)

    def _convolve(self, conv: nn.Conv2d, patch: _Patch, window: Window) -> Tensor:
        """The convolution's output at `window`, unpadded from as much of its input as that looks at."""
        (h, w), needs, pads = patch.size, [], []
        for axis, size in ((0, h), (1, w)):
            stride, padding = conv.stride[axis], conv.padding[axis]
            first = window[2 * axis] * stride - padding
            past = (window[2 * axis + 1] - 1) * stride - padding + _span(conv, axis)
            needs += [max(first, 0), min(past, size)]
            pads = [max(-first, 0), max(past - size, 0), *pads]  # F.pad begins with the last axis
        values = self._extended(patch, _union(tuple(needs), patch.window))
        r0, _, c0, _ = _union(tuple(needs), patch.window)
        values = values[_at((needs[0] - r0, needs[1] - r0, needs[2] - c0, needs[3] - c0))]
        if any(pads):
            values = F.pad(values, pads)
        values = values.contiguous(memory_format=_LAST)
        return F.conv2d(values, conv.weight, conv.bias, conv.stride, 0, conv.dilation, conv.groups)


def _at(window: Window) -> tuple[slice, ...]:
    r0, r1, c0, c1 = window
    return slice(None), slice(None), slice(r0, r1), slice(c0, c1)


def _area(window: Window) -> int:
    return (window[1] - window[0]) * (window[3] - window[2])


def _union(a: Window, b: Window) -> Window:
    return min(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), max(a[3], b[3])


def _span(conv: nn.Conv2d, axis: int) -> int:
    return conv.dilation[axis] * (conv.kernel_size[axis] - 1) + 1


def _output_size(size: tuple[int, int], conv: nn.Conv2d) -> tuple[int, int]:
    h, w = ((size[i] + 2 * conv.padding[i] - _span(conv, i)) // conv.stride[i] + 1 for i in (0, 1))
    return h, w


def _reached(patch: _Patch, conv: nn.Conv2d) -> Window:
    """Where the convolution's output can have moved."""
    found: list[int] = []
    for axis, size in enumerate(_output_size(patch.size, conv)):
        first, past = patch.window[2 * axis], patch.window[2 * axis + 1]
        stride, padding = conv.stride[axis], conv.padding[axis]
        low = max(math.ceil((first + padding - _span(conv, axis) + 1) / stride), 0)
        high = min((past - 1 + padding) // stride + 1, size)
        found += [min(low, size - 1), max(high, min(low, size - 1) + 1)]  # never empty
    r0, r1, c0, c1 = found
    return r0, r1, c0, c1


def _flat(node: fx.Node) -> bool:
    """Whether none of a node's arguments is a list, of nodes perhaps."""
    return not any(isinstance(arg, (tuple, list, dict, slice)) for arg in node.args)


def _nodes_by_name(node: fx.Node) -> bool:
    return any(isinstance(arg, fx.Node) for arg in node.kwargs.values())


def _constants(graph: fx.GraphModule) -> set[fx.Node]:
    """The nodes whose values do not depend on the image."""
    constant: set[fx.Node] = set()
    for node in graph.graph.nodes:
        made = node.op in ("call_function", "call_method") and node.all_input_nodes
        if node.op == "get_attr" or (made and constant.issuperset(node.all_input_nodes)):
            constant.add(node)
    return constant


def _overwrites_what_is_read(node: fx.Node, graph: fx.GraphModule) -> bool:
    """Whether it works in place, but for a ReLU and a sum whose input nobody else reads."""
    before = node.args[0] if node.args else None
    if node.op == "call_module":
        known, other = getattr(graph.get_submodule(node.target), "inplace", False), False
    elif node.op in ("call_function", "call_method"):
        name = getattr(node.target, "__name__", node.target)
        by_place = node.target in _SAME_PLACE_FUNCTIONS and any(arg is True for arg in node.args)
        known = node.kwargs.get("inplace", False) or node.target is operator.iadd
        other = by_place or name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
    else:
        return False
    return other or (known and isinstance(before, fx.Node) and len(before.users) > 1)


def _is_map(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 4


def _same_everywhere(value: Any) -> bool:
    """Whether an operand is the same at every place of a map: a number, or one value for each channel."""
    if isinstance(value, Tensor):
        return value.dim() == 0 or (value.dim() == 4 and tuple(value.shape[2:]) == (1, 1))
    return isinstance(value, (int, float))
