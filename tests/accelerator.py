"""The suite with its models on an accelerator: ``TL_CIRCUITS_TEST_DEVICE=cuda python -m pytest tests``.

``DEVICE`` is where tests put their models: the CPU unless the variable names another device. The package is then used
as on any accelerator. Tests compare its results with tensors they make on the CPU, which PyTorch refuses to mix:
:func:`lenient` moves tensors in calls written in a file of ``tests/``. Calls of the package, and of TransformerLens
within it, are left alone.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
import transformer_lens
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

DEVICE = os.environ.get("TL_CIRCUITS_TEST_DEVICE", "cpu")
CPU = torch.device("cpu")

_TESTS = str(Path(__file__).parent) + os.sep
_OWN_DEVICES = tuple(_TESTS + name for name in ("accelerator.py", "pretend_devices.py", "test_devices.py"))
_TORCH, _NUMPY, _PANDAS, _LENS = (
    str(Path(library.__file__).parent) + os.sep for library in (torch, np, pd, transformer_lens)
)
_PYTEST = tuple(str(Path(file).parent) + os.sep for file in (pytest.__file__, sys.modules["_pytest"].__file__))
# PyTorch's functions that are written in Python ask the mode from within these files.
_WRITTEN_IN_PYTHON = tuple(
    _TORCH + name for name in ("overrides.py", "functional.py", "_tensor.py", "nn/functional.py", "_jit_internal.py")
)
_TO_NUMPY = (Tensor.numpy, Tensor.__array__)
_TO_NUMPY_FROM = (_TORCH, _NUMPY, _PANDAS, *_PYTEST, _OWN_DEVICES[1])
_MAY_MIX = {"to", "type_as", "__get__", "__set__", "set_", "backward", "grad"}
_IN_PLACE = {f"__i{name}__" for name in "add sub mul truediv floordiv mod pow and or xor matmul".split()} | {
    "__setitem__"
}


def home_of(model: Any) -> torch.device:
    """Where a test puts tensors of its own that a model's are to meet on ``DEVICE``: there, if the model is there
    too."""
    if DEVICE == "cpu" or not isinstance(model, nn.Module):
        return CPU
    there = next(model.parameters()).device
    return there if there.type == torch.device(DEVICE).type else CPU


def _written_in_tests(frame: FrameType | None, through: tuple[str, ...]) -> bool:
    """Whether a call was written in a file of ``tests/``, seen from a frame within it; ``through``: files in
    between."""
    while frame is not None and frame.f_code.co_filename.startswith(through):
        frame = frame.f_back
    name = "" if frame is None else frame.f_code.co_filename
    return name.startswith(_TESTS) and not name.startswith(_OWN_DEVICES)


def _changed(change: Callable[[Tensor], Any], x: Any) -> Any:
    """``change`` of every tensor in ``x``, which may be a tensor, anything else, or lists and dictionaries of these."""
    if isinstance(x, Tensor):
        return change(x)
    if isinstance(x, dict):
        return {key: _changed(change, one) for key, one in x.items()}
    return type(x)([_changed(change, one) for one in x]) if type(x) in (list, tuple) else x


def _moved(x: Any, device: torch.device) -> Any:
    return _changed(lambda tensor: tensor if tensor.device == device else tensor.to(device), x)


class Lenient(TorchFunctionMode):
    """Calls of PyTorch's functions in files of ``tests/`` may mix tensors of the CPU and of one accelerator."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _TO_NUMPY:
            if args[0].device != CPU and _written_in_tests(sys._getframe(1), _TO_NUMPY_FROM):
                args = (args[0].cpu(), *args[1:])
        elif (
            _written_in_tests(sys._getframe(1), _WRITTEN_IN_PYTHON)
            and (name := getattr(func, "__name__", "")) not in _MAY_MIX
        ):
            devices: set[torch.device] = set()
            _changed(lambda tensor: devices.add(tensor.device), [list(args), kwargs])
            if len(devices) > 1:
                in_place = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
                device = args[0].device if in_place else max(devices, key=lambda one: one != CPU)
                args, kwargs = _moved(args, device), _moved(kwargs, device)
        return func(*args, **kwargs)


def lenient_call(call: Callable[..., Any]) -> Callable[..., Any]:
    """``nn.Module.__call__`` that takes tensors of another device where a test calls the module, or TransformerLens for
    it."""

    def __call__(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        devices: set[torch.device] = set()
        _changed(lambda tensor: devices.add(tensor.device), [list(args), kwargs])
        own = next((p.device for p in module.parameters()), None) if devices else None
        if own is not None and devices != {own} and _written_in_tests(sys._getframe(1), (_TORCH, _LENS)):
            args, kwargs = _moved(args, own), _moved(kwargs, own)
        return call(module, *args, **kwargs)

    return __call__


def _compared(assert_close: Callable[..., None]) -> Callable[..., None]:
    def on_the_cpu(actual: Any, expected: Any, **options: Any) -> None:
        __tracebackhide__ = True
        assert_close(_moved(actual, CPU), _moved(expected, CPU), **options)

    return on_the_cpu


def _pretended() -> AbstractContextManager[Any]:
    """The device if it is the one of :mod:`tests.pretend_devices`, with which this file itself is tried without an
    accelerator."""
    if torch.device(DEVICE).type != "xpu" or torch.xpu.is_available():
        return nullcontext()
    from tests.pretend_devices import whole_session

    return whole_session()


@contextmanager
def lenient() -> Iterator[None]:
    """Within this context tests may mix devices; nothing changes where ``DEVICE`` is the CPU."""
    if DEVICE == "cpu":
        yield
        return
    with (
        _pretended(),
        mock.patch.object(nn.Module, "__call__", lenient_call(nn.Module.__call__)),
        mock.patch.object(torch.testing, "assert_close", _compared(torch.testing.assert_close)),
        Lenient(),
    ):
        yield
