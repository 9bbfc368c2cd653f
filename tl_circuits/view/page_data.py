"""What the page is given: a graph small enough to look at, as plain JSON."""

from typing import Any

import torch

from tl_circuits.graph.graph import KINDS, AttributionGraph
from tl_circuits.graph.paths import sentence, strongest_paths

MOST_FEATURES = 240
MOST_LINKS = 12000
_NODE_THRESHOLDS = (0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01)


def prune_for_page(graph: AttributionGraph) -> AttributionGraph:
    """The largest pruned graph with at most :data:`MOST_FEATURES` features."""
    if int(graph.is_kind("feature").sum()) <= MOST_FEATURES:
        return graph
    for threshold in _NODE_THRESHOLDS:
        pruned = graph.prune(node_threshold=threshold)
        if int(pruned.is_kind("feature").sum()) <= MOST_FEATURES:
            break
    return pruned


def page_data(graph: AttributionGraph) -> dict[str, Any]:
    """Nodes, links, sentences and numbers of the page, as JSON-ready values.

    Links beyond :data:`MOST_LINKS` are left out, smallest share of their target's inputs first;
    ``links_hidden`` says how many.
    """
    shown = prune_for_page(graph)
    nodes, edges = shown._nodes, shown._edges
    mass = torch.zeros(len(shown)).index_add_(0, edges.target, edges.weight.abs()) + nodes.residue_mass
    share = edges.weight / mass.clamp_min(1e-30)[edges.target]
    kept = torch.argsort(share.abs(), descending=True, stable=True)[:MOST_LINKS].sort().values
    scores = graph.scores()
    return {
        "prompt": graph.info.prompt,
        "tokens": list(graph.info.tokens),
        "model": graph.info.model,
        "dictionary": graph.info.dictionary,
        "n_layers": graph.info.n_layers,
        "exact": graph.info.exact,
        "targets": [
            {"name": name, "probability": round(p, 6)}
            for name, p in zip(graph.info.target_names, graph.info.target_probabilities, strict=True)
        ],
        "story": [sentence(shown, path) for path in strongest_paths(shown, 3)],
        "scores": {
            "replacement": round(scores.replacement, 4),
            "completeness": round(scores.completeness, 4),
            "coverage": round(graph.coverage, 4),
        },
        "features_shown": int(shown.is_kind("feature").sum()),
        "features_traced": int(graph.is_kind("feature").sum()),
        "features_active": graph.info.n_active,
        "nodes": [_node(shown, i) for i in range(len(shown))],
        "links": [
            [s, t, float(f"{w:.4g}"), float(f"{r:.4g}")]
            for s, t, w, r in zip(
                edges.source[kept].tolist(),
                edges.target[kept].tolist(),
                edges.weight[kept].tolist(),
                share[kept].tolist(),
                strict=True,
            )
        ],
        "links_hidden": len(edges) - len(kept),
    }


def _node(graph: AttributionGraph, index: int) -> dict[str, Any]:
    nodes = graph._nodes
    node = {
        "id": graph.node_ids[index],
        "kind": KINDS[int(nodes.kind[index])],
        "layer": int(nodes.layer[index]),
        "position": int(nodes.position[index]),
        "feature": int(nodes.feature[index]),
        "activation": float(f"{float(nodes.activation[index]):.4g}"),
        "influence": float(f"{float(graph.influence[index]):.4g}"),
        "label": graph.label(index),
    }
    if index in graph.labels:
        label = graph.labels[index]
        node |= {
            "promotes": list(label.promotes),
            "suppresses": list(label.suppresses),
            "reads": list(label.reads),
            "origin": label.origin,
        }
    return node
