"""What to explain: logits, differences of logits, directions, or a feature."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuits.errors import TargetError
from tl_circuits.hooks import Replacement, token_text, unembed_weights

TOP_PROBABILITY = 0.95
TOP_COUNT = 10


@dataclass(frozen=True)
class Targets:
    """Quantities whose incoming direct effects are wanted: ``vector · x[position] + bias``.

    ``x`` is layer ``layer``'s dictionary input, or for ``layer == n_layers`` the output of
    ``ln_final``.
    """

    layer: Int[Tensor, " n"]
    position: Int[Tensor, " n"]
    vector: Float[Tensor, "n d_model"]
    bias: Float[Tensor, " n"]

    def __len__(self) -> int:
        return self.layer.numel()

    def to(self, device: torch.device) -> "Targets":
        """The same on another device."""
        return Targets(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))

    def __getitem__(self, index: Int[Tensor, " m"]) -> "Targets":
        return Targets(self.layer[index], self.position[index], self.vector[index], self.bias[index])


@dataclass(frozen=True)
class LogitDifference:
    """The logit of one token minus that of another (token strings or ids)."""

    positive: str | int
    negative: str | int


@dataclass(frozen=True)
class LogitDirection:
    """The final norm's output along any vector of length d_model."""

    vector: Float[Tensor, " d_model"]
    name: str


@dataclass(frozen=True)
class FeatureTarget:
    """The pre-activation of one active feature."""

    layer: int
    position: int
    feature: int


@dataclass(frozen=True)
class LogitTargets:
    """Resolved logit targets at one position.

    ``weights`` say how much each counts when influence is traced back: the probability for
    logits, one for differences and directions. ``token`` is the vocabulary id, -1 where none
    applies. ``value`` is the quantity the incoming edges and the bias add up to.
    """

    vector: Float[Tensor, "target d_model"]
    bias: Float[Tensor, " target"]
    value: Float[Tensor, " target"]
    weights: Float[Tensor, " target"]
    token: tuple[int, ...]
    name: tuple[str, ...]


def token_id(model: Any, token: str | int) -> int:
    """The vocabulary id of a token; raises TargetError unless the text is exactly one token."""
    d_vocab = int(model.cfg.d_vocab)
    if isinstance(token, int):
        if not 0 <= token < d_vocab:
            raise TargetError(f"target token id {token} is not in 0..{d_vocab - 1}.")
        return token
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise TargetError(f"the model has no tokenizer, so give the target {token!r} as a token id.")
    ids = tokenizer(token, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        pieces = [tokenizer.decode([i]) for i in ids]
        hint = f" Did you mean {' ' + token!r}?" if token and not token.startswith(" ") else ""
        raise TargetError(f"the target {token!r} is {len(ids)} tokens {pieces}, expected exactly one.{hint}")
    return int(ids[0])


def resolve_position(position: Any, n_pos: int) -> int:
    """``position`` counted from the start; raises TargetError when outside the prompt or no whole number."""
    try:
        position = operator.index(position)
    except TypeError as error:
        raise TargetError(f"a position is a whole number, got {position!r}.") from error
    if not -n_pos <= position < n_pos:
        raise TargetError(f"position {position} is outside the prompt's {n_pos} tokens (-{n_pos}..{n_pos - 1}).")
    return position % n_pos


def top_logits(logits: Float[Tensor, " d_vocab"]) -> list[int]:
    """The most likely tokens until 95 % of the probability, at most ten."""
    probabilities = logits.float().softmax(-1)
    top = probabilities.topk(min(TOP_COUNT, probabilities.numel()))
    needed = int((top.values.cumsum(-1) < TOP_PROBABILITY).sum()) + 1
    return top.indices[:needed].tolist()


def resolve_logits(
    replacement: Replacement,
    targets: Sequence[Any],
    final: Float[Tensor, " d_model"],
    logits: Float[Tensor, " d_vocab"],
) -> LogitTargets:
    """Vectors, biases and values of logit targets; ``final`` is the final norm's output there.

    A logit is taken minus the mean logit over the vocabulary, before any soft cap (the mean moves
    no probability): ``scale · ((W_U[:, t] - mean W_U)·x + b_U[t] - mean b_U)``.
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
            a, b = token_id(model, target.positive), token_id(model, target.negative)
            (va, ba), (vb, bb) = logit(a), logit(b)
            vector, bias, weight, token = va - vb, ba - bb, 1.0, -1
            name = f"{token_text(model, a)} − {token_text(model, b)}"
        elif isinstance(target, LogitDirection):
            vector = torch.as_tensor(target.vector).to(final.device).float()
            if tuple(vector.shape) != tuple(final.shape):
                raise TargetError(
                    f"the direction {target.name!r} has shape {tuple(vector.shape)}, expected {tuple(final.shape)}."
                )
            bias, weight, token, name = vector.new_zeros(()), 1.0, -1, target.name
        elif isinstance(target, (str, int)) and not isinstance(target, bool):
            token = token_id(model, target)
            vector, bias = logit(token)
            vector, bias = vector - mean_vector, bias - mean_bias
            weight, name = float(probabilities[token]), token_text(model, token)
        else:
            raise TargetError(
                f"a target is a token, a token id, LogitDifference, LogitDirection or one FeatureTarget, got {target!r}."
            )
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
