"""Put a graph on Neuronpedia: checked first, then sent."""

import json
import logging
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

from tl_circuits.dictionaries.source_sets import SourceSet
from tl_circuits.errors import ExportError, NeuronpediaError
from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.neuronpedia.client import Client, compressed, default_server, find_key
from tl_circuits.neuronpedia.export import ExportOptions, check_name, write_json
from tl_circuits.support.extras import how_to_install

logger = logging.getLogger(__name__)

SMALLEST, LARGEST = 1024, 100 * 1024 * 1024


def upload_graph(
    graph: AttributionGraph,
    slug: str,
    *,
    model: str | None = None,
    source_set: str | None = None,
    description: str = "",
    creator: str = "",
    key: str | None = None,
    server: str | None = None,
) -> str:
    """Put the graph on Neuronpedia as ``slug``. A graph of yours under that slug is replaced.

    Slug, size, JSON schema and, if given, the source set are checked before anything is sent.

    Args:
        graph: the graph.
        slug: the graph's name there.
        model: Neuronpedia's name of the model.
        source_set: Neuronpedia's name of the dictionary.
        description: shown with the graph.
        creator: your name, shown with the graph.
        key: your key; else ``NEURONPEDIA_API_KEY``, else the keyring's entry ``neuronpedia``/``api-key``.
        server: another server than the public site.

    Returns:
        The address of the graph's page.

    Raises:
        ExportError: for what the site would not take.
        NeuronpediaError: if the site refuses or cannot be reached.
    """
    check_name("slug", slug)
    key = find_key(key)
    if not key:
        raise NeuronpediaError(
            "uploading needs a key: set NEURONPEDIA_API_KEY, or give key=... (your account's settings on "
            "neuronpedia.org show it)."
        )
    client = Client(server or default_server(), key)
    exists = False
    if source_set is not None:
        _require_source_set(graph, client, model, source_set)
        exists = True
    options = ExportOptions("neuronpedia", slug, source_set, model, description, creator, exists)
    with tempfile.TemporaryDirectory() as folder:
        data = write_json(graph, Path(folder) / "graph.json", options, overwrite=False).read_bytes()
    content = check_upload(data)
    return _send(client, slug, content["metadata"]["scan"], data)


def check_upload(data: bytes) -> dict[str, Any]:
    """The parsed file.

    Raises:
        ExportError: if it is too large, or does not fit the site's schema.
    """
    if len(data) > LARGEST:
        raise ExportError(
            f"the file is {len(data) / 2**20:.0f} MB, Neuronpedia takes {LARGEST / 2**20:.0f} MB. Keep less: "
            "graph.prune(node_threshold=0.6)."
        )
    try:
        import fastjsonschema
    except ImportError as error:
        raise ImportError(f"uploading needs fastjsonschema. Run: {how_to_install('neuronpedia')}") from error
    schema = json.loads(files("tl_circuits.neuronpedia").joinpath("graph-schema.json").read_text(encoding="utf-8"))
    content = json.loads(data)
    try:
        fastjsonschema.compile(schema)(content)
    except fastjsonschema.JsonSchemaException as error:
        raise ExportError(f"the graph does not fit Neuronpedia's schema: {error}.") from error
    return content


def _require_source_set(graph: AttributionGraph, client: Client, model: str | None, source_set: str) -> None:
    from tl_circuits.neuronpedia.labelling import source_set_for

    features = graph.is_kind("feature").nonzero()[:, 0].tolist()
    if not features:
        return
    where: SourceSet = source_set_for(graph, model, source_set)
    layer, index = int(graph._nodes.layer[features[0]]), int(graph._nodes.feature[features[0]])
    if client.get(f"/api/feature/{where.model}/{where.source(layer)}/{index}") is None:
        raise NeuronpediaError(
            f"Neuronpedia has no feature {index} in {where.source(layer)!r} of {where.model!r}. Are model and source "
            "set right? Nothing was sent."
        )


def _send(client: Client, slug: str, model: str, data: bytes) -> str:
    # The site answers 500 to less than 1,024 bytes. JSON may end in spaces, so fill it up.
    packed = compressed(data)
    body = packed if len(packed) >= SMALLEST else data.ljust(SMALLEST)
    signed = client.post("/api/graph/signed-put", {"filename": f"{slug}.json", "contentLength": len(body)})
    if not isinstance(signed, dict) or not signed.get("url") or not signed.get("putRequestId"):
        raise NeuronpediaError("POST /api/graph/signed-put: the answer holds no place to put the file.")
    client.put(signed["url"], body)
    try:
        saved = client.post("/api/graph/save-to-db", {"putRequestId": signed["putRequestId"]})
    except NeuronpediaError as error:
        if "ERR_MODEL_DOES_NOT_EXIST" in str(error):
            raise NeuronpediaError(f"Neuronpedia has no model {model!r}. Give its name there: model=...") from error
        raise
    if not isinstance(saved, dict) or not saved.get("url"):
        raise NeuronpediaError("POST /api/graph/save-to-db: the answer holds no address.")
    logger.info("uploaded %s", saved["url"])
    return str(saved["url"])
