"""The attribution graph: nodes, direct effects between them, and what can be asked of it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tl_circuits.errors import PromptError
from tl_circuits.graph.kinds import KINDS, OURS, Kind, node_id
from tl_circuits.graph.nodes import GraphInfo, Label, Nodes
from tl_circuits.graph.notes import Groups, Notes, Supernodes, fingerprint
from tl_circuits.graph.prune import prune_masks
from tl_circuits.graph.scores import Edges, Scores, influence, input_shares, scores
from tl_circuits.hooks import whole
from tl_circuits.support.checked import checked
from tl_circuits.support.figures import Picture
from tl_circuits.support.outputs import output


@dataclass(frozen=True, eq=False)
class AttributionGraph:
    """Direct effects in the local replacement model of one prompt.

    ``edges`` run from sources to targets; for every node with a row,
    ``sum(incoming) + bias == value``. ``labels`` maps a node's index to its :class:`Label`;
    ``notes`` is what a person added; ``head_stories`` say which heads carried some of the edges and why
    they looked (:func:`tl_circuits.explain_heads`), as JSON; ``source_file`` is what the file of another program, from which
    the graph was read, says beyond these tables, so that an export can give it back.
    """

    info: GraphInfo
    _nodes: Nodes
    _edges: Edges
    labels: dict[int, Label] = field(default_factory=dict)
    notes: Notes = field(default_factory=Notes)
    source_file: dict[str, Any] = field(default_factory=dict)
    head_stories: tuple[dict[str, Any], ...] = ()

    def __len__(self) -> int:
        return len(self._nodes)

    def __eq__(self, other: object) -> bool:
        """Whether all content is the same: what was traced, labels, notes, stories of heads."""
        if not isinstance(other, AttributionGraph):
            return NotImplemented
        tables = ((self._nodes, other._nodes), (self._edges, other._edges))
        return all(
            _equal(getattr(a, column.name), getattr(b, column.name)) for a, b in tables for column in fields(a)
        ) and all(getattr(self, name) == getattr(other, name) for name in ("info", "labels", "notes", "source_file", "head_stories"))

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def prompt_tokens(self) -> list[int]:
        """The token ids to run the model on; raises PromptError for a graph of many prompts, which has none."""
        if self.info.recurring:
            raise PromptError(
                f"the graph is what recurs over {self.info.prompt!r}, so there is no prompt to run the model on. "
                "Use the graph of one of the prompts."
            )
        return list(self.info.token_ids)

    def skipped_positions(self, usual: Sequence[int] = ()) -> tuple[int, ...]:
        """The positions left out when the graph was traced; where its file does not say, those of ``usual`` without features."""
        if self.info.skip_positions is not None:
            return self.info.skip_positions
        with_features = set(self._nodes.position[self.is_kind("feature")].tolist())
        return tuple(p for p in usual if p not in with_features)

    def is_kind(self, kind: str) -> Tensor:
        """A mask ``[node]`` of the nodes of one kind."""
        return self._nodes.kind == Kind.of(kind)

    def adjacency(self) -> Float[Tensor, "node node"]:
        """Dense float32 matrix of direct effects: rows are targets, columns are sources."""
        dense = torch.zeros(len(self), len(self))
        dense[self._edges.target, self._edges.source] = self._edges.weight
        return dense

    @cached_property
    def influence(self) -> Float[Tensor, " node"]:
        """Each node's total influence on the targets (float64); targets add their own weight."""
        shares = input_shares(self._edges, len(self))
        weights = self._nodes.weight
        return influence(self._edges, shares, weights) + weights.double()

    @cached_property
    def node_ids(self) -> tuple[str, ...]:
        """Unique names: ``L14/F2268@9``, ``L3/error@2``, ``token@4``, ``logit:0``."""
        names, rank = [], 0
        columns = (self._nodes.kind, self._nodes.layer, self._nodes.position, self._nodes.feature)
        for kind, layer, position, feature in zip(*(c.tolist() for c in columns), strict=True):
            is_logit = kind == Kind.LOGIT
            names.append(node_id(kind, layer, position, rank if is_logit else feature))
            rank += is_logit
        return tuple(names)

    @cached_property
    def node_numbers(self) -> dict[str, int]:
        """Each id's place in adjacency order."""
        return {name: i for i, name in enumerate(self.node_ids)}

    def label(self, index: int) -> str:
        """One line of text for a node; a person's name for it comes first."""
        index = whole(index, "label(index=...)")
        if self.notes.names and self.node_ids[index] in self.notes.names:
            return self.notes.names[self.node_ids[index]]
        kind = KINDS[int(self._nodes.kind[index])]
        position = int(self._nodes.position[index])
        if kind == "embedding":
            return f"token “{self.info.tokens[position]}”"
        if kind == "error":
            return f"unexplained MLP output, layer {int(self._nodes.layer[index])}"
        if kind == "logit":
            first = int(self.is_kind("logit").nonzero()[0])
            return f"output “{self.info.target_names[index - first]}”"
        if index in self.labels:
            return self.labels[index].short
        if kind == "attention error":
            return f"unexplained attention output, layer {int(self._nodes.layer[index])}"
        if kind == "bias":
            return f"bias of layer {int(self._nodes.layer[index])}"
        return f"feature {int(self._nodes.feature[index])} of layer {int(self._nodes.layer[index])}"

    @cached_property
    def nodes(self) -> pd.DataFrame:
        """A frame with one row a node, in adjacency order."""
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
        }
        return pd.DataFrame(columns)

    @cached_property
    def edges(self) -> pd.DataFrame:
        """A frame ``source target weight`` of node ids, sorted by target, then source."""
        ids = pd.array(self.node_ids, dtype="str")
        return pd.DataFrame(
            {
                "source": ids[self._edges.source.numpy()],
                "target": ids[self._edges.target.numpy()],
                "weight": self._edges.weight.numpy(),
            }
        )

    def completeness_error(self) -> float:
        """Largest ``|sum(incoming) + bias - value|`` over nodes with a row, over the largest ``|value|``."""
        sums = torch.zeros(len(self), dtype=torch.float64)
        sums.index_add_(0, self._edges.target, self._edges.weight.double())
        known = ~self._nodes.value.isnan()
        if not known.any():
            return 0.0
        value = self._nodes.value[known].double()
        gap = (sums[known] + self._nodes.bias[known].double() - value).abs().max()
        return float(gap / value.abs().max().clamp_min(1e-30))

    @property
    def coverage(self) -> float:
        """The share of all absolute direct effects, weighted by influence, that the graph's edges carry."""
        mass = torch.zeros(len(self), dtype=torch.float64)
        mass.index_add_(0, self._edges.target, self._edges.weight.double().abs())
        residue = self._nodes.residue_mass.double()
        known = ~self._nodes.value.isnan()
        share = (mass / (mass + residue).clamp_min(1e-30))[known]
        reach = self.influence[known]
        return float((share * reach).sum() / reach.sum().clamp_min(1e-30))

    def scores(self) -> Scores:
        """Replacement and completeness score."""
        is_error = self.is_kind("error") | self.is_kind("attention error")
        return scores(self._edges, self._nodes.weight, is_error, self.is_kind("embedding"))

    @checked
    def prune(self, node_threshold: float = 0.8, edge_threshold: float = 0.98) -> "AttributionGraph":
        """The smaller graph that carries most of the influence (see :mod:`tl_circuits.graph.prune`).

        Kept nodes keep their bias; what pruned edges contributed is added to ``residue`` and
        ``bias``, so the sums still hold.
        """
        always = self.is_kind("embedding") | self.is_kind("logit") | (self._nodes.weight > 0)
        is_feature = self.is_kind("feature") | self.is_kind("attention feature")
        nodes, edges = prune_masks(
            self._edges, self._nodes.weight, is_feature, always, node_threshold, edge_threshold
        )
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
        made = AttributionGraph(self.info, nodes[keep_nodes], edges, labels, source_file=self.source_file)
        if self.head_stories:
            left = set(zip(made.edges.source, made.edges.target, strict=True))
            stories = tuple(s for s in self.head_stories if (s["source"], s["target"]) in left)
            made = replace(made, head_stories=stories)
        return made.with_notes(self.notes.of(made.node_ids)) if self.notes != Notes() else made

    @property
    def groups(self) -> Groups:
        """A person's groups: (label, node ids) each."""
        return self.notes.groups

    @property
    def pins(self) -> tuple[str, ...]:
        """Ids of pinned nodes: those every picture shows."""
        return self.notes.pins

    @cached_property
    def fingerprint(self) -> str:
        """A hash of what was traced, by which notes know their graph."""
        return fingerprint(self.info, self._nodes, self._edges)

    @checked
    def with_notes(self, notes: Notes) -> "AttributionGraph":
        """The same graph with these notes; raises ValueError for ids it does not have."""
        unknown = {*notes.pins, *notes.names, *(i for _, ids in notes.groups for i in ids)} - set(self.node_ids)
        if unknown:
            raise ValueError(f"the graph has no node {sorted(unknown)[0]!r}; ids look like {self.node_ids[0]!r}.")
        return replace(self, notes=notes)

    @checked
    def group(self, label: str, ids: Iterable[str]) -> "AttributionGraph":
        """With these nodes as one supernode. They leave other groups; raises ValueError for a label in use."""
        return self.with_notes(self.notes.group(label, ids))

    @checked
    def ungroup(self, label: str) -> "AttributionGraph":
        """Without the group ``label``; raises KeyError if there is none."""
        return self.with_notes(self.notes.ungroup(label))

    @checked
    def rename(self, old: str, new: str) -> "AttributionGraph":
        """The group, or the node with the id, ``old`` called ``new``; raises KeyError if there is neither."""
        if old in self.node_ids:
            return self.with_notes(replace(self.notes, names=self.notes.names | {old: new}))
        return self.with_notes(self.notes.rename(old, new))

    @checked
    def pin(self, *ids: str) -> "AttributionGraph":
        """With these nodes pinned."""
        return self.with_notes(replace(self.notes, pins=tuple(dict.fromkeys((*self.pins, *ids)))))

    def supernodes(self, max_boxes: int = 12) -> Supernodes:
        """At most ``max_boxes`` boxes of features that play one role (see :mod:`tl_circuits.graph.supernodes`).

        ``graph.with_groups(graph.supernodes().groups)`` makes them groups of your own to edit.
        """
        return output("supernodes")(self, max_boxes)

    def with_groups(self, groups: Groups) -> "AttributionGraph":
        """With these groups instead of the ones it has."""
        return self.with_notes(replace(self.notes, groups=groups))

    @checked
    def unpin(self, *ids: str) -> "AttributionGraph":
        """Without these pins."""
        return self.with_notes(replace(self.notes, pins=tuple(i for i in self.pins if i not in ids)))

    @checked
    def save(self, path: str | Path, overwrite: bool = False) -> Path:
        """Write one safetensors file, atomically; raises OutputError if it exists or cannot be written."""
        return output("graph file")(self, Path(path), overwrite)

    @checked
    def to_html(
        self, path: str | Path, overwrite: bool = False, ablations: list[dict[str, Any]] | None = None
    ) -> Path:
        """Write a page of its own, without any network access; raises OutputError as :meth:`save` does.

        ``ablations``: what :func:`tl_circuits.box_ablations` measured, for "remove this box" in the page.
        """
        return output("html")(self, Path(path), overwrite, ablations)

    @checked
    def plot(self, path: str | Path | None = None, max_boxes: int = 12, overwrite: bool = False) -> Path | Picture:
        """Draw the story as SVG, PNG or PDF, by the ending of ``path`` (extra ``figure``); no browser needed.

        Without a path the drawing is returned as a picture, which a notebook shows. Raises OutputError as
        :meth:`save` does, and for other endings.
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
        """Write the JSON that a page reads: ``target`` is ``"neuronpedia"`` or ``"circuit-tracer"``.

        ``path``: a file, or a folder for ``<slug>.json``. ``slug``: the graph's name there, from the file's
        name or the prompt by default. ``scan``: Neuronpedia's model id, or circuit-tracer's transcoders.
        ``features``: a folder from ``tl-circuits dashboards``, whose records of the graph's features are put
        where circuit-tracer's page finds them without a network. Raises ExportError for names with illegal characters and graphs that page cannot show, OutputError as
        :meth:`save` does.
        """
        given = dict(target=target, slug=slug, source_set=source_set, scan=scan, description=description, creator=creator)
        return output("neuronpedia")(self, Path(path), overwrite, None if features is None else Path(features), **given)

    def upload(self, slug: str, **options: Any) -> str:
        """Put the graph on Neuronpedia under ``slug`` and return its address.

        ``options``: ``model`` and ``source_set`` by Neuronpedia's names, ``description``, ``creator``, ``key``
        (else ``NEURONPEDIA_API_KEY`` or the keyring), ``server``. Raises ExportError for what the site would not
        take, before anything is sent, and NeuronpediaError where it refuses or cannot be reached.
        """
        return output("upload")(self, slug, **options)

    @checked
    def neuronpedia_url(self, model: str, slug: str, embed: bool = False) -> str:
        """The address at which Neuronpedia shows this graph, uploaded as ``slug``, with its groups, pins and names."""
        return output("neuronpedia address")(self, model, slug, embed)

    def to_networkx(self) -> Any:
        """A ``networkx.DiGraph`` with the frames' columns as attributes (extra ``networkx``)."""
        return output("networkx")(self)

    @checked
    def to_parquet(self, folder: str | Path, overwrite: bool = False) -> tuple[Path, Path]:
        """Write ``nodes.parquet`` and ``edges.parquet`` into a folder (extra ``parquet``); returns both paths."""
        return output("parquet")(self, Path(folder), overwrite)

    @checked
    def to_graphml(self, path: str | Path, overwrite: bool = False) -> Path:
        """Write GraphML, with the frames' columns as attributes (extra ``networkx``)."""
        return output("graphml")(self, Path(path), overwrite)

    @checked
    def to_dot(self, path: str | Path, overwrite: bool = False) -> Path:
        """Write DOT, for Graphviz."""
        return output("dot")(self, Path(path), overwrite)

    def __repr__(self) -> str:
        counts = {kind: int((self._nodes.kind == kind).sum()) for kind in Kind}
        text = ", ".join(f"{n} {kind.text}s" for kind, n in counts.items() if n or kind in OURS)
        return f"AttributionGraph({self.info.prompt!r}: {text}, {len(self._edges)} edges)"


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two columns are the same, NaN being NaN."""
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
