"""Read features from Neuronpedia, in batches and through the cache, and make labels of them."""

import logging
from collections.abc import Sequence
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from tl_circuits.dictionaries.source_sets import LAYERS_OF_MODEL, SourceSet
from tl_circuits.errors import NeuronpediaError
from tl_circuits.feature_labels.feature_files import EXAMPLES_KEPT, TOKENS_KEPT, WINDOW
from tl_circuits.graph.nodes import Example, Label
from tl_circuits.neuronpedia.cache import FeatureCache
from tl_circuits.neuronpedia.client import Client, default_server, find_key
from tl_circuits.support.checked import checked

logger = logging.getLogger(__name__)

AT_ONCE = 128
_PREFERRED = ("np_max-act-logits", "np_max-act")


def fetch_features(
    client: Client | None,
    server: str,
    model: str,
    wanted: Sequence[tuple[str, int]],
    cache: FeatureCache,
    progress: bool = False,
) -> dict[tuple[str, int], dict[str, Any] | None]:
    """Features by ``(source, index)``; None for those that the server does not have.

    ``client`` is asked for what ``cache`` does not know; without a client only the cache is used. If the server fails,
    what is known so far is returned, and the log has a warning.
    """
    known = cache.read(server, model, wanted, any_age=client is None)
    missing = [pair for pair in dict.fromkeys(wanted) if pair not in known]
    if client is None or not missing:
        return known
    with tqdm(total=len(missing), desc="Neuronpedia", unit="feature", disable=not progress) as bar:
        for start in range(0, len(missing), AT_ONCE):
            part = missing[start : start + AT_ONCE]
            try:
                fresh = _ask(client, model, part)
            except NeuronpediaError as error:
                logger.warning("%d of %d features stay without a label: %s", len(missing) - start, len(wanted), error)
                break
            cache.write(server, model, fresh)
            known |= fresh
            bar.update(len(part))
    return known


def _ask(client: Client, model: str, part: list[tuple[str, int]]) -> dict[tuple[str, int], dict[str, Any] | None]:
    body = [{"modelId": model, "layer": s, "index": i, "maxActsToReturn": EXAMPLES_KEPT} for s, i in part]
    answer = client.post("/api/features", body)
    if not isinstance(answer, list):
        raise NeuronpediaError(f"POST /api/features: the answer is {type(answer).__name__}, expected a list.")
    found: dict[tuple[str, int], dict[str, Any] | None] = dict.fromkeys(part)  # the unknown are silently left out
    for row in answer:
        try:
            pair = (str(row["layer"]), int(row["index"]))
        except (KeyError, TypeError, ValueError) as error:
            raise NeuronpediaError(f"POST /api/features: a feature without layer and index ({error}).") from error
        if pair in found:
            found[pair] = _trimmed(row)
    return found


def _trimmed(row: dict[str, Any]) -> dict[str, Any]:
    """The part of a feature that labels and cards use."""
    explanations = [
        {"description": e["description"], "typeName": e.get("typeName")}
        for e in row.get("explanations") or ()
        if isinstance(e, dict) and e.get("description")
    ]
    kept = {name: row.get(name) for name in ("frac_nonzero", "maxActApprox")}
    kept |= {name: list(row.get(name) or ())[:10] for name in ("pos_str", "neg_str")}
    return kept | {
        "explanations": explanations,
        "activations": [_window(a) for a in (row.get("activations") or ())[:EXAMPLES_KEPT]],
    }


def _window(activation: dict[str, Any]) -> dict[str, Any]:
    tokens, values = list(activation.get("tokens") or ()), list(activation.get("values") or ())
    top = max(range(len(values)), key=values.__getitem__, default=0)
    cut = slice(max(0, top - WINDOW), top + WINDOW)
    return {"tokens": tokens[cut], "values": values[cut]}


def label_of(feature: dict[str, Any]) -> Label | None:
    """The label of a feature: Neuronpedia's preferred explanation, else its first explanation, else its top tokens."""
    described = feature["explanations"]
    chosen = next((e for e in described if e["typeName"] in _PREFERRED), described[0] if described else None)
    promotes, suppresses = (tuple(feature[name][:TOKENS_KEPT]) for name in ("pos_str", "neg_str"))
    short = chosen["description"].strip() if chosen else ""
    if not short and promotes:
        short = "say " + ", ".join(f"“{token}”" for token in promotes[:2])
    if not short:
        return None
    examples = tuple(
        Example(tuple(map(str, a["tokens"])), tuple(map(float, a["values"])))
        for a in feature["activations"]
        if a["tokens"]
    )
    return Label(short, promotes, suppresses, (), "neuronpedia", examples)


@checked
def search_features(
    text: str,
    model: str,
    source_set: str,
    *,
    layers: Sequence[int] | None = None,
    limit: int = 20,
    server: str | None = None,
    key: str | None = None,
) -> pd.DataFrame:
    """Search Neuronpedia for features whose explanation is close in meaning to a text. This needs the network.

    Args:
        text: what to search for, at least three letters.
        model: Neuronpedia's name of the model.
        source_set: Neuronpedia's name of the dictionary.
        layers: which layers to search; by default all, if the model is known.
        limit: the most features to return.
        server: another server than the public site.
        key: your key; see the Neuronpedia page of the documentation.

    Returns:
        A frame ``layer feature label similarity``, most similar first.

    Raises:
        ValueError: for a shorter text, or if the layers are not known and not given.
        NeuronpediaError: if Neuronpedia does not answer, or does not know the model or the dictionary.

    Examples:
        >>> found = tlc.search_features("cities", "gemma-2-2b", "gemmascope-transcoder-16k")        # doctest: +SKIP
    """
    if len(text.strip()) < 3:
        raise ValueError(f"Neuronpedia searches for at least three letters, got {text!r}.")
    if layers is None:
        if model not in LAYERS_OF_MODEL:
            raise ValueError(f"how many layers {model!r} has is not known; give layers=range(...).")
        layers = range(LAYERS_OF_MODEL[model])
    client = Client(server or default_server(), find_key(key))
    sources = [SourceSet(model, source_set).source(layer) for layer in layers]
    rows: list[dict[str, Any]] = []
    offset = 0
    while len(rows) < limit:
        body = {"modelId": model, "layers": sources, "query": text, "offset": offset}
        answer = client.post("/api/explanation/search", body)
        if not isinstance(answer, dict) or not isinstance(answer.get("results"), list):
            raise NeuronpediaError("POST /api/explanation/search: the answer has no results.")
        rows += [_hit(row) for row in answer["results"]]
        if not answer.get("hasMore") or not answer["results"]:
            break
        offset = int(answer.get("nextOffset") or offset + len(answer["results"]))
    return pd.DataFrame(rows[:limit], columns=["layer", "feature", "label", "similarity"])


def _hit(row: dict[str, Any]) -> dict[str, Any]:
    try:
        layer = int(str(row["layer"]).split("-", 1)[0])
        similarity = float(row.get("cosine_similarity") or float("nan"))
        return {"layer": layer, "feature": int(row["index"]), "label": row["description"], "similarity": similarity}
    except (KeyError, TypeError, ValueError) as error:
        raise NeuronpediaError(f"POST /api/explanation/search: a result that cannot be read ({error}).") from error
