"""The families of prompts that assignment 5 is graded on, and the neurons' effects traced on a part of each."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float, Int
from safetensors.torch import load
from torch import Tensor

Neuron = tuple[int, int, int]
"""A neuron at one place: layer, neuron, position."""
Effects = dict[Neuron, float]
"""What each neuron does to the answer of one prompt: its total effect in a contrast graph."""
RECORDED = Path(__file__).parent / "recorded" / "fact_effects.safetensors"


@dataclass(frozen=True)
class Family:
    """Prompts that differ in one word, each with an answer of one token.

    Attributes:
        name: what it is called in hints.
        template: the prompt, with ``{}`` for the word.
        traced: word and answer of the prompts that neurons are chosen on.
        unseen: word and answer of those that the choice is judged on.
    """

    name: str
    template: str
    traced: tuple[tuple[str, str], ...]
    unseen: tuple[tuple[str, str], ...]

    def prompts(self, pairs: tuple[tuple[str, str], ...]) -> list[str]:
        """The prompts for some of its words."""
        return [self.template.format(word) for word, _ in pairs]


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    words = [pair.split() for pair in text.split(",")]
    return tuple((word, f" {answer}") for word, answer in words)


CAPITALS = Family(
    "capitals",
    "The capital of {} is",
    _pairs("France Paris,Germany Berlin,Italy Rome,Russia Moscow,Japan Tokyo,China Beijing"),
    _pairs(
        "Poland Warsaw,Norway Oslo,Sweden Stockholm,Portugal Lisbon,Hungary Budapest,Cuba Havana,Ireland "
        "Dublin,Egypt Cairo"
    ),
)
LANGUAGES = Family(
    "languages",
    "The official language of {} is",
    _pairs("France French,Germany German,Italy Italian,Russia Russian,Japan Japanese,China Chinese"),
    _pairs(
        "Greece Greek,Poland Polish,Portugal Portuguese,Sweden Swedish,Hungary Hungarian,Denmark Danish,Turkey Turkish"
    ),
)


def recorded_effects(file: Path = RECORDED) -> Mapping[str, list[Effects]]:
    """For each family by name, the effects on each of its traced prompts.

    ``python -m docs.make.fact_effects`` traces them again.
    """
    tensors = load(file.read_bytes())
    names = [name.removesuffix(".effect") for name in tensors if name.endswith(".effect")]
    return {name: _tables(tensors[f"{name}.neuron"], tensors[f"{name}.effect"]) for name in names}


def _tables(neuron: Int[Tensor, "prompt row 3"], effect: Float[Tensor, "prompt row"]) -> list[Effects]:
    made = []
    for where, values in zip(neuron.tolist(), effect.tolist(), strict=True):
        made.append(
            {(layer, feature, position): value for (layer, feature, position), value in zip(where, values, strict=True)}
        )
    return made
