"""Turn the computed rows into a graph: keep the entries whose sources became nodes, count the rest in ``bias``."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuits.attribution.expand import Block, Expansion
from tl_circuits.attribution.sources import Sources
from tl_circuits.attribution.targets import LogitTargets, Targets
from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.graph.kinds import OURS
from tl_circuits.graph.nodes import GraphInfo, Nodes
from tl_circuits.graph.scores import Edges


@dataclass(frozen=True)
class Roots:
    """Where influence starts: at logit targets (``logits``), or at one feature (``column``).

    ``weights`` says how much influence starts at each logit target.
    """

    targets: Targets | None
    weights: Float[Tensor, " root"]
    column: int | None
    logits: LogitTargets | None


def assemble(
    expansion: Expansion,
    roots: Roots,
    info: GraphInfo,
    tokens: Int[Tensor, " pos"],
    position: int,
    total: Float[Tensor, " column"],
) -> AttributionGraph:
    """The graph of all expanded features, errors, tokens and targets.

    Args:
        expansion: the rows.
        roots: what the graph explains.
        info: what the graph knows about its origin.
        tokens: the prompt's token ids.
        position: where the logits are read.
        total: the total effect of every column on the targets.
    """
    sources = expansion.sources
    features = expansion.expanded().sort().values
    columns = torch.cat([features, sources.error_columns, torch.arange(sources.n_pos)])
    node_of = torch.full((sources.width,), -1, dtype=torch.long)
    node_of[columns] = torch.arange(columns.numel())
    nodes = _nodes(sources, roots, features, tokens, position, total.cpu()[columns])
    parts = [
        _edges(block, node_of[block.columns], node_of, nodes)
        for place in sorted(expansion.blocks)
        for block in expansion.blocks[place]
    ]
    if expansion.roots is not None:
        first = columns.numel()
        targets = torch.arange(first, first + expansion.roots.columns.numel())
        parts.append(_edges(expansion.roots, targets, node_of, nodes))
    target, source, weight = (torch.cat(column) for column in zip(*parts, strict=True))
    # A target's own total effect is all that its sources bring to it.
    assert nodes.total_effect is not None  # _nodes makes the column
    nodes.total_effect[columns.numel() :] = (nodes.weight * (nodes.value - nodes.bias))[columns.numel() :]
    order = torch.argsort(target * len(nodes) + source)
    # A token's vector can be read off the unembedding again; that of a difference or a direction is kept.
    kept = roots.logits is not None and min(roots.logits.token) < 0
    vectors = roots.logits.vector.float().cpu() if roots.logits is not None and kept else None
    return AttributionGraph(info, nodes, Edges(source[order], target[order], weight[order]), target_vectors=vectors)


def _edges(
    block: Block, targets: Int[Tensor, " n"], node_of: Int[Tensor, " column"], nodes: Nodes
) -> tuple[Int[Tensor, " edge"], Int[Tensor, " edge"], Float[Tensor, " edge"]]:
    """Target, source and weight of one block's edges; biases and residues are written into ``nodes``.

    The residue of a node is the sum of the effects of sources that are no nodes. It is added to the bias, so that
    the edges that are left and the bias still add up to the node's value.
    """
    row, node, value = block.rows.entries(node_of)
    kept = torch.zeros(2, len(targets), dtype=torch.float64)
    kept.index_add_(1, row, torch.stack([value, value.abs()]).double())
    residue = block.rows.total.cpu() - kept[0]
    nodes.residue[targets] = residue.float()
    nodes.residue_mass[targets] = (block.rows.mass.cpu() - kept[1]).clamp_min(0).float()
    nodes.bias[targets] = (block.bias.cpu().double() + residue).float()
    if nodes.shared is not None:
        assert block.shared is not None  # with a baseline, every block has it
        nodes.shared[targets] = block.shared.cpu()
    return targets[row], node, value


def _nodes(
    sources: Sources,
    roots: Roots,
    features: Int[Tensor, " n"],
    tokens: Int[Tensor, " pos"],
    position: int,
    total: Float[Tensor, " column"],
) -> Nodes:
    """The node table in the order features, errors, tokens, logits; biases are still zero (``_edges`` writes them)."""
    table = {name: column.cpu() for name, column in sources.feature_table.items()}
    index = torch.searchsorted(sources.feature_columns, features)
    n_pos, n_layers = sources.n_pos, sources.n_layers
    with_error = torch.tensor([i for i, s in enumerate(sources.layers) if s.error is not None], dtype=torch.long)
    n_roots = 0 if roots.logits is None else len(roots.logits.token)
    counts = [len(features), with_error.numel() * n_pos, n_pos, n_roots]
    kind = torch.repeat_interleave(torch.tensor(OURS), torch.tensor(counts))
    every = torch.arange(n_pos)
    root = roots.logits
    # The places of features and errors; the rest stands at none.
    at = torch.cat([table["place"][index], with_error.repeat_interleave(n_pos)])
    layer = [torch.tensor([place.layer for place in sources.places])[at], torch.full((n_pos,), -1)]
    place = [table["position"][index], every.repeat(with_error.numel()), every]
    feature = [table["feature"][index], torch.full((counts[1],), -1), tokens.cpu()]
    activation = [table["activation"][index].float(), torch.zeros(counts[1] + n_pos)]
    value = [table["pre"][index].float(), torch.full((counts[1] + n_pos,), float("nan"))]
    if root is not None:
        layer.append(torch.full((n_roots,), n_layers))
        place.append(torch.full((n_roots,), position))
        feature.append(torch.tensor(root.token))
        activation.append(root.value.cpu().float())
        value.append(root.value.cpu().float())
    weight = torch.zeros(sum(counts))
    if root is not None:
        weight[-n_roots:] = root.weights.cpu()
    if roots.column is not None:
        weight[int((features == roots.column).nonzero()[0])] = 1.0
    zeros = torch.zeros(sum(counts))
    baseline = shared = None
    if "baseline" in table:
        baseline, shared = zeros.clone(), zeros.clone()
        baseline[: len(features)] = table["baseline"][index].float()
    return Nodes(
        kind=kind,
        layer=torch.cat(layer),
        position=torch.cat(place),
        feature=torch.cat(feature),
        activation=torch.cat(activation),
        value=torch.cat(value),
        bias=zeros.clone(),
        residue=zeros.clone(),
        residue_mass=zeros.clone(),
        weight=weight,
        total_effect=torch.cat([total.float(), torch.zeros(n_roots)]),
        baseline=baseline,
        shared=shared,
        site=_sites(sources, at, len(kind)),
    )


def _sites(sources: Sources, at: Int[Tensor, " n"], n_nodes: int) -> Int[Tensor, " node"] | None:
    """Each node's site as its index in ``sources.sites``, -1 for none; None if no layer has several dictionaries.

    ``at``: the places of the first ``n`` nodes.
    """
    if not sources.sites:
        return None
    of_place = torch.tensor([sources.sites.index(place.site) if place.site else -1 for place in sources.places])
    return torch.cat([of_place[at], torch.full((n_nodes - len(at),), -1)])
