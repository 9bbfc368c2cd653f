"""Read graphs from the JSON of Neuronpedia, circuit-tracer, Anthropic's viewer and llamascopium."""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from tl_circuits.dictionaries.source_sets import LAYERS_OF_MODEL
from tl_circuits.errors import GraphFileError
from tl_circuits.feature_labels.feature_codes import cantor_unpair, feature_of_code
from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.graph.kinds import NUMBERED, Kind
from tl_circuits.graph.nodes import OPTIONAL, GraphInfo, Label, Nodes, read_baselines
from tl_circuits.graph.storage import read_sample
from tl_circuits.neuronpedia.export import STORED_INFO, unescape_token
from tl_circuits.neuronpedia.ids import KIND_OF, parse_node_id
from tl_circuits.neuronpedia.read_links import read_links
from tl_circuits.neuronpedia.read_notes import notes_from_params, translated
from tl_circuits.support.reading import MOST_NODES, quoted

# What our tables or the export itself say; everything else a node carries is kept as it is.
_NODE_KEYS = {
    "node_id",
    "jsNodeId",
    "feature",
    "layer",
    "ctx_idx",
    "feature_type",
    "token_prob",
    "is_target_logit",
    "run_idx",
    "reverse_ctx_idx",
    "clerp",
    "activation",
    "value",
    "bias",
    "residue",
    "residue_mass",
    *OPTIONAL,
    "label_origin",
    "label_text",
    "top_logit_effects",
    "bottom_logit_effects",
    "top_embedding_effects",
    "token",
}
_METADATA_KEYS = {
    "tl_circuits", "prompt", "prompt_tokens", "schema_version", "replacement_score", "completeness_score",
}  # fmt: skip
_METADATA_TYPES = {
    "scan": str,
    "slug": str,
    "prompt": str,
    "prompt_tokens": list,
    "info": dict,
    "feature_details": dict,
    "transcoder_list": list,
    "tl_circuits": dict,
}


@dataclass(frozen=True)
class _Node:
    """One node of a file."""

    kind: int
    layer: int
    position: int
    feature: int
    raw: dict[str, Any]


def graph_from_json(content: Any, where: str) -> AttributionGraph:
    """The graph in parsed JSON; ``where`` names the file in messages.

    Raises:
        GraphFileError: for missing keys, unknown kinds of nodes, ids used twice, links to missing nodes, texts in place
            of numbers, and cycles. It says at which node or link.
    """
    content = content_of(content, where)
    metadata, raws = content["metadata"], content["nodes"]
    doubled = "scan" not in metadata and "qParams" not in content  # llamascopium: attention 2L, MLP 2L+1
    nodes = [_node(raw, i, where, metadata, doubled) for i, raw in enumerate(raws)]
    order = sorted(range(len(nodes)), key=lambda i: nodes[i].kind)  # stable: the file's order within a kind
    edges = read_links(content["links"], [n.raw["node_id"] for n in nodes], [n.kind for n in nodes],
                       [n.layer for n in nodes], order, where)  # fmt: skip
    nodes = [nodes[i] for i in order]
    info = _info(metadata, nodes, doubled)
    table = _table(nodes, info)
    graph = AttributionGraph(info, table, edges, _labels(nodes))
    if len(set(graph.node_ids)) < len(graph):
        counts = Counter(graph.node_ids)
        twice = next(i for i, name in enumerate(graph.node_ids) if counts[name] > 1)
        raise GraphFileError(f"{where}: node {nodes[twice].raw['node_id']!r} stands for what another node is already.")
    return _with_the_rest(graph, content, nodes)


def content_of(content: Any, where: str) -> dict[str, Any]:
    """The mapping with ``metadata``, ``nodes`` and ``links`` in parsed JSON, which some programs wrap in another one.

    Raises:
        GraphFileError: if a part is missing, or of the wrong type or size.
    """
    if isinstance(content, dict) and isinstance(content.get("graph_data"), dict):
        outer, content = content, content["graph_data"]
        content = {**content, "metadata": {"slug": str(outer.get("name") or ""), **content.get("metadata", {})}}
    for key in ("metadata", "nodes", "links"):
        if not isinstance(content, dict) or key not in content:
            raise GraphFileError(f"{where} is not an attribution graph: it has no {key!r}.")
    metadata, raws = content["metadata"], content["nodes"]
    for key in ("prompt_tokens", "prompt"):
        if not isinstance(metadata, dict) or key not in metadata:
            raise GraphFileError(f"{where} is not an attribution graph: its metadata has no {key!r}.")
    if not isinstance(raws, list) or not 0 < len(raws) <= MOST_NODES:
        given = len(raws) if isinstance(raws, list) else type(raws).__name__
        raise GraphFileError(f"{where}: 'nodes' must be a list of 1 to {MOST_NODES:,} nodes, got {given}.")
    for key, wanted in _METADATA_TYPES.items():
        if metadata.get(key) is not None and not isinstance(metadata[key], wanted):
            raise GraphFileError(
                f"{where}: its metadata has {key!r} of the type {type(metadata[key]).__name__}, expected "
                f"{wanted.__name__}."
            )
    return content


def _node(raw: Any, number: int, where: str, metadata: dict[str, Any], doubled: bool) -> _Node:
    for key in ("node_id", "feature_type", "layer", "ctx_idx"):
        if not isinstance(raw, dict) or key not in raw:
            raise GraphFileError(f"{where}: nodes[{number}] has no {key!r}.")
    if str(raw["feature_type"]) not in KIND_OF:
        known = ", ".join(map(repr, KIND_OF))
        raise GraphFileError(
            f"{where}: nodes[{number}] has the feature_type {quoted(raw['feature_type'])!r}; known are {known}."
        )
    kind = KIND_OF[str(raw["feature_type"])]
    try:
        layer = -1 if kind == "embedding" or raw["layer"] == "E" else int(raw["layer"])
        position = int(raw["ctx_idx"])
    except (TypeError, ValueError, OverflowError) as error:
        raise GraphFileError(
            f"{where}: nodes[{number}] has a layer or ctx_idx that is not a number ({error})."
        ) from error
    code, said = raw.get("feature"), parse_node_id(str(raw["node_id"]))
    if doubled and layer >= 0:
        layer //= 2
    if isinstance(code, dict):  # llamascopium puts the whole feature here
        code = code.get("feature_index", code.get("featureIndex", code.get("index")))
    if kind in ("error", "attention error"):
        feature = -1
    elif kind == "bias":
        feature = number
    elif kind == "embedding":
        feature = said.feature if said is not None else -1
    elif kind == "logit":
        feature = int(code) if isinstance(code, int) else (said.feature if said is not None else -1)
    else:
        found = _feature_index(code, layer, said, metadata, doubled)
        if found is None:
            raise GraphFileError(f"{where}: nodes[{number}] ({raw['node_id']!r}) does not say which feature it is.")
        feature = found
    return _Node(Kind.of(kind), layer, position, feature, raw)


def _feature_index(code: Any, layer: int, said: Any, metadata: dict[str, Any], doubled: bool) -> int | None:
    """The feature's index: unpaired if the file declares the pairing, else from the node's id or an older encoding."""
    if not isinstance(code, int) or code < 0:
        return said.feature if said is not None and said.feature >= 0 else None
    if doubled:
        return code
    if metadata.get("schema_version") and cantor_unpair(code)[0] == layer:
        return cantor_unpair(code)[1]
    if said is not None and said.feature >= 0 and said.layer == layer:
        return said.feature
    return feature_of_code(layer, code)


def _table(nodes: list[_Node], info: GraphInfo) -> Nodes:
    logit = Kind.LOGIT
    probabilities = iter(info.target_probabilities)
    raws = [n.raw for n in nodes]
    columns: dict[str, Any] = {
        name: torch.tensor([getattr(n, name) for n in nodes], dtype=torch.long)
        for name in ("kind", "layer", "position", "feature")
    }
    is_logit = columns["kind"] == logit
    columns["layer"][is_logit] = info.n_layers
    columns["feature"][is_logit & (columns["feature"] >= 10**9)] = -1
    columns["weight"] = torch.tensor([next(probabilities) if n.kind == logit else 0.0 for n in nodes])
    for name, default in (
        ("activation", 0.0),
        ("value", float("nan")),
        ("bias", 0.0),
        ("residue", 0.0),
        ("residue_mass", 0.0),
    ):
        found = [raw.get(name) for raw in raws]
        columns[name] = torch.tensor([default if x is None else float(x) for x in found], dtype=torch.float32)
    for name in OPTIONAL:
        if raws and all(isinstance(raw.get(name), (int, float)) for raw in raws):
            columns[name] = torch.tensor([float(raw[name]) for raw in raws], dtype=torch.float32)
    with_value = is_logit & ~columns["value"].isnan()
    columns["activation"][with_value] = columns["value"][with_value]
    return Nodes(**columns)


def _info(metadata: dict[str, Any], nodes: list[_Node], doubled: bool) -> GraphInfo:
    own = metadata.get("tl_circuits") or {}
    logits = [n for n in nodes if n.kind == Kind.LOGIT]
    names = [_logit_name(n) for n in logits]
    if "target_names" in own and len(own["target_names"]) == len(logits):
        names = list(own["target_names"])
    probabilities = tuple(_probability(n, len(logits)) for n in logits)
    ids = {n.position: n.feature for n in nodes if n.kind == Kind.EMBEDDING}
    tokens = tuple(map(str, metadata["prompt_tokens"]))
    token_ids = tuple(own.get("token_ids") or (ids.get(p, -1) for p in range(len(tokens))))
    facts: dict[str, Any] = {"prompt": str(metadata["prompt"]), "token_ids": token_ids, "tokens": tokens}
    facts |= {"target_names": tuple(names), "target_probabilities": probabilities}
    if set(STORED_INFO) <= set(own.get("info", {})):
        facts |= {name: own["info"][name] for name in STORED_INFO}
        return GraphInfo(**facts, **_said_by_us(own["info"]))
    scan = str(metadata.get("scan", "unknown"))
    generator = (metadata.get("info") or {}).get("generator") or {}
    by_features = [n for n in nodes if n.kind in NUMBERED]
    source_set = (metadata.get("feature_details") or {}).get("neuronpedia_source_set")
    return GraphInfo(
        **facts,
        model="unknown" if "/" in scan or metadata.get("transcoder_list") else scan,
        dictionary=source_set or str((metadata.get("info") or {}).get("transcoder_set") or scan),
        n_layers=_n_layers(metadata, nodes, logits, doubled),
        exact=False,
        engine=str(generator.get("name", "unknown")),
        max_nodes=len(by_features),
        n_active=len(by_features),
        version=str(generator.get("version", "")),
    )


def _said_by_us(info: dict[str, Any]) -> dict[str, Any]:
    """Facts that only our own export writes; older exports lack some of them."""
    skipped = info.get("skip_positions")
    return {
        "recurring": bool(info.get("recurring", False)),
        "sample": read_sample(info.get("sample", ())),
        "prompt_exact": bool(info.get("prompt_exact", False)),
        "skip_positions": None if skipped is None else tuple(int(p) for p in skipped),
        "prepended": str(info.get("prepended", "")),
        "select": str(info.get("select", "influence")),
        "baseline": read_baselines(info.get("baseline", ())),
        "compared_with": tuple(map(str, info.get("compared_with", ()))),
    }


def _n_layers(metadata: dict[str, Any], nodes: list[_Node], logits: list[_Node], doubled: bool) -> int:
    """The number of layers.

    circuit-tracer puts logits at layer n+1, llamascopium at n; a pruned graph may lack the last layers.
    """
    highest = max((n.layer for n in nodes if n.kind != Kind.LOGIT), default=-1) + 1
    if metadata.get("scan") in LAYERS_OF_MODEL:
        return max(highest, LAYERS_OF_MODEL[metadata["scan"]])
    at_n = doubled or any(re.match(r"\d+_(cro|lor|error)_", str(n.raw["node_id"])) for n in nodes)
    return max(highest, *(n.layer - (0 if at_n else 1) for n in logits), 1)


def _logit_name(node: _Node) -> str:
    if isinstance(node.raw.get("token"), str):
        return node.raw["token"]
    clerp = str(node.raw.get("clerp") or "")
    match = re.search(r"[\"'‘](.*)[\"'’] \(p=", clerp, re.DOTALL)
    return unescape_token(match[1]) if match else clerp or f"#{node.feature}"


def _probability(node: _Node, n_logits: int) -> float:
    if isinstance(node.raw.get("token_prob"), (int, float)):
        return float(node.raw["token_prob"])
    match = re.search(r"\(p=([\d.]+)\)", str(node.raw.get("clerp") or ""))
    return float(match[1]) if match else 1.0 / n_logits


def _labels(nodes: list[_Node]) -> dict[int, Label]:
    labels = {}
    for i, node in enumerate(nodes):
        if node.kind not in NUMBERED:
            continue
        raw = node.raw
        record = raw["feature"] if isinstance(raw.get("feature"), dict) else {}
        short = raw.get("label_text", raw.get("clerp")) or (record.get("interpretation") or {}).get("text") or ""
        lists = (raw.get(k) or () for k in ("top_logit_effects", "bottom_logit_effects", "top_embedding_effects"))
        promotes, suppresses, reads = (tuple(map(str, tokens)) for tokens in lists)
        if short or promotes or suppresses or reads:
            labels[i] = Label(str(short), promotes, suppresses, reads, str(raw.get("label_origin", "file")))
    return labels


def _with_the_rest(graph: AttributionGraph, content: dict[str, Any], nodes: list[_Node]) -> AttributionGraph:
    """The graph with notes, and with what the file says beyond our tables."""
    metadata, q_params = content["metadata"], content.get("qParams") or {}
    ours = dict(zip((n.raw["node_id"] for n in nodes), graph.node_ids, strict=True))
    by_js = {str(n.raw.get("jsNodeId")): name for n, name in zip(nodes, graph.node_ids, strict=True)}
    notes, kept = notes_from_params(
        graph, q_params, (metadata.get("tl_circuits") or {}).get("notes") or {}, by_js | ours
    )
    skipped = _NODE_KEYS | ({"influence"} if "tl_circuits" in metadata else set())
    known = set(graph.node_ids)
    said = (metadata.get("tl_circuits") or {}).get("head_stories") or ()
    stories = tuple(s for s in said if isinstance(s, dict) and {str(s.get("source")), str(s.get("target"))} <= known)
    explained = {story["target"] for story in stories}  # their results are made from the stories
    extras = {}
    for node, name in zip(nodes, graph.node_ids, strict=True):
        rest = {k: v for k, v in node.raw.items() if k not in skipped and v is not None}
        if name in explained:
            rest.pop("qk_tracing_results", None)
        if "qk_tracing_results" in rest:
            rest["qk_tracing_results"] = translated(rest["qk_tracing_results"], ours)
        if rest:
            extras[name] = rest
    source_file: dict[str, Any] = {"metadata": {k: v for k, v in metadata.items() if k not in _METADATA_KEYS}}
    source_file |= {"qParams": kept, "nodes": extras, "qk_only_nodes": content.get("qk_only_nodes") or {}}
    source_file = {key: value for key, value in source_file.items() if value}
    made = AttributionGraph(
        graph.info, graph._nodes, graph._edges, graph.labels, source_file=source_file, head_stories=stories
    )
    return made.with_notes(notes)
