"""The fast form of a network: the same logits and input gradients from less work.

BatchNorm is folded into the convolution before it, the weights are frozen (an attack then computes no gradients for
them) and lie in channels_last; with `compiled`, `torch.compile` fuses what is left between the convolutions.
"""

from __future__ import annotations

import contextlib
import copy
import io
import operator

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights

from rb_noisy.forward import column_scale, image_shape_of, in_mode, in_training

# Compiled for batches of any multiple of this: one graph, where other sizes would be compiled anew.
_MULTIPLE = 16
# What a form may differ by, and on how many images it is compared: logits relative to the largest, gradients to their
# length. On a GPU convolutions may round to TF32, of the folded weights otherwise than of the plain ones.
_FEW = 4
_TOLERANCES = {"cpu": (1e-4, 1e-2)}
_ROUNDED = (1e-2, 1e-1)
# What is tried after a traced form in channels_last: the layout, and whether it is traced.
_OTHERS = ((torch.contiguous_format, True), (torch.channels_last, False), (torch.contiguous_format, False))


def fast_form(model: nn.Module, *, compiled: bool = False, half: bool = False) -> FastForm:
    """A copy of `model` for evaluation and attacks, whose logits agree with it up to rounding (1e-4 in fp32).

    A network can do what a copy of its operations does not: hooks, gradients of its own, random numbers. So the copy is
    compared with the network, in logits and in input gradients, on the first images that it gets; where they differ a
    copy with less folded takes its place, in the end the network itself.

    Args:
        model: takes images (N, C, H, W), returns logits (N, K). It is left as it is; the copy is in eval mode, on its
            device, and its weights take no gradients. A network that `torch.fx` cannot trace is copied unfolded.
        compiled: also through `torch.compile`: about 20 s at the first batch, and again at the first with gradients.
            Needs a C++ compiler on the CPU.
        half: in bf16 (autocast), for a first pass or an estimate: logits agree to about 1%, so a verdict may differ.

    Returns:
        A network with the same arguments and results. Changes of the model's weights after its first images reach it by
        `update`.
    """
    return FastForm(model, compiled=compiled, half=half)


class FastForm(nn.Module):
    """See `fast_form`.

    Attributes:
        graph: the network as a graph of operations; None where that is not what the network does.
    """

    def __init__(self, model: nn.Module, *, compiled: bool, half: bool):
        super().__init__()
        # Not one of the modules: it is neither moved with this one nor put into its mode.
        object.__setattr__(self, "model", model)
        self.compiled, self.half, self.verified = compiled, half, False
        self.image_shape = image_shape_of(model)
        self._copy(torch.channels_last, traced=True)
        self.eval()

    @torch.inference_mode(False)  # whose tensors an attack could take no gradients through
    def _copy(self, layout: torch.memory_format, traced: bool) -> None:
        self.layout, self.multiple = layout, _MULTIPLE if self.compiled else 1
        self.graph: fx.GraphModule | None = None
        self.folded: dict[str, str] = {}
        try:
            form = copy.deepcopy(self.model).eval()
        except Exception:  # it keeps tensors of its last pass, for one
            return self._take_none()
        with contextlib.suppress(Exception):  # its own code meets what stands for its input while it is traced
            self.graph = fx.symbolic_trace(form) if traced and not _does_more(form) else None
        if self.graph is not None:
            form, self.folded = self.graph, _fold(self.graph)
            _rectify_in_place(form)
        try:
            form.requires_grad_(False)
        except RuntimeError:  # the copy of a TorchScript network shares its weights with the first
            return self._take_none()
        for module in form.modules():
            if isinstance(module, nn.Conv2d):
                module.to(memory_format=layout)
        self.form: nn.Module | None = form
        self.call = torch.compile(form, dynamic=True) if self.compiled else form
        self.update(self.model)

    def _take_none(self) -> None:
        """The network itself does the work from now on."""
        self.graph, self.folded, self.form, self.call, self.multiple = None, {}, None, None, 1

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take over the weights and BatchNorm statistics that `model`, which this was made of, has now."""
        if self.form is None:
            return
        state = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
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

    def verify(self, x: Tensor) -> None:
        """Compare with the network on some of the images x (N, C, H, W), once; see `fast_form`.

        The first call of this form does so by itself. A network in training mode is compared as it is in eval mode.
        """
        if self.verified:
            return
        self.update(self.model)  # which may have changed since
        few = _with_noise(x[:_FEW])
        # Where the whole is in eval mode, a part that is not is meant so.
        mode = "eval" if in_training(self.model) else "keep"
        with torch.random.fork_rng([x.device] if x.device.type == "cuda" else []), in_mode(self.model, mode):
            wanted = _answers(self.model, few)
            for other in (None, *_OTHERS):
                if other is not None:
                    self._copy(*other)
                if self.form is None or self._answers_so(few, wanted):
                    break
            else:
                self._take_none()
        self.verified = True

    def _answers_so(self, x: Tensor, wanted: tuple[Tensor, Tensor]) -> bool:
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # where a graph prints its errors
                found = _answers(lambda x: self.form(x.contiguous(memory_format=self.layout)), x)
        except Exception:  # as of a view of what lies in another order
            return False
        return all(map(_agree, found, wanted, _TOLERANCES.get(x.device.type, _ROUNDED)))

    def forward(self, x: Tensor) -> Tensor:
        self.verify(x)
        count = len(x)
        missing = -count % self.multiple
        if missing:
            x = F.pad(x, (0, 0) * (x.dim() - 1) + (0, missing))
        with torch.autocast(x.device.type, torch.bfloat16) if self.half else contextlib.nullcontext():
            logits = self.model(x) if self.form is None else self.call(x.contiguous(memory_format=self.layout))
        return logits[:count].to(x.dtype)


def _does_more(model: nn.Module) -> bool:
    """Whether calling the network does more than its class's `forward`, which is all that is traced of the whole."""
    return bool(model._forward_hooks or model._forward_pre_hooks or "forward" in vars(model))


def _with_noise(x: Tensor) -> Tensor:
    """Images (N, C, H, W), and the same with noise, as an attack makes them: a network may do nothing to the first."""
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype).to(x.device)
    return torch.cat([x, (x + 0.2 * (noise - 0.5)).clamp(0.0, 1.0)])


def _answers(network: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient with respect to x of their sum with unequal weights."""
    with torch.inference_mode(False), torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        logits = network(x).float()
        weights = torch.arange(1.0, logits.shape[1] + 1, device=x.device).cos()
        gradient = None
        if logits.requires_grad:
            (gradient,) = torch.autograd.grad((logits * weights).sum(), x, allow_unused=True)
    return logits.detach(), torch.zeros_like(x) if gradient is None else gradient


def _agree(found: Tensor, wanted: Tensor, tolerance: float) -> bool:
    finite = wanted.isfinite()
    if found.shape != wanted.shape or not torch.equal(finite, found.isfinite()):
        return False
    difference, size = (found - wanted)[finite], wanted[finite]
    if wanted.dim() == 2 and len(size):
        return bool(((found - wanted).abs() / column_scale(wanted)).nan_to_num(0.0).max() <= tolerance)
    return difference.norm().item() <= tolerance * size.norm().item()


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
        if not (_plain(conv, nn.Conv2d) and _plain(norm, nn.BatchNorm2d) and norm.track_running_stats):
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


def _plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether it is of just this kind, without hooks: these, and parametrizations, make weights of their own."""
    return type(module) is kind and not (module._forward_hooks or module._forward_pre_hooks)


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
