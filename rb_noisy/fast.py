"""The fast form of a network: the same logits and input gradients from less work.

BatchNorm is folded into the convolution before it, the weights are frozen (an attack then computes no gradients for
them) and lie in channels_last; with `compiled`, `torch.compile` fuses what is left between the convolutions.
"""

from __future__ import annotations

import copy
import operator

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights

# Compiled for batches of any multiple of this: one graph, where other sizes would be compiled anew.
_MULTIPLE = 16


def fast_form(model: nn.Module, *, compiled: bool = False, half: bool = False) -> FastForm:
    """A copy of `model` for evaluation and attacks, whose logits agree with it up to rounding (1e-4 in fp32).

    Args:
        model: takes images (N, C, H, W), returns logits (N, K). It is left as it is; the copy is in eval mode, on its
            device, and its weights take no gradients. A network that `torch.fx` cannot trace is copied unfolded.
        compiled: also through `torch.compile`: about 20 s at the first batch, and again at the first with gradients.
            Needs a C++ compiler on the CPU.
        half: in bf16 (autocast), for a first pass or an estimate: logits agree to about 1%, so a verdict may differ.

    Returns:
        A network with the same arguments and results. Later changes of the model's weights reach it by `update`.
    """
    return FastForm(model, compiled=compiled, half=half)


class FastForm(nn.Module):
    """See `fast_form`.

    Attributes:
        graph: the network as a graph of operations; None where it could not be traced.
    """

    def __init__(self, model: nn.Module, *, compiled: bool, half: bool):
        super().__init__()
        form = copy.deepcopy(model).eval()
        try:
            self.graph: fx.GraphModule | None = fx.symbolic_trace(form)
        except Exception:  # whatever the network's own code does with what stands for its input while it is traced
            self.graph = None
        self.folded = {} if self.graph is None else _fold(self.graph)
        if self.graph is not None:
            _rectify_in_place(self.graph)
        form = form if self.graph is None else self.graph
        for parameter in form.parameters():
            parameter.requires_grad_(False)
        for module in form.modules():
            if isinstance(module, nn.Conv2d):
                module.to(memory_format=torch.channels_last)
        self.form, self.half, self.multiple = form, half, _MULTIPLE if compiled else 1
        self.call = torch.compile(form, dynamic=True) if compiled else form
        self.update(model)
        self.eval()

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take over the weights and BatchNorm statistics that `model`, which this was made of, has now."""
        state = dict(model.named_parameters()) | dict(model.named_buffers())
        for name, value in (*self.form.named_parameters(), *self.form.named_buffers()):
            if name.rpartition(".")[0] not in self.folded and name in state:  # tracing adds constants of its own
                value.copy_(state[name])
        for name, norm in self.folded.items():
            conv, norm = model.get_submodule(name), model.get_submodule(norm)
            statistics = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            weight, bias = fuse_conv_bn_weights(conv.weight, conv.bias, *statistics)
            folded = self.form.get_submodule(name)
            folded.weight.copy_(weight)
            folded.bias.copy_(bias)

    def forward(self, x: Tensor) -> Tensor:
        count = len(x)
        missing = -count % self.multiple
        if missing:
            x = F.pad(x, (0, 0) * (x.dim() - 1) + (0, missing))
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.half):
            logits = self.call(x.contiguous(memory_format=torch.channels_last))
        return logits[:count].to(x.dtype)


def _fold(graph: fx.GraphModule) -> dict[str, str]:
    """Take every BatchNorm that follows a convolution, and nothing else does, out of the graph.

    Returns:
        The BatchNorm of each convolution that now has a bias for it, by name.
    """
    modules, folded = dict(graph.named_modules()), {}
    calls = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    for node in list(graph.graph.nodes):
        before = node.args[0] if node.args else None
        if not (node.op == "call_module" and isinstance(before, fx.Node) and before.op == "call_module"):
            continue
        conv, norm = modules[before.target], modules[node.target]
        if not (isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d) and norm.track_running_stats):
            continue
        if len(before.users) > 1 or calls.count(before.target) > 1 or calls.count(node.target) > 1:
            continue
        conv.bias = nn.Parameter(torch.zeros_like(conv.weight[:, 0, 0, 0]))
        node.replace_all_uses_with(before)
        graph.graph.erase_node(node)
        folded[before.target] = node.target
    graph.delete_all_unused_submodules()
    graph.recompile()
    return folded


def _rectify_in_place(graph: fx.GraphModule) -> None:
    """Let a ReLU write over its argument where nobody else reads that, the operation that made it included.

    On large maps most of a ReLU's time goes into fresh memory.
    """
    modules = dict(graph.named_modules())
    calls = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    for node in graph.graph.nodes:
        before = node.args[0] if node.args else None
        if not isinstance(before, fx.Node) or len(before.users) > 1:
            continue
        maker = modules[before.target] if before.op == "call_module" else before.target
        if not (isinstance(maker, (nn.Conv2d, nn.BatchNorm2d)) or maker in (operator.add, torch.add)):
            continue
        if node.op == "call_function" and node.target is F.relu:
            node.kwargs = {**node.kwargs, "inplace": True}
        elif node.op == "call_module" and isinstance(modules[node.target], nn.ReLU) and calls.count(node.target) == 1:
            modules[node.target].inplace = True
    graph.recompile()
