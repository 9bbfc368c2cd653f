"""Folders of per-layer transcoders with four bits a number: ``config.json`` and ``layer_{l}.four_bit.safetensors``.

A file holds ``{W}.codes``, ``{W}.scale`` and ``{W}.levels`` for each of W_enc, W_dec and, if there is a skip
connection, W_skip (``four_bit.py`` says what they mean), and b_enc, b_dec and, if there are such, threshold and rank as
they are. One config says for all layers which hooks are read and written, the activation, and the sizes.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from tl_circuits.dictionaries.base import Dictionary
from tl_circuits.dictionaries.formats.four_bit import N_LEVELS, FourBit, dequantised, quantised
from tl_circuits.dictionaries.formats.four_bit_config import (
    CONFIG,
    FORMAT,
    PATH,
    VERSION,
    Settings,
    layer_files,
    settings_of,
)
from tl_circuits.dictionaries.formats.layout import Entry, Hints, LayerWeights, Layout
from tl_circuits.dictionaries.formats.reading import need, require_known_tensors, shaped
from tl_circuits.dictionaries.repository import Repository
from tl_circuits.dictionaries.transcoder import Transcoder
from tl_circuits.dictionaries.transcoders import TranscoderSet
from tl_circuits.errors import DictionaryError, OutputError

MATRICES = ("W_enc", "W_dec", "W_skip")
_PARTS = ("codes", "scale", "levels")
_TENSORS = re.compile(r"(W_enc|W_dec|W_skip)\.(codes|scale|levels)|b_enc|b_dec|threshold|rank")


def find(repository: Repository) -> Sequence[Entry]:
    """One entry for each layer's file in the repository's top folder."""
    return [Entry(layer, (path, CONFIG)) for layer, path in layer_files(repository)]


def read(repository: Repository, entry: Entry, hints: Hints) -> LayerWeights:
    """One layer. Its encoder and decoder are computed when they are asked for."""
    weights, config = entry.files
    path, settings = repository.local(weights), settings_of(repository, config)
    file = repository.tensors(weights)
    require_known_tensors(path, file, _TENSORS)
    wide, narrow, d_in = settings.features, settings.d_out, settings.d_in
    kept = {"W_enc": _matrix(path, file, "W_enc", wide, d_in), "W_dec": _matrix(path, file, "W_dec", wide, narrow)}
    if settings.skip != any(name.startswith("W_skip.") for name in file):
        raise DictionaryError(
            f"{path}: {CONFIG} says {'a' if settings.skip else 'no'} skip connection, and the file has "
            f"{'none' if settings.skip else 'one'}. Are files of two sets mixed?"
        )
    b_enc, b_dec = need(path, file, "b_enc", "b_dec")
    optional = {name: need(path, file, name)[0] for name in ("threshold", "rank") if name in file}
    vectors = {"b_enc": b_enc, "b_dec": b_dec} | optional
    for name, vector in vectors.items():
        _floating(path, name, shaped(path, name, vector, (narrow if name == "b_dec" else wide,)))

    def make() -> dict[str, Tensor]:
        made = {name: dequantised(matrix) for name, matrix in kept.items()}
        file.forget_pages()
        return made

    given: dict[str, Any] = {
        **{name: torch.empty(wide, matrix.columns, device="meta") for name, matrix in kept.items()},
        **vectors,
        "W_skip": dequantised(_matrix(path, file, "W_skip", narrow, d_in)) if settings.skip else None,
        "activation": settings.activation,
        "k": settings.k,
        "clamp": settings.clamp,
        "input_hook": hints.input_hook or settings.input_hook,
        "output_hook": hints.output_hook or settings.output_hook,
        "forget_pages": file.forget_pages,
    }
    return LayerWeights(Transcoder(**given), make=make)


def model(repository: Repository, entry: Entry) -> str | None:
    """The model that the config names."""
    return settings_of(repository, entry.files[1]).model


def write_four_bit(
    transcoders: Dictionary,
    folder: str | Path,
    *,
    model: str | None = None,
    licence: str | None = None,
    training_tokens: int | None = None,
    description: str | None = None,
    levels: Mapping[int, Mapping[str, Float[Tensor, " 16"]]] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write per-layer transcoders as a folder with four bits a number, which ``tlc.load_transcoders`` opens.

    Encoder, decoder and skip connection are rounded. Biases are kept in float16 where that is precise enough, else in
    float32, thresholds in float32.

    Args:
        transcoders: an opened set whose layers have the same sizes, hooks and activation, none of them a normalisation.
        folder: where to; its parent exists.
        model: the model's name, for messages; None for what the set says.
        licence: of the weights.
        training_tokens: on how many tokens they were trained.
        description: a line about them.
        levels: ``{layer: {"W_enc": levels, ...}}``, the sixteen levels of a matrix that was trained with them; fitted
            to the matrix where there are none.
        overwrite: replace the folder if it holds such a set already.

    Returns:
        The folder.

    Raises:
        DictionaryError: the set cannot be written so; the message says why.
        OutputError: the folder exists already, or cannot be written.

    Examples:
        >>> from tl_circuits.dictionaries.formats.four_bit_files import write_four_bit
        >>> transcoders = tlc.load_transcoders("tiny-facts")
        >>> written = write_four_bit(transcoders, folder / "small", model="tiny-facts")
        >>> tlc.load_transcoders(written, name="small")
        TranscoderSet('small', layers 0..3)
        >>> sum(file.stat().st_size for file in written.iterdir()) < 4 * 100_000
        True
    """
    folder = Path(folder)
    if type(transcoders) is not TranscoderSet:
        raise DictionaryError(
            f"{transcoders!r} cannot be written with four bits a number: only per-layer transcoders can, a "
            "TranscoderSet with one dictionary a layer."
        )
    settings = _settings_of(transcoders, model, licence, training_tokens, description)
    half, old = (folder.with_name(f".{folder.name}.{what}") for what in ("saving", "old"))
    holds_a_set = folder.is_dir() and any(PATH.fullmatch(path.name) for path in folder.iterdir())
    if folder.exists() and not (overwrite and holds_a_set):
        raise OutputError(
            f"{folder} exists already. Choose another name{', or overwrite=True' if holds_a_set else ''}."
        )
    try:
        for leftover in (half, old):
            shutil.rmtree(leftover, ignore_errors=True)
        half.mkdir()
        for layer in settings.layers:
            tensors = _tensors(transcoders[layer], {} if levels is None else levels.get(layer, {}))
            save_file(tensors, half / f"layer_{layer:02d}.four_bit.safetensors")
        said = {"format": FORMAT, "version": VERSION} | asdict(settings)
        (half / CONFIG).write_text(json.dumps(said) + "\n", encoding="utf-8")
        if folder.exists():
            os.replace(folder, old)
        os.replace(half, folder)
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror or error}.") from error
    finally:
        for leftover in (half, old):
            shutil.rmtree(leftover, ignore_errors=True)
    return folder


def _tensors(t: Transcoder, levels: Mapping[str, Float[Tensor, " 16"]]) -> dict[str, Tensor]:
    """What the file of one layer holds."""
    made: dict[str, Tensor] = {}
    for name in MATRICES:
        matrix = getattr(t, name)
        if matrix is not None:
            kept = quantised(matrix, levels.get(name))
            scale = kept.scale.half() if kept.scale.half().float().equal(kept.scale) else kept.scale
            made |= {f"{name}.codes": kept.codes, f"{name}.scale": scale, f"{name}.levels": kept.levels}
    made |= {"b_enc": _short(t.b_enc), "b_dec": _short(t.b_dec)}
    made |= {name: getattr(t, name).float() for name in ("threshold", "rank") if getattr(t, name) is not None}
    # Copies, since two matrices may have the same levels, and safetensors takes no tensor twice.
    return {name: tensor.cpu().clone(memory_format=torch.contiguous_format) for name, tensor in made.items()}


def _short(bias: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """A bias in float16 if no number changes by over 0.05 % of itself or of their root mean square, else in float32."""
    bias = bias.detach().float()
    usual = bias.double().square().mean().sqrt().float()
    near = (bias.half().float() - bias).abs() <= torch.maximum(bias.abs(), usual) * 2**-11
    return bias.half() if bool(near.all()) else bias


def _settings_of(
    transcoders: TranscoderSet,
    model: str | None,
    licence: str | None,
    training_tokens: int | None,
    description: str | None,
) -> Settings:
    made = {layer: _settings_of_layer(layer, transcoders[layer]) for layer in transcoders.layers}
    first = transcoders.layers[0]
    for layer, said in made.items():
        other = next((name for name in said if said[name] != made[first][name]), None)
        if other is not None:
            raise DictionaryError(
                f"{other} is {made[first][other]!r} at layer {first} and {said[other]!r} at layer {layer}; in this "
                "format all layers have the same. Write them as sets of their own, with load_transcoders(..., "
                "layers=...)."
            )
    return Settings(
        model=model or transcoders.made_for,
        layers=tuple(transcoders.layers),
        licence=licence,
        training_tokens=training_tokens,
        description=description,
        **made[first],
    )


def _settings_of_layer(layer: int, t: Transcoder) -> dict[str, Any]:
    if t.normalize != "none":
        raise DictionaryError(f"layer {layer} has normalize={t.normalize!r}, which this format cannot say.")
    said = {name: getattr(t, name) for name in ("input_hook", "output_hook", "activation", "k", "clamp")}
    (features, d_in), d_out = t.W_enc.shape, t.W_dec.shape[1]
    return said | {"skip": t.W_skip is not None, "d_in": d_in, "d_out": d_out, "features": features}


def _matrix(path: Path, file: Mapping[str, Tensor], name: str, rows: int, columns: int) -> FourBit:
    codes, scale, levels = need(path, file, *(f"{name}.{part}" for part in _PARTS))
    shaped(path, f"{name}.codes", codes, (rows, (columns + 1) // 2))
    if codes.dtype != torch.uint8:
        raise DictionaryError(f"{path}: {name}.codes has dtype {codes.dtype}, expected torch.uint8, two codes a byte.")
    _floating(path, f"{name}.scale", shaped(path, f"{name}.scale", scale, (rows,)))
    _floating(path, f"{name}.levels", shaped(path, f"{name}.levels", levels, (N_LEVELS,)))
    return FourBit(codes, scale, levels, columns)


def _floating(path: Path, name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise DictionaryError(f"{path}: {name} has dtype {tensor.dtype}, expected floating-point numbers.")


LAYOUT = Layout(
    "tl_circuits, four bits a number (config.json, layer_*.four_bit.safetensors)", find, read, model, grows=8
)
