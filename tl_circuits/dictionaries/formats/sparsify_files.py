"""EleutherAI's sparsify: ``{hookpoint}/{cfg.json,sae.safetensors}``, such as ``layers.3.mlp``."""

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from tl_circuits.dictionaries.formats.layout import Entry, Hints, LayerWeights, Layout
from tl_circuits.dictionaries.formats.reading import (
    decoder_rows,
    need,
    positive_int,
    read_json,
    require_agreement,
    shaped,
)
from tl_circuits.dictionaries.mapped import MappedFile
from tl_circuits.dictionaries.repository import Repository
from tl_circuits.dictionaries.transcoders import Transcoder
from tl_circuits.errors import DictionaryError

_WEIGHTS = "sae.safetensors"
_MLP = re.compile(r"(?:.*\.)?(?:layers|h)\.(\d+)\.mlp")
_CLT = ("n_targets", "n_sources", "normalize_io", "divide_cross_layer", "post_encoder_scale")


def find(repository: Repository) -> Sequence[Entry]:
    """One entry for each hookpoint's folder; a hookpoint that is not an MLP is refused."""
    here, entries = set(repository.paths), []
    for path in repository.paths:
        folder = PurePosixPath(path)
        config = str(folder.with_name("cfg.json"))
        if folder.name != _WEIGHTS or config not in here or "best" in folder.parts:
            continue
        hookpoint = folder.parent.name
        match = _MLP.fullmatch(hookpoint)
        if match is None:
            raise DictionaryError(
                f"{repository.name}: the hookpoint {hookpoint!r} is not an MLP (layers.<n>.mlp), so it leaves no linear "
                "path through the MLP. Use transcoders, trained with --transcode on layers.*.mlp."
            )
        entries.append(Entry(int(match[1]), (path, config)))
    return entries


def read(repository: Repository, entry: Entry, hints: Hints) -> LayerWeights:
    """One layer: ``y = topk(ReLU(x Wᵀ + b)) W_dec + b_dec``, plus ``x W_skipᵀ`` if there is a skip connection.

    It reads the MLP's input, with the norm's gain applied, and writes the MLP's own output.
    """
    path, config_path = (repository.local(file) for file in entry.files)
    config = read_json(config_path)
    _require_known(config_path, config)
    file = MappedFile(path)
    weight, b_enc, W_dec, b_dec = need(path, file, "encoder.weight", "encoder.bias", "W_dec", "b_dec")
    width, d_out = b_enc.numel(), b_dec.numel()
    d_in = shaped(path, "encoder.weight", weight, (width, None)).shape[1]
    require_agreement(config_path, "d_in", config.get("d_in"), d_in)
    latents = config.get("num_latents") or d_in * int(config.get("expansion_factor") or 32)
    require_agreement(config_path, "num_latents (or d_in x expansion_factor)", latents, width)
    require_agreement(config_path, "skip_connection", bool(config.get("skip_connection")), "W_skip" in file)
    W_skip = shaped(path, "W_skip", file["W_skip"], (d_out, d_in)) if "W_skip" in file else None
    k = positive_int(config_path, "k", config.get("k", 32))
    if k > width:
        raise DictionaryError(f"{config_path}: k is {k}, but there are only {width} features.")
    return LayerWeights(
        Transcoder(
            W_enc=weight,
            W_dec=decoder_rows(path, W_dec, width, d_out),
            b_enc=b_enc,
            b_dec=b_dec,
            W_skip=W_skip,
            activation="topk",
            k=k,
            input_hook=hints.input_hook or "mlp.hook_in",
            output_hook=hints.output_hook or "mlp.hook_out",
            forget_pages=file.forget_pages,
        )
    )


def _require_known(path: Path, config: dict[str, Any]) -> None:
    if any(config.get(name) for name in _CLT) or config.get("coalesce_topk", "none") != "none":
        raise DictionaryError(
            f"{path}: this is a cross-layer transcoder of EleutherAI's clt-training, a layout that is recognised but "
            "not supported. Use a circuit-tracer cross-layer transcoder, or per-layer ones."
        )
    if not config.get("transcode"):
        raise DictionaryError(
            f"{path}: transcode is {config.get('transcode')!r}: this is an autoencoder, which leaves no linear path "
            "through the MLP. Train with transcode=True (tl-circuits train does)."
        )
    activation = config.get("activation", "topk")
    if activation != "topk":
        raise DictionaryError(f"{path}: activation {activation!r} is not supported, only topk.")


def model(repository: Repository, entry: Entry) -> str | None:
    """The model named in the training configuration beside the hookpoints, if it is there."""
    folder = PurePosixPath(entry.files[0]).parent.parent
    config = str(folder / "config.json")
    if config not in repository.paths:
        return None
    name = read_json(repository.local(config)).get("model")
    return name if isinstance(name, str) else None


LAYOUT = Layout("EleutherAI sparsify (cfg.json, sae.safetensors)", find, read, model)
