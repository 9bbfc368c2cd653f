"""Change features and see what the model does."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_circuits.attribution.same_values import require_same_run
from tl_circuits.attribution.targets import token_id
from tl_circuits.dictionaries.belonging import require_belonging, require_edits_belong
from tl_circuits.errors import DivergenceError, EditError
from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.graph.kinds import Kind, Place
from tl_circuits.graph.lookup import node_indices
from tl_circuits.hooks import (
    BlockPlace,
    CleanRun,
    Edit,
    HookList,
    Replacement,
    Set,
    as_edits,
    by_place,
    clean_run,
    edit_hooks,
    in_turn,
    make_plan,
    others_hooks,
    places,
    read_prompt,
    require_freeze,
    run_edited,
    sites_of,
    token_text,
    unembed_weights,
    wholes,
)
from tl_circuits.interventions.node_edits import edit_of
from tl_circuits.support.checked import checked
from tl_circuits.support.figures import Picture
from tl_circuits.support.outputs import output

TOKENS_AT_ONCE = 1024  # (runs x positions) in one batch
# A free norm keeps its output's size; only a denominator that is held, and is far too small, lets it grow so much.
DIVERGED = 1000.0


@dataclass(frozen=True, eq=False)
class InterventionResult:
    """One run with edits, compared with the untouched run.

    A run whose numbers overflowed raises DivergenceError when you ask it for logits or for anything made of them.

    Attributes:
        model: the model.
        tokens: the prompt's token ids ``[pos]``.
        edits: the edits.
        freeze: what was held: ``"all"``, ``"attention"`` or ``"none"``.
        final: what the unembedding reads in the edited run, float32 ``[pos, d_model]``.
        baseline_final: the same of the untouched run.
        activations: the features that are active in either run, in the layers that were compared. A frame
            ``layer position feature before after``, where ``before`` and ``after`` are activations without and with the
            edits; with a column ``site`` behind them if some layer has several dictionaries.

    Examples:
        >>> result = tlc.intervene(replacement, prompt, tlc.TokenEdit(7), freeze="none")        # without "Dallas"
        >>> result.logits.shape, result.kl() > 1
        (torch.Size([9, 670]), True)
        >>> before, after = result.logit_difference("Austin", "Juneau")
        >>> before > 0 > after
        True
    """

    model: Any = field(repr=False)
    tokens: Int[Tensor, " pos"] = field(repr=False)
    edits: tuple[Edit, ...]
    freeze: str
    final: Float[Tensor, "pos d_model"] = field(repr=False)
    baseline_final: Float[Tensor, "pos d_model"] = field(repr=False)
    activations: pd.DataFrame = field(repr=False, compare=False)

    @property
    def growth(self) -> float:
        """By what factor the edit lengthened the vectors that the unembedding reads, at the worst position.

        With norm denominators held, nothing limits the size of the stream: if an edit leaves a stream larger than the
        denominator held for it, gated MLPs, which are quadratic, square the excess layer after layer. Infinite for a
        run that overflowed.

        Examples:
            >>> result = tlc.intervene(replacement, prompt, tlc.TokenEdit(7), freeze="none")
            >>> round(result.growth, 2)
            1.01
        """
        return float(growth(self.final[None], self.baseline_final)[0])

    @property
    def diverged(self) -> bool:
        """Whether :attr:`growth` is beyond 1000. The numbers then say nothing about the model.

        Examples:
            >>> huge = tlc.Set(layer=0, position=8, feature=308, value=1e4)  # held denominators let it grow to 1e19
            >>> tlc.intervene(replacement, prompt, huge, freeze="attention").diverged
            True
            >>> tlc.intervene(replacement, prompt, huge, freeze="none").diverged
            False
        """
        return self.growth > DIVERGED

    def _require_finite(self) -> None:
        if not bool(self.final.isfinite().all()):
            raise DivergenceError(
                f"the run with {len(self.edits)} edits under freeze={self.freeze!r} outgrew floating point: "
                + _WHY_DIVERGED[self.freeze == "none"]
            )

    def _logits(self, final: Float[Tensor, "pos d_model"]) -> Float[Tensor, "pos d_vocab"]:
        return unembed_weights(self.model).logits(final)

    @cached_property
    def logits(self) -> Float[Tensor, "pos d_vocab"]:
        """Logits of the edited run, float32 ``[pos, d_vocab]``.

        Raises:
            DivergenceError: if the run overflowed.
        """
        self._require_finite()
        return self._logits(self.final)

    @cached_property
    def baseline_logits(self) -> Float[Tensor, "pos d_vocab"]:
        """Logits of the untouched run, float32 ``[pos, d_vocab]``."""
        return self._logits(self.baseline_final)

    @cached_property
    def last_logits(self) -> Float[Tensor, " d_vocab"]:
        """Logits of the edited run after the last token, float32 ``[d_vocab]``.

        Those of other positions are not computed, unlike for :attr:`logits`.

        Raises:
            DivergenceError: if the run overflowed.
        """
        self._require_finite()
        return self._logits(self.final[-1:])[0]

    @cached_property
    def _last(self) -> tuple[Tensor, Tensor]:
        """Baseline and edited log-probabilities after the last token."""
        self._require_finite()
        pair = torch.stack([self.baseline_final[-1], self.final[-1]])
        before, after = self._logits(pair).log_softmax(-1)
        return before, after

    @checked
    def top(self, k: int = 5) -> pd.DataFrame:
        """The likeliest next tokens of either run, with both probabilities.

        Args:
            k: how many tokens to take from each run. Tokens that are among the likeliest of both are listed once, so
                there are ``k`` to ``2 k`` rows.

        Returns:
            A frame ``token id before after`` with the token's text and id, and its probability (a share of 1) in the
            untouched and in the edited run. The row with the largest probability in either comes first.

        Raises:
            DivergenceError: if the run overflowed.

        Examples:
            >>> result = tlc.intervene(replacement, prompt, tlc.TokenEdit(7), freeze="none")        # without "Dallas"
            >>> result.top(1).round(2)
                token   id  before  after
            0  Austin  355     1.0   0.00
            1  Juneau  268     0.0   0.51
        """
        before, after = (log.exp() for log in self._last)
        ids = torch.cat([before.topk(k).indices, after.topk(k).indices]).unique()
        ids = ids[torch.argsort(torch.maximum(before, after)[ids], descending=True, stable=True)]
        return pd.DataFrame(
            {
                "token": [token_text(self.model, i) for i in ids.tolist()],
                "id": ids.tolist(),
                "before": before[ids].tolist(),
                "after": after[ids].tolist(),
            }
        )

    def kl(self) -> float:
        """How far the edits moved the distribution of the next token: KL(untouched ‖ edited), in nats.

        Returns:
            The Kullback-Leibler divergence after the last token; 0 if the edits changed no probability.

        Raises:
            DivergenceError: if the run overflowed.

        Examples:
            >>> result = tlc.intervene(replacement, prompt, tlc.TokenEdit(7), freeze="none")        # without "Dallas"
            >>> round(result.kl(), 1)
            5.6
        """
        before, after = self._last
        return float((before.exp() * (before - after)).sum())

    @checked
    def logit_difference(self, a: str | int, b: str | int) -> tuple[float, float]:
        """The logit of ``a`` minus the logit of ``b`` after the last token, in the untouched and in the edited run.

        Args:
            a: a token, as text or id.
            b: another token.

        Returns:
            The difference in the untouched run and the difference in the edited run, both in logits.

        Raises:
            TargetError: for a text that is not one token of the model, or an id that it does not have.
            DivergenceError: if the run overflowed.

        Examples:
            >>> result = tlc.intervene(replacement, prompt, tlc.TokenEdit(7), freeze="none")        # without "Dallas"
            >>> [round(logits, 1) for logits in result.logit_difference("Austin", "Juneau")]
            [12.2, -5.0]
        """
        ia, ib = token_id(self.model, a), token_id(self.model, b)
        before, after = self._last
        return float(before[ia] - before[ib]), float(after[ia] - after[ib])

    @checked
    def plot(self, path: str | Path | None = None, overwrite: bool = False) -> Path | Picture:
        """Draw the likeliest next tokens before and after the edits (extra ``figure``).

        Args:
            path: a file that ends in ``.svg``, ``.png`` or ``.pdf``. Without one, the picture is returned, and a
                notebook shows it.
            overwrite: whether to replace a file that exists.

        Returns:
            The path; without one, the picture.

        Raises:
            OutputError: if the file exists, cannot be written, or has another ending.
            ImportError: if matplotlib is not installed; it names the extra.
            DivergenceError: if the run overflowed.

        Examples:
            >>> result = tlc.intervene(replacement, prompt, tlc.TokenEdit(7), freeze="none")
            >>> result.plot(folder / "without-dallas.svg").name
            'without-dallas.svg'
        """
        return output("intervention figure")(self, None if path is None else Path(path), overwrite)

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table("token", "before", "after", title=f"{len(self.edits)} edits, freeze={self.freeze}", box=None)
        for row in self.top().itertuples():
            table.add_row(f"“{row.token}”", f"{row.before:.1%}", f"{row.after:.1%}")
        return table

    def _repr_html_(self) -> str:
        return self.top().to_html(formatters={"before": "{:.1%}".format, "after": "{:.1%}".format}, index=False)


_WHY_DIVERGED = (
    "the edit leaves a residual stream far larger than the norm denominator held for it, and gated MLPs square the "
    "excess layer after layer. Use freeze='none', or hold more (constrained_layers, freeze='all').",
    "the edits set values so large that the model's numbers overflow.",
)


def growth(finals: Float[Tensor, "run pos d_model"], baseline: Float[Tensor, "pos d_model"]) -> Float[Tensor, " run"]:
    """By what factor the vectors of each run are longer than the untouched ones, at the worst position."""
    sizes = finals.double().norm(dim=-1) / baseline.double().norm(dim=-1).clamp_min(1e-30)
    return sizes.nan_to_num(nan=torch.inf, posinf=torch.inf).amax(-1)


@checked
@in_turn
def intervene(
    replacement: Replacement,
    prompt: Any,
    edits: Sequence[Any] | Any,
    *,
    freeze: str = "attention",
    constrained_layers: Sequence[int] | range = (),
    layers: Iterable[int] | None = None,
) -> InterventionResult:
    """Run a prompt with edits and compare with the untouched run.

    The model keeps exactly the hooks it had.

    Args:
        replacement: the model with a dictionary attached.
        prompt: text, token ids, or a graph, which is run on exactly its token ids.
        edits: one or several of Ablate, Set, Scale, Add, Patch, ErrorEdit, TokenEdit, PatternEdit, ScoreEdit. An
            open-ended slice of positions runs to the prompt's end.
        freeze: what is held at the values of the untouched run. ``"all"``: attention patterns, norm denominators, all
            MLP outputs and all that dictionaries rebuild, so that edits have only their direct effects (of MLPs that
            graphs pass, the activation ratios are held instead). ``"attention"``: patterns and denominators.
            ``"none"``: nothing.
        constrained_layers: layers whose MLP output, or what their dictionaries rebuild, is held as well. This is the
            constrained patching of Ameisen et al. 2025, "Circuit Tracing: Revealing Computational Graphs in Language
            Models"; what each way of holding means for an edit is in docs/interventions.md, "What is held".
        layers: whose activations to compare; None for all layers with a dictionary.

    Returns:
        Logits, next tokens and activations of both runs.

    Raises:
        EditError: for edits that name what does not exist or contradict each other, an unknown ``freeze``, or
            ``constrained_layers`` that the model does not have.
        PromptError: for a prompt that cannot be run.
        BelongingError: for edits or a graph of another model or dictionary.
        DictionaryError: for ``layers`` without a dictionary.
        DivergenceError: if the run overflows, which can happen while denominators are held.
        AttachError: if the replacement was detached.

    Examples:
        >>> result = tlc.intervene(replacement, prompt, tlc.TokenEdit(7), freeze="none")        # without "Dallas"
        >>> result.top(1)[["token", "before", "after"]].round(1)
            token  before  after
        0  Austin     1.0    0.0
        1  Juneau     0.0    0.5
    """
    edits = as_edits(edits)
    result = _run(replacement, prompt, [edits], freeze, constrained_layers, layers)[0]
    result._require_finite()
    return result


@checked
@in_turn
def intervene_many(
    replacement: Replacement,
    prompt: Any,
    edit_sets: Sequence[Any],
    *,
    freeze: str = "attention",
    constrained_layers: Sequence[int] | range = (),
    layers: Iterable[int] | None = (),
    progress: bool = False,
) -> list[InterventionResult]:
    """Run one prompt with many lists of edits, in batches. Each result is the same as from :func:`intervene`.

    A run that overflows does not stop the others: its result is ``diverged``, and raises DivergenceError when you ask
    it for logits.

    Args:
        replacement: the model with a dictionary attached.
        prompt: text, token ids, or a graph.
        edit_sets: the edits of each run.
        freeze: as for :func:`intervene`.
        constrained_layers: as for :func:`intervene`.
        layers: whose activations to compare in every run; None for all layers with a dictionary. By default none.
        progress: show a progress bar on stderr.

    Returns:
        One result for each list of edits, in the same order.

    Raises:
        EditError, PromptError, BelongingError, DictionaryError, AttachError: as :func:`intervene` raises them.

    Examples:
        >>> sets = [tlc.edits_of(graph, [name]) for name in ("L0/F308@7", "token@7")]
        >>> results = tlc.intervene_many(replacement, prompt, sets, freeze="none")
        >>> [result.kl() > 0.1 for result in results]        # one feature does little, its token does much
        [False, True]
    """
    sets = [as_edits(edits) for edits in edit_sets]
    return _run(replacement, prompt, sets, freeze, constrained_layers, layers, progress)


def _run(
    replacement: Replacement,
    prompt: Any,
    edit_sets: Sequence[tuple[Any, ...]],
    freeze: str,
    constrained_layers: Sequence[int] | range,
    layers: Iterable[int] | None,
    progress: bool = False,
) -> list[InterventionResult]:
    replacement.require_attached()
    require_freeze(freeze)
    require_run_belongs(replacement, prompt, edit_sets)
    model, dictionary = replacement.model, replacement.dictionary
    read = read_prompt(model, dictionary, prompt)
    tokens = read.tokens
    constrained = _constrained(model, constrained_layers)
    placed, every = by_place(dictionary), places(dictionary, int(model.cfg.n_layers))
    compared = list(placed.layers)
    if layers is not None:
        asked = wholes(layers, "layers", EditError)
        for layer in asked:
            require_dictionary(replacement, layer)
        compared = [place for place in compared if every[place].layer in asked]
    clean = clean_run(replacement, tokens, read.skipped)
    if isinstance(prompt, AttributionGraph):
        require_same_run(replacement, prompt, clean)
    results = []
    batches = edited_batches(replacement, tokens, edit_sets, clean, freeze, constrained, compared)
    with tqdm(total=len(edit_sets), desc="intervening", unit="run", disable=not progress) as bar:
        for finals, seen, part in batches:
            for row, edits in enumerate(part):
                inputs = {place: seen[placed.input_hook(place)][row] for place in compared}
                frame = _compare(placed, every, clean, inputs)
                results.append(InterventionResult(model, tokens, edits, freeze, finals[row], clean.final, frame))
            bar.update(len(part))
    return results


def require_run_belongs(replacement: Replacement, prompt: Any, edit_sets: Iterable[Iterable[Any]]) -> None:
    """Raise BelongingError for edits made from the graph of another dictionary, and for such a graph as the prompt."""
    if isinstance(prompt, AttributionGraph):
        require_belonging(replacement, prompt)
    require_edits_belong(replacement, (edit for edits in edit_sets for edit in edits))


def edited_batches(
    replacement: Replacement,
    tokens: Int[Tensor, " pos"],
    edit_sets: Sequence[tuple[Any, ...]],
    clean: CleanRun,
    freeze: str,
    constrained: Sequence[int],
    compared: Sequence[int],
) -> Iterable[tuple[Tensor, dict[str, Tensor], Sequence[tuple[Edit, ...]]]]:
    """Batches of runs: the final streams, what dictionaries read at the places ``compared``, and each run's edits."""
    model, dictionary = replacement.model, replacement.dictionary
    n = tokens.numel()
    # A user's hook may name a row of the batch, so with such hooks each run goes alone.
    size = 1 if others_hooks(model) else max(1, TOKENS_AT_ONCE // n)
    wanted = [by_place(dictionary).input_hook(place) for place in compared]
    for start in range(0, len(edit_sets), size):
        part = edit_sets[start : start + size]
        plan = make_plan(model, dictionary, part, n, n)
        arrivals: dict[str, Tensor] = {}
        hooks = edit_hooks(replacement, plan, clean, freeze, constrained, arrivals)
        finals, seen = run_edited(replacement, tokens.expand(len(part), n), hooks, wanted, arrivals)
        yield finals, seen, part


def require_dictionary(replacement: Replacement, layer: int) -> None:
    """Raise DictionaryError for a layer without a dictionary."""
    if not sites_of(replacement.dictionary, layer):
        replacement.site(layer)  # its message lists the layers


def _constrained(model: Any, layers: Sequence[int] | range) -> tuple[int, ...]:
    n_layers = int(model.cfg.n_layers)
    asked = wholes(layers, "constrained_layers", EditError)
    for layer in asked:
        if not 0 <= layer < n_layers:
            raise EditError(f"constrained layer {layer} is not in 0..{n_layers - 1}.")
    return asked


def _compare(dictionary: Any, every: Sequence[BlockPlace], clean: CleanRun, inputs: dict[int, Tensor]) -> pd.DataFrame:
    """Activations before and after, of features that are active in either run."""
    parts = []
    several = any(place.site for place in every)
    for at, after in inputs.items():
        before = clean.seen[dictionary.input_hook(at)][0]
        pair = [dictionary.activate(at, dictionary.pre_activations(at, x), x) for x in (before, after)]
        position, feature = ((pair[0] != 0) | (pair[1] != 0)).nonzero(as_tuple=True)
        parts.append(
            pd.DataFrame(
                {
                    "layer": every[at].layer,
                    "position": position.cpu().numpy(),
                    "feature": feature.cpu().numpy(),
                    "before": pair[0][position, feature].cpu().numpy(),
                    "after": pair[1][position, feature].cpu().numpy(),
                }
                | ({"site": every[at].site} if several else {})
            )
        )
    columns = ["layer", "position", "feature", "before", "after", *(["site"] if several else [])]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)


@checked
@in_turn
def intervention_hooks(
    replacement: Replacement, prompt: Any, edits: Sequence[Any] | Any, *, freeze: str = "attention"
) -> HookList:
    """The hooks of :func:`intervene`, for ``model.run_with_hooks`` or ``model.add_hook``.

    They fit this prompt only: its length, and the values of its untouched run if ``freeze`` holds any.

    Args:
        replacement: the model with a dictionary attached.
        prompt: text, token ids, or a graph.
        edits: one edit or several.
        freeze: as for :func:`intervene`.

    Returns:
        A list of (hook name, function).

    Raises:
        EditError, PromptError, BelongingError: as :func:`intervene` raises them.

    Examples:
        >>> hooks = tlc.intervention_hooks(replacement, prompt, tlc.TokenEdit(7), freeze="none")
        >>> logits = model.run_with_hooks(tlc.hooks.to_tokens(model, prompt)[None], fwd_hooks=hooks)
        >>> model.tokenizer.decode(logits[0, -1].argmax())
        'Juneau'
    """
    replacement.require_attached()
    edits = as_edits(edits)
    require_run_belongs(replacement, prompt, [edits])
    read = read_prompt(replacement.model, replacement.dictionary, prompt)
    tokens = read.tokens
    clean = None
    if freeze != "none":
        clean = clean_run(replacement, tokens, read.skipped)
        if isinstance(prompt, AttributionGraph):
            require_same_run(replacement, prompt, clean)
    n = tokens.numel()
    plan = make_plan(replacement.model, replacement.dictionary, [edits], n, n)
    return edit_hooks(replacement, plan, clean, freeze)


@checked
def edits_of(
    graph: AttributionGraph, nodes: Any, factor: float = 0.0, *, replacement: Replacement | None = None
) -> list[Any]:
    """Edits that multiply nodes of a graph by ``factor``; by default, that remove them.

    In a contrast graph, what is multiplied is the difference from the baseline: 0 sets a feature to what it is there.
    The edits remember their graph: :func:`intervene` refuses them if another model or dictionary is attached.

    Args:
        graph: the graph.
        nodes: ids or indices, such as those of a supernode.
        factor: what to multiply by; 0 removes.
        replacement: if given, a graph that does not belong to it is refused now.

    Returns:
        One edit for each node, in the same order. A token gives TokenEdit, an error ErrorEdit, and a feature Ablate (if
        ``factor`` is 0) or Scale, or in a contrast graph Set. An empty list of nodes gives an empty list.

    Raises:
        EditError: for an unknown id, and for nodes that nothing can edit: outputs, attention features and biases of
            other programs' graphs, and in a contrast graph all but features.
        PromptError: for an aggregated graph, whose positions are not those of a prompt.
        BelongingError: for a graph that does not belong to ``replacement``.

    Examples:
        >>> tlc.edits_of(graph, ["L0/F308@7", "token@7"], factor=2.0)
        [Scale(layer=0, position=7, feature=308, factor=2.0), TokenEdit(position=7, factor=2.0)]
    """
    graph.prompt_tokens()
    if replacement is not None:
        require_belonging(replacement, graph)
    if not isinstance(nodes, str) and hasattr(nodes, "__len__") and getattr(nodes, "ndim", 1) != 0 and not len(nodes):
        return []
    contrast, baseline = bool(graph.info.compared_with), graph._nodes.baseline
    if contrast and baseline is None:
        raise EditError(
            f"this graph's file does not hold the features' activations in the baseline ({graph.info.compared}), so no "
            "feature can be set back to it. Trace the prompt again, or give values yourself with tlc.Set."
        )
    edits: list[Edit] = []
    for i in node_indices(graph, nodes, EditError):
        layer, position, feature = (int(getattr(graph._nodes, name)[i]) for name in ("layer", "position", "feature"))
        place = Place(Kind(int(graph._nodes.kind[i])), layer, position, feature, graph.sites[i])
        if place.kind == Kind.LOGIT:
            raise EditError(f"{graph.node_ids[i]!r} is an output; edit features, errors or tokens.")
        if contrast and place.kind != Kind.FEATURE:
            raise EditError(
                f"{graph.node_ids[i]!r} has no stored baseline value: a contrast graph keeps baselines of features "
                "only. Name features, or change this node with TokenEdit or ErrorEdit."
            )
        if contrast and baseline is not None:
            usual, own = float(baseline[i]), float(graph._nodes.activation[i])
            value, site = usual + factor * (own - usual), place.site or None
            edits.append(Set(place.layer, place.position, place.feature, value=value, site=site, of=graph.info))
            continue
        edit = edit_of(place, factor, graph.info)
        if edit is None:
            raise EditError(
                f"{graph.node_ids[i]!r} is a node of kind {place.kind.text!r}, which no edit can change; name "
                "features, errors or tokens."
            )
        edits.append(edit)
    return edits
