"""Many interventions at once: patching feature by feature, and keeping a circuit while all other features are off."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuits.attribution.same_values import require_same_run
from tl_circuits.dictionaries.belonging import require_belonging
from tl_circuits.dictionaries.node_places import node_places
from tl_circuits.errors import ArgumentError, PromptError
from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.hooks import Replacement, Set, by_place, clean_run, in_turn, places, read_prompt, real
from tl_circuits.interventions.intervene import intervene_many, require_dictionary
from tl_circuits.interventions.replaced_runs import Kept, Runs, Values, circuit, everything, values_of
from tl_circuits.support.checked import checked

Metric = Callable[[Float[Tensor, " d_vocab"]], Any]


@checked
@in_turn
def feature_patching(
    replacement: Replacement,
    clean: Any,
    corrupted: Any,
    metric: Callable[..., Any],
    *,
    layers: Sequence[int] | range | None = None,
    freeze: str = "none",
    limit: int = 2000,
) -> pd.DataFrame:
    """Activation patching: run ``corrupted`` with one feature at a time set to its activation on ``clean``.

    Every layer, position and feature whose activations differ is a candidate; the ``limit`` largest differences are
    run.

    Args:
        replacement: the model with a dictionary attached.
        clean: the prompt to take activations from.
        corrupted: the prompt to run; it must have as many tokens.
        metric: makes one number of the logits after the last token, ``[d_vocab]``.
        layers: which layers to patch; None for all layers with a dictionary.
        freeze: as for :func:`intervene`.
        limit: the most features to run.

    Returns:
        A frame ``layer position feature clean corrupted metric change``, largest change first. ``clean`` and
        ``corrupted`` are the feature's activations; ``change`` is the metric minus that of the corrupted run. If some
        layer has several dictionaries, the frame has a column ``site`` behind ``feature``.

    Raises:
        PromptError: if the prompts differ in length.
        DictionaryError: for layers without a dictionary.
        ArgumentError: for a metric that does not make one number of the logits, or a negative ``limit``.

    Examples:
        >>> austin = model.tokenizer.convert_tokens_to_ids("Austin")
        >>> other = prompt.replace("Dallas", "Oakland")
        >>> patched = tlc.feature_patching(replacement, prompt, other, lambda logits: logits[austin], limit=20)
        >>> patched[["layer", "position", "feature", "change"]].head(1).round(1)
           layer  position  feature  change
        0      0         7      308     3.8
    """
    replacement.require_attached()
    if limit < 0:
        raise ArgumentError(f"feature_patching(limit=...) must be 0 or more, got {limit}.")
    asked = list(replacement.dictionary.layers if layers is None else layers)
    for layer in asked:
        require_dictionary(replacement, layer)
    model, dictionary = replacement.model, replacement.dictionary
    placed, every = by_place(dictionary), places(dictionary, int(model.cfg.n_layers))
    pair = [read_prompt(model, dictionary, p).tokens for p in (clean, corrupted)]
    if pair[0].numel() != pair[1].numel():
        raise PromptError(
            f"the prompts must have the same number of tokens, got {pair[0].numel()} and {pair[1].numel()}."
        )
    runs = [clean_run(replacement, tokens) for tokens in pair]
    rows: list[tuple[Any, ...]] = []
    for at in (number for layer in asked for number in placed.layers if every[number].layer == layer):
        name = placed.input_hook(at)
        acts = []
        for run in runs:
            x = run.seen[name][0]
            acts.append(placed.activate(at, placed.pre_activations(at, x), x))
        position, feature = (acts[0] != acts[1]).nonzero(as_tuple=True)
        values, n = (a[position, feature].tolist() for a in acts), len(position)
        rows += zip(
            [every[at].layer] * n, position.tolist(), feature.tolist(), [every[at].site] * n, *values, strict=True
        )
    frame = pd.DataFrame(rows, columns=["layer", "position", "feature", "site", "clean", "corrupted"])
    size = (frame.clean - frame.corrupted).abs()
    frame = frame.loc[size.sort_values(ascending=False, kind="stable").index[:limit]].reset_index(drop=True)
    sets = [[Set(r.layer, r.position, r.feature, value=r.clean, site=r.site or None)] for r in frame.itertuples()]
    if not any(place.site for place in every):
        frame = frame.drop(columns="site")
    results = intervene_many(replacement, corrupted, [[], *sets], freeze=freeze)
    scores = [_number(metric, result.last_logits) for result in results]
    frame["metric"] = scores[1:]
    frame["change"] = frame["metric"] - scores[0]
    order = frame["change"].abs().sort_values(ascending=False, kind="stable").index
    return frame.loc[order].reset_index(drop=True)


@checked
@in_turn
def circuit_curve(
    replacement: Replacement,
    graph: AttributionGraph,
    metric: Callable[..., Any],
    *,
    thresholds: Sequence[float] = (0.2, 0.4, 0.6, 0.8, 0.95),
    others: Literal["zero", "mean"] = "zero",
    random_sets: int = 5,
    seed: int = 0,
) -> pd.DataFrame:
    """Keep only the features of a pruned graph, and see how much of a metric stays.

    For each node threshold of :meth:`AttributionGraph.prune`, all other features are set to zero or to their mean over
    the prompt, except at the positions that the graph leaves out. Errors stay as the run makes them.

    Args:
        replacement: the model with the graph's dictionary attached.
        graph: the graph.
        metric: makes one number of the logits after the last token, ``[d_vocab]``.
        thresholds: the node thresholds.
        others: ``"zero"`` or ``"mean"``: what all other features are set to.
        random_sets: how many sets of as many random active features to compare with.
        seed: for the random sets.

    Returns:
        A frame ``threshold features kept random_mean random_std``. ``kept`` is the metric as a share of the untouched
        model's; ``random_mean`` and ``random_std`` are mean and standard deviation of that share for the random sets.

    Raises:
        BelongingError: for a graph of another model or dictionary.
        ArgumentError: for a metric that does not make one number of the logits, or is 0 for the untouched model.

    Examples:
        >>> austin, dallas = (model.tokenizer.convert_tokens_to_ids(word) for word in ("Austin", "Dallas"))
        >>> def metric(logits):
        ...     return logits[austin] - logits[dallas]
        >>> curve = tlc.circuit_curve(replacement, graph, metric, thresholds=[0.8])
        >>> curve[["threshold", "features", "kept"]].round(1)
           threshold  features  kept
        0        0.8        11   0.9
    """
    replacement.require_attached()
    require_belonging(replacement, graph)
    prompt = read_prompt(replacement.model, replacement.dictionary, graph)
    tokens, skipped = prompt.tokens[None], tuple(prompt.skipped)
    require_same_run(replacement, graph, clean_run(replacement, prompt.tokens, skipped))
    values = values_of(replacement, tokens)
    instead = {place: _instead(acts, others) for place, acts in values.acts.items()}
    runs = Runs(
        replacement,
        tokens,
        lambda logits: torch.tensor([_number(metric, logits[0])]),
        Values(instead, values.errors),
        skipped,
    )
    whole = runs.number(everything(values))
    if whole == 0:
        raise ArgumentError(
            "the metric is 0 on the untouched model, so there is no share of it to keep. Take one that is not."
        )
    active = torch.cat([_places(place, acts[0], list(skipped)) for place, acts in values.acts.items()])
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for threshold in thresholds:
        pruned = graph.prune(node_threshold=threshold)
        nodes, own = pruned._nodes, pruned.is_kind("feature")
        at = node_places(replacement.dictionary, pruned)
        kept = torch.stack([at[own], nodes.position[own], nodes.feature[own]], dim=1)
        share = _kept(runs, values, kept) / whole
        random = []
        for _ in range(random_sets):
            chosen = active[torch.randperm(len(active), generator=generator)[: len(kept)]]
            random.append(_kept(runs, values, chosen) / whole)
        spread = torch.tensor(random, dtype=torch.float64)
        rows.append((threshold, len(kept), share, float(spread.mean()), float(spread.std(unbiased=False))))
    return pd.DataFrame(rows, columns=["threshold", "features", "kept", "random_mean", "random_std"])


def _instead(acts: Float[Tensor, "prompt pos feature"], others: str) -> Float[Tensor, "prompt pos feature"]:
    """What features outside the circuit are set to: zero, or their mean over the prompt."""
    return acts.mean(1, keepdim=True).expand_as(acts) if others == "mean" else torch.zeros_like(acts)


def _places(place: int, acts: Float[Tensor, "pos feature"], skipped: list[int]) -> Int[Tensor, "n 3"]:
    on = acts != 0
    on[skipped] = False
    found = on.nonzero().cpu()
    return torch.cat([torch.full((len(found), 1), place), found], dim=1)


def _kept(runs: Runs, values: Values, nodes: Int[Tensor, "n 3"]) -> float:
    """The metric with only these features, and all errors, as the run makes them."""
    acts = circuit(values, [[(place, position, feature) for place, position, feature in nodes.tolist()]]).acts
    return runs.number(Kept(acts, everything(values).errors))


def _number(metric: Metric, logits: Float[Tensor, " d_vocab"]) -> float:
    """The number that ``metric`` makes of the logits after the last token.

    Raises:
        ArgumentError: unless it is one number.
    """
    asked = (
        f"metric is given the logits after the last token, one number for each of the {len(logits)} tokens: "
        "logits[token]"
    )
    try:
        made = metric(logits)
    except (IndexError, TypeError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        raise ArgumentError(
            f"{asked}, not logits[0, -1, token]; it failed on them ({type(error).__name__}: {error})."
        ) from error
    try:
        made = made.reshape(()) if isinstance(made, Tensor) and made.numel() == 1 else made
        return real(made, "what it returns")
    except ArgumentError as error:
        raise ArgumentError(f"{asked}; {error}") from error
