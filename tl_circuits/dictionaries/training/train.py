"""Train transcoders for any model on text, all layers in one pass."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from tl_circuits.dictionaries.formats.four_bit import fitted_levels
from tl_circuits.dictionaries.formats.four_bit_files import write_four_bit
from tl_circuits.dictionaries.load import load_transcoders
from tl_circuits.dictionaries.training import text as text_files
from tl_circuits.dictionaries.training.checkpoint import (
    Checkpoint,
    check_out,
    check_settings,
    read_checkpoint,
    read_history,
    write_checkpoint,
)
from tl_circuits.dictionaries.training.fit import NormalEquations, equations_bytes, n_inputs
from tl_circuits.dictionaries.training.layer import LayerTraining, Numbers
from tl_circuits.dictionaries.training.network import Network, opened, watched
from tl_circuits.dictionaries.training.progress import COLUMNS, Line, held_out_measures, rows_of
from tl_circuits.dictionaries.training.samples import write_samples
from tl_circuits.dictionaries.training.start import Moments, add_tokens, no_moments, resumed, started
from tl_circuits.dictionaries.training.step import Weights
from tl_circuits.dictionaries.training.together import step_together
from tl_circuits.dictionaries.transcoders import TranscoderSet
from tl_circuits.errors import ArgumentError, NotFiniteError, PromptError
from tl_circuits.hooks import shown, special_token
from tl_circuits.models import sha256
from tl_circuits.support.checked import checked

START_TOKENS = 50_000
"""Tokens of which the scales and the skip connection are fitted."""
START_KEPT = 4096
"""Of these, tokens that features can be taken from."""
DEAD_TOKENS = 200_000
"""A feature that was silent for so many tokens counts as dead."""
FIT_TOKENS = 20
"""How many tokens decoders are fitted to for each number to be found."""
FIT_BYTES = 2 << 30
"""Memory for the fit's sums: layers beyond it wait for another pass over the text."""
TOGETHER_RATE = 1 / 2
"""The highest learning rate where layers are trained together, as a share of that before."""
ROUNDED = 0.4
"""The share of the steps together that round weights to four bits, if they are to be kept so."""
HELD_OUT = 32
"""Pieces that are held out at most, if none are given: one of fifty."""
MEASURES = 25
"""How often held-out text is measured in a run."""
MEASURED = 8
"""Held-out pieces that are measured while a run goes on; at its end, all are."""


@checked
def train_transcoders(
    model: str,
    texts: Sequence[str | Path],
    out: str | Path,
    *,
    dataset: str | None = None,
    generate: int = 0,
    layers: Sequence[int] | None = None,
    features: int | None = None,
    expansion: int | None = None,
    k: int = 32,
    skip: bool = True,
    context: int = 256,
    batch_size: int = 8,
    epochs: int = 1,
    tokens: int | None = None,
    together: int = 0,
    four_bits: bool = False,
    local: float = 0.4,
    begin_with: str | Path | None = None,
    held_out: str | Path | None = None,
    lr: float = 1e-3,
    save_minutes: float = 10.0,
    resume: bool = False,
    device: str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Train a TopK transcoder for every MLP of a model; ``load_transcoders(out)`` opens them afterwards.

    The model reads each piece of text once, and each layer is trained when its MLP has run, so the activations of one
    layer are in memory at a time. sparsify opens the files, too.

    Args:
        model: ``smollm2-135m`` or ``gemma-3-270m``, a folder with a Hugging Face checkpoint, or a hub name.
        texts: UTF-8 text files, also compressed (``.gz``), folders of such files, and ``.npy`` files with token ids
            ``[piece, context]``. All are cut into pieces of ``context`` tokens, which are kept beside ``out``, in a
            folder ``<out>.text``.
        out: a folder that does not exist yet; with ``resume``, that of an earlier, interrupted run.
        dataset: further text: the split ``train`` of a dataset by its hub name or folder, rows with a ``text``. It is
            read to its end.
        generate: further text: about so many tokens that the model writes itself, at temperature 1.
        layers: which MLPs; None for all.
        features: how many features a layer gets; None for ``expansion`` times d_model.
        expansion: as a multiple of d_model; None for 16.
        k: how many features are active on a token.
        skip: with a linear skip connection (Paulo et al. 2025), which explains more with the same ``k``.
        context: tokens in a piece of text.
        batch_size: pieces in a training step.
        epochs: how often the text is gone through.
        tokens: train on so many tokens at most; None for the whole text.
        together: then train all layers together on so many tokens of the same text, in another order, so that the model
            still says the same with all of these MLPs replaced (:mod:`~tl_circuits.dictionaries.training.together`). A
            step takes several times as long as one before.
        four_bits: also write the set with four bits a number, in a folder ``<out>.four_bits``. The last of the steps
            together are taken with weights rounded so.
        local: in steps together, how many nats a layer's unexplained variance counts for, if it is all of it: more of
            it keeps a layer truer to its MLP, less brings the whole model's predictions nearer.
        begin_with: a set of such transcoders that ``load_transcoders`` opens, of the same sizes: go on from its
            weights, rather than from a fit to the text. ``tokens`` may then be 0, which leaves the steps together.
        held_out: text to measure on, as in ``texts``; None sets aside one piece of fifty. 32 pieces are used at most,
            and the first 8 of them until the last step.
        lr: the highest learning rate: it rises over the first fiftieth of the run, then falls to zero at its end.
        save_minutes: minutes between checkpoints. Each replaces the one before, whole or not at all.
        resume: go on from the last checkpoint in ``out``. The result is that of a run without interruption.
        device: where to train; None for a GPU if there is one.
        seed: of the order of the text, the first features and the model's own text.
        progress: show a progress line on stderr, with the means over layers and the time left.

    Returns:
        A frame with a row for each step and layer. Its columns are ``step``, ``tokens`` read so far, ``layer``,
        ``explained_variance`` and ``l0`` (active features a token) on the step's text, ``dead`` (features silent for
        the last 200,000 tokens); and, 25 times in a run, explained variance on ``held_out`` text and ``loss_change``:
        how much the model's loss there grows if all MLPs that are trained are replaced, in nats. Also kept as
        ``history.json``.

    Raises:
        ImportError: a dataset is asked for, and the library ``datasets`` is not installed.
        ModelError: the model cannot be opened, or has no MLPs under the usual names.
        OutputError: ``out`` exists already, cannot be written, or was trained with other settings or text.
        NotFiniteError: training ran away, as it does with too high a learning rate.
        PromptError: a text cannot be read, or all texts together are shorter than one batch.
        ArgumentError: a number is out of range.

    Examples:
        >>> from tl_circuits.models import BUILTIN_FOLDER  # the checkpoint of tiny-facts
        >>> text = folder / "facts.txt"
        >>> _ = text.write_text("the capital of Texas is Austin " * 400)
        >>> history = tlc.train_transcoders(str(BUILTIN_FOLDER), [text], folder / "mine", features=384, k=8, context=32)
        >>> tlc.load_transcoders(folder / "mine").width(0)
        384
    """
    out = Path(out)
    check_out(out, resume)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with torch.inference_mode(False), torch.no_grad():
        network, tokenizer = opened(model, device, layers)
        width = _width(features, expansion, k, network.d_model)
        _require_positive(
            context=context - 1,
            batch_size=batch_size,
            epochs=epochs,
            lr=lr,
            tokens=1 if tokens is None else tokens + (begin_with is not None and together > 0),
        )
        first = special_token(tokenizer)  # as text is traced with the set (dictionaries/prompt_rules.py)
        files = _written(out, network, tokenizer, texts, held_out, context, first, dataset, generate, seed)
        pieces = text_files.read_pieces(files[0], context, network.d_vocab)
        plan = _planned(len(pieces), len(files) == 1, epochs, batch_size, context, tokens, together, seed)
        settings = {
            "model": model,
            "layers": sorted(network.mlps),
            "features": width,
            "k": k,
            "skip": skip,
            "context": context,
            "batch_size": batch_size,
            "steps": plan.alone,
            "together": plan.steps - plan.alone,
            "four_bits": four_bits,
            "local": local,
            "lr": lr,
            "seed": seed,
            "text": [sha256(f) for f in files],
            "begin_with": None if begin_with is None else str(begin_with),
        }
        at = None
        if out.exists():
            check_settings(out, settings)
            at = read_checkpoint(out, k, DEAD_TOKENS, device)
            if at is None:
                return pd.DataFrame(read_history(out), columns=COLUMNS)
        held = _tensor(
            pieces[np.sort(plan.held)]
            if len(files) == 1
            else text_files.read_pieces(files[1], context, network.d_vocab)[:HELD_OUT],
            device,
        )
        if at is None:
            layers_at_first = _begun(network, pieces, plan, width, k, skip, device, seed, begin_with, progress)
            at = Checkpoint(layers_at_first, 0, [])
        history = _trained(network, pieces, plan, held, at, _Saving(out, settings, save_minutes), lr, device, progress)
        if four_bits:
            levels = {n: layer.levels for n, layer in at.layers.items()}
            write_four_bit(
                load_transcoders(out),
                _four_bits_of(out),
                model=model,
                training_tokens=plan.steps * batch_size * context,
                levels=levels,
            )
    return pd.DataFrame(history, columns=COLUMNS)


@dataclass(frozen=True)
class _Plan:
    """Which pieces each step reads, and which are held out; layers are trained apart in the first ``alone`` steps."""

    order: np.ndarray
    held: np.ndarray
    batch_size: int
    alone: int

    @property
    def steps(self) -> int:
        return len(self.order) // self.batch_size

    def pieces_of(self, step: int) -> np.ndarray:
        return self.order[step * self.batch_size : (step + 1) * self.batch_size]


@dataclass(frozen=True)
class _Saving:
    """Where and how often a checkpoint is written, and with which settings."""

    out: Path
    settings: dict[str, Any]
    minutes: float


def _width(features: int | None, expansion: int | None, k: int, d_model: int) -> int:
    """How many features a layer gets."""
    if features is not None and expansion is not None:
        raise ArgumentError("train_transcoders: give features=... or expansion=..., not both.")
    width = features if features is not None else d_model * (16 if expansion is None else expansion)
    if not 1 <= k <= width:
        raise ArgumentError(f"train_transcoders: k is {k}, expected 1 to the number of features, {width}.")
    return width


def _require_positive(**numbers: float) -> None:
    for name, number in numbers.items():
        if not number > 0:
            raise ArgumentError(f"train_transcoders({name}=...) is too small: {shown(number)}.")


def _written(
    out: Path, network: Network, tokenizer: Any, texts: Sequence[str | Path], held_out: str | Path | None, context: int,
    first: int | None, dataset: str | None, generate: int, seed: int,
) -> list[Path]:  # fmt: skip
    """The files of pieces to train on and, if text to measure on was given, of that; written unless they are there."""
    folder = out.with_name(f"{out.name}.text")
    pieces, held = folder / "pieces.npy", folder / "held_out.npy"
    if not pieces.exists() or not out.exists():
        sources = text_files.files_of(texts)
        folder.mkdir(exist_ok=True)
        if generate:
            if first is None:
                raise PromptError("generate: the tokenizer has no special token that a text could begin with.")
            count = -(-generate // (context - 1))
            for _ in write_samples(
                network.whole, first, count, context, folder / "samples.npy", batch_size=64, seed=seed
            ):
                pass
            sources.append(folder / "samples.npy")
        more = [] if dataset is None else text_files.dataset_texts(dataset)
        if held_out is not None:
            measured = text_files.files_of([held_out])
            text_files.write_pieces(held, tokenizer, measured, [], context, first, network.d_vocab)
        text_files.write_pieces(pieces, tokenizer, sources, more, context, first, network.d_vocab)
    return [pieces] if held_out is None else [pieces, held]


def _planned(
    n: int, hold: bool, epochs: int, batch_size: int, context: int, tokens: int | None, together: int, seed: int
) -> _Plan:
    """Hold pieces out, and put the others in a new random order for each epoch, and again for the steps together."""
    mixed = np.random.default_rng(seed).permutation(n)
    held = mixed[: min(HELD_OUT, n // 50)] if hold else mixed[:0]
    others = mixed[len(held) :]
    order = np.concatenate([np.random.default_rng((seed, epoch)).permutation(others) for epoch in range(epochs)])
    if tokens is not None:
        order = order[: max(batch_size, tokens // context) if tokens else 0]
    if len(others) < batch_size:
        raise PromptError(
            f"the text gives {n} pieces, fewer than one batch of {batch_size}. Give more text, or a smaller context."
        )
    alone = len(order) // batch_size
    later = -(-together // (batch_size * context)) * batch_size
    more = [np.random.default_rng((seed, epochs + n)).permutation(others) for n in range(-(-later // len(others)))]
    return _Plan(
        np.concatenate([order[: alone * batch_size], *more])[: alone * batch_size + later], held, batch_size, alone
    )


def _tensor(pieces: np.ndarray, device: str) -> Tensor:
    return torch.from_numpy(np.array(pieces)).long().to(device)


def _trunk_pass(network: Network, ids: Tensor) -> None:
    network.trunk(input_ids=ids, use_cache=False)


def _inner(x: Tensor) -> Tensor:
    """All tokens but those at position 0, whose activations are far larger than all others on many models."""
    return x[:, 1:].flatten(0, 1).float()


def _begun(
    network: Network, pieces: np.ndarray, plan: _Plan, width: int, k: int, skip: bool, device: str, seed: int,
    begin_with: str | Path | None, progress: bool,
) -> dict[int, LayerTraining]:  # fmt: skip
    """All layers as training begins: those of a folder, or fitted by least squares to the first tokens of the plan."""
    moments: dict[int, Moments] = {}
    context = pieces.shape[1]
    steps = min(plan.alone or plan.steps, -(-START_TOKENS // (plan.batch_size * context)))

    def add(layer: int, x: Tensor, y: Tensor) -> None:
        x, y = _inner(x), _inner(y)
        if layer not in moments:
            moments[layer] = no_moments(x, y)
        add_tokens(moments[layer], x, y, keep=-(-START_KEPT // steps))

    with watched(network.mlps, add):
        for step in tqdm(range(steps), desc="fitting the skip connections", unit="step", disable=not progress):
            _trunk_pass(network, _tensor(pieces[plan.pieces_of(step)], device))
    if begin_with is not None:
        before = _opened(begin_with, sorted(moments), width, k, skip, network.d_model, device)
        return {
            layer: LayerTraining(resumed(moments[layer], before[layer]), k, DEAD_TOKENS) for layer in sorted(moments)
        }
    random = torch.Generator().manual_seed(seed)
    layers = {
        layer: LayerTraining(started(moments.pop(layer), width, skip, random), k, DEAD_TOKENS)
        for layer in sorted(moments)
    }
    _fit(
        network,
        layers,
        pieces,
        plan,
        range(_fit_steps(plan, context, layers)),
        device,
        "fitting the decoders",
        progress,
    )
    return layers


def _opened(
    begin_with: str | Path, layers: Sequence[int], width: int, k: int, skip: bool, d_model: int, device: str
) -> dict[int, Weights]:
    """The weights of a set that ``load_transcoders`` opens, of these layers."""
    found = load_transcoders(begin_with, device=device)
    if not isinstance(found, TranscoderSet) or not set(layers) <= set(found.layers):
        raise ArgumentError(
            f"begin_with: {begin_with} is {found!r}, expected per-layer transcoders of the layers {list(layers)}."
        )
    made = {}
    for layer in layers:
        t = found[layer]
        there = {
            "activation": t.activation,
            "k": t.k,
            "skip": t.W_skip is not None,
            "W_enc": tuple(t.W_enc.shape),
            "normalize": t.normalize,
        }
        wanted = {"activation": "topk", "k": k, "skip": skip, "W_enc": (width, d_model), "normalize": "none"}
        if there != wanted:
            raise ArgumentError(f"begin_with: layer {layer} of {begin_with} has {there}, expected {wanted}.")
        skips = None if t.W_skip is None else t.W_skip.float()
        made[layer] = Weights(t.W_enc.float(), t.b_enc.float(), t.W_dec.float(), t.b_dec.float(), skips)
    return made


def _fit_steps(plan: _Plan, context: int, layers: Mapping[int, LayerTraining]) -> int:
    """How many steps' text decoders are fitted to; 0 if there is so little that they would learn it by heart."""
    unknown = max(n_inputs(layer.start.weights) for layer in layers.values())
    steps = -(-FIT_TOKENS * unknown // (plan.batch_size * context))
    return steps if steps <= plan.alone else 0


def _fit(
    network: Network,
    layers: Mapping[int, LayerTraining],
    pieces: np.ndarray,
    plan: _Plan,
    steps: range,
    device: str,
    what: str,
    progress: bool,
) -> None:
    """Give layers the best decoder for their encoder on some steps' text, as many layers at a time as memory allows."""
    if not steps:
        return
    at_once = max(1, FIT_BYTES // max(equations_bytes(layer.start.weights) for layer in layers.values()))
    groups = [sorted(layers)[n : n + at_once] for n in range(0, len(layers), at_once)]
    with tqdm(total=len(groups) * len(steps), desc=what, unit="step", disable=not progress) as bar:
        for group in groups:
            equations = {layer: layers[layer].equations() for layer in group}

            def add(layer: int, x: Tensor, y: Tensor, equations: dict[int, NormalEquations] = equations) -> None:
                layers[layer].add(equations[layer], _inner(x), _inner(y))

            with watched({layer: network.mlps[layer] for layer in group}, add):
                for step in steps:
                    _trunk_pass(network, _tensor(pieces[plan.pieces_of(step)], device))
                    bar.update()
            for layer in group:
                layers[layer].fit(equations.pop(layer))


def _trained(
    network: Network,
    pieces: np.ndarray,
    plan: _Plan,
    held: Tensor,
    at: Checkpoint,
    saving: _Saving,
    lr: float,
    device: str,
    progress: bool,
) -> list[dict[str, Any]]:
    """Run the steps that are left, and write checkpoints; returns the history."""
    layers, history = at.layers, list(at.history)
    line = Line(plan.steps, at.step, progress)
    saved = time.monotonic()
    rate = 0.0
    numbers: dict[int, Numbers] = {}

    def learn(layer: int, x: Tensor, y: Tensor) -> None:
        numbers[layer] = layers[layer].step(_inner(x), _inner(y), rate)

    def together(step: int) -> dict[int, Numbers]:
        if step == plan.alone:
            for layer in layers.values():
                layer.begin_again()
        if saving.settings["four_bits"] and step >= plan.steps - int(ROUNDED * (plan.steps - plan.alone)):
            for layer in layers.values():
                layer.levels = layer.levels or {
                    name: fitted_levels(t) for name, t in layer.tensors.items() if t.ndim == 2
                }
        return step_together(
            network, layers, _tensor(pieces[plan.pieces_of(step)], device), rate, saving.settings["local"]
        )[0]

    try:
        for step in range(at.step, plan.steps):
            if step < plan.alone:
                rate, numbers = lr * _share(step, plan.alone), {}
                with watched(network.mlps, learn):
                    _trunk_pass(network, _tensor(pieces[plan.pieces_of(step)], device))
            else:
                rate = lr * TOGETHER_RATE * _share(step - plan.alone, plan.steps - plan.alone)
                numbers = together(step)
            _require_finite(numbers, step, lr)
            last = step == plan.steps - 1
            # in order: the encoders' last step, the decoders that fit them, what that explains
            if step == plan.alone - 1:
                steps = range(plan.alone - _fit_steps(plan, pieces.shape[1], layers), plan.alone)
                _fit(network, layers, pieces, plan, steps, device, "fitting the decoders again", progress)
            measured: tuple[dict[int, float], float] = ({}, float("nan"))
            if len(held) and (last or step == plan.alone - 1 or step % max(1, plan.steps // MEASURES) == 0):
                measured = held_out_measures(network, layers, held if last else held[:MEASURED])
            rows = rows_of(step, (step + 1) * plan.batch_size * pieces.shape[1], numbers, *measured)
            history += rows
            line.step(rows)
            if last or time.monotonic() - saved >= 60 * saving.minutes:
                write_checkpoint(
                    saving.out, network, saving.settings, Checkpoint(layers, step + 1, history), finished=last
                )
                saved = time.monotonic()
    finally:
        line.close()
    return history


def _require_finite(numbers: Mapping[int, Numbers], step: int, lr: float) -> None:
    for layer, found in numbers.items():
        if not isfinite(found.explained_variance):
            raise NotFiniteError(
                f"the error of layer {layer} is not finite in step {step}. Go on from the last checkpoint with "
                f"resume if there is one, or begin again with a lower learning rate than {lr}."
            )


def _four_bits_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.four_bits")


def _share(step: int, steps: int) -> float:
    """The share of the highest learning rate at a step: up over the first fiftieth, then down to zero."""
    return min(1.0, (step + 1) / max(1, steps // 50)) * (1 - step / steps)
