"""From a prompt to an attribution graph."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_circuits.attribution.assemble import Roots, assemble
from tl_circuits.attribution.batches import Engine
from tl_circuits.attribution.check_sums import require_sums
from tl_circuits.attribution.contrast import Compared, compare
from tl_circuits.attribution.engines.autograd import AutogradEngine
from tl_circuits.attribution.engines.closed_form import ClosedForm, closed_form
from tl_circuits.attribution.engines.total import combined, total_effects
from tl_circuits.attribution.expand import MAX_NODES, Expansion, Trimming, expand
from tl_circuits.attribution.sources import Sources, find_sources, recorded_sites
from tl_circuits.attribution.targets import (
    FeatureTarget,
    LogitDifference,
    LogitTargets,
    Targets,
    as_targets,
    resolve_logits,
    resolve_position,
    top_logits,
)
from tl_circuits.errors import ArchitectureError, ArgumentError, PromptError, TargetError
from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.graph.nodes import AGAINST_OTHERS, GraphInfo
from tl_circuits.hooks import (
    Holds,
    PromptRule,
    ReadPrompt,
    Recording,
    Replacement,
    in_turn,
    left_out,
    place_number,
    prompt_text,
    read_prompt,
    record,
    to_tokens,
    token_text,
)
from tl_circuits.support.checked import checked
from tl_circuits.support.threads import free_threads


@checked
@in_turn
def attribute(
    replacement: Replacement,
    prompt: Any,
    targets: Any = None,
    *,
    position: int = -1,
    max_nodes: int = MAX_NODES,
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
    """Trace one prompt: which features, tokens and errors led the model to its answer, as an attribution graph.

    Each edge is the exact direct effect of one node on another in the *local replacement model* (Ameisen et al. 2025,
    "Circuit Tracing: Revealing Computational Graphs in Language Models"): attention patterns and the denominators of
    norms are frozen at their values on this prompt, and each MLP is replaced by the dictionary's features plus an error
    term. There everything that is left is linear, so a node's incoming edges and its ``bias`` add up to its value: a
    feature's pre-activation, or a logit minus the mean logit. Equations: docs/method.md, "The local replacement model"
    and "Edges".

    Args:
        replacement: the model with a dictionary attached, as :func:`tl_circuits.attach` returns it.
        prompt: text, token ids, or a tensor ``[pos]``. Or a graph: its token ids are run again, with the positions
            left out that it leaves out. A text that starts with its special tokens does not get them again.
        targets: what to explain. None: the likeliest next tokens, until their probabilities sum to 95 %, at most ten
            (with other prompts as baseline: the likeliest token's logit minus the mean logit of the other tokens that
            are likeliest there, if there are any). Or one or several tokens (text or ids), :class:`LogitDifference`,
            :class:`LogitDirection`; or one :class:`FeatureTarget`.
        position: the position whose logits are explained; -1 is the last token.
        max_nodes: how many feature nodes the graph gets at most, the most influential ones. Only these are
            *expanded*, which means that their incoming edges are computed.
        batch_size: for how many nodes incoming edges are computed together; ``"auto"`` chooses by prompt length
            and free memory. It changes speed and memory, not which nodes are chosen.
        engine: ``"linear"`` (closed form, fast, for architectures it knows), ``"autograd"`` (reference, slow,
            any architecture), or ``"auto"`` for linear where possible.
        skip_positions: positions that get no feature and error nodes; what their MLPs write counts as constant,
            in ``bias``. None takes those of the dictionary's ``prompt_rule``: position 0 for published sets, for
            others the beginning-of-sequence token, if the prompt has one. The graph keeps them
            (``info.skip_positions``).
        prepend_special: whether a special token (bos, else pad, else eos) is put before a text that starts with
            none. None does what the dictionary's ``prompt_rule`` says; published sets ask for it.
        row_mass: which share of a node's incoming effects (by absolute value) is kept in memory while the graph
            is built, 1.0 for all. None keeps all if that takes at most half a gigabyte, else 0.999. Dropped
            effects are counted in ``bias`` and lower ``coverage``.
        baseline: one or several other prompts, or a :class:`Baseline` made from texts, for the question "why this
            answer here, and not there?". Every source then counts by how it differs from its mean there, at the same
            position: ``(a - ā)·d`` for a feature. What the prompts have in common is part of ``bias``, and its size is
            in the column ``shared``. Features that are active there but not here are nodes, too.
        align: which positions of the baseline's prompts correspond to which of this one. None if all have one length;
            ``"end"`` counts from the last token; or one ``{position: slot}`` for each prompt, this one's first.
        select: how the ``max_nodes`` features are chosen: ``"total_effect"``, by the size of their effect on the
            targets over all paths; ``"influence"``, as circuit-tracer does; ``"auto"``, whichever carries more of the
            answer: total effect for neurons and against a baseline, else influence (docs/benchmarks.md).
        progress: show a progress bar on stderr.

    Returns:
        The graph, with the features that were expanded, errors, tokens (embeddings) and logits, and every edge between
        them. The model is left as it was. Beside other programs that take the processors, fewer of torch's threads are
        used, and the last bits of float32 sums differ; after ``torch.set_num_threads(1)`` they are always the same.

    Raises:
        BaselineError: there are no prompts to compare with, or it is not clear which positions correspond.
        PromptError: the prompt is empty, a batch, or has ids that the model does not know.
        TargetError: a target is no token of the model, is listed wrongly, or names an inactive feature.
        ArchitectureError: ``engine="linear"`` does not know this architecture, or edges and bias do not add up.
        NotFiniteError: the model computes infinite or undefined numbers on this prompt.
        AttachError: the replacement was detached.
        ValueError: a number is out of its range.

    Examples:
        >>> graph = tlc.attribute(replacement, prompt, max_nodes=60)
        >>> graph.info.target_names
        ('Austin',)
        >>> graph.nodes.kind.value_counts().to_dict()
        {'feature': 60, 'error': 36, 'embedding': 9, 'logit': 1}
        >>> print(graph.edges[graph.edges.target == "logit:0"].nlargest(2, "weight").round(2).to_string(index=False))
           source  target  weight
          token@2 logit:0    3.25
        L0/F308@7 logit:0    3.12

        What makes it Austin here and not the capital of another state? Compare with another city:

        >>> other = "the capital of the state containing Oakland is"
        >>> contrast = tlc.attribute(replacement, prompt, baseline=other, max_nodes=60)
        >>> into = contrast.edges[contrast.edges.target == "logit:0"]
        >>> print(into.nlargest(2, "weight").round(2).to_string(index=False))
           source  target  weight
        L0/F308@7 logit:0    3.77
          token@7 logit:0    2.95
    """
    replacement.require_attached()
    if max_nodes < 1:
        raise ValueError(f"max_nodes must be at least 1, got {max_nodes}.")
    if isinstance(batch_size, int) and batch_size < 1:
        raise ValueError(f'batch_size must be at least 1 or "auto", got {batch_size}.')
    if baseline is None and align is not None:
        raise ArgumentError("align= says how positions of the baseline correspond; without baseline= leave it out.")
    if row_mass is not None and not 0.0 < row_mass <= 1.0:
        raise ValueError(f"row_mass is a share of each row's absolute sum, above 0 and at most 1; got {row_mass}.")
    model, dictionary = replacement.model, replacement.dictionary
    rule = _rule(dictionary.prompt_rule, prompt, prepend_special)
    read = _read(replacement, prompt, rule, skip_positions)
    tokens = read.tokens
    position = resolve_position(position, tokens.numel())
    with torch.no_grad(), free_threads():
        holds = replacement.holds(tokens)
        recording = record(model, tokens, position, recorded_sites(model, dictionary))
        sources = find_sources(model, dictionary, recording, read.skipped)
        compared = Compared(sources)
        if baseline is not None:
            read_other = partial(_read, replacement, rule=rule, asked=None)
            compared = compare(
                replacement, sources, recording, position, read, baseline, align, read_other, skip_positions is not None
            )
        sources = compared.sources
        chosen = _make_engine(engine, model, recording, sources, holds)
        roots = _roots(replacement, recording, sources, targets, position, chosen.final, compared.answers)
        expansion = Expansion(
            sources,
            roots.weights,
            started_at=() if roots.column is None else (roots.column,),
            trimming=Trimming.choose(
                row_mass, min(max_nodes, len(sources.feature_columns)), sources.width, sources.home
            ),
        )
        total = _total(chosen, model, recording, roots, holds)
        # Neurons, and all nodes of a contrast graph, carry more of the answer if chosen by total effect; transcoder
        # features without a baseline do not (measured: docs/benchmarks.md, "What a circuit carries").
        by_total = select == "total_effect" or (select == "auto" and (baseline is not None or dictionary.exact))
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
        info = replace(
            info, select="total_effect" if by_total else "influence", skip_positions=read.skipped, **compared.said
        )
        graph = assemble(expansion, roots, info, tokens, position, total)
        require_sums(graph, recording.dtype)
        return graph


def _total(
    engine: ClosedForm | AutogradEngine, model: Any, recording: Recording, roots: Roots, holds: Holds
) -> Float[Tensor, " column"]:
    """The total effect of every column on all roots together, each weighted as it is for influence."""
    if roots.targets is not None:
        return total_effects(engine, model, recording, combined(roots.targets, roots.weights), None, holds)
    assert roots.column is not None  # roots without targets are one feature
    column = torch.tensor([roots.column])
    return total_effects(
        engine, model, recording, _feature_targets(recording, engine.sources, column), roots.column, holds
    )


def _rule(rule: PromptRule, prompt: Any, prepend: bool | None) -> PromptRule:
    """The dictionary's prompt rule, with ``prepend`` replaced where the caller decided about the special token."""
    if prepend is None:
        return rule
    if not isinstance(prompt, str):
        raise PromptError("prepend_special is for a text; token ids and graphs are run as given, so leave it out.")
    return replace(rule, prepend=prepend)


def _read(replacement: Replacement, prompt: Any, rule: PromptRule, asked: Iterable[Any] | None) -> ReadPrompt:
    """The prompt's token ids, and the positions without nodes: ``asked``, else those of a given graph or the rule."""
    if rule == replacement.dictionary.prompt_rule:
        read = read_prompt(replacement.model, replacement.dictionary, prompt)
    else:
        tokens = to_tokens(replacement.model, prompt, rule)
        read = ReadPrompt(tokens, left_out(replacement.model, tokens, rule))
    if asked is None:
        return read
    return replace(read, skipped=tuple(sorted({resolve_position(p, read.tokens.numel()) for p in asked})))


def _make_engine(
    name: str, model: Any, recording: Recording, sources: Sources, holds: Holds
) -> ClosedForm | AutogradEngine:
    if name == "autograd":
        return AutogradEngine(model, recording, sources, holds)
    # The linear engines compare their frozen maps with this prompt's run, so they find out themselves whether they fit.
    try:
        return closed_form(model, recording, sources)
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
    final: Float[Tensor, " d_model"] | None,
    other_answers: Sequence[int],
) -> Roots:
    asked = [] if targets is None else as_targets(targets)
    if any(isinstance(t, FeatureTarget) for t in asked):
        if len(asked) > 1:
            raise TargetError("a FeatureTarget is traced alone; give it without other targets.")
        column = _feature_column(sources, asked[0])
        empty = sources.tokens.new_zeros(0)
        return Roots(None, empty, column, None)
    assert final is not None  # the whole model was recorded
    logits = recording.whole_logits
    answer = int(logits.argmax())
    others = [token for token in other_answers if token != answer]
    if targets is None:
        asked = [LogitDifference(answer, others)] if others else list(top_logits(logits))
    resolved = resolve_logits(replacement, asked, final, logits)
    if targets is None and others:
        resolved = replace(resolved, name=(token_text(replacement.model, answer) + AGAINST_OTHERS,))
    n = len(asked)
    vectors = Targets(
        place=torch.full((n,), len(sources.places)),
        position=torch.full((n,), position),
        vector=resolved.vector,
        bias=resolved.bias,
    )
    # Influence starts at the targets in proportion to their probabilities. Where all of these are zero (tokens
    # that the model rules out still have causes), every target counts the same.
    weights = resolved.weights if bool(resolved.weights.any()) else torch.ones_like(resolved.weights)
    return Roots(vectors.to(sources.home), weights.to(sources.home), None, resolved)


def _feature_column(sources: Sources, target: FeatureTarget) -> int:
    table, position = sources.feature_table, resolve_position(target.position, sources.n_pos)
    at = (
        place_number(sources.dictionary, target.layer, target.site, TargetError)
        if 0 <= target.layer < sources.n_layers
        else -1
    )
    here = (table["place"] == at) & (table["position"] == position)
    match = (here & (table["feature"] == target.feature)).nonzero()
    if match.numel() == 0:
        raise TargetError(
            f"{target} is not active on this prompt; layer {target.layer} has {int(here.sum())} active features "
            f"at position {position}."
        )
    return int(sources.feature_columns[int(match[0])])


def _feature_targets(recording: Recording, sources: Sources, columns: Int[Tensor, " n"]) -> Targets:
    """The features in ``columns`` as targets: the vector by which each reads its layer's input, on one device."""
    table, dictionary = sources.feature_table, sources.dictionary
    index = torch.searchsorted(sources.feature_columns, columns).to(table["place"].device)
    place, position, feature = (table[name][index] for name in ("place", "position", "feature"))
    reads = {at: recording.sites[dictionary.input_hook(at)] for at in place.unique().tolist()}
    # What is read may be wider than the stream (all heads of attn.hook_z); narrower vectors end with zeros.
    width = max(sources.tokens.shape[1], *(x.shape[1] for x in reads.values()), 0)
    vectors = sources.tokens.new_zeros(len(columns), width)
    bias = sources.tokens.new_zeros(len(columns))
    for at, x in reads.items():
        here = (place == at).nonzero()[:, 0]
        x = x[position[here].to(x.device)]
        found = dictionary.read_vectors(at, feature[here].to(x.device), x)
        vectors[here, : x.shape[1]], bias[here] = (part.to(vectors.device) for part in found)
    return Targets(place, position, vectors, bias)


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
        n_layers=sources.n_layers,
        exact=sources.dictionary.exact and not sources.error_columns.numel(),
        engine="autograd" if isinstance(engine, AutogradEngine) else "linear",
        max_nodes=max_nodes,
        n_active=sources.feature_columns.numel(),
        version=version("tl_circuits"),
        sample=replacement.sample,
        prompt_exact=exact,
        skip_positions=sources.skipped,
        prepended=token_text(model, ids[0]) if added else "" if graph is None else graph.prepended,
        sites=sources.sites,
    )
