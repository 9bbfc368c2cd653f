"""Features read from Neuronpedia: in batches, through the cache, as labels."""

import logging
from collections.abc import Sequence
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from tl_circuits.dictionaries.source_sets import LAYERS_OF_MODEL, SourceSet
from tl_circuits.errors import NeuronpediaError
from tl_circuits.graph.nodes import Example, Label
from tl_circuits.neuronpedia.cache import FeatureCache
from tl_circuits.neuronpedia.client import Client, default_server, find_key
from tl_circuits.support.checked import checked

logger = logging.getLogger(__name__)

AT_ONCE = 128
EXAMPLES = 3
WINDOW = 24
TOKENS_KEPT = 5
_PREFERRED = ("np_max-act-logits", "np_max-act")


def fetch_features(
    client: Client | None,
    server: str,
    model: str,
    wanted: Sequence[tuple[str, int]],
    cache: FeatureCache,
    progress: bool = False,
) -> dict[tuple[str, int], dict[str, Any] | None]:
    """Features by ``(source, index)``, None for those the server does not have.

    Asks ``client`` for what ``cache`` does not know; without a client, takes what the cache has.
    When the server fails, what is known so far is returned, with a warning in the log.
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
    body = [{"modelId": model, "layer": s, "index": i, "maxActsToReturn": EXAMPLES} for s, i in part]
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
    """What labels and cards use of a feature."""
    explanations = [
        {"description": e["description"], "typeName": e.get("typeName")}
        for e in row.get("explanations") or ()
        if isinstance(e, dict) and e.get("description")
    ]
    kept = {name: row.get(name) for name in ("frac_nonzero", "maxActApprox")}
    kept |= {name: list(row.get(name) or ())[:10] for name in ("pos_str", "neg_str")}
    return kept | {"explanations": explanations, "activations": [_window(a) for a in (row.get("activations") or ())[:EXAMPLES]]}


def _window(activation: dict[str, Any]) -> dict[str, Any]:
    tokens, values = list(activation.get("tokens") or ()), list(activation.get("values") or ())
    top = max(range(len(values)), key=values.__getitem__, default=0)
    cut = slice(max(0, top - WINDOW), top + WINDOW)
    return {"tokens": tokens[cut], "values": values[cut]}


def label_of(feature: dict[str, Any]) -> Label | None:
    """A feature's label: Neuronpedia's preferred explanation, else its first, else its top tokens."""
    described = feature["explanations"]
    chosen = next((e for e in described if e["typeName"] in _PREFERRED), described[0] if described else None)
    promotes, suppresses = (tuple(feature[name][:TOKENS_KEPT]) for name in ("pos_str", "neg_str"))
    short = chosen["description"].strip() if chosen else ""
    if not short and promotes:
        short = "say " + ", ".join(f"“{token}”" for token in promotes[:2])
    if not short:
        return None
    examples = tuple(
        Example(tuple(map(str, a["tokens"])), tuple(map(float, a["values"]))) for a in feature["activations"] if a["tokens"]
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
    """Features whose explanation is near ``text`` in meaning: layer, feature, label, similarity.

    ``model`` and ``source_set`` by Neuronpedia's names; ``layers``: which to search, all by default
    where the model is known. Raises ValueError for texts under three letters and unknown layers,
    NeuronpediaError when Neuronpedia does not answer or does not know them.
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
