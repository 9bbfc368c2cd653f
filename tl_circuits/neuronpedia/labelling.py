"""Labels for a graph's features: from Neuronpedia, from your own feature files, or from the vocabulary."""

import logging
from dataclasses import replace
from pathlib import Path

from tl_circuits.dictionaries.references import SHORT_NAMES, parse_reference
from tl_circuits.dictionaries.source_sets import SourceSet, known_source_set, model_id
from tl_circuits.errors import NeuronpediaError
from tl_circuits.feature_labels.feature_files import FeatureFiles
from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.graph.one_a_layer import require_one_a_layer
from tl_circuits.hooks import Replacement
from tl_circuits.neuronpedia.cache import FeatureCache
from tl_circuits.neuronpedia.client import Client, default_server, find_key
from tl_circuits.neuronpedia.features import fetch_features, label_of
from tl_circuits.support.checked import checked

logger = logging.getLogger(__name__)


@checked
def add_labels(
    graph: AttributionGraph,
    source: str | Path = "neuronpedia",
    *,
    replacement: Replacement | None = None,
    model: str | None = None,
    source_set: str | None = None,
    offline: bool = False,
    server: str | None = None,
    key: str | None = None,
    timeout: float = 30.0,
    deadline: float = 60.0,
    progress: bool = False,
) -> AttributionGraph:
    """The same graph with labels on its features. A label that it has stays if the source has none.

    If the server is slow or fails, some features stay without a label; the call returns all the same, and a warning in
    the log says how many.

    Args:
        graph: the graph.
        source: ``"neuronpedia"``, ``"vocabulary"`` (needs ``replacement``), or a folder that ``tl-circuits dashboards``
            wrote.
        replacement: if given, features that still have no label get their vocabulary label.
        model: Neuronpedia's name of the model; taken from the graph if its dictionary is known.
        source_set: Neuronpedia's name of the dictionary; as ``model``.
        offline: use only what this computer remembers.
        server: another server than the public site.
        key: your key; see the Neuronpedia page of the documentation.
        timeout: seconds to wait for one answer.
        deadline: seconds that one question may take with its retries; after that, the rest stays without labels.
        progress: show a progress bar on stderr.

    Returns:
        A new graph. Each label's ``origin`` says where it comes from.

    Raises:
        NeuronpediaError: if the source set is not known, or none of the features is found and there is no
            ``replacement``.
        BelongingError: for feature files, or a ``replacement``, of another model or dictionary.
        GraphFileError: for a folder without feature files, or with damaged ones.
        ValueError: for ``"vocabulary"`` without ``replacement``.
        ImportError: if Neuronpedia is asked and requests is not installed; it names the extra.

    Examples:
        >>> labelled = tlc.add_labels(graph, "vocabulary", replacement=replacement)
        >>> len(labelled.labels)
        60
    """
    if source == "vocabulary":
        if replacement is None:
            raise ValueError("vocabulary labels need the model: give replacement=...")
        made = graph
    elif source == "neuronpedia":
        where = source_set_for(graph, model, source_set)
        address = server or default_server()
        client = None if offline else Client(address, find_key(key), timeout, deadline)
        made = _from_neuronpedia(graph, where, client, address, replacement is not None, progress)
    else:
        made = _from_files(graph, FeatureFiles(Path(source)))
    if replacement is None:
        return made
    from tl_circuits.feature_labels.vocabulary import label_features

    rest = [i for i in graph.is_kind("feature").nonzero()[:, 0].tolist() if i not in made.labels]
    return label_features(replacement, made, rest, progress) if rest else made


def source_set_for(graph: AttributionGraph, model: str | None, source_set: str | None) -> SourceSet:
    """Where on Neuronpedia a graph's features are.

    Raises:
        NeuronpediaError: if this is not known and has to be given.
    """
    require_one_a_layer(graph.info, "Neuronpedia tells", NeuronpediaError)
    metadata = graph.source_file.get("metadata", {})
    about = metadata.get("info") or {}
    said = str(about.get("transcoder_set") or "")  # most public files name their transcoders here
    if said in SHORT_NAMES:
        said = str(parse_reference(SHORT_NAMES[said].reference))
    known = known_source_set(graph.info.dictionary) or (known_source_set(said) if said else None)
    details = metadata.get("feature_details") or {}
    name = (
        source_set
        or details.get("neuronpedia_source_set")
        or about.get("neuronpedia_source_set")
        or (known.name if known else None)
    )
    if name is None:
        raise NeuronpediaError(
            f"where Neuronpedia has the features of {graph.info.dictionary!r} is not known. Give model=... and "
            "source_set=..., such as 'gemma-2-2b' and 'gemmascope-transcoder-16k'."
        )
    name = name.split("/")[-1]
    by_name = model or (known.model if known else None) or (metadata.get("scan") if details else None)
    return SourceSet(by_name or model_id(graph.info.model), name)


def _from_neuronpedia(
    graph: AttributionGraph, where: SourceSet, client: Client | None, server: str, has_fallback: bool, progress: bool
) -> AttributionGraph:
    n = graph._nodes
    indices = graph.is_kind("feature").nonzero()[:, 0].tolist()
    pairs = {i: (where.source(int(n.layer[i])), int(n.feature[i])) for i in indices}
    found = fetch_features(client, server, where.model, list(pairs.values()), FeatureCache(), progress)
    answered = [pairs[i] in found for i in indices]
    if answered and all(answered) and not any(found.values()):
        problem = (
            f"Neuronpedia has none of the graph's {len(indices)} features in {where.source(0)!r} and the like of "
            f"{where.model!r}. Are model and source set right?"
        )
        if not has_fallback:
            raise NeuronpediaError(problem)
        logger.warning("%s", problem)
    made = dict(graph.labels)
    for i, pair in pairs.items():
        feature = found.get(pair)
        label = label_of(feature) if feature is not None else None
        if label is not None:
            before = made.get(i)
            made[i] = replace(label, reads=before.reads) if before is not None else label
    return replace(graph, labels=made)


def _from_files(graph: AttributionGraph, files: FeatureFiles) -> AttributionGraph:
    files.require_of(graph)
    n, made = graph._nodes, dict(graph.labels)
    for i in graph.is_kind("feature").nonzero()[:, 0].tolist():
        label = files.label(int(n.layer[i]), int(n.feature[i]))
        if label is not None:
            made[i] = label
    return replace(graph, labels=made)
