"""Answers that name neurons, as (layer, neuron, position), in the form that questions expect."""

from typing import Any

from tl_circuits.course.families import Effects, Neuron
from tl_circuits.course.questions import WrongAnswer, kind, number, sequence
from tl_circuits.hooks import Replacement


def neuron_effects(answer: Any) -> Effects:
    """The answer as a dict from neurons to numbers.

    Raises:
        WrongAnswer: for anything else.
    """
    if not isinstance(answer, dict):
        raise WrongAnswer(f"it returned {kind(answer)}; expected a dict {{(layer, neuron, position): effect}}.")
    return {_neuron(key): number(value) for key, value in answer.items()}


def neurons_in(answer: Any) -> list[Neuron]:
    """The answer as a list of neurons, in which one may stand twice.

    Raises:
        WrongAnswer: for anything else.
    """
    return [_neuron(item) for item in sequence(answer, object, "a list of (layer, neuron, position)")]


def neuron_list(answer: Any, most: int | None = None, replacement: Replacement | None = None) -> list[Neuron]:
    """The answer as a list of neurons, each once.

    Args:
        answer: what the function returned.
        most: how many there may be; None for any number.
        replacement: the model whose neurons they have to be; None if that does not matter.

    Raises:
        WrongAnswer: for anything else.
    """
    found = neurons_in(answer)
    if len(set(found)) < len(found):
        raise WrongAnswer(
            f"it returned {len(found)} neurons, of which only {len(set(found))} are different; name each once."
        )
    if most is not None and len(found) > most:
        raise WrongAnswer(f"it returned {len(found)} neurons; expected {most}.")
    if replacement is not None:
        widths = {layer: replacement.dictionary.width(layer) for layer in replacement.dictionary.layers}
        for layer, neuron, position in found:
            if not 0 <= neuron < widths.get(layer, 0) or position < 0:
                raise WrongAnswer(
                    f"there is no neuron {(layer, neuron, position)}; expected (layer, neuron, position), as in the "
                    "tables."
                )
    return found


def _neuron(item: Any) -> Neuron:
    if not isinstance(item, (tuple, list)) or len(item) != 3:
        raise WrongAnswer(f"a neuron is given as {kind(item)}; expected a tuple (layer, neuron, position).")
    numbers = [number(part) for part in item]
    if any(part != int(part) or isinstance(given, bool) for part, given in zip(numbers, item, strict=True)):
        raise WrongAnswer(
            f"a neuron is given as {tuple(numbers)}; expected three whole numbers: layer, neuron, position."
        )
    layer, neuron, position = map(int, numbers)
    return layer, neuron, position
