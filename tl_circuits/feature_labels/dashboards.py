"""Feature files for your own dictionary: what its features do over a corpus. Streamed, and resumed after an
interruption.
"""

import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm.auto import tqdm

from tl_circuits.dictionaries.base import ranges
from tl_circuits.dictionaries.belonging import origin_of
from tl_circuits.dictionaries.several_sites import refuse_several
from tl_circuits.errors import OutputError, PromptError
from tl_circuits.feature_labels.directions import written_directions
from tl_circuits.feature_labels.feature_files import FeatureFiles, write_index, write_layer, write_origin
from tl_circuits.feature_labels.running_top import RunningTop
from tl_circuits.graph.storage import read_sample
from tl_circuits.hooks import (
    Replacement,
    collect_sites,
    first_difference,
    first_tokens,
    flat,
    in_turn,
    model_device,
    plain_ids,
    token_text,
    unembed_weights,
    without_first,
)
from tl_circuits.models import sha256
from tl_circuits.support.checked import checked
from tl_circuits.support.files import atomic_file

_PIECE = 1 << 18  # characters read from a text at once
_SHARES = (0.5, 0.9, 0.99, 0.999)
_FEATURES_AT_ONCE = 128
_LOGITS = 10


@checked
@in_turn
def make_dashboards(
    replacement: Replacement,
    texts: Sequence[str | Path],
    folder: str | Path,
    *,
    layers: Sequence[int] | None = None,
    context: int = 64,
    examples: int = 10,
    batch: int = 16,
    max_tokens: int | None = None,
    save_every: float = 60.0,
    progress: bool = True,
) -> FeatureFiles:
    """Run text files through the model and write down what each feature does, into ``folder/features``.

    For each feature, the files hold its strongest examples, a histogram of its activations, and the tokens that its
    decoder promotes and suppresses. The text is cut into pieces of ``context`` tokens. Before each piece stands the
    special token that a traced text gets; it is not counted. Neurons can be negative and are ranked by absolute value.

    Memory depends on the number of features, on ``examples`` and on ``context``, not on the corpus. If a call is
    interrupted, call again with the same arguments: it goes on from its last save and gives the same files.

    Args:
        replacement: the model with the dictionary attached.
        texts: the text files.
        folder: where to write.
        layers: which layers; None for all layers with a dictionary.
        context: tokens in one example.
        examples: how many examples to keep for each feature.
        batch: how many pieces to run at once.
        max_tokens: stop after this many tokens.
        save_every: seconds between saves.
        progress: show a progress bar on stderr.

    Returns:
        The files, to read records and labels from.

    Raises:
        PromptError: for texts that are missing or empty.
        OutputError: for a folder that holds the beginning of another run.
        DictionaryError: if some layer has several dictionaries.
        ValueError: for a layer without a dictionary.

    Examples:
        >>> (folder / "corpus.txt").write_text("the state containing Dallas is Texas . " * 10)
        390
        >>> files = tlc.make_dashboards(replacement, [folder / "corpus.txt"], folder, layers=[0], progress=False)
        >>> record = files.read(0, 308)
        >>> files.layers, len(record["top_logits"]), round(record["act_max"], 1)
        ([0], 10, 2.8)
    """
    replacement.require_attached()
    dictionary = replacement.dictionary
    refuse_several(dictionary, "feature files are written")
    chosen = list(dictionary.layers) if layers is None else sorted(layers)
    unknown = [layer for layer in chosen if layer not in dictionary.layers]
    if unknown:
        raise ValueError(f"layer {unknown[0]} has no dictionary; there are {ranges(dictionary.layers)}.")
    out = Path(folder) / "features"
    out.mkdir(parents=True, exist_ok=True)
    run = _Run(replacement, [Path(t) for t in texts], out / ".unfinished", chosen, context, examples, max_tokens)
    with tqdm(total=max_tokens, desc="dashboards", unit="token", disable=not progress) as bar:
        bar.update(run.done * context)
        saved = time.monotonic()
        for pieces in run.batches(batch):
            run.take(pieces)
            bar.update(int((pieces >= 0).sum()))
            if time.monotonic() - saved > save_every:
                run.save()
                saved = time.monotonic()
    if run.done == 0:
        raise PromptError("the texts hold no tokens.")
    entries = {layer: write_layer(out, layer, run.records(layer)) for layer in chosen}
    write_origin(out, origin_of(replacement))
    write_index(out, entries)
    run.close()
    return FeatureFiles(Path(folder))


class _Run:
    """A run, with its state on disk: the sums of each layer, and the tokens of all pieces seen so far."""

    def __init__(
        self,
        replacement: Replacement,
        texts: list[Path],
        folder: Path,
        layers: list[int],
        context: int,
        examples: int,
        max_tokens: int | None,
    ):
        self.replacement, self.texts, self.folder, self.layers = replacement, texts, folder, layers
        self.context, self.max_tokens, self.done = context, max_tokens, 0
        width = replacement.dictionary.width
        self.tops = {layer: RunningTop.empty(width(layer), examples, context) for layer in layers}
        for path in texts:
            if not path.is_file():
                raise PromptError(f"there is no text file {path}.")
        # What stands before every piece, as before a traced text; it is left out of what is counted.
        self.first = first_tokens(replacement.model, replacement.dictionary.prompt_rule)
        self._resume({"context": context, "examples": examples, "max_tokens": max_tokens})

    def _resume(self, settings: dict[str, Any]) -> None:
        dictionary = self.replacement.dictionary
        settings |= {"layers": {str(layer): dictionary.width(layer) for layer in self.layers}}
        settings |= {"model": str(self.replacement.model.cfg.model_name), "dictionary": dictionary.name}
        settings |= {"texts": [[p.name, sha256(p)] for p in self.texts]}
        mark = self.folder / "settings.json"
        begun = json.loads(mark.read_text()) if mark.is_file() else settings
        other = first_difference(read_sample(begun.pop("sample", ())), self.replacement.sample)
        if begun != settings or other is not None:
            raise OutputError(f"{self.folder} holds the beginning of another run. Take another folder, or remove it.")
        self.folder.mkdir(exist_ok=True)
        with atomic_file(mark, overwrite=True) as file:
            file.write(json.dumps(settings | {"sample": self.replacement.sample}).encode())
        state = self.folder / "state.safetensors"
        if state.is_file():
            try:
                tensors = load_file(state)
            except SafetensorError as error:
                raise OutputError(f"{state} is damaged ({error}). Remove {self.folder} to start again.") from error
            self.done = int(tensors.pop("done"))
            for layer, top in self.tops.items():
                for column in fields(top):
                    setattr(top, column.name, tensors[f"{layer}.{column.name}"])
        self._tokens = (self.folder / "tokens.i32").open("r+b" if (self.folder / "tokens.i32").exists() else "w+b")
        self._tokens.truncate(self.done * self.context * 4)
        self._tokens.seek(0, os.SEEK_END)

    def save(self) -> None:
        """Write the state, whole or not at all."""
        self._tokens.flush()
        tensors = {f"{layer}.{name}": t for layer, top in self.tops.items() for name, t in top.tensors().items()}
        with atomic_file(self.folder / "state.safetensors", overwrite=True) as file:
            file.write(save({name: t.contiguous() for name, t in tensors.items()} | {"done": torch.tensor(self.done)}))

    def close(self) -> None:
        """Delete the state; the files are written."""
        self._tokens.close()
        shutil.rmtree(self.folder)

    def batches(self, size: int) -> Iterator[Int[Tensor, "batch pos"]]:
        """The pieces still to do, one batch at a time. The last piece is filled up with -1."""
        pieces, limit = [], None if self.max_tokens is None else max(1, self.max_tokens // self.context)
        for number, piece in enumerate(self._pieces()):
            if limit is not None and number >= limit:
                break
            if number < self.done:
                continue
            pieces.append(piece)
            if len(pieces) == size:
                yield torch.tensor(pieces)
                pieces = []
        if pieces:
            yield torch.tensor(pieces)

    def _pieces(self) -> Iterator[list[int]]:
        tokenizer, rest = self.replacement.model.tokenizer, []
        for path in self.texts:
            with path.open(encoding="utf-8", errors="replace") as file:
                starts = True
                while text := file.read(_PIECE):
                    text += file.readline()  # up to the line's end, so that no word is cut
                    ids = plain_ids(tokenizer, text)
                    rest += without_first(ids, self.first) if starts else ids
                    starts = False
                    while len(rest) >= self.context:
                        yield rest[: self.context]
                        rest = rest[self.context :]
        if rest:
            yield rest + [-1] * (self.context - len(rest))

    def take(self, pieces: Int[Tensor, "batch pos"]) -> None:
        """Run a batch of pieces, and add what the features of every layer do."""
        model, dictionary = self.replacement.model, self.replacement.dictionary
        counted = pieces >= 0
        tokens = pieces.clamp_min(0)
        tokens = torch.cat([torch.tensor(self.first, dtype=torch.long).expand(len(tokens), -1), tokens], 1)
        names = [dictionary.input_hook(layer) for layer in self.layers]
        seen = collect_sites(model, tokens.to(model_device(model)), names)
        with torch.no_grad():
            for layer, name in zip(self.layers, names, strict=True):
                x = flat(seen[name])[:, len(self.first) :]
                acts = dictionary.activate(layer, dictionary.pre_activations(layer, x), x)
                self.tops[layer].add(acts, counted, self.done)
        self._tokens.write(pieces.to(torch.int32).numpy().tobytes())
        self.done += len(pieces)

    def records(self, layer: int) -> Iterator[dict[str, Any] | None]:
        """The record of every feature, in order; None for features that were never active."""
        model, dictionary, top = self.replacement.model, self.replacement.dictionary, self.tops[layer]
        self._tokens.flush()
        pieces = np.asarray(np.memmap(self._tokens.name, dtype=np.int32, mode="r")).reshape(-1, self.context)
        n_tokens = max(1, int(top.tokens))
        W_U = unembed_weights(model).W_U
        texts, rounded = _Texts(model), _four_digits()
        for start in range(0, dictionary.width(layer), _FEATURES_AT_ONCE):
            features = torch.arange(start, min(start + _FEATURES_AT_ONCE, dictionary.width(layer)))
            sign = torch.where(top.high[features] >= -top.low[features], 1.0, -1.0)
            with torch.no_grad():
                written = written_directions(model, dictionary, layer, features.to(W_U.device)) * sign[:, None].to(
                    W_U.device
                )
                effects = (written.to(W_U.dtype) @ W_U).float()
            up, down = (e.topk(min(_LOGITS, e.shape[1])).indices.tolist() for e in (effects, -effects))
            quantiles, counts = top.quantiles(features, _SHARES), top.counts[features].tolist()
            for row, feature in enumerate(features.tolist()):
                if float(top.strength[0, feature]) == 0:
                    yield None
                    continue
                yield {
                    "transcoder_id": dictionary.name,
                    "index": feature,
                    "examples_quantiles": [
                        {
                            "quantile_name": "Top activations",
                            "examples": _examples(top, feature, pieces, texts, rounded),
                        }
                    ],
                    "top_logits": [texts[i] for i in up[row]],
                    "bottom_logits": [texts[i] for i in down[row]],
                    "act_min": float(top.low[feature]),
                    "act_max": float(top.high[feature]),
                    "quantile_values": quantiles[row],
                    "histogram": [c / n_tokens for c in counts[row]],
                    "histogram_range": float(top.range[feature]),
                    "activation_frequency": sum(counts[row]) / n_tokens,
                }


class _Texts(dict[int, str]):
    """The texts of tokens, decoded once each."""

    def __init__(self, model: Any):
        super().__init__()
        self._model = model

    def __missing__(self, token: int) -> str:
        self[token] = token_text(self._model, token)
        return self[token]


def _four_digits() -> Float[np.ndarray, " half"]:
    """Every half-precision number rounded to four digits, indexed by its sixteen bits. Looking up is faster than
    rounding.
    """
    return np.array([float(f"{v:.4g}") for v in np.arange(2**16, dtype=np.uint16).view(np.float16).tolist()])


def _examples(
    top: RunningTop,
    feature: int,
    pieces: Int[np.ndarray, "piece pos"],
    texts: _Texts,
    rounded: Float[np.ndarray, " half"],
) -> list[dict[str, Any]]:
    """A feature's strongest pieces, strongest first."""
    numbers = [number for number in top.context[:, feature].tolist() if number >= 0]
    windows = rounded[top.window[: len(numbers), feature].numpy().view(np.uint16)]
    places = np.abs(windows).argmax(1).tolist()
    found = []
    for number, values, place in zip(numbers, windows.tolist(), places, strict=True):
        tokens = [texts[i] for i in pieces[number].tolist() if i >= 0]
        row = {"tokens": tokens, "tokens_acts_list": values[: len(tokens)], "train_token_ind": place}
        found.append(row | {"is_repeated_datapoint": False})
    return found
