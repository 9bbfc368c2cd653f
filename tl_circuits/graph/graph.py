"""The attribution graph: nodes, direct effects between them, and what can be asked of it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tl_circuits.errors import PromptError, TargetError
from tl_circuits.graph.identity import earlier_fingerprint, fingerprint
from tl_circuits.graph.kinds import KINDS, OURS, Kind, node_id
from tl_circuits.graph.nodes import GraphInfo, Label, Nodes
from tl_circuits.graph.notes import Groups, Notes, Supernodes
from tl_circuits.graph.prune import prune_masks
from tl_circuits.graph.scores import Carried, Edges, Scores, influence, input_shares, scores
from tl_circuits.hooks import whole
from tl_circuits.support.checked import checked
from tl_circuits.support.figures import Picture
from tl_circuits.support.outputs import output


@dataclass(frozen=True, eq=False)
class AttributionGraph:
    """Which features and tokens acted on the answer to one prompt, and by how much.

    Nodes are tokens, features, errors (what the dictionary does not rebuild) and targets. An edge is the direct effect
    of its source on its target in the local replacement model of the prompt (Ameisen et al. 2025, "Circuit Tracing";
    equations in docs/method.md, "Edges"). For every node with a row, incoming edges and ``bias`` add up to its
    ``value``. A graph is never changed; methods return new ones.

    Attributes:
        info: what the graph is of: prompt, tokens, targets, model, dictionary.
        labels: what features read and write, by node index.
        notes: groups, pins and names that a person gave.
        source_file: for a graph read from another program's file, what that file says beyond our tables. An export
            writes it back.
        head_stories: which heads carried some of the edges, and why they looked there, as JSON values
            (:func:`tl_circuits.explain_heads` makes them).
        target_vectors: what each target reads of the final norm's output, ``[target, d_model]``. None if all targets
            are single tokens, whose vectors the model's unembedding has.

    Examples:
        >>> graph
        AttributionGraph('the capital of the state containing Dallas is': 60 features, 36 errors, 9 embeddings, ...
        >>> graph.nodes[["id", "kind", "token"]].tail(2)
                  id       kind token
        104  token@8  embedding    is
        105  logit:0      logit    is
        >>> graph.edges.nlargest(2, "weight").round(2)
               source     target  weight
        41    token@7  L0/F308@7    3.33
        2360  token@2    logit:0    3.25
    """

    info: GraphInfo
    _nodes: Nodes
    _edges: Edges
    labels: dict[int, Label] = field(default_factory=dict)
    notes: Notes = field(default_factory=Notes)
    source_file: dict[str, Any] = field(default_factory=dict)
    head_stories: tuple[dict[str, Any], ...] = ()
    target_vectors: Float[Tensor, "target d_model"] | None = None
    _notes_read: Notes | None = None  # the notes beside the file this graph was read from: a save may replace them

    def __len__(self) -> int:
        return len(self._nodes)

    def __eq__(self, other: object) -> bool:
        """Whether two graphs say the same: what was traced, labels, notes and stories of heads."""
        if not isinstance(other, AttributionGraph):
            return NotImplemented
        tables = ((self._nodes, other._nodes), (self._edges, other._edges))
        return (
            _equal(self.target_vectors, other.target_vectors)
            and all(_equal(getattr(a, column.name), getattr(b, column.name)) for a, b in tables for column in fields(a))
            and all(
                getattr(self, name) == getattr(other, name)
                for name in ("info", "labels", "notes", "source_file", "head_stories")
            )
        )

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def prompt_tokens(self) -> list[int]:
        """The token ids to run the model on.

        Returns:
            The ids of the whole prompt, one for each position, special tokens included.

        Raises:
            PromptError: for an aggregated graph, which belongs to no single prompt.

        Examples:
            >>> model.to_str_tokens(tlc.hooks.to_tokens(model, graph.prompt_tokens()))[:3]
            ['<bos>', 'the', 'capital']
        """
        if self.info.recurring:
            raise PromptError(
                f"the graph is what recurs over {self.info.prompt!r}, so there is no prompt to run the model on. "
                "Use the graph of one of the prompts."
            )
        return list(self.info.token_ids)

    def skipped_positions(self, usual: Sequence[int] = ()) -> tuple[int, ...]:
        """The positions that were left out when the graph was traced: they have neither features nor errors.

        Args:
            usual: the positions to consider if the graph's file does not say which were left out; then those without
                features are returned.

        Returns:
            Positions, counted from 0.

        Examples:
            >>> graph.skipped_positions()        # the beginning-of-sequence token
            (0,)
        """
        if self.info.skip_positions is not None:
            return self.info.skip_positions
        with_features = set(self._nodes.position[self.is_kind("feature")].tolist())
        return tuple(p for p in usual if p not in with_features)

    def is_kind(self, kind: str) -> Tensor:
        """Which nodes are of one kind.

        Args:
            kind: ``"feature"``, ``"error"``, ``"embedding"`` or ``"logit"`` (in graphs read from other programs' files
                also ``"attention feature"``, ``"attention error"`` and ``"bias"``).

        Returns:
            A boolean mask ``[node]`` in adjacency order.

        Examples:
            >>> int(graph.is_kind("feature").sum())
            60
        """
        return self._nodes.kind == Kind.of(kind)

    def adjacency(self) -> Float[Tensor, "node node"]:
        """All direct effects as one dense float32 matrix.

        Returns:
            A tensor ``[node, node]``. Rows are targets, columns are sources.

        Examples:
            >>> graph.adjacency().shape
            torch.Size([106, 106])
        """
        dense = torch.zeros(len(self), len(self))
        dense[self._edges.target, self._edges.source] = self._edges.weight
        return dense

    @cached_property
    def influence(self) -> Float[Tensor, " node"]:
        """Each node's total influence on the targets, over all paths: a float64 tensor ``[node]`` in adjacency order.

        It is ``w + w (N + N² + …)``, where ``N`` holds the absolute edges, each row divided by its sum, and ``w`` the
        targets' weights, such as their probabilities (Ameisen et al. 2025, "Circuit Tracing"; docs/method.md, "Which
        nodes"). For a node that is no target, this is the share of the targets' absolute inputs that can be traced back
        to it, summed over the targets, each by its weight.

        Examples:
            >>> graph.influence.shape
            torch.Size([106])
            >>> round(float(graph.influence[graph.node_numbers["token@7"]]), 2)  # half of Austin goes back to Dallas
            0.53
        """
        shares = input_shares(self._edges, len(self))
        weights = self._nodes.weight
        return influence(self._edges, shares, weights) + weights.double()

    @cached_property
    def node_ids(self) -> tuple[str, ...]:
        """Unique names in adjacency order: ``L14/F2268@9``, ``L3/error@2``, ``token@4``, ``logit:0``.

        Where a layer has several dictionaries, they name the site as well: ``L14.resid_post/F2268@9``.
        """
        names, rank = [], 0
        columns = (self._nodes.kind, self._nodes.layer, self._nodes.position, self._nodes.feature)
        rows = zip(*(c.tolist() for c in columns), self.sites, strict=True)
        for kind, layer, position, feature, site in rows:
            is_logit = kind == Kind.LOGIT
            names.append(node_id(kind, layer, position, rank if is_logit else feature, site))
            rank += is_logit
        return tuple(names)

    @cached_property
    def sites(self) -> tuple[str, ...]:
        """Each node's site, such as ``"resid_post"``; empty where its layer has one dictionary only, or none."""
        if self._nodes.site is None:
            return ("",) * len(self)
        return tuple(self.info.sites[i] if i >= 0 else "" for i in self._nodes.site.tolist())

    @cached_property
    def node_numbers(self) -> dict[str, int]:
        """The index of each node id in adjacency order."""
        return {name: i for i, name in enumerate(self.node_ids)}

    def label(self, index: int) -> str:
        """One line of text for a node: the name that a person gave it, else its label, else what it is.

        Args:
            index: the node's index in adjacency order.

        Returns:
            The text.

        Examples:
            >>> graph.label(0), graph.label(graph.node_ids.index("logit:0"))
            ('feature 171 of layer 0', 'output “Austin”')
        """
        index = whole(index, "label(index=...)")
        if self.notes.names and self.node_ids[index] in self.notes.names:
            return self.notes.names[self.node_ids[index]]
        kind = KINDS[int(self._nodes.kind[index])]
        position = int(self._nodes.position[index])
        if kind == "embedding":
            return f"token “{self.info.tokens[position]}”"
        if kind == "error":
            what = f"part of {self.sites[index]}" if self.sites[index] else "MLP output"
            return f"unexplained {what}, layer {int(self._nodes.layer[index])}"
        if kind == "logit":
            first = int(self.is_kind("logit").nonzero()[0])
            return f"output “{self.info.target_names[index - first]}”"
        if index in self.labels:
            return self.labels[index].short
        if kind == "attention error":
            return f"unexplained attention output, layer {int(self._nodes.layer[index])}"
        if kind == "bias":
            return f"bias of layer {int(self._nodes.layer[index])}"
        where = f"{self.sites[index]}, layer" if self.sites[index] else "layer"
        return f"feature {int(self._nodes.feature[index])} of {where} {int(self._nodes.layer[index])}"

    @cached_property
    def nodes(self) -> pd.DataFrame:
        """A pandas frame with one row for each node, in adjacency order.

        ``graph.nodes.set_index("id")`` is the same frame by id; :meth:`node` gives one row. Columns:

        * ``id``: such as ``L3/F667@8``: layer, feature, position.
        * ``kind``: ``feature``, ``error``, ``embedding`` or ``logit``.
        * ``layer``: -1 for embeddings, the number of layers for logits.
        * ``position``: where in the prompt; for a logit, where it is read.
        * ``feature``: the feature's number; the vocabulary id of an embedding or logit; -1 where there is none.
        * ``token``: the token at the position.
        * ``activation``: of features; of logits the value that is explained; 0 for others.
        * ``bias``: the part of ``value`` that no edge shows.
        * ``influence``: the share of the targets' absolute inputs that can be traced back to the node, over all paths.
        * ``label``: what it is, in a line.
        * ``value``: what incoming edges and ``bias`` add up to: a feature's pre-activation, a target's logit minus the
          mean logit. NaN for nodes without a row.
        * ``residue``: the part of ``bias`` that comes from features outside the graph.
        * ``total_effect``: the signed effect on the targets over all paths of the local replacement model, each target
          by its weight; NaN if the file does not say.
        * ``baseline``: in a contrast graph, the feature's mean activation in the baseline; else 0.
        * ``shared``: in a contrast graph, the part of ``bias`` that the baseline brings; else 0.
        * ``site``: only if some layer has several dictionaries: the name of the site, such as ``resid_post``; empty for
          nodes of other layers, embeddings and logits.
        """
        n = self._nodes
        position = n.position.tolist()
        columns = {
            "id": list(self.node_ids),
            "kind": [KINDS[k] for k in n.kind.tolist()],
            "layer": n.layer.numpy(),
            "position": n.position.numpy(),
            "feature": n.feature.numpy(),
            "token": [self.info.tokens[p] if p >= 0 else "" for p in position],
            "activation": n.activation.numpy(),
            "bias": n.bias.numpy(),
            "influence": self.influence.numpy(),
            "label": [self.label(i) for i in range(len(n))],
            "value": n.value.numpy(),
            "residue": n.residue.numpy(),
            "total_effect": np.full(len(n), np.nan, np.float32) if n.total_effect is None else n.total_effect.numpy(),
            "baseline": np.zeros(len(n), np.float32) if n.baseline is None else n.baseline.numpy(),
            "shared": np.zeros(len(n), np.float32) if n.shared is None else n.shared.numpy(),
        }
        if n.site is not None:
            columns["site"] = list(self.sites)
        return pd.DataFrame(columns)

    def node(self, name: str) -> pd.Series:
        """One node: its row of :attr:`nodes`.

        Args:
            name: the node's id, such as ``L3/F667@8``, ``L0/error@2``, ``token@4`` or ``logit:0``.

        Returns:
            A pandas series, whose index is the columns of the frame ``nodes``.

        Raises:
            TargetError: if the graph has no such node; it names the nearest ones.

        Examples:
            >>> node = graph.node("L3/F667@8")
            >>> node.token, round(float(node.activation), 1)
            ('is', 1.1)
        """
        if name not in self.node_numbers:
            near = get_close_matches(str(name), self.node_ids, n=3, cutoff=0.5)
            raise TargetError(
                f"the graph has no node {name!r}"
                + (f"; did you mean {' or '.join(near)}?" if near else "; see graph.nodes.")
            )
        return self.nodes.iloc[self.node_numbers[name]]

    @cached_property
    def edges(self) -> pd.DataFrame:
        """A pandas frame ``source target weight`` with node ids, sorted by target, then source."""
        ids = pd.array(self.node_ids, dtype="str")
        return pd.DataFrame(
            {
                "source": ids[self._edges.source.numpy()],
                "target": ids[self._edges.target.numpy()],
                "weight": self._edges.weight.numpy(),
            }
        )

    def completeness_error(self) -> float:
        """How exactly edges and bias add up to the nodes' values.

        Returns:
            The largest ``|sum(incoming) + bias - value|`` over all nodes with a row, divided by the largest
            ``|value|``; NaN if an edge is not finite.

        Examples:
            >>> graph.completeness_error() < 1e-5
            True
        """
        sums = torch.zeros(len(self), dtype=torch.float64)
        sums.index_add_(0, self._edges.target, self._edges.weight.double())
        known = ~self._nodes.value.isnan()
        if not bool(self._edges.weight.isfinite().all()):
            return float("nan")
        if not known.any():
            return 0.0
        value = self._nodes.value[known].double()
        gap = (sums[known] + self._nodes.bias[known].double() - value).abs().max()
        return float(gap / value.abs().max().clamp_min(1e-30))

    @property
    def words(self) -> pd.DataFrame:
        """Which words mattered: what each token of the prompt does to the answer, over all paths.

        A frame ``position token effect share``, one row for each token, in the order of the prompt. ``effect`` is
        signed and in logits (for several targets, the sum of the effects on each, weighted by their probabilities; for
        a :class:`FeatureTarget` or a :class:`LogitDirection`, in the target's own units). In a contrast graph it is the
        effect of how the token's embedding differs from the baseline. In a graph from another program's file, it runs
        over the paths that the graph has. ``share`` is the effect divided by the sum of all tokens' absolute effects,
        so it lies between -1 and 1.

        Examples:
            >>> graph.words.nlargest(2, "effect").round(2)
               position    token  effect  share
            7         7   Dallas   15.18   0.65
            2         2  capital    5.57   0.24
        """
        return output("words")(self)

    @property
    def coverage(self) -> float:
        """How much of the direct effects the graph shows: the share of all absolute inputs that its edges carry.

        It lies between 0 and 1. Each node with a row counts by its influence. What edges do not show are effects of
        features that were not traced, and of nodes and edges that were pruned.

        Examples:
            >>> round(graph.coverage, 2), round(graph.prune().coverage, 2)
            (0.97, 0.78)
        """
        mass = torch.zeros(len(self), dtype=torch.float64)
        mass.index_add_(0, self._edges.target, self._edges.weight.double().abs())
        residue = self._nodes.residue_mass.double()
        known = ~self._nodes.value.isnan()
        share = (mass / (mass + residue).clamp_min(1e-30))[known]
        reach = self.influence[known]
        return float((share * reach).sum() / reach.sum().clamp_min(1e-30))

    @checked
    def scores(self, only: Iterable[str | int] | None = None) -> Scores:
        """The replacement score and the completeness score: how much of the graph features explain.

        Both are defined by Ameisen et al. 2025, "Circuit Tracing: Revealing Computational Graphs in Language Models",
        and computed as circuit-tracer does. Their equations are in docs/method.md, "Which nodes".

        Args:
            only: ids or indices of nodes, such as those of a subgraph. Then all other features count as unexplained:
                what they write is added to the error of their layer and position, and what drives them is left out.
                This is what Neuronpedia's page computes for pinned nodes.

        Returns:
            The two scores, each a share of 1.

        Raises:
            TargetError: for a node that the graph does not have.

        Examples:
            >>> scores = graph.scores()
            >>> round(scores.replacement, 3), round(scores.completeness, 3)
            (0.967, 0.988)
            >>> graph.scores(["L0/F308@7", "L3/F667@8"]).replacement < scores.replacement
            True
        """
        if only is not None:
            return output("pinned scores")(self, only)
        is_error = self.is_kind("error") | self.is_kind("attention error")
        return scores(self._edges, self._nodes.weight, is_error, self.is_kind("embedding"))

    @checked
    def carried(self, nodes: Iterable[str | int]) -> Carried:
        """How much of the answer runs through some features: the signed sum over all paths of the graph that pass them.

        A path that passes several of them counts once. The sum is what the graph predicts that the target of the
        largest weight (the likeliest token) loses if all of these features are removed together. Paths of opposite sign
        cancel here; in :attr:`influence`, which takes absolute values, they do not.

        Args:
            nodes: ids or indices of features, such as those of a box.

        Returns:
            The target's ``value``, the part of it that is to be explained (``whole``), what runs through the features
            (``by``), all three in logits, and ``share``, which is ``by`` divided by ``whole``.

        Raises:
            TargetError: for a node that the graph does not have, or none at all.

        Examples:
            >>> boxed = [i for _, ids in graph.supernodes().groups for i in ids]
            >>> found = graph.carried(boxed)
            >>> round(found.share, 2), round(found.value, 1), round(found.value - found.by, 1)
            (0.68, 17.8, 5.6)
        """
        return output("carried")(self, nodes)

    @checked
    def prune(self, node_threshold: float = 0.8, edge_threshold: float = 0.98) -> "AttributionGraph":
        """The smaller graph that carries most of the influence on the targets (circuit-tracer's ``prune_graph``).

        Tokens and targets always stay. Kept nodes keep their value: what a cut edge contributed moves into the target's
        ``bias`` and ``residue``, so the sums still hold. The rule is in docs/method.md, "Which nodes" (Ameisen et al.
        2025, "Circuit Tracing").

        Args:
            node_threshold: the share of all influence that the kept nodes carry, 0 to 1.
            edge_threshold: the share that the kept edges carry of the scores of all edges between kept nodes, 0 to 1.
                An edge's score is its share of its target's absolute inputs, times the target's influence, both on
                what is left.

        Returns:
            A graph of the kept nodes and edges, with the labels, notes and stories of heads that are about these.

        Raises:
            ValueError: for a threshold outside 0 to 1.

        Examples:
            >>> small = graph.prune()
            >>> len(graph), len(small), round(small.coverage, 1)
            (106, 21, 0.8)
        """
        always = self.is_kind("embedding") | self.is_kind("logit") | (self._nodes.weight > 0)
        is_feature = self.is_kind("feature") | self.is_kind("attention feature")
        nodes, edges = prune_masks(self._edges, self._nodes.weight, is_feature, always, node_threshold, edge_threshold)
        return self._subgraph(nodes, edges)

    def _subgraph(self, keep_nodes: Tensor, keep_edges: Tensor) -> "AttributionGraph":
        dropped = self._edges[~keep_edges]
        zero = torch.zeros(len(self), dtype=torch.float64)
        lost = zero.index_add(0, dropped.target, dropped.weight.double())
        lost_mass = zero.index_add(0, dropped.target, dropped.weight.double().abs())
        nodes = replace(
            self._nodes,
            bias=(self._nodes.bias.double() + lost).float(),
            residue=(self._nodes.residue.double() + lost).float(),
            residue_mass=(self._nodes.residue_mass.double() + lost_mass).float(),
        )
        index = torch.full((len(self),), -1, dtype=torch.long)
        index[keep_nodes] = torch.arange(int(keep_nodes.sum()))
        kept = self._edges[keep_edges]
        edges = Edges(index[kept.source], index[kept.target], kept.weight)
        labels = {int(index[i]): label for i, label in self.labels.items() if index[i] >= 0}
        made = AttributionGraph(
            self.info,
            nodes[keep_nodes],
            edges,
            labels,
            source_file=_unpruned(self.source_file),
            target_vectors=self.target_vectors,
        )
        if self.head_stories:
            left = set(zip(made.edges.source, made.edges.target, strict=True))
            stories = tuple(s for s in self.head_stories if (s["source"], s["target"]) in left)
            made = replace(made, head_stories=stories)
        return made.with_notes(self.notes.of(made.node_ids)) if self.notes != Notes() else made

    @property
    def groups(self) -> Groups:
        """The groups that a person made, as (label, node ids)."""
        return self.notes.groups

    @property
    def pins(self) -> tuple[str, ...]:
        """Ids of pinned nodes. Every picture shows them."""
        return self.notes.pins

    @cached_property
    def fingerprint(self) -> str:
        """A hash of what was traced: model, dictionary, tokens, targets and nodes.

        Notes carry it, so that they are not applied to another graph.
        """
        return fingerprint(self.info, self.node_ids)

    @cached_property
    def earlier_fingerprint(self) -> str:
        """The hash in notes of earlier versions, which are still accepted."""
        return earlier_fingerprint(self.info, self._nodes, self._edges)

    @checked
    def with_notes(self, notes: Notes) -> "AttributionGraph":
        """The same graph with other notes.

        Args:
            notes: the notes that replace those of the graph.

        Returns:
            A new graph.

        Raises:
            ValueError: if the notes name a node that the graph does not have.

        Examples:
            >>> noted = graph.with_notes(tlc.Notes(pins=("L0/F308@7",), text="Look at Dallas."))
            >>> noted.notes.text
            'Look at Dallas.'
        """
        unknown = {*notes.pins, *notes.names, *(i for _, ids in notes.groups for i in ids)} - set(self.node_ids)
        if unknown:
            raise ValueError(f"the graph has no node {sorted(unknown)[0]!r}; ids look like {self.node_ids[0]!r}.")
        return replace(self, notes=notes)

    def with_notes_read(self, notes: Notes) -> "AttributionGraph":
        """The same graph with the notes that were found beside its file.

        A later :meth:`save` may replace these notes. Of other notes that it finds there, nothing is lost.

        Args:
            notes: the notes that were read.

        Returns:
            A new graph.

        Raises:
            ValueError: if the notes name a node that the graph does not have.

        Examples:
            >>> graph.with_notes_read(tlc.Notes(pins=("L0/F308@7",))).pins
            ('L0/F308@7',)
        """
        return replace(self.with_notes(notes), _notes_read=notes)

    @checked
    def group(self, label: str, ids: Iterable[str]) -> "AttributionGraph":
        """The same graph with some nodes put into one group of your own. They leave the groups they were in.

        Args:
            label: the group's name.
            ids: the nodes' ids.

        Returns:
            A new graph.

        Raises:
            ValueError: for a label that is empty or in use, an empty group, or an id that the graph does not have.

        Examples:
            >>> graph.group("Texas", ["L0/F308@7", "L0/F71@7"]).groups
            (('Texas', ('L0/F308@7', 'L0/F71@7')),)
        """
        return self.with_notes(self.notes.group(label, ids))

    @checked
    def ungroup(self, label: str) -> "AttributionGraph":
        """The same graph without one of its groups. Its nodes stay in the graph.

        Args:
            label: the group's name.

        Returns:
            A new graph.

        Raises:
            KeyError: if there is no group with this label; it names those there are.

        Examples:
            >>> graph.group("Texas", ["L0/F308@7"]).ungroup("Texas").groups
            ()
        """
        return self.with_notes(self.notes.ungroup(label))

    @checked
    def rename(self, old: str, new: str) -> "AttributionGraph":
        """The same graph with another name for a group or a node.

        Args:
            old: the group's label, or the node's id.
            new: the new name.

        Returns:
            A new graph.

        Raises:
            KeyError: if there is neither a group nor a node called ``old``.
            ValueError: for a group, if ``new`` is empty or the label of another group.

        Examples:
            >>> named = graph.rename("L0/F308@7", "Dallas, a city in Texas")
            >>> named.label(named.node_ids.index("L0/F308@7"))
            'Dallas, a city in Texas'
        """
        if old in self.node_ids:
            return self.with_notes(replace(self.notes, names=self.notes.names | {old: new}))
        return self.with_notes(self.notes.rename(old, new))

    @checked
    def pin(self, *ids: str) -> "AttributionGraph":
        """The same graph with these nodes pinned: every picture shows them.

        Args:
            *ids: node ids. They are added to the pins that the graph has.

        Returns:
            A new graph.

        Raises:
            ValueError: for an id that the graph does not have.

        Examples:
            >>> graph.pin("L0/F308@7", "L0/F71@7").pins
            ('L0/F308@7', 'L0/F71@7')
        """
        return self.with_notes(replace(self.notes, pins=tuple(dict.fromkeys((*self.pins, *ids)))))

    def supernodes(self, max_boxes: int = 12) -> Supernodes:
        """Group the strongest features into boxes that read and write alike; no model is needed.

        ``graph.with_groups(graph.supernodes().groups)`` makes the boxes groups of your own to edit.

        Args:
            max_boxes: the most boxes, at least 1.

        Returns:
            The boxes, and how much is lost by drawing them instead of their features.

        Raises:
            ValueError: for ``max_boxes`` below 1.

        Examples:
            >>> found = graph.supernodes()
            >>> len(found.groups) <= 12, found.lump_error < 0.18
            (True, True)
            >>> label, ids = found.groups[0]
            >>> label, "L0/F308@7" in ids
            ('at “Dallas”, layer 0', True)
        """
        if max_boxes not in self._boxes:  # page, figure, removals and terminal ask for the same boxes
            self._boxes[max_boxes] = output("supernodes")(self, max_boxes)
        return self._boxes[max_boxes]

    @cached_property
    def _boxes(self) -> dict[int, Supernodes]:
        return {}

    def with_groups(self, groups: Groups) -> "AttributionGraph":
        """The same graph with these groups instead of those it has.

        Args:
            groups: (label, node ids) for each group.

        Returns:
            A new graph.

        Raises:
            ValueError: for a label or a node in two groups, or an id that the graph does not have.

        Examples:
            >>> mine = graph.with_groups(graph.supernodes(max_boxes=4).groups)
            >>> len(mine.groups) <= 4
            True
        """
        return self.with_notes(replace(self.notes, groups=groups))

    @checked
    def unpin(self, *ids: str) -> "AttributionGraph":
        """The same graph without these pins.

        Args:
            *ids: node ids. One that is not pinned is passed over.

        Returns:
            A new graph.

        Examples:
            >>> graph.pin("L0/F308@7", "L0/F71@7").unpin("L0/F71@7").pins
            ('L0/F308@7',)
        """
        return self.with_notes(replace(self.notes, pins=tuple(i for i in self.pins if i not in ids)))

    @checked
    def save(self, path: str | Path, overwrite: bool = False) -> Path:
        """Write the graph into one safetensors file, whole or not at all; its notes go into a file beside it.

        Notes that are there already are not lost. A graph without notes leaves them as they are. Notes of another
        graph, and notes that say what the new ones do not, are renamed to ``NAME.notes.json.other``. Only notes that
        :func:`tl_circuits.load_graph` read together with this graph are replaced.

        Args:
            path: such as ``why.graph.safetensors``.
            overwrite: whether to replace a file that exists.

        Returns:
            The path.

        Raises:
            OutputError: if the file exists or cannot be written.

        Examples:
            >>> path = graph.save(folder / "why.graph.safetensors")
            >>> tlc.load_graph(path) == graph
            True
        """
        return output("graph file")(self, Path(path), overwrite)

    @checked
    def to_html(self, path: str | Path, overwrite: bool = False, ablations: list[dict[str, Any]] | None = None) -> Path:
        """Write the graph as one HTML page that needs no network.

        Args:
            path: the file to write.
            overwrite: whether to replace a file that exists.
            ablations: what :func:`tl_circuits.box_ablations` measured; the page then shows what removing a box does.

        Returns:
            The path.

        Raises:
            OutputError: if the file exists or cannot be written.

        Examples:
            >>> graph.to_html(folder / "why.html").name
            'why.html'
        """
        return output("html")(self, Path(path), overwrite, ablations)

    @checked
    def plot(self, path: str | Path | None = None, max_boxes: int = 12, overwrite: bool = False) -> Path | Picture:
        """Draw the graph's boxes, strongest paths and answer as a figure (extra ``figure``); no browser is needed.

        Args:
            path: a file that ends in ``.svg``, ``.png`` or ``.pdf``. Without one, the picture is returned, and a
                notebook shows it.
            max_boxes: the most boxes to draw, at least 1.
            overwrite: whether to replace a file that exists.

        Returns:
            The path; without one, the picture.

        Raises:
            OutputError: if the file exists, cannot be written, or has another ending.
            ImportError: if matplotlib is not installed; it names the extra.
            ValueError: for ``max_boxes`` below 1.

        Examples:
            >>> graph.plot(folder / "why.svg").name
            'why.svg'
        """
        return output("figure")(self, None if path is None else Path(path), max_boxes, overwrite)

    @checked
    def to_neuronpedia(
        self,
        path: str | Path,
        target: str = "neuronpedia",
        *,
        slug: str | None = None,
        source_set: str | None = None,
        scan: str | None = None,
        features: str | Path | None = None,
        description: str = "",
        creator: str = "",
        overwrite: bool = False,
    ) -> Path:
        """Write the graph as JSON for Neuronpedia's page, or for circuit-tracer's.

        Args:
            path: a file, or a folder, which then gets ``<slug>.json``.
            target: ``"neuronpedia"`` or ``"circuit-tracer"``: whose page the file is for.
            slug: the graph's name on the page. By default it is made from the file's name or the prompt.
            source_set: Neuronpedia's name of the dictionary.
            scan: Neuronpedia's model id, or circuit-tracer's transcoders.
            features: for circuit-tracer: a folder from ``tl-circuits dashboards``. The records of the graph's features
                are copied to where the page finds them without a network.
            description: a text shown with the graph.
            creator: your name, shown with the graph.
            overwrite: whether to replace a file that exists.

        Returns:
            The file's path.

        Raises:
            ExportError: for a name with illegal characters, or a graph that the page cannot show.
            OutputError: if the file exists or cannot be written.

        Examples:
            >>> graph.to_neuronpedia(folder, slug="dallas").name
            'dallas.json'
        """
        given = dict(
            target=target, slug=slug, source_set=source_set, scan=scan, description=description, creator=creator
        )
        return output("neuronpedia")(self, Path(path), overwrite, None if features is None else Path(features), **given)

    def upload(self, slug: str, **options: Any) -> str:
        """Put the graph on Neuronpedia. This needs the network and a key.

        Args:
            slug: the graph's name there.
            **options: ``model`` and ``source_set`` (Neuronpedia's names), ``description``, ``creator``, ``key`` (else
                ``NEURONPEDIA_API_KEY`` or the keyring), ``server``.

        Returns:
            The address of the graph's page.

        Raises:
            ExportError: for what the site would not take; nothing has been sent then.
            NeuronpediaError: if the site refuses or cannot be reached.
        """
        return output("upload")(self, slug, **options)

    @checked
    def neuronpedia_url(self, model: str, slug: str, embed: bool = False) -> str:
        """The address at which Neuronpedia shows this graph after an upload, with its groups, pins and names.

        Args:
            model: Neuronpedia's model id.
            slug: the name under which the graph was uploaded.
            embed: the page without its frame, for other sites to embed.

        Returns:
            The address.

        Raises:
            ExportError: if the address would be too long for servers, for a model id or slug with characters other than
                letters, digits and ``_ . -``, and for a graph in which some layer has several dictionaries.

        Examples:
            >>> graph.pin("token@7").neuronpedia_url("gemma-2-2b", "dallas")
            'https://www.neuronpedia.org/gemma-2-2b/graph?slug=dallas&pinnedIds=E_210_7'
        """
        return output("neuronpedia address")(self, model, slug, embed)

    def to_networkx(self) -> Any:
        """The graph as a ``networkx.DiGraph`` (extra ``networkx``).

        Returns:
            The directed graph. Its nodes are the ids, with the other columns of the frame ``nodes`` as attributes. Its
            edges have the attribute ``weight``.

        Raises:
            ImportError: if networkx is not installed; it names the extra.

        Examples:
            >>> directed = graph.to_networkx()
            >>> round(directed["token@7"]["L0/F308@7"]["weight"], 2)
            3.33
        """
        return output("networkx")(self)

    @checked
    def to_parquet(self, folder: str | Path, overwrite: bool = False) -> tuple[Path, Path]:
        """Write the frames :attr:`nodes` and :attr:`edges` as two Parquet files.

        Args:
            folder: where to write them; it is made if it does not exist.
            overwrite: whether to replace files that exist.

        Returns:
            The paths of ``nodes.parquet`` and ``edges.parquet``.

        Raises:
            OutputError: if a file exists or cannot be written.

        Examples:
            >>> [path.name for path in graph.to_parquet(folder)]
            ['nodes.parquet', 'edges.parquet']
        """
        return output("parquet")(self, Path(folder), overwrite)

    @checked
    def to_graphml(self, path: str | Path, overwrite: bool = False) -> Path:
        r"""Write GraphML, for Gephi, Cytoscape or yEd (extra ``networkx``). Attributes are the columns of the frames.

        Characters that XML cannot hold are written as ``\uXXXX``.

        Args:
            path: the file to write.
            overwrite: whether to replace a file that exists.

        Returns:
            The path.

        Raises:
            OutputError: if the file exists or cannot be written.
            ImportError: if networkx is not installed; it names the extra.

        Examples:
            >>> graph.to_graphml(folder / "why.graphml").name
            'why.graphml'
        """
        return output("graphml")(self, Path(path), overwrite)

    @checked
    def to_dot(self, path: str | Path, overwrite: bool = False) -> Path:
        """Write DOT, for Graphviz: nodes by label, edges in the colour of their sign.

        An edge is the wider, the larger its share of its target's absolute inputs.

        Args:
            path: the file to write.
            overwrite: whether to replace a file that exists.

        Returns:
            The path.

        Raises:
            OutputError: if the file exists or cannot be written.

        Examples:
            >>> graph.prune().to_dot(folder / "why.dot").read_text().splitlines()[0]
            'digraph attribution {'
        """
        return output("dot")(self, Path(path), overwrite)

    def __repr__(self) -> str:
        counts = {kind: int((self._nodes.kind == kind).sum()) for kind in Kind}
        text = ", ".join(f"{n} {kind.text}s" for kind, n in counts.items() if n or kind in OURS)
        return f"AttributionGraph({self.info.prompt!r}: {text}, {len(self._edges)} edges)"


def _unpruned(source_file: dict[str, Any]) -> dict[str, Any]:
    """Another program's file without what it says about its own pruning, which no longer holds after ours."""
    if "metadata" not in source_file:
        return source_file
    kept = {
        key: value
        for key, value in source_file["metadata"].items()
        if key not in ("pruning_settings", "node_threshold")
    }
    return source_file | {"metadata": kept}


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two columns are the same, or both missing; NaN counts as equal to NaN."""
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
