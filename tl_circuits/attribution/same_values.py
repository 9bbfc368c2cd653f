"""Check that the attached model computes on a graph's prompt what it computed when the graph was traced.

A few numbers from the weights tell other models and dictionaries apart (:mod:`tl_circuits.dictionaries.belonging`), but
not every edited weight, nor a user's own hooks. What the graph keeps does: the values of its targets and features.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tl_circuits.attribution.sources import Sources
from tl_circuits.attribution.targets import kept_vectors
from tl_circuits.dictionaries.node_places import node_places
from tl_circuits.errors import BelongingError
from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.graph.kinds import Kind
from tl_circuits.hooks import CleanRun, Replacement, by_place, unembed_weights

# Allowed difference, as a share of the largest value compared. Half precision on another device moves values by up to
# two hundredths; a model that was changed usually by far more.
_WITHIN = 0.05
_DIFFERENCES_WITHIN = 0.15  # a difference of two large logits may be small


def require_same_run(replacement: Replacement, graph: AttributionGraph, clean: CleanRun) -> None:
    """Raise BelongingError unless the targets and features have the values that the graph keeps.

    Args:
        replacement: the model and its dictionary.
        graph: a graph; one from another program's file, which keeps no such values, is not checked.
        clean: a run on the graph's prompt, with nothing edited.
    """
    if not graph.info.sample:
        return
    nodes, at = graph._nodes, node_places(replacement.dictionary, graph)
    active = graph.is_kind("feature") & (nodes.activation != 0)
    dictionary = by_place(replacement.dictionary)
    for place in at[active].unique().tolist():
        here = (active & (at == place)).nonzero()[:, 0]
        seen = clean.seen[dictionary.input_hook(place)][0]
        x = seen[nodes.position[here].to(seen.device)].float()
        vectors, bias = dictionary.read_vectors(place, nodes.feature[here].to(x.device), x)
        require_same(graph, here.tolist(), ((vectors * x).sum(-1) + bias).tolist(), nodes.value)
    _require_same_targets(replacement, graph, clean.final)


def _require_same_targets(
    replacement: Replacement, graph: AttributionGraph, final: Float[Tensor, "pos d_model"]
) -> None:
    unembed = unembed_weights(replacement.model)
    nodes, here, within = [], [], _WITHIN
    logits = graph.is_kind("logit").nonzero()[:, 0].tolist()
    for node, vector in zip(logits, kept_vectors(replacement, graph, logits), strict=True):
        token = int(graph._nodes.feature[node])
        if vector is None or (token < 0 and bool(unembed.b_U.any())):
            continue  # a difference's or direction's own bias is not kept
        if token < 0:
            within = _DIFFERENCES_WITHIN
        bias = 0.0 if token < 0 else float((unembed.b_U[token] - unembed.b_U.float().mean()) * unembed.scale)
        at = int(graph._nodes.position[node])
        here.append(float(final[at].float() @ vector.to(final.device).float()) + bias)
        nodes.append(node)
    require_same(graph, nodes, here, graph._nodes.activation, within)


def require_same_features(graph: AttributionGraph, sources: Sources) -> None:
    """Raise BelongingError unless the features have the activations that the graph keeps, in the layers recorded.

    Args:
        graph: a graph; one from another program's file is not checked.
        sources: what is active on the graph's prompt on the attached model.
    """
    nodes = graph._nodes
    features = (nodes.kind == Kind.FEATURE).nonzero()[:, 0].tolist()
    for number, source in enumerate(sources.layers):
        active, place = source.active, sources.places[number]
        keys = zip(active.position.tolist(), active.feature.tolist(), strict=True)
        own = dict(zip(keys, active.activation.tolist(), strict=True))
        found, here = [], []
        for i in features:
            if int(nodes.layer[i]) == place.layer and graph.sites[i] in ("", place.site):
                found.append(i)
                here.append(own.get((int(nodes.position[i]), int(nodes.feature[i])), 0.0))
        require_same(graph, found, here, nodes.activation)


def require_same(
    graph: AttributionGraph,
    nodes: Sequence[int],
    here: Sequence[float],
    kept: Float[Tensor, " n"],
    within: float = _WITHIN,
) -> None:
    """Raise BelongingError unless ``kept``, a number for each node of the graph, is ``here`` at these ``nodes``."""
    if not graph.info.sample:
        return
    there, values = kept[list(nodes)].double(), torch.tensor(here, dtype=torch.float64)
    known = there.isfinite()
    if not bool(known.any()):
        return
    gap = torch.where(known, (values - there).abs(), 0.0)
    worst = int(gap.argmax())
    if not float(gap[worst]) <= within * float(there[known].abs().max()):
        raise BelongingError(
            f"the graph was traced on {graph.info.model!r} with {graph.info.dictionary!r}, where "
            f"{graph.node_ids[nodes[worst]]} is {float(there[worst]):.4g}; on the attached model it is "
            f"{float(values[worst]):.4g}. So its weights, or hooks on it, are others than when the graph was traced. "
            "Trace the prompt again."
        )
