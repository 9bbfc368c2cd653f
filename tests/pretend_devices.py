"""Accelerators on a machine without any: tensors that say they lie on ``xpu:0``, computed with the CPU's kernels.

Within :class:`PretendDevices`, ``tensor.to("xpu:1")`` and factories with such a ``device`` give tensors
that refuse, as those of a real accelerator do, to meet tensors of another device in one operation.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from accelerate.hooks import attach_align_device_hook_on_blocks
from torch import Tensor
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function_unary
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM

from tests.tiny import tiny_folder

CPU = torch.device("cpu")
KIND = "xpu"
_aten = torch.ops.aten
_CROSSING = (_aten.copy_,)
_INDEXING = (_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_, _aten._unsafe_index)


class Pretend(Tensor):
    """A tensor of a device that does not exist, around one of the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device) -> "Pretend":
        made = Tensor._make_wrapper_subclass(
            cls, held.size(), held.stride(), held.storage_offset(), dtype=held.dtype, requires_grad=False
        )
        made.held, made._where = held.detach(), device
        return made

    @property
    def device(self) -> torch.device:
        return self._where

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {name: value for name, value in (kwargs or {}).items() if name != "device"}
        device = _one_device(func, args, kwargs)
        out = func(*_map(_held, args), **{name: _map(_held, value) for name, value in kwargs.items()})
        if func._schema.is_mutable:
            return kwargs.get("out", args[0])
        return out if device == CPU else _map(lambda x: cls(x, device), out)

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        if has_torch_function_unary(self):  # a mode may move it first
            return handle_torch_function(Tensor.numpy, (self,), self, *args, **kwargs)
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first.")

    def __repr__(self, *args: Any, **kwargs: Any) -> str:
        return f"Pretend({self.held!r}, {self.device})"


def _map(change: Callable[[Tensor], Any], x: Any) -> Any:
    """``change`` of every tensor in ``x``, which may be a tensor, anything else, or lists of these."""
    if isinstance(x, Tensor):
        return change(x)
    return type(x)(_map(change, one) for one in x) if isinstance(x, (tuple, list)) else x


def _held(x: Tensor) -> Tensor:
    return x.held if isinstance(x, Pretend) else x


def _one_device(func: Any, args: Any, kwargs: dict[str, Any]) -> torch.device:
    """The device of an operation's result; RuntimeError where a real accelerator would raise it."""
    packet = func.overloadpacket
    if packet in _CROSSING:
        return args[0].device
    found: set[torch.device] = set()
    _map(lambda x: _may_mix(x, args, packet) or found.add(x.device), [list(args), list(kwargs.values())])
    if len(found) > 1:
        names = " and ".join(sorted(map(str, found)))
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {names}! ({func})"
        )
    return found.pop() if found else CPU


def _may_mix(x: Tensor, args: Any, packet: Any) -> bool:
    """Whether a tensor may lie on the CPU beside others of an accelerator: numbers, and indices into it."""
    if x.device != CPU:
        return False
    if packet in _INDEXING:
        return any(x is index for index in args[1]) or (x.ndim == 0 and x is not args[0])
    return x.ndim == 0 and any(x is one for one in args)  # not within a list, as of cat


class _Move(torch.autograd.Function):
    """A copy on another device; gradients go the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, device: torch.device) -> Tensor:
        ctx.back = x.device
        held = _held(x).detach().clone()
        return held if device == CPU else Pretend(held, device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return move(grad, ctx.back), None


def move(x: Tensor, device: torch.device | str) -> Tensor:
    """``x`` on a device, itself where it is there already."""
    device = torch.device(device)
    if device.type == KIND and device.index is None:
        device = torch.device(KIND, 0)
    return x if x.device == device else _Move.apply(x, device)


class PretendDevices(TorchFunctionMode):
    """Within this context ``xpu:0``, ``xpu:1`` ... exist."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.to:
            return _to(*args, **(kwargs or {}))
        if func is Tensor.cpu:
            return move(args[0], CPU)
        if func is Tensor.numpy:
            return args[0].numpy(*args[1:], **(kwargs or {}))
        if func is torch.nn.functional.one_hot:  # PyTorch makes a part of it on the device it takes the tensor to be on
            return move(func(_held(args[0]), *args[1:], **(kwargs or {})), args[0].device)
        if func is not Tensor.new_tensor and not (kwargs and "device" in kwargs):  # nearly all of millions of calls
            return func(*args, **(kwargs or {}))
        kwargs = dict(kwargs or {})
        if func is torch.nn.Module.to:
            return func(*args, **kwargs)
        real = kwargs.get("device") is not None and torch.device(kwargs["device"]).type != KIND
        if real and not any(isinstance(a, Pretend) for a in args):  # the CPU, or tensors without numbers
            return func(*args, **kwargs)
        device = kwargs.pop("device", args[0].device if func is Tensor.new_tensor else None)
        out = func(*args, **kwargs)
        return move(out, device) if device is not None and isinstance(out, Tensor) else out


def _to(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    where = [a for a in args if isinstance(a, (str, torch.device, Tensor))]
    device = kwargs.pop("device", where[0] if where else None)
    other = kwargs.pop("other", None)
    rest = [a for a in args if not isinstance(a, (str, torch.device, Tensor))]
    if isinstance(device, Tensor):
        device, other = None, device
    if other is not None:
        device, rest = other.device, [other.dtype]
    kwargs.pop("non_blocking", None)
    rest = [a for a in rest if isinstance(a, torch.dtype)]
    if rest or kwargs.get("dtype") is not None:
        x = Tensor.to(x, *rest, **kwargs)
    return x if device is None else move(x, device)


def place(module: torch.nn.Module, device: torch.device | str, placed: dict[int, Tensor] | None = None) -> None:
    """Put a module's parameters and buffers on a device in place; those already ``placed`` (tied ones) stay there."""
    placed = {} if placed is None else placed
    for table, name, tensor in list(_tensors(module)):
        if id(tensor) not in placed:
            moved = tensor if tensor.device == torch.device(device) else move(tensor.detach(), device)
            if isinstance(tensor, torch.nn.Parameter):
                moved = torch.nn.Parameter(moved, requires_grad=tensor.requires_grad)
            placed[id(tensor)] = moved
            placed[id(moved)] = moved
        table[name] = placed[id(tensor)]


def _tensors(module: torch.nn.Module) -> Iterator[tuple[dict, str, Tensor]]:
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    yield table, name, tensor


def on_one_device(architecture: str, dtype: torch.dtype = torch.float32) -> TransformerBridge:
    """A tiny model on ``xpu:0``."""
    network = _network(architecture, dtype)
    place(network, "xpu:0")
    model = TransformerBridge.boot_transformers(tiny_folder(architecture), hf_model=network, dtype=dtype).eval()
    model.cfg.device = "xpu:0"
    return model


def on_two_devices(architecture: str, dtype: torch.dtype = torch.float32) -> TransformerBridge:
    """A tiny model with its first layers on ``xpu:0`` and the others on ``xpu:1``, as ``device_map`` spreads it.

    Accelerate's own hooks move activations between layers. An unembedding tied to the embedding is
    where that is.
    """
    network = _network(architecture, dtype)
    spread = _device_map(network)
    placed: dict[int, Tensor] = {}
    for name, device in spread.items():
        place(network.get_submodule(name), device, placed)
    where = {name: torch.device(device) for name, device in spread.items()}
    with mock.patch("accelerate.hooks.set_module_tensor_to_device"):  # they are there; it knows real devices only
        attach_align_device_hook_on_blocks(
            network,
            execution_device={"": torch.device("xpu:0")} | where,
            offload=dict.fromkeys(where, False),
            skip_keys="past_key_values",
        )
    network.hf_device_map = spread
    return TransformerBridge.boot_transformers(tiny_folder(architecture), hf_model=network, dtype=dtype).eval()


@contextmanager
def whole_session() -> Iterator[None]:
    """``xpu:0`` as the device that every model and dictionary goes to, as a GPU is:
    ``TL_CIRCUITS_TEST_DEVICE=xpu:0``."""
    to, home = torch.nn.Module.to, torch.device(KIND, 0)

    def module_to(module: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if device is None or device.type != KIND:
            return to(module, *args, **kwargs)
        place(module if dtype is None else to(module, dtype), device)
        return module

    with (
        mock.patch.object(torch.nn.Module, "to", module_to),
        mock.patch("transformer_lens.model_bridge.sources.transformers.get_device", lambda: home),
        mock.patch("tl_circuits.dictionaries.load._device", lambda device: torch.device(device or home)),
        PretendDevices(),
    ):
        yield


def _network(architecture: str, dtype: torch.dtype) -> Any:
    folder = tiny_folder(architecture)
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=dtype).eval()


def _device_map(network: Any) -> dict[str, str]:
    name = network.base_model_prefix
    spread, n_layers = {}, network.config.num_hidden_layers
    for child, part in getattr(network, name).named_children():
        if isinstance(part, torch.nn.ModuleList):
            spread |= {f"{name}.{child}.{i}": f"xpu:{int(i >= n_layers // 2)}" for i in range(n_layers)}
        else:
            spread[f"{name}.{child}"] = "xpu:1" if "norm" in child or child == "ln_f" else "xpu:0"
    (head,) = (child for child, _ in network.named_children() if child != name)
    return spread | {head: "xpu:0" if network.config.tie_word_embeddings else "xpu:1"}
