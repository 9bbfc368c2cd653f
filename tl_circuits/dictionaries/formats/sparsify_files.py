"""EleutherAI's sparsify and clt-training, one layer by itself: ``{hookpoint}/{cfg.json,sae.safetensors}``."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_circuits.dictionaries.formats import sparsify_config
from tl_circuits.dictionaries.formats.layout import Entry, Hints, LayerWeights, Layout
from tl_circuits.dictionaries.formats.reading import (
    decoder_rows,
    need,
    positive_int,
    require_agreement,
    require_known_tensors,
    shaped,
)
from tl_circuits.dictionaries.formats.sparsify_config import Settings, hooks_of, layer_of, scales_of, settings_of
from tl_circuits.dictionaries.matrices import encoded
from tl_circuits.dictionaries.repository import Repository
from tl_circuits.dictionaries.transcoder import Transcoder
from tl_circuits.errors import DictionaryError

_TENSORS = re.compile(
    r"encoder\.(weight|bias)|in_norm|out_norm|W_dec|b_dec|W_skip|post_enc|post_enc_scale|(W_dec|b_dec|W_skip|post_enc|post_enc_scale)s\.\d+"
)


def hookpoints(repository: Repository) -> list[tuple[int, str, str]]:
    """Layer, weights and config of every hookpoint's folder, by layer; a hookpoint that is not an MLP is refused."""
    here, found = set(repository.paths), []
    for path in repository.paths:
        folder = PurePosixPath(path)
        config = str(folder.with_name("cfg.json"))
        if folder.name == sparsify_config.WEIGHTS and config in here and "best" not in folder.parts:
            found.append((layer_of(repository, folder.parent.name), path, config))
    return sorted(found)


def find(repository: Repository) -> Sequence[Entry]:
    """One entry for each hookpoint's folder."""
    return [Entry(layer, (weights, config)) for layer, weights, config in hookpoints(repository)]


def read(repository: Repository, entry: Entry, hints: Hints) -> LayerWeights:
    """One layer: ``y = a W_dec + b_dec`` with ``a = topk(ReLU(x Wᵀ + b))``, plus ``x W_skipᵀ`` if there is a skip.

    Older files subtract ``b_dec`` from ``x`` before the encoder, but not before the skip connection. clt-training adds
    ``post_enc`` to active features and multiplies them by ``post_enc_scale``; with ``normalize_io``, ``x`` is first
    multiplied by ``√d / in_norm``, and ``y`` last by ``out_norm / √d``. An activation here is ``a + post_enc``; all
    factors of what is written are in ``W_dec``.
    """
    weights, config = entry.files
    path, settings = repository.local(weights), settings_of(repository, config)
    file = repository.tensors(weights)
    encoder, make = encoder_of(path, settings, file, file.get("post_enc"))
    width, d_in = encoder["W_enc"].shape
    W_dec, b_dec = need(path, file, "W_dec", "b_dec")
    rows = decoder_rows(path, W_dec, width, b_dec.numel())
    s_in, s_out = scales_of(settings, file, d_in, b_dec.numel())
    factor = written_factor(path, settings, file, "post_enc_scale", width, s_out)
    if factor is not None:
        make["W_dec"] = lambda: rows.float() * factor[:, None]
    input_hook, output_hook = hooks_of(repository, config, hints)
    return LayerWeights(
        Transcoder(
            **encoder,
            W_dec=rows if factor is None else torch.empty(rows.shape, device="meta"),
            b_dec=b_dec if s_out == 1.0 else b_dec.float() * s_out,
            W_skip=skip_of(path, settings, file, "W_skip", (b_dec.numel(), d_in), s_in * s_out),
            input_hook=input_hook,
            output_hook=output_hook,
            forget_pages=file.forget_pages,
        ),
        make=(lambda: {name: made() for name, made in make.items()}) if make else None,
    )


def encoder_of(
    path: Path, settings: Settings, file: Mapping[str, Tensor], post_enc: Float[Tensor, " feature"] | None
) -> tuple[dict[str, Any], dict[str, Callable[[], Tensor]]]:
    """A file's encoder as fields of a :class:`Transcoder`, and what computes fields that the file does not store.

    With ``p = post_enc``, an active feature's ``ReLU(h) + p`` is ``h + p`` where that is above ``p``: the bias holds
    ``p``, and ``p`` is the threshold. So the edges into a feature still add up to its activation.
    """
    require_known_tensors(path, file, _TENSORS)
    weight, b_enc = need(path, file, "encoder.weight", "encoder.bias")
    width = b_enc.numel()
    d_in = shaped(path, "encoder.weight", weight, (width, None)).shape[1]
    fields = settings.fields
    require_agreement(settings.path, "d_in", fields.get("d_in"), d_in)
    latents = fields.get("num_latents") or d_in * int(fields.get("expansion_factor") or 32)
    require_agreement(settings.path, "num_latents (or d_in x expansion_factor)", latents, width)
    k = positive_int(settings.path, "k", fields.get("k", 32))
    if k > width:
        raise DictionaryError(f"{settings.path}: k is {k}, but there are only {width} features.")
    make: dict[str, Callable[[], Tensor]] = {}
    s_in, _ = scales_of(settings, file, d_in, d_in)
    if s_in != 1.0:
        make["W_enc"] = lambda: weight.float() * s_in
    threshold = None
    if post_enc is not None and bool(shaped(path, "post_enc", post_enc, (width,)).any()):
        threshold = post_enc.float()
        b_enc = b_enc.float() + threshold
    if settings.subtracts_bias:
        stored, (b_dec,) = b_enc.float(), need(path, file, "b_dec")
        shaped(path, "b_dec", b_dec, (d_in,))
        make["b_enc"] = lambda: stored - encoded(weight, b_dec[None].float())[0]
    small = {"threshold": threshold, "activation": "topk", "k": k, "clamp": threshold is None}
    without_numbers = {
        name: torch.empty(shape, device="meta") for name, shape in (("W_enc", weight.shape), ("b_enc", b_enc.shape))
    }
    return {"W_enc": weight, "b_enc": b_enc} | small | {name: without_numbers[name] for name in make}, make


def written_factor(
    path: Path, settings: Settings, file: Mapping[str, Tensor], name: str, width: int, factor: float
) -> Float[Tensor, " feature"] | None:
    """What each decoder row is multiplied by: ``factor``, and the tensor ``name`` if the config has it; None for 1."""
    if settings.on("post_encoder_scale"):
        (scale,) = need(path, file, name)
        return shaped(path, name, scale, (width,)).float() * factor
    return None if factor == 1.0 else torch.full((width,), factor)


def skip_of(
    path: Path, settings: Settings, file: Mapping[str, Tensor], name: str, shape: tuple[int, int], factor: float
) -> Float[Tensor, "d_out d_in"] | None:
    """The skip connection called ``name``, times ``factor``; None if the config and the file have none."""
    require_agreement(settings.path, "skip_connection", settings.on("skip_connection"), name in file)
    if name not in file:
        return None
    W_skip = shaped(path, name, file[name], shape)
    return W_skip if factor == 1.0 else W_skip.float() * factor


def model(repository: Repository, entry: Entry) -> str | None:
    """The model named in the training configuration beside the hookpoints, if it is there."""
    return sparsify_config.model_of(repository, entry.files[1])


LAYOUT = Layout("EleutherAI sparsify (cfg.json, sae.safetensors)", find, read, model)
