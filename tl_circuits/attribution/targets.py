"""What a graph explains: logits, differences of logits, directions, or a feature."""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuits.errors import TargetError
from tl_circuits.graph.graph import AttributionGraph
from tl_circuits.hooks import Replacement, is_whole, shown, token_text, unembed_weights, whole

TOP_PROBABILITY = 0.95
TOP_COUNT = 10
LISTED = 3  # tokens that a target's name lists; of more it says the number


@dataclass(frozen=True)
class Targets:
    """Numbers to be explained, each a linear function of one activation: ``vector · x[position] + bias``.

    ``x[position]`` is what the dictionary at place ``place`` reads (its number in the order of the forward pass, which
    is the layer's unless some layer has several dictionaries). Where ``place`` is the number of all places, it is the
    output of the final norm (``ln_final``), which the unembedding reads. Vectors of different widths stand in one
    tensor; the shorter ones end with zeros.
    """

    place: Int[Tensor, " n"]
    position: Int[Tensor, " n"]
    vector: Float[Tensor, "n d_model"]
    bias: Float[Tensor, " n"]

    def __len__(self) -> int:
        return self.place.numel()

    def to(self, device: torch.device) -> "Targets":
        """The same on another device."""
        return Targets(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))

    def __getitem__(self, index: Int[Tensor, " m"]) -> "Targets":
        return Targets(self.place[index], self.position[index], self.vector[index], self.bias[index])


@dataclass(frozen=True)
class LogitDifference:
    """Explain why the model prefers one token to others: the logit of ``positive`` minus the logit of ``negative``.

    Args:
        positive: a token, as text or id.
        negative: the token to compare it with; or several, whose mean logit is taken.

    Raises:
        TargetError: a token is neither text nor a whole number.

    Examples:
        >>> graph = tlc.attribute(replacement, prompt, tlc.LogitDifference("Austin", "Texas"), max_nodes=20)
        >>> graph.info.target_names, round(float(graph.nodes.activation.iloc[-1]), 1)
        (('Austin − Texas',), 7.8)
        >>> target = tlc.LogitDifference("Austin", ["Sacramento", "Salem"])
        >>> graph = tlc.attribute(replacement, prompt, target, max_nodes=20)
        >>> graph.info.target_names
        ('Austin − mean of Sacramento, Salem',)
    """

    positive: Any
    negative: Any

    def __post_init__(self) -> None:
        object.__setattr__(self, "positive", _token(self.positive, "positive"))
        several = (
            isinstance(self.negative, Iterable)
            and not isinstance(self.negative, (str, bytes))
            and getattr(self.negative, "ndim", 1) != 0
        )
        negative = tuple(_token(t, "negative") for t in self.negative) if several else _token(self.negative, "negative")
        if negative == ():
            raise TargetError("LogitDifference: negative is an empty list; give one token or several.")
        object.__setattr__(self, "negative", negative)


def _token(token: Any, which: str) -> Any:
    return (
        token
        if isinstance(token, str)
        else whole(token, f"LogitDifference: the {which} token, unless it is text,", TargetError)
    )


@dataclass(frozen=True, eq=False)
class LogitDirection:
    """Explain how far the final norm's output points along a vector, such as a probe's or a difference of means.

    Args:
        vector: the direction ``[d_model]``. It is used as given, not scaled to length one.
        name: what the graph calls it.

    Examples:
        >>> mean = model.W_U.mean(dim=1)  # the average token
        >>> graph = tlc.attribute(replacement, prompt, tlc.LogitDirection(mean, "average token"), max_nodes=20)
        >>> graph.info.target_names
        ('average token',)
    """

    vector: Float[Tensor, " d_model"]
    name: str


@dataclass(frozen=True)
class FeatureTarget:
    """Explain why one feature is active: its pre-activation, before the dictionary's nonlinearity.

    Args:
        layer: the feature's layer.
        position: the token at which it is active; -1 is the last one.
        feature: its number in the layer's dictionary.
        site: which dictionary, if the layer has several: the name of its site, such as ``"resid_post"``.

    Raises:
        TargetError: layer, position or feature is not a whole number (of Python, NumPy or torch).

    Examples:
        >>> target = tlc.FeatureTarget(layer=2, position=8, feature=603)
        >>> graph = tlc.attribute(replacement, prompt, target, max_nodes=20)
        >>> print(graph.edges[graph.edges.target == "L2/F603@8"].nlargest(2, "weight").round(2).to_string(index=False))
           source    target  weight
        L0/F308@7 L2/F603@8    0.12
          token@2 L2/F603@8    0.05
    """

    layer: Any
    position: Any
    feature: Any
    site: str | None = None

    def __post_init__(self) -> None:
        for name in ("layer", "position", "feature"):
            object.__setattr__(self, name, whole(getattr(self, name), f"FeatureTarget: the {name}", TargetError))


@dataclass(frozen=True)
class LogitTargets:
    """Logit targets at one position, with everything that tracing needs to know about them.

    A target is ``vector · x + bias``, with ``x`` the final norm's output, and ``value`` is what that gives on this
    prompt. ``weights`` say how much influence starts at each target: a token's probability, or one for differences
    and directions. ``token`` is the vocabulary id, -1 for differences and directions.
    """

    vector: Float[Tensor, "target d_model"]
    bias: Float[Tensor, " target"]
    value: Float[Tensor, " target"]
    weights: Float[Tensor, " target"]
    token: tuple[int, ...]
    name: tuple[str, ...]


def as_targets(given: Any) -> list[Any]:
    """One or several targets as a list, with token ids as Python ints; raises TargetError for an empty list."""
    single = (
        isinstance(given, (str, bytes, Mapping)) or not isinstance(given, Iterable) or getattr(given, "ndim", 1) == 0
    )
    found = [given] if single else list(given)
    if not found:
        raise TargetError("targets is an empty list; give at least one target, or None for the likeliest tokens.")
    return [whole(target) if is_whole(target) else target for target in found]


def token_id(model: Any, token: Any) -> int:
    """The vocabulary id of a token; raises TargetError unless the text is exactly one token that the model knows."""
    d_vocab = int(model.cfg.d_vocab)
    if not isinstance(token, str):
        token = whole(token, "a target, unless it is text,", TargetError)
        if not 0 <= token < d_vocab:
            raise TargetError(f"target token id {token} is not in 0..{d_vocab - 1}.")
        return token
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise TargetError(f"the model has no tokenizer, so give the target {token!r} as a token id.")
    ids = tokenizer(token, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        pieces = [tokenizer.decode([i]) for i in ids]
        raise TargetError(
            f"the target {token!r} is {len(ids)} tokens {pieces}, expected exactly one.{_hint(tokenizer, token)}"
        )
    found = int(ids[0])
    text = tokenizer.decode([found])
    if found == getattr(tokenizer, "unk_token_id", None) and token != tokenizer.unk_token:
        raise TargetError(
            f"the target {token!r} is not in the model's vocabulary: its tokenizer reads it as the unknown token "
            f"{tokenizer.unk_token!r}.{_hint(tokenizer, token)}"
        )
    if text and _bare(text) != _bare(token):
        raise TargetError(
            f"the model's tokenizer reads the target {token!r} as {text!r}; give that text, or the id {found}, if it "
            "is meant."
        )
    return found


def kept_vector(replacement: Replacement, graph: AttributionGraph, node: int) -> Float[Tensor, " d_model"] | None:
    """What a logit node of a graph reads of the final norm's output.

    None if it is no logit, or is a difference or direction of a graph whose file does not say what it reads.
    """
    return kept_vectors(replacement, graph, [node])[0]


def kept_vectors(
    replacement: Replacement, graph: AttributionGraph, nodes: Sequence[int]
) -> list[Float[Tensor, " d_model"] | None]:
    """:func:`kept_vector` of several nodes; the mean over the vocabulary is computed once for all."""
    mean: Tensor | None = None
    found: list[Tensor | None] = []
    logits = graph.is_kind("logit")
    for node in nodes:
        token = int(graph._nodes.feature[node])
        if not logits[node]:
            found.append(None)
        elif token < 0:
            first = int(logits.nonzero()[0])
            found.append(None if graph.target_vectors is None else graph.target_vectors[node - first])
        else:
            mean = replacement.mean_unembedding[0] if mean is None else mean
            vector = unembed_weights(replacement.model).columns(torch.tensor([token]))[:, 0]
            found.append(vector - mean.to(vector.device))
    return found


def _names(model: Any, tokens: Sequence[int]) -> str:
    """Several tokens in a target's name: their texts if they are few, else their number."""
    different = list(dict.fromkeys(tokens))
    few = len(different) <= LISTED
    return "mean of " + (
        ", ".join(token_text(model, t).strip() for t in different) if few else f"{len(different)} tokens"
    )


def _hint(tokenizer: Any, token: str) -> str:
    """A sentence that suggests what may have been meant by a text that is no token; empty if there is no guess."""
    before, minus, after = token.partition(" - ")
    if minus and before.strip() and after.strip():
        return f" For a difference of two logits give tlc.LogitDifference({before!r}, {_like(before, after)!r})."
    spaced = (
        tokenizer(f" {token}", add_special_tokens=False)["input_ids"] if token and not token.startswith(" ") else []
    )
    known = len(spaced) == 1 and spaced[0] != getattr(tokenizer, "unk_token_id", None)
    return f" Did you mean {' ' + token!r}?" if known else ""


def _like(before: str, after: str) -> str:
    """``after``, with a space put in front if ``before`` starts with one."""
    return f" {after}" if before.startswith(" ") and not after.startswith(" ") else after


def _bare(text: str) -> str:
    """A text without what tokenizers may change: spaces around it, case, and how accented letters are encoded."""
    return unicodedata.normalize("NFKC", text).strip().casefold()


_QUOTED = re.compile(r'\s*"(?P<positive>[^"]+)"\s+-\s+"(?P<negative>[^"]+)"\s*')


def parse_target(text: str) -> str | LogitDifference:
    """A target as written on a command line or in a file: a token, or ``A - B`` for a difference of two logits.

    If A starts with a space, as tokens that begin a word do, B gets one too. In quotes (``"A" - "B"``) both are
    taken exactly as written.

    Examples:
        >>> parse_target(" big - large")
        LogitDifference(positive=' big', negative=' large')
        >>> parse_target(" big")
        ' big'
    """
    quoted = _QUOTED.fullmatch(text)
    if quoted is not None:
        return LogitDifference(quoted["positive"], quoted["negative"])
    before, minus, after = text.partition(" - ")
    if not minus or not before.strip() or not after.strip():
        return text
    return LogitDifference(before, _like(before, after))


def resolve_position(position: Any, n_pos: int) -> int:
    """``position`` counted from the start; raises TargetError when outside the prompt or no whole number."""
    position = whole(position, "a position", TargetError)
    if not -n_pos <= position < n_pos:
        raise TargetError(f"position {position} is outside the prompt's {n_pos} tokens (-{n_pos}..{n_pos - 1}).")
    return position % n_pos


def top_logits(logits: Float[Tensor, " d_vocab"]) -> list[int]:
    """Ids of the most likely tokens: so many that their probabilities sum to 95 %, at most ten."""
    probabilities = logits.float().softmax(-1)
    top = probabilities.topk(min(TOP_COUNT, probabilities.numel()))
    needed = int((top.values.cumsum(-1) < TOP_PROBABILITY).sum()) + 1
    return top.indices[:needed].tolist()


def _direction(target: LogitDirection, final: Float[Tensor, " d_model"]) -> Float[Tensor, " d_model"]:
    """The vector of a direction in float32.

    Raises:
        TargetError: it is no vector of ``d_model`` real, finite numbers, or its name is no text.
    """
    if not isinstance(target.name, str):
        raise TargetError(f"LogitDirection's name is {shown(target.name)}, expected a text.")
    what = f"the direction {target.name!r}"
    try:
        vector = torch.as_tensor(target.vector).detach().to(final.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TargetError(f"{what} is no vector of numbers: got {shown(target.vector)}.") from error
    if vector.is_complex():
        raise TargetError(f"{what} has complex numbers, expected real ones.")
    if tuple(vector.shape) != tuple(final.shape):
        raise TargetError(f"{what} has shape {tuple(vector.shape)}, expected {tuple(final.shape)}.")
    vector = vector.float()
    if not bool(vector.isfinite().all()):
        raise TargetError(f"{what} holds NaN or infinity.")
    # The square of a number is the largest that anything computed from it comes to.
    if not bool(vector.square().sum().isfinite()) or not bool((vector @ final.float()).isfinite()):
        raise TargetError(
            f"{what} is too long for float32 (its largest number is {float(vector.abs().max()):.1e}). Scale it down."
        )
    return vector


def resolve_logits(
    replacement: Replacement,
    targets: Sequence[Any],
    final: Float[Tensor, " d_model"],
    logits: Float[Tensor, " d_vocab"],
) -> LogitTargets:
    """Turn logit targets into vectors, biases and values.

    A token's target is its logit minus the mean logit over the vocabulary, before any soft cap:
    ``scale · ((W_U[:, t] - mean W_U)·x + b_U[t] - mean b_U)``. The mean is taken away because adding the same number
    to all logits changes no probability (Ameisen et al. 2025 do the same).

    Args:
        replacement: the model and its dictionary.
        targets: tokens, ids, LogitDifferences and LogitDirections.
        final: ``x``, the final norm's output at the position that is explained.
        logits: the model's logits there; they give the tokens' probabilities.

    Raises:
        TargetError: a target is none of these, or is not known to the model.
    """
    model = replacement.model
    unembed = unembed_weights(model)
    probabilities = logits.float().softmax(-1)
    mean_vector, mean_bias = (mean.to(final.device) for mean in replacement.mean_unembedding)

    def logit(token: int) -> tuple[Tensor, Tensor]:
        vector, bias = unembed.columns(torch.tensor([token]))[:, 0], unembed.b_U[token].float() * unembed.scale
        return vector.to(final.device), bias.to(final.device)

    vectors, biases, weights, tokens, names = [], [], [], [], []
    for target in targets:
        if isinstance(target, LogitDifference):
            several = isinstance(target.negative, tuple)
            a = token_id(model, target.positive)
            negative = [token_id(model, t) for t in (target.negative if several else (target.negative,))]
            if a in negative:
                text = token_text(model, a)
                raise TargetError(f"{target} is the difference of the token {text!r} and itself, which is zero.")
            (va, ba), others = logit(a), [logit(b) for b in negative]
            vector = va - torch.stack([vb for vb, _ in others]).mean(0)
            bias, weight, token = ba - torch.stack([bb for _, bb in others]).mean(0), 1.0, -1
            name = f"{token_text(model, a)} − {_names(model, negative) if several else token_text(model, negative[0])}"
        elif isinstance(target, LogitDirection):
            vector = _direction(target, final)
            bias, weight, token, name = vector.new_zeros(()), 1.0, -1, target.name
        elif isinstance(target, str) or is_whole(target):
            token = token_id(model, target)
            vector, bias = logit(token)
            vector, bias = vector - mean_vector, bias - mean_bias
            weight, name = float(probabilities[token]), token_text(model, token)
        else:
            raise TargetError(
                "a target is a token, a token id, LogitDifference, LogitDirection or one FeatureTarget, got "
                f"{shown(target)}."
            )
        if token != -1 and token in tokens:
            raise TargetError(f"the target {name!r} is given twice; leave one out.")
        vectors.append(vector)
        biases.append(bias)
        weights.append(weight)
        tokens.append(token)
        names.append(name)
    vector, bias = torch.stack(vectors), torch.stack(biases)
    return LogitTargets(
        vector=vector,
        bias=bias,
        value=vector @ final.float() + bias,
        weights=torch.tensor(weights, device=vector.device),
        token=tuple(tokens),
        name=tuple(names),
    )
