"""Edits: what to change in a run of the model (features, error terms, tokens, attention), and at which positions."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import Any

from .errors import ArgumentError
from .numbers import real, whole, wholes

Whole = Any
"""A whole number of any library, see :func:`whole`."""

Several = Any
"""A whole number, or several: a list, an array, a column of a frame, a tensor."""

Where = Any
"""One position, several, a slice, or None for all. Negative ones count from the prompt's end."""

Real = Any
"""A finite number of any library, see :func:`real`."""


@dataclass(frozen=True)
class _Edit:
    """What all edits share.

    Numbers may come from NumPy, frames or tensors; they are converted to Python's own. Anything that is not a number is
    kept as it is, so that the run can refuse it with a message that names the edit.

    ``of``: the graph that the edit was made from, if any; the run checks that it fits the attached dictionary.
    """

    of: Any = field(default=None, kw_only=True, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            if name in _TIDIED:
                object.__setattr__(self, name, _tidied(_TIDIED[name], getattr(self, name)))


@dataclass(frozen=True)
class _SiteEdit(_Edit):
    """What edits of a dictionary's features or error share.

    ``site``: which dictionary, if the layer has several: the name of its site, such as ``"resid_post"``.
    """

    site: str | None = field(default=None, kw_only=True)

    def __repr__(self) -> str:
        names = [f.name for f in fields(self) if f.repr and f.name != "site"]
        names += [] if self.site is None else ["site"]
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"


@dataclass(frozen=True, repr=False)
class Ablate(_SiteEdit):
    """Take features out: set their activations to zero.

    Args:
        layer: the features' layer.
        position: where: one position, several, a slice, or None for all; negative ones count from the prompt's end.
        feature: one feature's number, or several.
        site: which dictionary, if the layer has several: the name of its site, such as ``"resid_post"``.

    Examples:
        >>> result = tlc.intervene(replacement, prompt, tlc.Ablate(layer=0, position=7, feature=308), freeze="none")
        >>> austin = model.tokenizer.convert_tokens_to_ids("Austin")
        >>> round(float((result.logits - result.baseline_logits)[-1, austin]), 1)  # change of the answer's logit
        -0.4
    """

    layer: Whole
    position: Where
    feature: Several


@dataclass(frozen=True, repr=False)
class Set(_SiteEdit):
    """Set features' activations to a value.

    Args:
        layer: the features' layer.
        position: where: one position, several, a slice, or None for all; negative ones count from the prompt's end.
        feature: one feature's number, or several.
        value: the new activation.
        site: which dictionary, if the layer has several: the name of its site, such as ``"resid_post"``.

    Examples:
        >>> result = tlc.intervene(replacement, prompt, tlc.Set(0, 7, 308, value=4.0), freeze="all")
        >>> austin = model.tokenizer.convert_tokens_to_ids("Austin")
        >>> round(float((result.logits - result.baseline_logits)[-1, austin]), 1)  # change of the answer's logit
        1.3
    """

    layer: Whole
    position: Where
    feature: Several
    value: Real


@dataclass(frozen=True, repr=False)
class Scale(_SiteEdit):
    """Multiply features' activations by a factor: 0 takes them out, -1 turns them around.

    Args:
        layer: the features' layer.
        position: where: one position, several, a slice, or None for all; negative ones count from the prompt's end.
        feature: one feature's number, or several.
        factor: what the activations are multiplied by.
        site: which dictionary, if the layer has several: the name of its site, such as ``"resid_post"``.

    Examples:
        >>> result = tlc.intervene(replacement, prompt, tlc.Scale(0, 7, 308, factor=-1), freeze="none")
        >>> austin = model.tokenizer.convert_tokens_to_ids("Austin")
        >>> round(float((result.logits - result.baseline_logits)[-1, austin]), 1)  # change of the answer's logit
        -7.3
    """

    layer: Whole
    position: Where
    feature: Several
    factor: Real


@dataclass(frozen=True, repr=False)
class Add(_SiteEdit):
    """Add a number to features' activations.

    Args:
        layer: the features' layer.
        position: where: one position, several, a slice, or None for all; negative ones count from the prompt's end.
        feature: one feature's number, or several.
        value: what is added.
        site: which dictionary, if the layer has several: the name of its site, such as ``"resid_post"``.

    Examples:
        >>> result = tlc.intervene(replacement, prompt, tlc.Add(0, 7, 308, value=1.0), freeze="all")
        >>> austin = model.tokenizer.convert_tokens_to_ids("Austin")
        >>> round(float((result.logits - result.baseline_logits)[-1, austin]), 1)  # change of the answer's logit
        1.1
    """

    layer: Whole
    position: Where
    feature: Several
    value: Real


@dataclass(frozen=True, repr=False)
class Patch(_SiteEdit):
    """Give features the activations that they have at the same positions of another prompt.

    Args:
        layer: the features' layer.
        position: where: one position, several, a slice, or None for all; negative ones count from the prompt's end.
        feature: one feature's number, or several.
        source: the other prompt: text, token ids or a graph.
        site: which dictionary, if the layer has several: the name of its site, such as ``"resid_post"``.

    Examples:
        >>> other = "the capital of the state containing Oakland is"
        >>> patch = tlc.Patch(layer=0, position=7, feature=range(768), source=other)  # a whole layer at the city
        >>> print(tlc.intervene(replacement, prompt, patch, freeze="none").top(1).token.tolist())
        ['Austin', 'Sacramento']
    """

    layer: Whole
    position: Where
    feature: Several
    source: Any


@dataclass(frozen=True, repr=False)
class ErrorEdit(_SiteEdit):
    """Multiply a layer's error term: the part of the MLP's output that the dictionary misses.

    An autoencoder's error is the part that it misses of the tensor at its site.

    Args:
        layer: the layer. Without a dictionary, the whole output of its MLP is error.
        position: where, as for :class:`Ablate`.
        factor: what the error is multiplied by; 0 removes it.
        site: which dictionary, if the layer has several: the name of its site, such as ``"resid_post"``.

    Examples:
        >>> result = tlc.intervene(replacement, prompt, tlc.ErrorEdit(layer=0, position=7), freeze="none")
        >>> austin = model.tokenizer.convert_tokens_to_ids("Austin")
        >>> round(float((result.logits - result.baseline_logits)[-1, austin]), 1)  # change of the answer's logit
        0.1
    """

    layer: Whole
    position: Where
    factor: Real = 0.0


@dataclass(frozen=True)
class TokenEdit(_Edit):
    """Multiply what tokens write to the residual stream: their embeddings.

    Args:
        position: where, as for :class:`Ablate`.
        factor: what the embedding is multiplied by; 0 removes the token.

    Examples:
        >>> result = tlc.intervene(replacement, prompt, tlc.TokenEdit(position=7), freeze="none")
        >>> austin = model.tokenizer.convert_tokens_to_ids("Austin")
        >>> round(float((result.logits - result.baseline_logits)[-1, austin]), 1)  # change of the answer's logit
        -10.7
    """

    position: Where
    factor: Real = 0.0


@dataclass(frozen=True)
class PatternEdit(_Edit):
    """Set how much a head attends from one position to another, after softmax; its other weights stay as they are.

    Args:
        layer: the head's layer.
        head: its number.
        query: the position that attends.
        key: the position that it attends to.
        value: the new attention weight.

    Examples:
        >>> edit = tlc.PatternEdit(layer=3, head=0, query=8, key=7, value=0.0)
        >>> result = tlc.intervene(replacement, prompt, edit, freeze="none")
        >>> austin = model.tokenizer.convert_tokens_to_ids("Austin")
        >>> round(float((result.logits - result.baseline_logits)[-1, austin]), 1)  # change of the answer's logit
        -1.2
    """

    layer: Whole
    head: Whole
    query: Whole
    key: Whole
    value: Real


@dataclass(frozen=True)
class ScoreEdit(_Edit):
    """Add to a head's attention score from one position to another, before softmax and after any soft cap.

    If attention patterns are held in the run, the held weights of this query change as their softmax would.

    Args:
        layer: the head's layer.
        head: its number.
        query: the position that attends.
        key: the position that it attends to.
        value: what is added to the score.

    Examples:
        >>> edit = tlc.ScoreEdit(layer=3, head=0, query=8, key=7, value=-5.0)
        >>> result = tlc.intervene(replacement, prompt, edit, freeze="none")
        >>> austin = model.tokenizer.convert_tokens_to_ids("Austin")
        >>> round(float((result.logits - result.baseline_logits)[-1, austin]), 1)  # change of the answer's logit
        -0.5
    """

    layer: Whole
    head: Whole
    query: Whole
    key: Whole
    value: Real


def one_or_several(value: Any) -> Any:
    """One number as an int, several as a tuple; slices and None are returned as they are."""
    if value is None:
        return None
    if isinstance(value, slice):
        return slice(*(None if end is None else whole(end) for end in (value.start, value.stop, value.step)))
    several = isinstance(value, Iterable) and getattr(value, "ndim", 1) > 0
    return wholes(value) if several else whole(value)


_TIDIED: dict[str, Callable[[Any], Any]] = dict.fromkeys(("layer", "head", "query", "key"), whole)
_TIDIED |= dict.fromkeys(("value", "factor"), real) | dict.fromkeys(("position", "feature"), one_or_several)


def _tidied(tidy: Any, value: Any) -> Any:
    try:
        return tidy(value)
    except ArgumentError:
        return value


HeadEdit = PatternEdit | ScoreEdit
CellEdit = Ablate | Set | Scale | Add | Patch | ErrorEdit | TokenEdit
Edit = CellEdit | HeadEdit
