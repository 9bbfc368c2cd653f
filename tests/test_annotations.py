"""While the tests run, a call of our own code whose arguments or shapes do not fit is an error."""

import ast

import pytest
import torch
from beartype.roar import BeartypeCallHintParamViolation, BeartypeCallHintReturnViolation
from jaxtyping import TypeCheckError

from tests.annotations import checked_source
from tl_circuits.hooks.any_site import flat
from tl_circuits.interventions.replaced_runs import leads

SOURCE = '''
"""A module."""
from dataclasses import dataclass
from jaxtyping import Float
from torch import Tensor

def product(a: Float[Tensor, "row inner"], b: Float[Tensor, "inner column"]) -> Float[Tensor, "row column"]:
    return a @ b

Row = Float[Tensor, "inner"]

def both(a: Row, b: Row) -> None: ...

def wrong() -> Float[Tensor, "one two"]:
    from torch import zeros
    return zeros(3)

def double(count: int) -> int:
    return "two" if count == 1 else 2 * count

def outer(a):
    def inner(b: Float[Tensor, "row"]) -> None: ...
    inner(a)

@dataclass
class Pair:
    left: Float[Tensor, "row"]
    right: Float[Tensor, "row"]

    def said(self, word: str) -> str:
        return word

@dataclass
class Named:
    name: str
'''


@pytest.fixture(scope="module")
def made():
    names = {"__name__": "tests.made_for_annotations"}
    exec(compile(checked_source(ast.parse(SOURCE)), "made", "exec"), names)
    return names


def test_shapes_are_checked_across_arguments_and_results(made):
    a, b = torch.zeros(2, 3), torch.zeros(3, 4)
    assert made["product"](a, b).shape == (2, 4)
    for call in (
        lambda: made["product"](a, a),
        made["wrong"],
        lambda: made["outer"](a),
        lambda: made["both"](a[0], b[0]),
    ):
        with pytest.raises(TypeCheckError):
            call()


def test_plain_types_are_checked_too(made):
    assert made["double"](2) == 4
    with pytest.raises(BeartypeCallHintParamViolation):
        made["double"]("2")
    with pytest.raises(BeartypeCallHintReturnViolation):
        made["double"](1)


def test_fields_of_dataclasses_are_checked(made):
    right = made["Pair"](torch.zeros(2), torch.zeros(2))
    assert right.said("yes") == "yes"
    with pytest.raises(TypeCheckError):
        made["Pair"](torch.zeros(2), torch.zeros(3))
    for call in (lambda: right.said(1), lambda: made["Named"](1)):
        with pytest.raises(BeartypeCallHintParamViolation):
            call()


def test_the_package_is_checked():
    for call in (lambda: flat(torch.zeros(3)), lambda: leads(torch.zeros(2, 5), torch.zeros(3, dtype=torch.long))):
        with pytest.raises(TypeCheckError):
            call()
