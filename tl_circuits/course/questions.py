"""What a question is, what the functions under test are given, and how their answers are judged."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from tl_circuits.course.handouts import (
    AllTranscoders,
    Attached,
    GraphOf,
    NeuronsOf,
    Recorded,
    TinyFacts,
    TranscoderOf,
    with_neurons,
)
from tl_circuits.course.wire import Stranger
from tl_circuits.dictionaries import load_transcoders
from tl_circuits.dictionaries.attaching import attach
from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.hooks import Replacement
from tl_circuits.models import BUILTIN, load_model

TOLERANCE = 1e-3  # answers are sums of some hundred float32 products of size about 1, in any order


class WrongAnswer(Exception):
    """An answer of the wrong type or shape. The message tells the student."""


@dataclass(frozen=True)
class Part:
    """A part of a question: its points, whether they are earned, and a hint if they are not."""

    points: int
    right: bool
    hint: str


@dataclass(frozen=True)
class Lab:
    """What questions have to work with: the reference, and what they hand out.

    ``ours`` gives the expected answers; it never reaches the notebook's process. What a function is given are handouts:
    that process opens each anew for every call. ``model``, ``transcoders`` and ``replacement`` hand out `tiny-facts`;
    checks on another model hand out ``neurons``, that model with its MLPs' own neurons attached.
    """

    ours: Replacement
    name: str = BUILTIN
    model = TinyFacts()
    transcoders = AllTranscoders()
    replacement = Attached()

    @property
    def neurons(self) -> NeuronsOf:
        """The model called ``name`` with its neurons attached, for the student."""
        return NeuronsOf(self.name)

    def transcoder(self, layer: int, without: str = "") -> TranscoderOf:
        """The transcoder of a layer, for the student; the bias ``without``, if any, is zero."""
        return TranscoderOf(layer, without)

    def recorded(self, cache: Any) -> Recorded:
        """A TransformerLens cache, for the student."""
        return Recorded({name: value.detach() for name, value in cache.items()})

    def graph(self, graph: AttributionGraph) -> GraphOf:
        """A graph, for the student."""
        return GraphOf.graph(graph)

    def cache(self, prompt: str) -> Any:
        """The values at all hook points on ``prompt``: a TransformerLens cache."""
        with torch.no_grad():
            return self.ours.model.run_with_cache(prompt)[1]


def open_lab(model: str = BUILTIN) -> Lab:
    """A lab with a reference model of its own: `tiny-facts` with its transcoders, or another model with its neurons."""
    if model != BUILTIN:
        return Lab(with_neurons(model), model)
    return Lab(attach(load_model("tiny-facts", device="cpu"), load_transcoders("tiny-facts")))


@runtime_checkable
class Asking(Protocol):
    """A function of the notebook, as questions call it.

    Attributes:
        hooks_left: the most hooks that stayed on the model that a call was given.
    """

    hooks_left: int

    def __call__(self, *arguments: Any) -> Any:
        """The notebook's answer."""


Check = Callable[[Asking, Lab], Iterator[Part]]


@dataclass(frozen=True)
class Question:
    """A function that the student writes. ``check`` calls it with hidden inputs and yields parts, which add up to
    ``points``. ``reference`` does what is asked: it stands in where other functions need one that never returns.
    """

    function: str
    task: str
    points: int
    check: Check
    reference: Callable[..., Any] | None = None


def tensor(answer: Any, shape: Sequence[int], axes: str) -> Tensor:
    """The answer as a finite float32 tensor of the expected shape.

    Raises:
        WrongAnswer: for anything else.
    """
    if not isinstance(answer, Tensor):
        raise WrongAnswer(f"it returned {kind(answer)}; expected a tensor [{axes}].")
    if tuple(answer.shape) != tuple(shape):
        raise WrongAnswer(f"it returned shape {tuple(answer.shape)}; expected {tuple(shape)}, that is [{axes}].")
    if not bool(answer.isfinite().all()):
        raise WrongAnswer("it returned numbers that are not finite (NaN or infinity).")
    return answer.detach().float()


def number(answer: Any) -> float:
    """The answer as a float.

    Raises:
        WrongAnswer: if it is not a single number.
    """
    if isinstance(answer, Tensor) and answer.numel() == 1:
        answer = answer.item()
    if isinstance(answer, Stranger) and answer.number is not None:
        return answer.number
    try:
        return float(answer) if not isinstance(answer, str) else _refuse(answer, "a number")
    except (TypeError, ValueError):
        return _refuse(answer, "a number")


def effects(answer: Any) -> dict[str, float]:
    """The answer as a dict from node ids to numbers.

    Raises:
        WrongAnswer: for anything else.
    """
    if not isinstance(answer, dict):
        _refuse(answer, "a dict {node id: effect}")
    strangers = [key for key in answer if not isinstance(key, str)]
    if strangers:
        raise WrongAnswer(f"a key of the dict is {strangers[0]!r}; expected node ids such as 'L0/F12@3'.")
    return {key: number(value) for key, value in answer.items()}


def sequence(answer: Any, of: type, what: str) -> list[Any]:
    """The answer as a list whose items all have one type.

    Raises:
        WrongAnswer: for anything else.
    """
    if isinstance(answer, Tensor) and answer.ndim == 1:
        answer = answer.tolist()
    if not isinstance(answer, (list, tuple, set, frozenset)):
        _refuse(answer, what)
    wrong = [item for item in answer if not isinstance(item, of)]
    if wrong:
        raise WrongAnswer(f"it returned a {type(answer).__name__} holding {kind(wrong[0])}; expected {what}.")
    return list(answer)


def kind(answer: Any) -> str:
    """What an answer is, in words."""
    if answer is None:
        return "None (is a `return` missing?)"
    if isinstance(answer, Tensor):
        return f"a tensor of shape {tuple(answer.shape)}"
    name = answer.name if isinstance(answer, Stranger) else type(answer).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _refuse(answer: Any, expected: str) -> Any:
    raise WrongAnswer(f"it returned {kind(answer)}; expected {expected}.")


def close(got: Tensor, want: Tensor) -> bool:
    """Whether two tensors are equal up to rounding, measured on the largest entry."""
    scale = max(1.0, float(want.abs().max()))
    return bool((got - want.float()).abs().max() <= TOLERANCE * scale)


def near(got: float, want: float) -> bool:
    """Whether two numbers are equal up to rounding."""
    return math.isclose(got, want, rel_tol=TOLERANCE, abs_tol=TOLERANCE)


def same_effects(got: dict[str, float], want: dict[str, float]) -> bool:
    """Whether two dicts have the same number for each node. A missing node counts as zero."""
    scale = max([1.0, *(abs(v) for v in want.values())])
    return all(abs(got.get(key, 0.0) - want.get(key, 0.0)) <= TOLERANCE * scale for key in {*got, *want})
