"""From a prompt to an attribution graph."""

from collections.abc import Iterable
from dataclasses import replace
from importlib.metadata import version
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_circuits.attribution.assemble import Roots, assemble
from tl_circuits.attribution.baseline import against, position_means
from tl_circuits.attribution.batches import Engine
from tl_circuits.attribution.engines.autograd import AutogradEngine
from tl_circuits.attribution.engines.linear import LinearEngine
from tl_circuits.attribution.engines.total import combined, total_effects
from tl_circuits.attribution.expand import Expansion, Trimming, expand
from tl_circuits.attribution.family import Family, find_family
from tl_circuits.attribution.sources import Sources, find_sources
from tl_circuits.attribution.sums import require_sums
from tl_circuits.attribution.targets import (
    FeatureTarget,
    LogitTargets,
    Targets,
    as_targets,
    resolve_logits,
    resolve_position,
    top_logits,
)
from tl_circuits.errors import ArchitectureError, PromptError, TargetError
from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.graph.nodes import GraphInfo
from tl_circuits.hooks import (
    Holds,
    PromptRule,
    ReadPrompt,
    Recording,
    Replacement,
    left_out,
    prompt_text,
    read_prompt,
    record,
    to_tokens,
    token_text,
)
from tl_circuits.support.checked import checked


@checked
def attribute(
    replacement: Replacement,
    prompt: Any,
    targets: Any = None,
    *,
    position: int = -1,
    max_nodes: int = 4000,
    batch_size: int | Literal["auto"] = "auto",
    engine: Literal["auto", "linear", "autograd"] = "auto",
    skip_positions: Iterable[int] | None = None,
    prepend_special: bool | None = None,
    row_mass: float | None = None,
    baseline: Any = None,
    align: Any = None,
    select: Literal["auto", "total_effect", "influence"] = "auto",
    progress: bool = True,
) -> AttributionGraph:
    """The attribution graph of one prompt: exact direct effects in the local replacement model.

    Attention patterns and norm denominators are frozen at their values on this prompt and MLPs
    are replaced by the dictionary's features plus error terms (Ameisen et al. 2025).

    Args:
        replacement: what :func:`tl_circuits.attach` returned.
        prompt: text, token ids, or a tensor ``[pos]``; or a graph, which means its token ids and the positions
            that it leaves out. A text that starts with its special tokens does not get them again.
        targets: None (the likeliest tokens until 95 % of the probability, at most ten), one or
            several tokens or token ids, :class:`LogitDifference`, :class:`LogitDirection`, or
            one :class:`FeatureTarget`.
        position: where the logits are read; -1 is the last token.
        max_nodes: how many feature nodes to expand, most influential first.
        batch_size: targets in one sweep; ``"auto"`` bounds memory by prompt length.
        engine: ``"linear"`` (closed form), ``"autograd"`` (reference), or ``"auto"``.
        skip_positions: positions without feature and error nodes, whose MLP outputs count as
            constants; None takes those of the dictionary's ``prompt_rule``: position 0 of published sets, elsewhere
            the beginning-of-sequence token, if the prompt has one. The graph keeps them (``info.skip_positions``).
        prepend_special: whether a special token (bos, else pad, else eos) is put before a text that starts with
            none; None does what the dictionary's ``prompt_rule`` says: published sets want it.
        row_mass: how much of each row's absolute sum to keep while the graph is built, 1.0 for all; None
            keeps all where the rows fit into half a gigabyte, else 0.999. What is dropped counts
            in ``bias`` and lowers ``coverage``.
        baseline: what the prompt is compared with: one other prompt or several. Each source then counts by what differs
            from their mean at its position; what they share goes to ``bias`` and stands in the column ``shared``.
            Features that are silent here and active there are nodes too.
        align: which positions of the baseline's prompts belong to which of this one: None where all have one length,
            ``"end"``, or one ``{position: slot}`` a prompt, this one's first.
        select: by what features are chosen: ``"total_effect"``, the size of their effect over all paths;
            ``"influence"``, as circuit-tracer does; ``"auto"``: what carries more of the answer (docs/benchmarks.md).
        progress: show a progress bar on stderr.

    Raises BaselineError, PromptError, TargetError, ArchitectureError, NotFiniteError, AttachError or ValueError;
    the model is left as it was.
    """
    replacement.require_attached()
    if max_nodes < 1:
        raise ValueError(f"max_nodes must be at least 1, got {max_nodes}.")
    if isinstance(batch_size, int) and batch_size < 1:
        raise ValueError(f'batch_size must be at least 1 or "auto", got {batch_size}.')
    if row_mass is not None and not 0.0 < row_mass <= 1.0:
        raise ValueError(f"row_mass is a share of each row's absolute sum, above 0 and at most 1; got {row_mass}.")
    model, dictionary = replacement.model, replacement.dictionary
    rule = _rule(dictionary.prompt_rule, prompt, prepend_special)
    read = _read(replacement, prompt, rule, skip_positions)
    tokens = read.tokens
    position = resolve_position(position, tokens.numel())
    sites = [f(layer) for layer in dictionary.layers for f in (dictionary.input_hook, dictionary.output_hook)]
    with torch.no_grad():
        holds = replacement.holds(tokens)
        recording = record(model, tokens, position, sites)
        sources = find_sources(model, dictionary, recording, read.skipped)
        family = Family(())
        if baseline is not None:
            asked = skip_positions is not None
            family = find_family(model, read, baseline, align, lambda p: _read(replacement, p, rule, None), asked)
            sources = against(sources, recording, position_means(replacement, family, sources))
        chosen = _make_engine(engine, model, recording, sources, holds)
        roots = _roots(replacement, recording, sources, targets, position, chosen.final)
        expansion = Expansion(
            sources,
            roots.weights,
            started_at=() if roots.column is None else (roots.column,),
            trimming=Trimming.choose(row_mass, min(max_nodes, len(sources.feature_columns)), sources.width),
        )
        total = _total(chosen, model, recording, roots, holds)
        by_total = select == "total_effect" or (select == "auto" and _total_carries_more(dictionary, family))
        count = min(max_nodes, sources.feature_columns.numel())
        with tqdm(total=count, desc="tracing", unit="node", disable=not progress) as bar:
            expand(
                chosen,
                expansion,
                roots.targets,
                lambda columns: _feature_targets(recording, sources, columns),
                max_nodes,
                batch_size,
                lambda n: bar.update(n) and None,
                ranking=total.abs().cpu() if by_total else None,
            )
        info = _info(replacement, prompt, rule, roots, sources, recording, chosen, max_nodes)
        compared = tuple((member.token_ids, member.places) for member in family.members)
        info = replace(info, select="total_effect" if by_total else "influence", baseline=compared)
        graph = assemble(expansion, roots, info, tokens, position, total)
        require_sums(graph, recording.dtype)
        return graph


def _total(engine: Engine, model: Any, recording: Recording, roots: Roots, holds: Holds) -> Float[Tensor, " column"]:
    """The total effect of every column on the roots, weighted as influence is."""
    if roots.targets is not None:
        return total_effects(engine, model, recording, combined(roots.targets, roots.weights), None, holds)
    column = torch.tensor([roots.column])
    return total_effects(engine, model, recording, _feature_targets(recording, engine.sources, column), roots.column, holds)


def _total_carries_more(dictionary: Any, family: Family) -> bool:
    """Whether nodes chosen by total effect carry more of the answer than those chosen by influence (docs/benchmarks.md)."""
    return bool(family.members)


def _rule(rule: PromptRule, prompt: Any, prepend: bool | None) -> PromptRule:
    """The dictionary's rule, or the caller's choice of what stands before a text."""
    if prepend is None:
        return rule
    if not isinstance(prompt, str):
        raise PromptError("prepend_special is for a text; token ids and graphs are run as given, so leave it out.")
    return replace(rule, prepend=prepend)


def _read(replacement: Replacement, prompt: Any, rule: PromptRule, asked: Iterable[Any] | None) -> ReadPrompt:
    """The prompt's tokens, and the positions left out: those asked for, else those of the graph or the rule."""
    if rule == replacement.dictionary.prompt_rule:
        read = read_prompt(replacement.model, replacement.dictionary, prompt)
    else:
        tokens = to_tokens(replacement.model, prompt, rule)
        read = ReadPrompt(tokens, left_out(replacement.model, tokens, rule))
    if asked is None:
        return read
    return replace(read, skipped=tuple(sorted({resolve_position(p, read.tokens.numel()) for p in asked})))


def _make_engine(name: str, model: Any, recording: Recording, sources: Sources, holds: Holds) -> Engine:
    if name == "autograd":
        return AutogradEngine(model, recording, sources, holds)
    try:
        return LinearEngine(model, recording, sources)
    except ArchitectureError:
        if name == "linear":
            raise
        return AutogradEngine(model, recording, sources, holds)


def _roots(
    replacement: Replacement,
    recording: Recording,
    sources: Sources,
    targets: Any,
    position: int,
    final: Float[Tensor, " d_model"],
) -> Roots:
    asked = [] if targets is None else as_targets(targets)
    if any(isinstance(t, FeatureTarget) for t in asked):
        if len(asked) > 1:
            raise TargetError("a FeatureTarget is traced alone; give it without other targets.")
        column = _feature_column(sources, asked[0])
        empty = sources.tokens.new_zeros(0)
        return Roots(None, empty, column, None)
    logits = recording.logits
    if targets is None:
        asked = list(top_logits(logits))
    resolved = resolve_logits(replacement, asked, final, logits)
    n = len(asked)
    vectors = Targets(
        layer=torch.full((n,), len(sources.layers)),
        position=torch.full((n,), position),
        vector=resolved.vector,
        bias=resolved.bias,
    )
    # Tokens that a model gives no probability at all still have causes: then all targets count alike.
    weights = resolved.weights if bool(resolved.weights.any()) else torch.ones_like(resolved.weights)
    return Roots(vectors.to(sources.home), weights.to(sources.home), None, resolved)


def _feature_column(sources: Sources, target: FeatureTarget) -> int:
    table, position = sources.feature_table, resolve_position(target.position, sources.n_pos)
    here = (table["layer"] == target.layer) & (table["position"] == position)
    match = (here & (table["feature"] == target.feature)).nonzero()
    if match.numel() == 0:
        raise TargetError(
            f"{target} is not active on this prompt; layer {target.layer} has {int(here.sum())} active features "
            f"at position {position}."
        )
    return int(sources.feature_columns[int(match[0])])


def _feature_targets(recording: Recording, sources: Sources, columns: Int[Tensor, " n"]) -> Targets:
    """Read vectors of the features in ``columns``, at their layers' inputs, brought home."""
    table, dictionary = sources.feature_table, sources.dictionary
    index = torch.searchsorted(sources.feature_columns, columns).to(table["layer"].device)
    layer, position, feature = (table[name][index] for name in ("layer", "position", "feature"))
    d_model = sources.tokens.shape[1]
    vectors = sources.tokens.new_zeros(len(columns), d_model)
    bias = sources.tokens.new_zeros(len(columns))
    for at in layer.unique().tolist():
        here = (layer == at).nonzero()[:, 0]
        x = recording.sites[dictionary.input_hook(at)]
        x = x[position[here].to(x.device)]
        found = dictionary.read_vectors(at, feature[here].to(x.device), x)
        vectors[here], bias[here] = (part.to(vectors.device) for part in found)
    return Targets(layer, position, vectors, bias)


def _info(
    replacement: Replacement,
    prompt: Any,
    rule: PromptRule,
    roots: Roots,
    sources: Sources,
    recording: Recording,
    engine: Engine,
    max_nodes: int,
) -> GraphInfo:
    model, tokens = replacement.model, recording.tokens
    ids = tokens.tolist()
    logit: LogitTargets | None = roots.logits
    graph = prompt.info if isinstance(prompt, AttributionGraph) else None
    given = graph.prompt if graph is not None else prompt if isinstance(prompt, str) else None
    text, exact = prompt_text(model, tokens, rule, given)
    added = isinstance(prompt, str) and len(ids) > to_tokens(model, prompt).numel()
    return GraphInfo(
        prompt=text,
        token_ids=tuple(ids),
        tokens=tuple(token_text(model, i) for i in ids),
        target_names=() if logit is None else logit.name,
        target_probabilities=() if logit is None else tuple(logit.weights.tolist()),
        model=str(getattr(model.cfg, "model_name", "unknown")),
        dictionary=sources.dictionary.name,
        n_layers=len(sources.layers),
        exact=sources.dictionary.exact,
        engine="linear" if isinstance(engine, LinearEngine) else "autograd",
        max_nodes=max_nodes,
        n_active=sources.feature_columns.numel(),
        version=version("tl_circuits"),
        sample=replacement.sample,
        prompt_exact=exact,
        skip_positions=sources.skipped,
        prepended=token_text(model, ids[0]) if added else "" if graph is None else graph.prepended,
    )


