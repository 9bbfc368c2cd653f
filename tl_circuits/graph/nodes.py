"""What a graph consists of: its nodes, their labels, and which prompt and model it is of."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuits.graph.kinds import Kind
from tl_circuits.graph.visible import visible
from tl_circuits.hooks import Sample

OPTIONAL = ("total_effect", "baseline", "shared", "site")
"""Columns of :class:`Nodes` that a graph may lack."""


@dataclass(frozen=True, eq=False)
class Nodes:
    """The nodes in adjacency order: features, errors (layer by layer), embeddings, logits.

    Attributes:
        kind: the numbers of :class:`~tl_circuits.graph.kinds.Kind`.
        layer: -1 for embeddings, the number of layers for logits.
        position: the token's position; -1 where there is none.
        feature: the feature's index; -1 for errors; the vocabulary id for embeddings and logits (-1 for a target that
            is not a single token); a running number for biases.
        activation: the feature's activation on the prompt.
        value: what incoming edges and bias add up to: the pre-activation, or the logit minus the mean logit. NaN for
            nodes without a row.
        bias: the part of ``value`` that no edge shows.
        residue: the part of ``bias`` that comes from features outside the graph.
        residue_mass: the absolute sum of those features' effects.
        weight: what a target counts for, such as its probability; 0 for all other nodes.
        total_effect: the signed effect on the targets over all paths, each target by its weight. None if the file does
            not say.
        baseline: in a contrast graph, the feature's mean activation in the baseline.
        shared: in a contrast graph, the part of ``bias`` that the baseline brings.
        site: where some layer has several dictionaries: at which one a feature or error stands, as an index of
            ``GraphInfo.sites``; -1 for other nodes, and in layers with one dictionary.
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
    total_effect: Float[Tensor, " node"] | None = None
    baseline: Float[Tensor, " node"] | None = None
    shared: Float[Tensor, " node"] | None = None
    site: Int[Tensor, " node"] | None = None

    def __len__(self) -> int:
        return self.kind.numel()

    def __getitem__(self, index: Tensor) -> "Nodes":
        return Nodes(**{name: column[index] for name, column in self.columns().items()})

    @property
    def counted(self) -> Float[Tensor, " node"]:
        """The activation that counts: all of it, or in a contrast graph what differs from the baseline."""
        return self.activation if self.baseline is None else self.activation - self.baseline

    @property
    def towards(self) -> Float[Tensor, " node"]:
        """1 where a positive edge makes a node count more, -1 where it makes it count less.

        The latter are features that are below zero, or below the baseline. 0 for features that do not count.
        """
        return torch.where(self.kind == Kind.FEATURE, self.counted.sign(), 1.0)

    @property
    def depth(self) -> Int[Tensor, " node"]:
        """A number that grows along every edge: the layer, and within a layer the site if there are several."""
        if self.site is None:
            return self.layer
        return self.layer * (int(self.site.max()) + 2) + self.site + 1

    def columns(self) -> dict[str, Tensor]:
        """The columns that are there, by name."""
        found = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: column for name, column in found.items() if column is not None}


@dataclass(frozen=True)
class Example:
    """A piece of text that activates a feature: its tokens, and the feature's activation on each of them."""

    tokens: tuple[str, ...]
    activations: tuple[float, ...]


@dataclass(frozen=True)
class Label:
    """What a feature reads and writes, as tokens of the vocabulary, strongest first.

    Attributes:
        short: one line for pictures.
        promotes: tokens whose logits the feature's decoder raises most.
        suppresses: tokens whose logits it lowers most.
        reads: tokens whose embeddings fit the feature's encoder best.
        origin: where the label comes from.
        examples: texts that activate the feature most.

    Examples:
        >>> labelled = tlc.label_features(replacement, graph, ["L3/F667@8"])
        >>> label = labelled.labels[labelled.node_numbers["L3/F667@8"]]
        >>> label.short, label.origin
        ('say “Austin”, “TX”', 'vocabulary')
    """

    short: str
    promotes: tuple[str, ...] = ()
    suppresses: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    origin: str = "vocabulary"
    examples: tuple[Example, ...] = ()


UNCLEAR = "no clear name"
"""What a label says, in place of a name, of a feature that neither its weights nor its examples name clearly."""

AGAINST_OTHERS = " − the others’ answers"
"""How the name of a contrast graph's usual target ends.

That target is the answer's logit minus the mean logit of the others' answers.
"""

OTHERS_NAMED = 3  # prompts that a graph is compared with and that a line names; of more it says the number

Baselines = tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
"""A baseline's prompts: token ids, and the position in the graph's prompt that each is compared with (-1: none)."""


def read_baselines(stored: Any) -> Baselines:
    """A baseline's prompts as JSON holds them; raises ValueError or TypeError for anything else."""
    return tuple((tuple(map(int, ids)), tuple(map(int, places))) for ids, places in stored)


@dataclass(frozen=True)
class GraphInfo:
    """What a graph is of. All of it is stored in the graph's file.

    Attributes:
        prompt: the text.
        token_ids: the ids that the model was run on.
        tokens: their texts.
        target_names: what is explained, such as the likeliest next tokens.
        target_probabilities: the targets' probabilities (1 for a difference or direction).
        model: the model's name.
        dictionary: the dictionary's name.
        n_layers: the number of the model's blocks.
        exact: whether the dictionary rebuilds every MLP exactly, as neurons do.
        engine: which engine computed the edges.
        max_nodes: how many features were asked for.
        n_active: how many features are active on the prompt.
        version: the version of the program that made the graph.
        recurring: whether this is an aggregated graph of what recurs over many prompts.
        sample: some numbers from the weights of model and dictionary, by which both are recognised.
        prompt_exact: whether tokenising ``prompt`` is known to give ``token_ids`` again. False if no text does, or the
            file does not say; then run the graph itself instead of its text.
        skip_positions: positions without features and error nodes, whose MLP outputs are constants; None if the file
            does not say.
        prepended: the special token that the dictionary's rule put before the text in addition to the model's own;
            empty if there is none.
        select: by what the features were chosen, ``"total_effect"`` or ``"influence"``.
        baseline: the token ids of a contrast graph's baseline prompts.
        compared_with: what a contrast graph compares with: those prompts' texts, or what its :class:`Baseline` was made
            from. Empty if the graph is no contrast.
        sites: where some layer has several dictionaries: the names of their sites, in the order of the forward pass.

    Examples:
        >>> graph.info.tokens[-2:], graph.info.target_names, graph.info.skip_positions
        (('Dallas', 'is'), ('Austin',), (0,))
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
    select: str = "influence"
    baseline: Baselines = ()
    compared_with: tuple[str, ...] = ()
    sites: tuple[str, ...] = ()

    @property
    def _others(self) -> tuple[str, ...]:
        """What is compared with, without the special token that the prompt's own text leaves out as well."""
        first = self.tokens[0] if self.tokens else ""
        return tuple(t if self.prompt.startswith(first) else t.removeprefix(first) for t in self.compared_with)

    @property
    def reads(self) -> str:
        """What the model reads, and what that is compared with, as a line for people."""
        others = [f"“{visible(text)}”" if self.baseline else text for text in self._others]
        listed = [
            *others[:OTHERS_NAMED],
            *([f"{len(others) - OTHERS_NAMED} more"] if len(others) > OTHERS_NAMED else []),
        ]
        named = f", compared with {_listed(listed)}" if listed else ""
        return f"{self.model} reads “{visible(self.prompt)}”{named}"

    @property
    def question(self) -> str:
        """What the graph explains, as a question."""
        if not self.target_names:
            return "Why did this feature fire?"
        name = visible(self.target_names[0].removesuffix(AGAINST_OTHERS))
        if not self.compared_with:
            # A difference or direction has weight one, which is not a probability.
            weight = self.target_probabilities[0]
            probability = f" ({weight:.0%})".replace("%", " %") if weight < 1 else ""
            return f"Why “{name}”{probability}?"
        if not self.baseline:
            return f"Why “{name}”, and not what is usual in {self.compared_with[0]}?"
        n = len(self.compared_with)
        other = f"“{visible(self._others[0])}” gives" if n == 1 else f"the other {n} prompts give"
        return f"Why “{name}”, and not what {other}?"

    @property
    def compared(self) -> str:
        """What a contrast graph compares with, in a few words; empty if the graph is no contrast."""
        if not self.compared_with:
            return ""
        if not self.baseline:
            return f"what is usual in {self.compared_with[0]}"
        n = len(self.compared_with)
        return f"the prompt “{self._others[0]}”" if n == 1 else f"{n} other prompts"


def _listed(words: list[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else words[0]
