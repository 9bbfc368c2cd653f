"""Head loadings and QK attributions of edges as plain data: for pages, for JSON, for Neuronpedia."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from tl_circuits.attention.head_paths import EdgeParts, Head, sum_parts
from tl_circuits.attention.loadings import edge_paths, path_name
from tl_circuits.attention.qk import QKAttribution, score_attribution
from tl_circuits.attention.retrace import Retraced, retrace
from tl_circuits.errors import TargetError
from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.graph.lookup import node_indices
from tl_circuits.graph.scores import input_shares
from tl_circuits.hooks import Replacement, in_turn, left_out
from tl_circuits.support.checked import checked


@dataclass(frozen=True)
class EdgeStory:
    """Why one edge is there: which heads it went through, and why the largest of them looked where they looked.

    Attributes:
        source: id of the edge's source.
        target: id of the edge's target.
        weight: the edge's weight.
        paths: the edge by heads.
        heads: the heads with the largest loadings, (layer, head) each.
        scores: for each of these heads, the QK attribution of its score from the target's position to the source's.
        attention: for each head, the weight that it has there after softmax.
        instead: for each head, the QK attribution of that score minus the score at its next most attended position, and
            the weight of that position. The beginning of the sequence does not count as one. None if there is no other
            position.
    """

    source: str
    target: str
    weight: float
    paths: EdgeParts
    heads: tuple[Head, ...]
    scores: tuple[QKAttribution, ...]
    attention: tuple[float, ...]
    instead: tuple[tuple[QKAttribution, float] | None, ...]


@checked
@in_turn
def explain_heads(
    replacement: Replacement,
    graph: AttributionGraph,
    edges: int | Sequence[Sequence[str | int]] = 12,
    *,
    heads: int = 1,
    targets: Any = None,
    progress: bool = False,
) -> AttributionGraph:
    """The same graph with stories of heads: which heads carried some of its edges, and why they looked there.

    Pages show the stories (``graph.to_html``), and exports to Neuronpedia contain them. Edges explained before are
    kept.

    Args:
        replacement: the model with the graph's dictionary attached.
        graph: the graph.
        edges: how many edges to explain, those between different positions with the most influence; or the edges as
            pairs (source, target) of node ids or indices.
        heads: how many heads of each edge to explain.
        targets: as for :func:`tl_circuits.head_loadings`.
        progress: show progress bars on stderr.

    Returns:
        A new graph. Its ``head_stories`` also hold a dict for each edge explained now, as ``story_data`` makes it.

    Raises:
        TargetError, BelongingError, BaselineError, ArchitectureError, AttachError: as
            :func:`tl_circuits.head_loadings` raises them.

    Examples:
        >>> told = tlc.explain_heads(replacement, graph, [("token@7", "logit:0")])
        >>> story = told.head_stories[0]
        >>> story["source"], story["target"], story["heads"][0]["layer"], story["heads"][0]["head"]
        ('token@7', 'logit:0', 2, 1)
    """
    pairs = strongest_edges(graph, edges) if isinstance(edges, int) else edges
    told = edge_stories(replacement, graph, pairs, heads, targets=targets, progress=progress) if pairs else []
    made = {(data["source"], data["target"]): data for data in graph.head_stories}
    made |= {(story.source, story.target): story_data(graph, story) for story in told}
    return replace(graph, head_stories=tuple(made.values()))


@checked
@in_turn
def edge_stories(
    replacement: Replacement,
    graph: AttributionGraph,
    edges: Sequence[Sequence[str | int]],
    heads: int = 3,
    top: int = 10,
    *,
    targets: Any = None,
    progress: bool = False,
) -> list[EdgeStory]:
    """For some edges: the heads that carried them, and what made these heads look there.

    Args:
        replacement: the model with the graph's dictionary attached.
        graph: the graph.
        edges: pairs (source, target) of node ids or indices.
        heads: how many heads of each edge to explain; 0 for loadings alone.
        top: how many pairs and sources to list for each head, and how many chains of heads for each edge.
        targets: as for :func:`tl_circuits.head_loadings`.
        progress: show progress bars on stderr.

    Returns:
        A story for each edge, in the same order, with the edge by heads and the QK attribution of each explained head.

    Raises:
        TargetError, BelongingError, BaselineError, ArchitectureError, AttachError: as
            :func:`tl_circuits.head_loadings` raises them.

    Examples:
        >>> from tl_circuits.attention.stories import edge_stories
        >>> (story,) = edge_stories(replacement, graph, [("token@7", "logit:0")], heads=1)
        >>> story.heads, round(story.attention[0], 2)        # head 1 of layer 2 looks at Dallas with all its attention
        (((2, 1),), 1.0)
    """
    for edge in edges:
        if isinstance(edge, str) or len(edge) != 2:
            raise TargetError(f"an edge is a pair (source, target) of node ids or indices, got {edge!r}.")
    indices = [_edge_index(graph, *edge) for edge in edges]
    local = retrace(replacement, graph, contrast=True)
    found = edge_paths(local, graph, indices, top, targets, progress)
    if graph.info.compared_with:
        local = retrace(replacement, graph)  # why a head looks is a question about whole effects
    shown = tqdm(list(zip(indices, found, strict=True)), desc="why heads look", unit="edge", disable=not progress)
    return [_story(local, graph, edge, paths, heads, top) for edge, paths in shown]


@checked
@in_turn
def word_stories(
    replacement: Replacement,
    graph: AttributionGraph,
    words: Sequence[int],
    target: str | int = "logit:0",
    heads: int = 3,
    top: int = 10,
    *,
    targets: Any = None,
    progress: bool = False,
) -> list[EdgeStory]:
    """For some words of the prompt: which heads brought what stands there to the target, and why they looked there.

    All edges from the word's position, of its token, features and error, are added up.

    Args:
        replacement: the model with the graph's dictionary attached.
        graph: the graph.
        words: positions of the words.
        target: the node that they act on.
        heads: how many heads of each word to explain.
        top: how many pairs and sources to list for each head.
        targets: as for :func:`tl_circuits.head_loadings`.
        progress: show progress bars on stderr.

    Returns:
        A story for each word, with ``@2`` as the source of position 2.

    Raises:
        TargetError: for a position from which no edge leads to the target; else as :func:`tl_circuits.head_loadings`.

    Examples:
        >>> from tl_circuits.attention.stories import word_stories
        >>> (story,) = word_stories(replacement, graph, [7])
        >>> story.source, story.heads[0]
        ('@7', (3, 0))
    """
    (end,) = node_indices(graph, target)
    into = graph._edges.target == end
    edges = {p: (into & (graph._nodes.position[graph._edges.source] == p)).nonzero()[:, 0].tolist() for p in words}
    empty = next((p for p, found in edges.items() if not found), None)
    if empty is not None:
        raise TargetError(f"no edge leads from position {empty} to {graph.node_ids[end]}; see graph.edges.")
    local = retrace(replacement, graph, contrast=True)
    stories = []
    for position, found in edges.items():
        parts = sum_parts(edge_paths(local, graph, found, top, targets, progress), top)
        weight = float(graph._edges.weight[found].sum())
        stories.append((f"@{position}", weight, parts, position))
    if graph.info.compared_with:
        local = retrace(replacement, graph)
    query, name = int(graph._nodes.position[end]), graph.node_ids[end]
    return [_told(local, graph, s, name, weight, parts, query, key, heads, top) for s, weight, parts, key in stories]


def strongest_edges(graph: AttributionGraph, count: int) -> list[tuple[str, str]]:
    """The edges into the targets, from other positions, that carry most influence. Heads must have carried them.

    Positions that the graph leaves out, such as the beginning of the sequence, are no sources: heads that find nothing
    look there. If no edge into a target comes from another position, edges into features are taken.
    """
    edges, position = graph._edges, graph._nodes.position
    moved = position[edges.source] != position[edges.target]
    moved &= ~torch.isin(position[edges.source], torch.tensor(graph.skipped_positions(), dtype=torch.long))
    into = moved & (graph._nodes.weight[edges.target] > 0)
    chosen = (into if bool(into.any()) else moved).nonzero()[:, 0]
    flow = input_shares(edges, len(graph)) * graph.influence[edges.target]
    order = chosen[flow[chosen].argsort(descending=True, stable=True)[:count]].tolist()
    return [(graph.node_ids[int(edges.source[e])], graph.node_ids[int(edges.target[e])]) for e in order]


def _edge_index(graph: AttributionGraph, source: str | int, target: str | int) -> int:
    (a,), (b,) = node_indices(graph, source), node_indices(graph, target)
    found = ((graph._edges.source == a) & (graph._edges.target == b)).nonzero()
    if found.numel() == 0:
        raise TargetError(f"the graph has no edge from {graph.node_ids[a]} to {graph.node_ids[b]}; see graph.edges.")
    return int(found[0])


def _story(local: Retraced, graph: AttributionGraph, edge: int, paths: EdgeParts, heads: int, top: int) -> EdgeStory:
    source, target = int(graph._edges.source[edge]), int(graph._edges.target[edge])
    query, key = (int(graph._nodes.position[i]) for i in (target, source))
    weight = float(graph._edges.weight[edge])
    return _told(local, graph, graph.node_ids[source], graph.node_ids[target], weight, paths, query, key, heads, top)


def _told(
    local: Retraced,
    graph: AttributionGraph,
    source: str,
    target: str,
    weight: float,
    paths: EdgeParts,
    query: int,
    key: int,
    heads: int,
    top: int,
) -> EdgeStory:
    ordered = sorted(paths.heads, key=lambda head: -abs(paths.heads[head]))
    chosen = [head for head in ordered if paths.heads[head] != 0.0][:heads]
    scores = tuple(score_attribution(local, graph, *head, query, key, top=top) for head in chosen)
    weights = [_attention(local, *head, query) for head in chosen]
    attention = tuple(float(row[key]) for row in weights)
    instead = tuple(
        _instead(local, graph, head, query, key, row, top) for head, row in zip(chosen, weights, strict=True)
    )
    return EdgeStory(source, target, weight, paths, tuple(chosen), scores, attention, instead)


def _attention(local: Retraced, layer: int, head: int, query: int) -> Float[Tensor, " key"]:
    """One row of a recorded attention pattern."""
    block = next(b for b in local.recording.patterns[layer].blocks if query < b.queries.stop)
    row = block.weights.new_zeros(local.n_pos)
    row[block.keys] = block.weights[head, query - block.queries.start]
    return row


def _instead(
    local: Retraced, graph: AttributionGraph, head: Head, query: int, key: int, row: Float[Tensor, " key"], top: int
) -> tuple[QKAttribution, float] | None:
    """Why the head looks at ``key`` rather than at its next most attended position, and the weight of that position."""
    usual = left_out(local.model, local.recording.tokens, local.replacement.dictionary.prompt_rule)
    skipped = {*usual, *local.sources.skipped}
    others = [p for p in range(query + 1) if p != key and p not in skipped and float(row[p]) > 0]
    if not others:
        return None
    other = max(others, key=lambda p: float(row[p]))
    return score_attribution(local, graph, *head, query, key, baseline_key=other, top=top), float(row[other])


def story_data(graph: AttributionGraph, story: EdgeStory, top: int = 10) -> dict[str, Any]:
    """An :class:`EdgeStory` as JSON values: what a page shows beside a link.

    Args:
        graph: the graph.
        story: the story.
        top: the most heads and chains of heads to list.

    Returns:
        A dict. ``source`` and ``target`` are the edge's ends. ``residual``, the loadings of ``heads``, ``other_heads``
        (all heads beyond ``top``), ``chains`` and ``rest`` (all other chains) add up to ``weight``. Each of ``heads``
        has ``layer head loading`` and, if it is explained, ``query key score attention pairs by_query by_key`` and
        ``baseline``: ``key attention score pairs by_query by_key`` of another key, with score and parts of the
        difference to it; or None. ``pairs`` are ``[query source, key source, weight]`` by id; ``labels`` has the label
        of every such id that is a node of the graph.

    Examples:
        >>> from tl_circuits.attention.stories import edge_stories, story_data
        >>> (story,) = edge_stories(replacement, graph, [("token@7", "logit:0")], heads=1)
        >>> data = story_data(graph, story)
        >>> data["source"], data["target"], round(data["weight"], 2), len(data["heads"])
        ('token@7', 'logit:0', 1.48, 10)
    """
    everything = sorted(story.paths.heads.items(), key=lambda item: -abs(item[1]))
    ordered, left_out = everything[:top], everything[top:]
    explained = zip(story.heads, story.scores, story.attention, story.instead, strict=True)
    scores = {head: (qk, attention, instead) for head, qk, attention, instead in explained}
    named: set[str] = set()
    heads = []
    for (layer, head), loading in ordered:
        made: dict[str, Any] = {"layer": layer, "head": head, "loading": loading}
        if (layer, head) in scores:
            qk, attention, instead = scores[layer, head]
            made |= {"query": qk.query, "key": qk.key, "attention": attention, **_sums(qk)}
            made["baseline"] = None
            named |= _named(qk)
            if instead is not None:
                other, weight = instead
                made["baseline"] = {"key": other.baseline_key, "attention": weight, **_sums(other)}
                named |= _named(other)
        heads.append(made)
    labels = {name: graph.label(i) for i, name in enumerate(graph.node_ids) if name in named}
    return {
        "source": story.source,
        "target": story.target,
        "weight": story.weight,
        "residual": story.paths.residual,
        "heads": heads,
        "other_heads": sum(loading for _, loading in left_out),
        "chains": [[path_name(chain), value] for chain, value in story.paths.chains[:top]],
        "rest": story.paths.rest + sum(value for _, value in story.paths.chains[top:]),
        "labels": labels,
    }


def _sums(qk: QKAttribution) -> dict[str, Any]:
    return {
        "score": qk.score,
        "pairs": [[q, k, float(w)] for q, k, w in qk.terms.itertuples(index=False, name=None)],
        "by_query": _marginals(qk.by_query),
        "by_key": _marginals(qk.by_key),
    }


def _marginals(frame: pd.DataFrame) -> list[list[Any]]:
    return [[name, float(w)] for name, w in zip(frame.source, frame.weight, strict=True)]


def _named(qk: QKAttribution) -> set[str]:
    return {*qk.terms.query_source, *qk.terms.key_source, *qk.by_query.source, *qk.by_key.source}


def qk_tracing_results(
    heads: Iterable[dict[str, Any]], node_id: Callable[[str], str | None], top: int = 20
) -> dict[str, list[list[Any]]]:
    """The ``qk_tracing_results`` of one node, in Neuronpedia's format.

    Pairs and sources of several heads are added up. A head and position that was explained for several edges counts
    once.

    Args:
        heads: the explained heads that reach the node, as :func:`story_data` gives them.
        node_id: turns our ids into those of the exported file. Sources for which it returns None, such as the bias, are
            left out, because every id in the file must be that of a node or of a ``qk_only_nodes`` entry.
        top: the most pairs, and the most sources of either side.

    Returns:
        A dict of three lists, each with the largest first. ``pair_wise_contributors`` has entries ``[query id, key id,
        weight]``, ``top_q_marginal_contributors`` and ``top_k_marginal_contributors`` have entries ``[id, weight]``.
        Weights are parts of scores before softmax.

    Examples:
        >>> from tl_circuits.attention.stories import edge_stories, qk_tracing_results, story_data
        >>> (story,) = edge_stories(replacement, graph, [("token@7", "logit:0")], heads=1)
        >>> found = qk_tracing_results(story_data(graph, story)["heads"], lambda name: None if name == "bias" else name)
        >>> found["pair_wise_contributors"][0][:2]
        ['token@8', 'token@7']
    """
    pairs: dict[tuple[str, str], float] = {}
    sides: dict[str, dict[str, float]] = {"by_query": {}, "by_key": {}}
    for head in {(h["layer"], h["head"], h["key"]): h for h in heads if "pairs" in h}.values():
        for query, key, weight in head["pairs"]:
            reading, read = node_id(query), node_id(key)
            if reading is not None and read is not None:
                pairs[reading, read] = pairs.get((reading, read), 0.0) + weight
        for name, side in sides.items():
            for source, weight in head[name]:
                made = node_id(source)
                if made is not None:
                    side[made] = side.get(made, 0.0) + weight

    def largest(found: dict[Any, float]) -> list[tuple[Any, float]]:
        return sorted(found.items(), key=lambda item: -abs(item[1]))[:top]

    return {
        "pair_wise_contributors": [[*ids, weight] for ids, weight in largest(pairs)],
        "top_q_marginal_contributors": [[name, weight] for name, weight in largest(sides["by_query"])],
        "top_k_marginal_contributors": [[name, weight] for name, weight in largest(sides["by_key"])],
    }
