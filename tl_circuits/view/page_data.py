"""What the page gets: the story, the nodes as columns, and the strongest links as packed numbers."""

import base64
import gzip
import json
import math
from collections.abc import Container
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from tl_circuits.graph.carried import answer_scale, input_mass
from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.graph.kinds import Kind
from tl_circuits.graph.nodes import AGAINST_OTHERS, Example, Label
from tl_circuits.graph.page_limits import LEVELS, page_graph
from tl_circuits.graph.scores import input_shares
from tl_circuits.view.story import Story, carried_line, story_of, too_little

MOST_LINKS = 60_000
MOST_CARDS = 600  # features whose promoted, suppressed and read tokens travel with the page
MOST_EXAMPLES = 150  # of these, with the texts that activate them most
EXAMPLE_TOKENS = 32
TOKEN_LENGTH = 60  # characters of one token of an example


def page_data(graph: AttributionGraph, ablations: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """Everything that the page shows, as JSON values. ``links`` is a base64 text (:func:`_packed`).

    At most :data:`MOST_LINKS` links are included, those with the most influence. ``links_traced`` says how many the
    graph has, and ``links_share`` which share of the influence the included ones carry.
    """
    shown = page_graph(graph)
    stories = [story_of(shown, boxes) for boxes in LEVELS]
    drawn = sorted({i for story in stories for unit in story.units for i in unit.members})
    kept, share = _strongest_links(shown, drawn)
    targets = [unit.members[0] for unit in stories[1].units if unit.kind == "target"]
    scores, info = graph.scores(), graph.info
    return {
        "hash": graph.fingerprint,
        "earlier_hash": graph.earlier_fingerprint,  # under which pages of earlier versions kept notes in the browser
        "prompt": info.prompt,
        "tokens": list(info.tokens),
        "compared_with": list(info.compared_with),
        "against_others": AGAINST_OTHERS,
        "model": info.model,
        "dictionary": info.dictionary,
        "n_layers": info.n_layers,
        "exact": info.exact,
        "targets": [
            {"name": name, "probability": round(p, 6)}
            for name, p in zip(info.target_names, info.target_probabilities, strict=True)
        ],
        "story": {
            "headline": stories[1].headline,
            "reads": info.reads,
            "too_little": too_little(stories[1], graph),
            "targets": targets,
            "weights": [round(float(shown._nodes.weight[i]), 6) for i in targets],
            "scales": [float(f"{answer_scale(shown, i):.5g}") for i in targets],
        },
        "levels": _levels(stories, shown),
        "words": _words(graph),
        "weights": [
            [i, round(float(shown._nodes.weight[i]), 9)] for i in (shown._nodes.weight > 0).nonzero()[:, 0].tolist()
        ],
        "scores": {
            "replacement": round(scores.replacement, 4),
            "completeness": round(scores.completeness, 4),
            "coverage": round(graph.coverage, 4),
        },
        "features_shown": int(shown.is_kind("feature").sum()),
        "features_traced": int(graph.is_kind("feature").sum()),
        "features_active": info.n_active,
        "unlabelled": int(graph.is_kind("feature").sum())
        - sum(1 for i in graph.labels if graph._nodes.kind[i] == Kind.FEATURE),
        "nodes": _nodes(shown, drawn),
        "links": _packed(shown, kept),
        "links_traced": len(graph._edges),
        "links_share": round(share, 4),
        "notes": {
            "groups": [[label, *ids] for label, ids in graph.groups],
            "pins": list(graph.pins),
            "names": dict(graph.notes.names),
            "text": graph.notes.text,
        },
        "ablations": ablations or [],
        **attention_data(shown),
    }


def attention_data(shown: AttributionGraph) -> dict[str, Any]:
    """Why heads look: ``heads`` are the graph's head stories; ``qk`` is what another program's file says of nodes."""
    known = {name: i for i, name in enumerate(shown.node_ids)}
    theirs = shown.source_file.get("nodes", {})
    results = {
        str(known[i]): rest["qk_tracing_results"]
        for i, rest in theirs.items()
        if i in known and "qk_tracing_results" in rest
    }
    return {"heads": [story_on_page(story, known) for story in shown.head_stories], "qk": results}


def story_on_page(story: dict[str, Any], known: Container[str]) -> dict[str, Any]:
    """A head story with numbers of five digits, and with labels only for ids that the page does not know itself."""
    made = _rounded(story)
    return made | {"labels": {name: label for name, label in made["labels"].items() if name not in known}}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def naming_data(graph: AttributionGraph) -> dict[str, Any]:
    """The parts of :func:`page_data` that depend on labels, for labels that come later than the picture."""
    shown = page_graph(graph)
    stories = [story_of(shown, boxes) for boxes in LEVELS]
    drawn = sorted({i for story in stories for unit in story.units for i in unit.members})
    nodes = _nodes(shown, drawn)
    return {"levels": _levels(stories, shown), "label": nodes["label"], "cards": nodes["cards"]}


def _words(graph: AttributionGraph) -> dict[str, list[Any]]:
    """What each token does to the answer, and its share, as columns."""
    frame = graph.words
    columns = {name: [float(f"{v:.4g}") for v in frame[name]] for name in ("effect", "share")}
    return {"position": frame.position.tolist()} | columns


def _levels(stories: list[Story], graph: AttributionGraph) -> list[dict[str, Any]]:
    return [_level(story, graph, usual=most == LEVELS[1]) for most, story in zip(LEVELS, stories, strict=True)]


def _level(story: Story, graph: AttributionGraph, usual: bool) -> dict[str, Any]:
    boxes = [{"label": u.name, "members": list(u.members)} for u in story.units if u.kind == "box"]
    return {
        "usual": usual,
        "boxes": boxes,
        "sentences": list(story.sentences),
        "ways": [[story.units[u].members[0] for u in way] for way in story.ways],
        "lump_error": round(story.lump_error, 4),
        "carried": {
            "line": carried_line(story, graph),
            "share": finite(story.carried.share),
            "value": finite(story.carried.value),
        },
    }


def finite(value: float) -> float | None:
    """A number rounded for JSON, which has no NaN or infinity; None for these."""
    return round(value, 4) if math.isfinite(value) else None


def _strongest_links(graph: AttributionGraph, drawn_nodes: list[int]) -> tuple[Int[Tensor, " kept"], float]:
    """The links to include, and the share of the influence that they carry.

    First come links between things that the stories draw and the five strongest inputs of each node, then all others;
    each by influence.
    """
    edges = graph._edges
    flow = input_shares(edges, len(graph)) * graph.influence[edges.target]
    drawn = torch.zeros(len(graph), dtype=torch.bool)
    drawn[drawn_nodes] = True
    order = torch.argsort(flow, descending=True, stable=True)
    target = edges.target[order]
    # The rank of each link among its target's: strongest first within each target.
    by_target = torch.argsort(target, stable=True)
    counts = torch.bincount(target, minlength=len(graph))
    starts = counts.cumsum(0) - counts
    rank = torch.empty_like(order)
    rank[by_target] = torch.arange(len(order)) - starts[target[by_target]]
    first = (drawn[edges.source[order]] & drawn[target]) | (rank < 5)
    kept = order[torch.argsort((~first).long(), stable=True)[:MOST_LINKS]].sort().values
    return kept, float(flow[kept].sum() / flow.sum().clamp_min(1e-30))


def _nodes(graph: AttributionGraph, drawn: list[int]) -> dict[str, Any]:
    """The nodes as columns. ``mass`` is the sum of a node's absolute inputs, also of those that the page does not get;
    a link divided by it is a share.
    """
    nodes = graph._nodes
    ranked = torch.argsort(graph.influence, descending=True, stable=True)[:MOST_CARDS].tolist()
    carded = sorted({*ranked, *drawn} & graph.labels.keys())
    exemplified = set([i for i in ranked if i in graph.labels and graph.labels[i].examples][:MOST_EXAMPLES])
    several = {} if nodes.site is None else {"site": list(graph.sites), "depth": nodes.depth.tolist()}
    return several | {
        "kind": nodes.kind.tolist(),
        "layer": nodes.layer.tolist(),
        "position": nodes.position.tolist(),
        "feature": nodes.feature.tolist(),
        "activation": _short(nodes.activation),
        "value": _short(nodes.value),
        "baseline": None if nodes.baseline is None else _short(nodes.baseline),
        "total_effect": None if nodes.total_effect is None else _short(nodes.total_effect),
        "influence": _short(graph.influence),
        "mass": _short(input_mass(graph)),
        "label": [graph.label(i) for i in range(len(graph))],
        "cards": {
            str(i): [
                list(label.promotes),
                list(label.suppresses),
                list(label.reads),
                label.origin,
                *_examples(label, i in exemplified),
            ]
            for i, label in ((i, graph.labels[i]) for i in carded)
        },
    }


def _examples(label: Label, wanted: bool) -> list[list[list[Any]]]:
    """The label's examples, each as tokens and activations around its strongest token; none if they are not wanted."""
    if not wanted:
        return []
    return [[_cut(example) for example in label.examples]]


def _cut(example: Example) -> list[list[Any]]:
    top = max(range(len(example.activations)), key=lambda i: abs(example.activations[i]), default=0)
    start = max(0, min(top - EXAMPLE_TOKENS // 2, len(example.tokens) - EXAMPLE_TOKENS))
    part = slice(start, start + EXAMPLE_TOKENS)
    tokens = [t if len(t) <= TOKEN_LENGTH else t[:TOKEN_LENGTH] + "…" for t in example.tokens[part]]
    return [tokens, [float(f"{v:.3g}") if math.isfinite(v) else 0.0 for v in example.activations[part]]]


def _short(values: Tensor) -> list[float | None]:
    return [None if v != v else float(f"{v:.5g}") for v in values.tolist()]


def _packed(graph: AttributionGraph, kept: Int[Tensor, " kept"]) -> str:
    """Sources, targets (uint16; uint32 above 65,536 nodes) and weights (float32): little-endian, gzip, base64."""
    index = "<u2" if len(graph) <= 65_536 else "<u4"
    edges = graph._edges[kept]
    parts = [edges.source.numpy().astype(index), edges.target.numpy().astype(index), edges.weight.numpy().astype("<f4")]
    raw = b"".join(np.ascontiguousarray(part).tobytes() for part in parts)
    return base64.b64encode(gzip.compress(raw, 6, mtime=0)).decode()


def packed_json(data: dict[str, Any]) -> str:
    """``data`` as JSON, gzip, base64. The page's script unpacks it."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode("utf-8", "replace"), 6, mtime=0)).decode()
