"""Assignment 5, its last two questions: random neurons to compare with, and how sure the comparison makes one."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from tl_circuits.course.families import Neuron
from tl_circuits.course.neuron_answers import neurons_in
from tl_circuits.course.questions import Asking, Lab, Part, WrongAnswer, number, sequence

Z95 = 1.959964  # standard deviations of a normal distribution that hold 95 %


def controls(student: Asking, lab: Lab) -> Iterator[Part]:
    chosen = [(7, neuron, 4) for neuron in range(6)] + [(7, 2, 5), (12, 9, 5), (12, 10, 5)]
    width, count = 16, 8  # so narrow that neurons drawn without care are often the chosen ones, or drawn twice

    def sets(seed: int) -> list[list[Neuron]]:
        return [
            neurons_in(one)
            for one in sequence(student(list(chosen), width, count, seed), object, "a list of lists of neurons")
        ]

    first = sets(1)
    if len(first) != count:
        raise WrongAnswer(f"it returned {len(first)} sets for count={count}.")
    yield Part(1, all(_alike(one, chosen, width) for one in first), _unlike(first, chosen, width))
    free = not any({*one} & {*chosen} for one in first)
    yield Part(1, free, "a control holds some of the chosen neurons themselves: draw among the others.")
    hint = (
        "wrong with seeds: the same seed has to give the same sets, another seed others, and the sets of one call "
        "differ."
    )
    again, other = sets(1), sets(2)
    differ = len({frozenset(one) for one in first}) > count // 2 and first != other
    if first == again and not differ:
        hint = "the sets do not depend on `seed`, or are all the same: draw each with one generator made from the seed."
    yield Part(1, first == again and differ, hint)


def _places(neurons: Sequence[Neuron]) -> Counter[tuple[int, int]]:
    return Counter((layer, position) for layer, _, position in neurons)


def _alike(one: Sequence[Neuron], chosen: Sequence[Neuron], width: int) -> bool:
    return (
        _places(one) == _places(chosen) and len({*one}) == len(one) and all(0 <= neuron < width for _, neuron, _ in one)
    )


def _unlike(sets: Sequence[Sequence[Neuron]], chosen: Sequence[Neuron], width: int) -> str:
    """Why the sets are not like the chosen neurons."""
    one = next((one for one in sets if not _alike(one, chosen, width)), chosen)
    if len(one) != len(chosen):
        return "each set needs as many neurons as the chosen ones are."
    if Counter(layer for layer, _, _ in one) != Counter(layer for layer, _, _ in chosen):
        return (
            "controls from other layers prove little: late neurons do more than early ones. Draw as many in each layer."
        )
    if _places(one) != _places(chosen):
        return "the positions differ: draw as many neurons in each layer at each position."
    if len({*one}) < len(one):
        return "a control holds a neuron twice: draw without putting back."
    return "a neuron's number is at least 0 and less than `width`."


def how_sure(student: Asking, lab: Lab) -> Iterator[Part]:
    cases = ((0.5, [0.1, -0.2, 0.0, 0.3]), (0.2, [0.1, 0.2, -0.4, 0.25, 0.0, 0.1, 0.15]), (-0.1, [0.0, -0.1, -0.2]))
    right = {"p": True, "interval": True}
    hints = {
        "p": "wrong p: (1 + b) / (1 + n), where b of the n random values are at least as large as the one found.",
        "interval": "wrong interval, or share: Wilson's interval for the share b / n, with z = 1.96.",
    }
    for found, random in cases:
        got = student(found, list(random))
        if not isinstance(got, dict) or set(got) != {"share", "p", "interval"}:
            raise WrongAnswer("expected a dict with the keys share, p and interval.")
        b, n = sum(value >= found for value in random), len(random)
        p, share, (low, high) = number(got["p"]), number(got["share"]), _pair(got["interval"])
        if not math.isclose(p, (1 + b) / (1 + n), abs_tol=1e-4):
            right["p"] = False
            above = sum(value > found for value in random)
            if math.isclose(p, b / n, abs_tol=1e-4):
                hints["p"] = (
                    "a p-value of b / n can be 0, which no sample shows: what was found counts as one of the sets, "
                    "(1 + b) / (1 + n)."
                )
            elif above != b and math.isclose(p, (1 + above) / (1 + n), abs_tol=1e-4):
                hints["p"] = "a random set that is just as strong counts too: at least as large, not larger."
            elif math.isclose(p, (1 + sum(abs(value) >= abs(found) for value in random)) / (1 + n), abs_tol=1e-4):
                hints["p"] = (
                    "compare signed values: a random set that raises the lead is not as strong as one that lowers it."
                )
        want = wilson(b, n)
        if not all(math.isclose(x, y, abs_tol=1e-3) for x, y in zip((share, low, high), (b / n, *want), strict=True)):
            right["interval"] = False
            half = Z95 * math.sqrt(b / n * (1 - b / n) / n)
            if math.isclose(high - low, 2 * half, abs_tol=1e-3):
                hints["interval"] = (
                    "b / n plus and minus 1.96 standard errors is an interval of width 0 where b = 0: take Wilson's."
                )
    for part in ("p", "interval"):
        yield Part(1, right[part], hints[part])


def wilson(b: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval for a share of which b out of n were seen (Wilson 1927)."""
    share, z2 = b / n, Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return centre - half, centre + half


def _pair(answer: Any) -> tuple[float, float]:
    ends = sequence(answer, object, "an interval (low, high)")
    if len(ends) != 2:
        raise WrongAnswer(f"the interval has {len(ends)} numbers; expected (low, high).")
    return number(ends[0]), number(ends[1])
