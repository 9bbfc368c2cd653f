"""What a graph is made of: its nodes, their labels, and what prompt and model it is of."""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from tl_circuits.hooks import Sample


@dataclass(frozen=True, eq=False)
class Nodes:
    """The nodes in adjacency order: features, errors (layer-major), embeddings, logits.

    ``kind`` holds the numbers of :class:`~tl_circuits.graph.kinds.Kind`. ``layer`` is -1 for embeddings and the number of layers for
    logits; ``feature`` is the feature index, -1 for errors, the vocabulary id for embeddings and
    logits (-1 for targets that are not a single token), a running number for biases. ``value`` is what incoming edges and bias
    add up to (pre-activation, or logit minus mean logit), NaN for nodes without a row. ``residue``
    is the part of ``bias`` that comes from features outside the graph, ``residue_mass`` their
    absolute sum.
    """

    kind: Int[Tensor, " node"]
    layer: Int[Tensor, " node"]
    position: Int[Tensor, " node"]
    feature: Int[Tensor, " node"]
    activation: Float[Tensor, " node"]
    value: Float[Tensor, " node"]
    bias: Float[Tensor, " node"]
    residue: Float[Tensor, " node"]
    residue_mass: Float[Tensor, " node"]
    weight: Float[Tensor, " node"]

    def __len__(self) -> int:
        return self.kind.numel()

    def __getitem__(self, index: Tensor) -> "Nodes":
        return Nodes(**{name: getattr(self, name)[index] for name in self.__dataclass_fields__})


@dataclass(frozen=True)
class Example:
    """A piece of text on which a feature is active: its tokens, and the activation on each."""

    tokens: tuple[str, ...]
    activations: tuple[float, ...]


@dataclass(frozen=True)
class Label:
    """What a feature reads and writes, in the vocabulary's own tokens, strongest first.

    ``promotes`` and ``suppresses``: tokens whose logits its decoder raises and lowers most.
    ``reads``: tokens whose embedding its encoder likes best. ``short`` is one line for pictures;
    ``origin`` says where the label came from; ``examples`` are texts that activate the feature most.
    """

    short: str
    promotes: tuple[str, ...] = ()
    suppresses: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    origin: str = "vocabulary"
    examples: tuple[Example, ...] = ()


@dataclass(frozen=True)
class GraphInfo:
    """What the graph is of. All of it is stored in the file's metadata as JSON.

    ``prompt_exact``: whether tokenising ``prompt`` again is known to give ``token_ids``, which was tried when
    the graph was traced. False where no text does, and for files that do not say; run the graph itself then.
    ``skip_positions``: positions without features and error nodes, whose MLP outputs are constants; None for
    files that do not say. ``prepended``: the special token that the dictionary's rule put before the text,
    beyond the model's own rule; empty if none.
    """

    prompt: str
    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    target_names: tuple[str, ...]
    target_probabilities: tuple[float, ...]
    model: str
    dictionary: str
    n_layers: int
    exact: bool
    engine: str
    max_nodes: int
    n_active: int
    version: str
    recurring: bool = False  # of what recurs over many prompts, so of no single one
    sample: Sample = ()  # numbers out of the weights of model and dictionary, by which both are known again
    prompt_exact: bool = False
    skip_positions: tuple[int, ...] | None = None
    prepended: str = ""
