"""A baseline made from texts: what the model and its dictionary do on average, whatever the position."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm

from tl_circuits.attribution.aligned_prompts import as_prompts
from tl_circuits.attribution.baseline import LayerMean, PositionMeans
from tl_circuits.attribution.sources import Sources, add_decoded
from tl_circuits.dictionaries.base import LayerActive
from tl_circuits.dictionaries.belonging import Origin, difference_of, origin_of
from tl_circuits.errors import BaselineError, GraphFileError
from tl_circuits.graph.storage import read_sample
from tl_circuits.hooks import (
    Replacement,
    by_place,
    collect_sites,
    first_tokens,
    flat,
    in_turn,
    model_device,
    places,
    plain_ids,
    to_tokens,
    without_first,
)
from tl_circuits.support.checked import checked
from tl_circuits.support.files import atomic_file

FORMAT = "tl_circuits.baseline"
COMMON = 0.1  # a feature that is silent here becomes a node if it is active on so large a share of the texts' tokens
_BATCH = 8


@dataclass(frozen=True, eq=False)
class Baseline:
    """What a model and its dictionary do on average over texts; :func:`make_baseline` makes one.

    Attributes:
        name: what it was made from, in a few words.
        origin: the model and the dictionary, by name and by some numbers from their weights.
        n_tokens: how many tokens were counted.
        first: ids of the special tokens before each text, which are not counted.
        embedding: mean input of block 0, ``[d_model]``.
        activation: by layer (by place, numbered in the order of the forward pass, if some layer has several
            dictionaries), each feature's mean activation, ``[feature]``; of autoencoders that normalise their input,
            the mean of the activation times the input's own factor, which is what is written.
        frequency: likewise, the share of tokens on which each feature is active, ``[feature]``.
        error: likewise, the mean of what features do not rebuild (of the whole MLP output in a layer without features),
            ``[d_out]``.

    Examples:
        >>> baseline = tlc.make_baseline(replacement, ["Miami is in Florida .", "Oakland is in California ."])
        >>> baseline
        Baseline('2 texts, 10 tokens')
        >>> graph = tlc.attribute(replacement, "Dallas is in", baseline=baseline, max_nodes=20)
        >>> graph.info.compared_with
        ('2 texts, 10 tokens',)
        >>> tlc.Baseline.load(baseline.save(folder / "mean.safetensors")).n_tokens
        10
    """

    name: str
    origin: Origin
    n_tokens: int
    first: tuple[int, ...]
    embedding: Float[Tensor, " d_model"]
    activation: dict[int, Float[Tensor, " feature"]]
    frequency: dict[int, Float[Tensor, " feature"]]
    error: dict[int, Float[Tensor, " d_out"]]

    def save(self, path: str | Path, overwrite: bool = False) -> Path:
        """Write the baseline to one safetensors file.

        Args:
            path: such as ``mean.safetensors``.
            overwrite: whether to replace a file that exists.

        Returns:
            The path.

        Raises:
            OutputError: if it cannot be written, or exists and ``overwrite`` is False.

        Examples:
            >>> baseline = tlc.make_baseline(replacement, ["Miami is in Florida .", "Oakland is in California ."])
            >>> baseline.save(folder / "mean.safetensors").name
            'mean.safetensors'
        """
        tensors = {"embedding": self.embedding}
        for part in _PARTS:
            tensors |= {f"{part}.{layer}": t for layer, t in getattr(self, part).items()}
        content = {"name": self.name, "origin": self.origin._asdict(), "n_tokens": self.n_tokens, "first": self.first}
        # One key only: safetensors writes several in no fixed order.
        data = save(
            {n: t.contiguous().cpu() for n, t in tensors.items()}, {FORMAT: json.dumps(content, sort_keys=True)}
        )
        with atomic_file(Path(path), overwrite) as file:
            file.write(data)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> "Baseline":
        """Read a baseline that :meth:`save` wrote.

        Args:
            path: the file.

        Returns:
            The baseline.

        Raises:
            GraphFileError: if the file is missing, damaged, or no baseline.

        Examples:
            >>> baseline = tlc.make_baseline(replacement, ["Miami is in Florida .", "Oakland is in California ."])
            >>> tlc.Baseline.load(baseline.save(folder / "mean.safetensors"))
            Baseline('2 texts, 10 tokens')
        """
        path = Path(path)
        if not path.is_file():
            raise GraphFileError(f"there is no baseline file {path}.")
        try:
            with safe_open(path, framework="pt") as file:
                content = json.loads((file.metadata() or {})[FORMAT])
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            origin = content["origin"]
            origin = Origin(origin["model"], origin["dictionary"], origin["n_layers"], read_sample(origin["sample"]))
            parts: dict[str, dict[int, Tensor]] = {part: {} for part in _PARTS}
            for name, tensor in tensors.items():
                part, _, layer = name.partition(".")
                if part in parts:
                    parts[part][int(layer)] = tensor
            first = tuple(map(int, content["first"]))
            return cls(str(content["name"]), origin, int(content["n_tokens"]), first, tensors["embedding"], **parts)
        except Exception as error:  # whatever a damaged file makes the reader raise
            raise GraphFileError(
                f"{path} is not a baseline of tl_circuits: {type(error).__name__}: {error}."
            ) from error

    def __repr__(self) -> str:
        return f"Baseline({self.name!r})"


_PARTS = ("activation", "frequency", "error")


@checked
@in_turn
def make_baseline(replacement: Replacement, texts: Any, *, context: int = 128, progress: bool = True) -> Baseline:
    """Run texts through the model, and average what its features do, whatever the position.

    The result is a ``baseline=`` for :func:`attribute`: every source of a prompt then counts by how it differs from
    what is usual in these texts. The first position of each piece of text is not counted, since models treat it unlike
    all others; nor are special tokens before it. NaN and infinity are not looked for here: :func:`attribute` refuses a
    baseline that holds them.

    Args:
        replacement: the model with a dictionary attached.
        texts: one text or several, as text or as token ids. Each is cut into pieces of ``context`` tokens.
        context: tokens in one piece, at least 2.
        progress: show a progress bar on stderr.

    Returns:
        The means, by feature and for embeddings and errors.

    Raises:
        BaselineError: for texts without tokens, or a ``context`` below 2.
        PromptError: for token ids that the model does not have, or a list of them that is longer than its context.
        AttachError: if the replacement was detached.

    Examples:
        >>> baseline = tlc.make_baseline(replacement, ["Miami is in Florida .", "Oakland is in California ."])
        >>> baseline.n_tokens, tuple(baseline.activation[0].shape)
        (10, (768,))
    """
    replacement.require_attached()
    if context < 2:
        raise BaselineError(f"context must be at least 2 tokens, got {context}.")
    texts = as_prompts(texts)
    tokenizer = getattr(replacement.model, "tokenizer", None)
    first = () if tokenizer is None else tuple(first_tokens(replacement.model, replacement.dictionary.prompt_rule))
    sums = _Sums(replacement, len(first) or 1)
    for piece in tqdm(list(_pieces(replacement.model, texts, first, context)), desc="baseline", disable=not progress):
        sums.add(piece)
    if not sums.count:
        raise BaselineError("the texts hold no tokens beyond the first of each, so there is nothing to average.")
    counted = f"{len(texts)} text{'' if len(texts) == 1 else 's'}, {sums.count:,} tokens"
    return sums.means(counted, first)


def _pieces(
    model: Any, texts: Sequence[Any], first: tuple[int, ...], context: int
) -> Iterator[Int[Tensor, "batch pos"]]:
    """Batches of pieces of one length, each after the special tokens."""
    waiting: dict[int, list[list[int]]] = {}
    for text in texts:
        plain = isinstance(text, str) and getattr(model, "tokenizer", None) is not None
        ids = without_first(plain_ids(model.tokenizer, text) if plain else to_tokens(model, text).tolist(), first)
        for start in range(0, len(ids), context):
            piece = [*first, *ids[start : start + context]]
            waiting.setdefault(len(piece), []).append(piece)
    for _, pieces in sorted(waiting.items()):
        for start in range(0, len(pieces), _BATCH):
            yield torch.tensor(pieces[start : start + _BATCH])


class _Sums:
    """Sums over tokens of what a model and its dictionary do; ``skip`` first positions of each piece do not count."""

    def __init__(self, replacement: Replacement, skip: int):
        self._replacement, self._skip = replacement, skip
        dictionary, n_layers = by_place(replacement.dictionary), int(replacement.model.cfg.n_layers)
        self._dictionary = dictionary
        self._reads = {place: dictionary.input_hook(place) for place in dictionary.layers}
        self._writes = {
            place: dictionary.output_hook(place) if place in self._reads else f"blocks.{where.layer}.hook_mlp_out"
            for place, where in enumerate(places(dictionary, n_layers))
            if place in self._reads or dictionary.mlps == "error"  # passed MLPs write nothing of their own
        }
        self.count = 0
        self._acts: dict[int, Tensor] = {}
        self._active: dict[int, Tensor] = {}
        self._sites: dict[str, Tensor] = {}
        self._constants: dict[int, Tensor] = {}  # of places whose constant is not the same on all inputs

    def add(self, tokens: Int[Tensor, "batch pos"]) -> None:
        """Run a batch of pieces and add it up."""
        if tokens.shape[1] <= self._skip:
            return  # a last piece of nothing but positions that are left out
        model, dictionary = self._replacement.model, self._dictionary
        names = list(dict.fromkeys([_STREAM, *self._reads.values(), *self._writes.values()]))
        seen = collect_sites(model, tokens.to(model_device(model)), names)
        counted = {name: flat(tensor)[:, self._skip :].flatten(0, 1).float() for name, tensor in seen.items()}
        with torch.no_grad():
            for name, tensor in counted.items():
                _add(self._sites, name, tensor.sum(0))
            for place, name in self._reads.items():
                x = counted[name]
                acts = dictionary.activate(place, dictionary.pre_activations(place, x), x).float()
                scale = dictionary.written_scale(place, x)
                if scale is not None:
                    acts = acts * scale[:, None]
                    _add(self._constants, place, dictionary.constant_on(place, x).sum(0))
                _add(self._acts, place, acts.sum(0))
                _add(self._active, place, (acts != 0).float().sum(0))
        self.count += len(counted[_STREAM])

    def means(self, name: str, first: tuple[int, ...]) -> Baseline:
        """The means over all tokens counted."""
        dictionary, n = self._dictionary, self.count
        acts = {place: total / n for place, total in self._acts.items()}
        sites = {site: total / n for site, total in self._sites.items()}
        errors = {}
        for place, site in self._writes.items():
            if place not in self._reads:
                errors[place] = sites[site]
            elif place in self._constants:  # the decoders' outputs were multiplied by each input's own factor
                every = torch.arange(dictionary.width(place), device=acts[place].device)
                decoded = acts[place] @ dictionary.decoder_vectors(place, every, place).float()
                errors[place] = sites[site] - self._constants[place] / n - decoded
            elif not dictionary.exact:
                # Reconstructions are affine in activations and input, so the mean of them is that of the means.
                writers = {w: acts[w].to(sites[site].device) for w in dictionary.writers(place)}
                errors[place] = sites[site] - dictionary.decode(place, writers, sites[self._reads[place]])
        share = {place: total / n for place, total in self._active.items()}
        return Baseline(name, origin_of(self._replacement), n, first, sites[_STREAM], acts, share, errors)


_STREAM = "blocks.0.hook_resid_pre"


def _add(into: dict[Any, Tensor], at: Any, more: Tensor) -> None:
    into[at] = into[at] + more if at in into else more


def require_baseline_fits(replacement: Replacement, baseline: Baseline) -> None:
    """Raise BaselineError unless ``baseline`` is of the attached model and dictionary, and finite."""
    origin = origin_of(replacement)
    why = difference_of(origin, baseline.origin)
    if why is not None:
        raise BaselineError(
            f"the baseline is of the dictionary {baseline.origin.dictionary!r} on {baseline.origin.model!r}, and "
            f"attached is {origin.dictionary!r} on {origin.model!r}: {why}. Make one with what is attached: "
            "tlc.make_baseline."
        )
    parts = {"embedding": baseline.embedding}
    for part in _PARTS:
        parts |= {f"{part} of layer {layer}": tensor for layer, tensor in getattr(baseline, part).items()}
    broken = next((name for name, tensor in parts.items() if not bool(torch.isfinite(tensor).all())), None)
    if broken is not None:
        raise BaselineError(
            f"the baseline {baseline.name!r} holds NaN or infinity ({broken}). Make it again from other texts."
        )


def text_means(sources: Sources, baseline: Baseline) -> PositionMeans:
    """The baseline's means at every position of a prompt.

    At each position, the features listed are those active there and those that the texts often activate. What all
    others write on average is left out on both sides, so sums hold.
    """
    layers = tuple(_layer_mean(sources, baseline, place) for place in range(len(sources.layers)))
    return PositionMeans(baseline.embedding.to(sources.home).expand(sources.n_pos, -1), layers)


def _layer_mean(sources: Sources, baseline: Baseline, place: int) -> LayerMean:
    source, dictionary = sources.layers[place], sources.dictionary
    error = None
    if source.error is not None:
        error = baseline.error[place].to(source.error.device).expand(sources.n_pos, -1)
    written = torch.zeros_like(source.constant) if error is None else error.clone()
    if place not in dictionary.layers:
        none = torch.empty(0, dtype=torch.long, device=written.device)
        return LayerMean(none, none, written.new_empty(0), error, written)
    for writer in dictionary.writers(place):
        position, feature, mean = _listed(sources, baseline, writer)
        add_decoded(written, dictionary, writer, place, LayerActive(position, feature, mean, mean))
    return LayerMean(*_listed(sources, baseline, place), error, written)


def _listed(sources: Sources, baseline: Baseline, place: int) -> tuple[Tensor, Tensor, Tensor]:
    """Positions, features and means of those that are active at a position, or often active in the texts."""
    active = sources.layers[place].active
    device, mean = active.position.device, baseline.activation[place]
    usual = (baseline.frequency[place] >= COMMON).nonzero()[:, 0].to(device)
    width = len(mean)
    everywhere = torch.arange(sources.n_pos, device=device)[:, None] * width + usual
    keys = torch.cat([active.position * width + active.feature, everywhere.flatten()]).unique()
    return keys // width, keys % width, mean.to(device)[keys % width]


def shared_first(tokens: Int[Tensor, " pos"], baseline: Baseline) -> int:
    """How many tokens at its start the prompt shares with all pieces of the texts."""
    first = baseline.first
    return len(first) if tuple(tokens[: len(first)].tolist()) == first else 0
