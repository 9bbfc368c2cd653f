"""Tests may mix tensors of an accelerator and of the CPU (tests/accelerator.py); the package may not."""

import numpy as np
import pytest
import torch

from tests.accelerator import Lenient, lenient_call
from tests.pretend_devices import PretendDevices


@pytest.fixture(autouse=True)
def _devices():
    with PretendDevices(), Lenient():
        yield


def elsewhere(expression: str, **names):
    """An expression as if it were written in a file of the package."""
    return eval(compile(expression, "tl_circuits/somewhere.py", "eval"), {"torch": torch, "np": np, **names})


@pytest.mark.parametrize(
    "expression",
    [
        "a + b",
        "b - a",
        "torch.stack([a, b])",
        "torch.where(b > 0, a, b)",
        "torch.einsum('i,i->', a, b)",
        "torch.nn.functional.cosine_similarity(a, b, dim=0)",
        "torch.equal(a, b)",
        "b[a.long() - 1]",
        "b.index_add_(0, (a.long() - 1), a)",
        "a.add_(b)",
        "np.asarray(a)",
        "a.numpy()",
    ],
)
def test_a_call_written_in_a_test_may_mix_devices_and_one_of_the_package_may_not(expression):
    def names():
        return {"a": torch.tensor([1.0, 2.0, 3.0], device="xpu:0"), "b": torch.tensor([4.0, 5.0, 6.0])}

    with pytest.raises((RuntimeError, TypeError), match="same device|convert"):
        elsewhere(expression, **names())
    here = eval(compile(expression, __file__, "eval"), {"torch": torch, "np": np, **names()})
    wanted = elsewhere(expression, **{name: tensor.cpu() for name, tensor in names().items()})
    assert np.array_equal(*(x.tolist() if isinstance(x, torch.Tensor) else x for x in (here, wanted)))


def test_what_is_changed_in_place_stays_where_it_is():
    a, b = torch.ones(3, device="xpu:0"), torch.zeros(3)
    b[1:] = a[1:]
    b += a
    a[:2] = b[:2]
    assert b.device == torch.device("cpu") and b.tolist() == [1, 2, 2]
    assert a.device == torch.device("xpu:0") and a.tolist() == [1, 2, 1]


def test_a_module_called_by_a_test_takes_tensors_of_another_device():
    layer = torch.nn.Linear(2, 1, bias=False)
    called = lenient_call(torch.nn.Module.__call__)
    x = torch.ones(2, device="xpu:0")
    assert called(layer, x).device == torch.device("cpu")
    with pytest.raises(RuntimeError, match="same device"):
        elsewhere("called(layer, x)", called=called, layer=layer, x=x)
