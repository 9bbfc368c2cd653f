"""Write graphs as the JSON that Neuronpedia's and circuit-tracer's pages read, as a stream."""

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tl_circuits.dictionaries.source_sets import known_source_set, model_id
from tl_circuits.errors import ExportError
from tl_circuits.feature_labels.feature_codes import cantor_pair
from tl_circuits.feature_labels.feature_files import FeatureFiles
from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.graph.kinds import KINDS, NUMBERED, Kind
from tl_circuits.graph.nodes import OPTIONAL
from tl_circuits.graph.one_a_layer import require_one_a_layer
from tl_circuits.neuronpedia.ids import FEATURE_TYPES, node_id
from tl_circuits.neuronpedia.qk_results import pruned_contributors, tracing_results
from tl_circuits.neuronpedia.read_notes import translated
from tl_circuits.support.files import atomic_file

VIRTUAL_TOKEN = 10**9
"""Vocabulary ids from here on stand for targets that are no single token (differences, directions)."""

STORED_INFO = ("model", "dictionary", "n_layers", "exact", "engine", "max_nodes", "n_active", "version")
# files from before these lack them
_ALSO_STORED = (
    "recurring",
    "sample",
    "prompt_exact",
    "skip_positions",
    "prepended",
    "select",
    "baseline",
    "compared_with",
)
_LINKS_AT_ONCE = 20_000


@dataclass(frozen=True)
class ExportOptions:
    """What a file says besides the graph.

    Attributes:
        target: whose page it is for, ``"neuronpedia"`` or ``"circuit-tracer"``.
        slug: the graph's name; None to make one from the path or the prompt.
        source_set: Neuronpedia's name of the dictionary.
        scan: Neuronpedia's model id, or the place from which circuit-tracer's page takes features.
        description: shown with the graph.
        creator: shown with the graph.
        source_set_exists: whether Neuronpedia is known to have ``source_set``.
    """

    target: str = "neuronpedia"
    slug: str | None = None
    source_set: str | None = None
    scan: str | None = None
    description: str = ""
    creator: str = ""
    source_set_exists: bool = False


def export(graph: AttributionGraph, path: Path, overwrite: bool, features: Path | None, **options: Any) -> Path:
    """Do what :meth:`AttributionGraph.to_neuronpedia` says; ``options`` are those of :class:`ExportOptions`."""
    return write_json(graph, path, ExportOptions(**options), overwrite, features)


def write_json(
    graph: AttributionGraph, path: Path, options: ExportOptions, overwrite: bool, features: Path | None = None
) -> Path:
    """Write the graph for ``options.target``; if ``path`` is a folder, as ``<slug>.json`` inside it.

    For circuit-tracer, the graph is also entered into ``graph-metadata.json`` beside it, and the records of its
    features are copied from the folder ``features`` to ``features/<slug>``. Nothing is left half-written.

    Raises:
        ExportError: for slugs with illegal characters, and graphs that the page cannot show.
        OutputError: for files that exist or cannot be written.
    """
    if options.target not in ("neuronpedia", "circuit-tracer"):
        raise ExportError(f"target {options.target!r} is not 'neuronpedia' or 'circuit-tracer'.")
    slug = _slug(graph, path, options)
    path = path / f"{slug}.json" if path.is_dir() else path
    if options.target == "circuit-tracer" and path.name != f"{slug}.json":
        raise ExportError(f"circuit-tracer's page looks for {slug}.json, got {path.name}. Give a folder, or that name.")
    _require_showable(graph, options.target)
    if features is not None:
        if options.target != "circuit-tracer":
            raise ExportError(
                "Neuronpedia takes features from its own database; feature files are for target='circuit-tracer'."
            )
        options = replace(options, scan=options.scan or f"./graph_data/features/{slug}")
    metadata = _metadata(graph, slug, options)
    with atomic_file(path, overwrite) as file:
        for text in _pieces(graph, metadata, options.target):
            file.write(text.encode())
    if features is not None:
        FeatureFiles(features).write_loose(graph, path.parent / "features" / slug)
    if options.target == "circuit-tracer":
        enter_metadata(metadata, path.parent / "graph-metadata.json")
    return path


def enter_metadata(metadata: dict[str, Any], path: Path) -> None:
    """Put a graph into the list from which circuit-tracer's page chooses. It replaces an entry with the same slug."""
    graphs = []
    if path.is_file():
        try:
            graphs = [g for g in json.loads(path.read_bytes())["graphs"] if g.get("slug") != metadata["slug"]]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ExportError(f"{path} is not a list of graphs ({error}). Move it away and export again.") from error
    with atomic_file(path, overwrite=True) as file:
        file.write(_json({"graphs": [*graphs, metadata]}).encode())


def check_name(what: str, text: str) -> str:
    """``text``, if Neuronpedia takes it as a slug or model id.

    Raises:
        ExportError: if it does not; it names what is illegal.
    """
    illegal = sorted(set(re.sub(r"[A-Za-z0-9_.-]", "", text)))
    if illegal or not text:
        which = f"holds {' '.join(map(repr, illegal))}" if illegal else "is empty"
        raise ExportError(f"the {what} {text!r} {which}; only letters, digits, and _ . - are allowed.")
    return text


def escape_token(token: str) -> str:
    """A token as it can stand in the label of a logit. The readers cut labels at double quotes and at ``(p=``."""
    return token.replace('"', "\uff02").replace("(p=", "(p\uff1d")


def unescape_token(token: str) -> str:
    """The token in a text of :func:`escape_token`."""
    return token.replace("\uff02", '"').replace("(p\uff1d", "(p=")


def their_ids(graph: AttributionGraph) -> list[str]:
    """Each node's id in the file, in adjacency order. All differ.

    Raises:
        ExportError: for a graph in which some layer has several dictionaries.
    """
    require_one_a_layer(graph.info, "Neuronpedia's and circuit-tracer's files tell", ExportError)
    n, made = graph._nodes, []
    seen: set[str] = set()
    for kind, layer, feature, position in zip(
        *(c.tolist() for c in (n.kind, n.layer, n.feature, n.position)), strict=True
    ):
        text = node_id(KINDS[kind], layer, feature, position, graph.info.n_layers)
        while kind == Kind.LOGIT and (feature < 0 or text in seen):
            feature = VIRTUAL_TOKEN + len(seen)
            text = node_id("logit", layer, feature, position, graph.info.n_layers)
        seen.add(text)
        made.append(text)
    return made


def cumulative_influence(graph: AttributionGraph) -> list[float]:
    """For each node, the share of all influence that it and all more influential nodes carry: small is important."""
    reach = (graph.influence - graph._nodes.weight.double()).clamp_min(0)
    order = torch.argsort(reach, descending=True, stable=True)
    share = reach[order].cumsum(0) / reach.sum().clamp_min(1e-30)
    made = torch.zeros_like(reach)
    made[order] = share.clamp_max(1.0)
    return made.tolist()


def _slug(graph: AttributionGraph, path: Path, options: ExportOptions) -> str:
    if options.slug is not None:
        return check_name("slug", options.slug)
    before = graph.source_file.get("metadata", {}).get("slug") or graph.info.prompt
    text = before if path.is_dir() else path.name.removesuffix(".json")
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-.")[:60] or "graph"


def _require_showable(graph: AttributionGraph, target: str) -> None:
    require_one_a_layer(graph.info, "Neuronpedia's and circuit-tracer's files tell", ExportError)
    layered = ~(graph.is_kind("logit") | graph.is_kind("embedding"))
    highest = int(graph._nodes.layer[layered].max()) if layered.any() else -1
    if target == "neuronpedia" and highest < 1:
        what = "only nodes of layer 0" if highest == 0 else "no features or errors"
        raise ExportError(
            f"the graph has {what}, and Neuronpedia's page fails on such graphs. Prune less, or export it "
            "with target='circuit-tracer'."
        )
    if target == "circuit-tracer" and len(graph.info.tokens) == 1:
        raise ExportError(
            "the prompt is one token long, and circuit-tracer's page then drops every node (it takes them for "
            "features active nearly everywhere). Export it with target='neuronpedia', or look at to_html()."
        )


def _metadata(graph: AttributionGraph, slug: str, options: ExportOptions) -> dict[str, Any]:
    info, scores = graph.info, graph.scores()
    made: dict[str, Any] = dict(graph.source_file.get("metadata", {}))
    made |= {"slug": slug, "scan": _scan(graph, slug, options)}
    made |= {"prompt_tokens": list(info.tokens), "prompt": info.prompt, "schema_version": 1}
    made.setdefault("transcoder_list", [])
    made.setdefault("node_threshold", 1.0)
    made.setdefault("generation_settings", {"max_feature_nodes": info.max_nodes, "engine": info.engine})
    made |= {"replacement_score": scores.replacement, "completeness_score": scores.completeness}
    about = dict(made.get("info", {}))
    about.setdefault("generator", {"name": "tl_circuits", "version": info.version})  # of a file that was read, its own
    about |= {k: v for k, v in (("description", options.description), ("creator_name", options.creator)) if v}
    known = known_source_set(info.dictionary)
    details = dict(made.get("feature_details", {}))
    source_set = options.source_set or details.get("neuronpedia_source_set") or (known and known.name)
    if source_set and options.target == "neuronpedia":
        details["neuronpedia_source_set"] = source_set
        # The database reads this one, against a foreign key: only sets that exist may stand here.
        if options.source_set_exists or (known and known.name == source_set):
            about["neuronpedia_source_set"] = source_set
    made["info"] = about
    if details:
        made["feature_details"] = details
    made["tl_circuits"] = {
        "info": {name: getattr(info, name) for name in (*STORED_INFO, *_ALSO_STORED)}
        | {"model": _shareable(info.model)},
        "token_ids": list(info.token_ids),
        "target_names": list(info.target_names),
        "notes": asdict(graph.notes),
    }
    if graph.head_stories:
        made["tl_circuits"]["head_stories"] = graph.head_stories
    return made


def _shareable(model: str) -> str:
    """The model's name, without the folders of this computer."""
    return Path(model).name if Path(model).is_absolute() else model


def _scan(graph: AttributionGraph, slug: str, options: ExportOptions) -> str:
    before = graph.source_file.get("metadata", {}).get("scan", "")
    known = known_source_set(graph.info.dictionary)
    if options.target == "neuronpedia":
        legal = before if re.fullmatch(r"[A-Za-z0-9_.-]+", before) else ""
        scan = options.scan or legal or (known.model if known else model_id(graph.info.model))
        return check_name("model id", scan)
    own = graph.info.dictionary if "/" in graph.info.dictionary else f"./graph_data/features/{slug}"
    return options.scan or before or own


def _pieces(graph: AttributionGraph, metadata: dict[str, Any], target: str) -> Iterator[str]:
    ids = their_ids(graph)
    yield f'{{"metadata":{_json(metadata)},"qParams":{_json(_q_params(graph, ids, target))},"nodes":['
    comma = ""
    results = tracing_results(graph, dict(zip(graph.node_ids, ids, strict=True)))
    for node in _nodes(graph, ids, results):
        yield comma + _json(node)
        comma = ","
    yield '],"links":['
    quoted = [json.dumps(i, ensure_ascii=False) for i in ids]
    sources = [f'{{"source":{i},"target":' for i in quoted]
    edges, comma = graph._edges, ""
    for start in range(0, len(edges), _LINKS_AT_ONCE):
        part = edges[torch.arange(start, min(start + _LINKS_AT_ONCE, len(edges)))]
        weights = part.weight.numpy().astype(str).tolist()  # the shortest digits that give the same float32
        rows = zip(part.source.tolist(), part.target.tolist(), weights, strict=True)
        yield comma + ",".join([f'{sources[s]}{quoted[t]},"weight":{w}}}' for s, t, w in rows])
        comma = ","
    yield "]"
    only = graph.source_file.get("qk_only_nodes", {}) | pruned_contributors(results.values(), set(ids))
    yield f',"qk_only_nodes":{_json(only)}}}' if only else "}"


def _q_params(graph: AttributionGraph, ids: list[str], target: str) -> dict[str, Any]:
    their = dict(zip(graph.node_ids, ids, strict=True))
    members = [i for _, group in graph.groups for i in group]
    logits = graph.is_kind("logit").nonzero()[:, 0].tolist()
    made = {"linkType": "both", "clickedId": ids[logits[0]] if logits else "", "sg_pos": ""}
    made |= graph.source_file.get("qParams", {})
    made["pinnedIds"] = [their[i] for i in dict.fromkeys((*graph.pins, *members))]
    made["supernodes"] = [[label, *(their[i] for i in group)] for label, group in graph.groups]
    clerps = clerp_pairs(graph, target)
    made["clerps"] = json.dumps(clerps, ensure_ascii=False) if target == "circuit-tracer" else clerps
    return made


def clerp_pairs(graph: AttributionGraph, target: str) -> list[list[str]]:
    """A person's names for features, as pairs.

    They are by encoded feature for circuit-tracer, and by layer, code and position for Neuronpedia.
    """
    n = graph._nodes
    index = {name: i for i, name in enumerate(graph.node_ids)}
    pairs = []
    # circuit-tracer looks names up by number alone, and fails on a logit whose name it replaces.
    taken = {str(f) for f in n.feature[graph.is_kind("logit")].tolist()} | {
        str(p) for p in range(len(graph.info.tokens))
    }
    for name, text in graph.notes.names.items():
        i = index[name]
        kind, layer, position = int(n.kind[i]), int(n.layer[i]), int(n.position[i])
        if kind not in NUMBERED:
            continue
        code = cantor_pair(layer, int(n.feature[i]))
        if target == "neuronpedia":
            pairs.append([f"{layer}_{code}_{position}", text])
        elif str(code) not in taken:
            pairs.append([str(code), text])
    return pairs


def _nodes(graph: AttributionGraph, ids: list[str], qk_results: dict[str, Any]) -> Iterator[dict[str, Any]]:
    n, reach = graph._nodes, cumulative_influence(graph)
    extras = graph.source_file.get("nodes", {})
    columns = {name: getattr(n, name).tolist() for name in ("kind", "layer", "feature", "position")}
    activation, weight, value, bias, residue, mass = (
        np.char.mod("%.9g", getattr(n, name).numpy()).astype(float).tolist()
        for name in ("activation", "weight", "value", "bias", "residue", "residue_mass")
    )
    optional = {name: column.tolist() for name, column in n.columns().items() if name in OPTIONAL}
    n_logits = 0
    their = dict(zip(graph.node_ids, ids, strict=True))
    for i, ours in enumerate(graph.node_ids):
        kind, layer, feature, position = (columns[c][i] for c in ("kind", "layer", "feature", "position"))
        name = KINDS[kind]
        node: dict[str, Any] = {"node_id": their[ours], "feature": feature, "layer": str(layer), "ctx_idx": position}
        node |= {"feature_type": FEATURE_TYPES[name], "token_prob": 0.0, "is_target_logit": False}
        node |= {"run_idx": 0, "reverse_ctx_idx": 0, "jsNodeId": f"{their[ours].rsplit('_', 1)[0]}-0", "clerp": ""}
        node["influence"] = float(f"{reach[i]:.9g}")
        if kind in NUMBERED:
            node |= {
                "feature": cantor_pair(layer, feature),
                "activation": activation[i] if activation[i] == activation[i] else None,
            }
            node |= _label(graph, i)
        elif name == "embedding":
            node |= {"feature": position, "layer": "E", "jsNodeId": f"E_{feature}-{position}"}
        elif name == "logit":
            token = int(their[ours].split("_")[1])
            node |= {"feature": token, "layer": str(graph.info.n_layers + 1), "token_prob": weight[i]}
            node |= {"is_target_logit": n_logits == 0, "jsNodeId": f"L_{token}-{position}", "influence": None}
            node["clerp"] = f'Output "{escape_token(graph.info.target_names[n_logits])}" (p={weight[i]:.3f})'
            n_logits += 1
        elif name == "bias":
            node["feature"] = -1
        if value[i] == value[i]:
            node |= {"value": value[i], "bias": bias[i], "residue": residue[i], "residue_mass": mass[i]}
        node |= {name: float(f"{column[i]:.9g}") for name, column in optional.items()}
        if ours in graph.notes.names and name not in ("logit", "embedding"):
            node |= {"label_text": node["clerp"], "clerp": graph.notes.names[ours]}
        rest = dict(extras.get(ours, {}))
        if "qk_tracing_results" in rest:
            rest["qk_tracing_results"] = translated(rest["qk_tracing_results"], their)
        if ours in qk_results:
            rest["qk_tracing_results"] = qk_results[ours]
        yield node | rest


def _label(graph: AttributionGraph, index: int) -> dict[str, Any]:
    if index not in graph.labels:
        return {}
    label = graph.labels[index]
    made: dict[str, Any] = {"clerp": label.short, "label_origin": label.origin}
    lists = {"top_logit_effects": label.promotes, "bottom_logit_effects": label.suppresses}
    lists["top_embedding_effects"] = label.reads
    return made | {key: list(tokens) for key, tokens in lists.items() if tokens}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
