"""circuit-tracer's cross-layer transcoders: ``W_enc_{l}.safetensors`` and ``W_dec_{l}.safetensors``."""

import re
from collections.abc import Sequence

from torch import Tensor

from tl_circuits.dictionaries.formats.circuit_tracer import activation_of, required_hooks
from tl_circuits.dictionaries.formats.layout import Entry, Hints, LayerWeights, Layout
from tl_circuits.dictionaries.formats.reading import need, shaped, valid_threshold
from tl_circuits.dictionaries.mapped import MappedFile
from tl_circuits.dictionaries.repository import Repository
from tl_circuits.dictionaries.transcoder import Transcoder
from tl_circuits.errors import DictionaryError

_ENCODER = re.compile(r"W_enc_(\d+)\.safetensors")
_DECODER = re.compile(r"W_dec_(\d+)\.safetensors")


def find(repository: Repository) -> Sequence[Entry]:
    """One entry for each layer; both of its files must be there. A skip connection may have a file of its own."""
    encoders = {int(m[1]) for m in map(_ENCODER.fullmatch, repository.paths) if m}
    decoders = {int(m[1]) for m in map(_DECODER.fullmatch, repository.paths) if m}
    if encoders != decoders:
        kind, lacking = ("W_dec", encoders - decoders) if encoders - decoders else ("W_enc", decoders - encoders)
        raise DictionaryError(f"{repository.name}: {kind}_{min(lacking)}.safetensors is missing.")
    entries = []
    for i in sorted(encoders):
        skip = f"W_skip_{i}.safetensors"
        here = (skip,) if skip in repository.paths else ()
        entries.append(Entry(i, (f"W_enc_{i}.safetensors", f"W_dec_{i}.safetensors", *here)))
    return entries


def read(repository: Repository, entry: Entry, hints: Hints) -> LayerWeights:
    """One layer. A feature writes to layer ``l + j`` through ``W_dec[:, j]``; ``b_dec`` is layer ``l``'s alone.

    circuit-tracer's cross-layer transcoders add ``x W_skip``, not transposed as its per-layer ones do.
    """
    i = entry.layer
    path, decoder_path = (repository.local(file) for file in entry.files[:2])
    files = [MappedFile(repository.local(file)) for file in entry.files]
    file, decoder_file = files[:2]
    W_enc, b_enc, b_dec = need(path, file, f"W_enc_{i}", f"b_enc_{i}", f"b_dec_{i}")
    (decoder,) = need(decoder_path, decoder_file, f"W_dec_{i}")
    width, d_out = b_enc.numel(), b_dec.numel()
    d_in = shaped(path, f"W_enc_{i}", W_enc, (width, None)).shape[1]
    shaped(decoder_path, f"W_dec_{i}", decoder, (width, None, d_out))
    W_skip = _skip(repository, i, files)
    input_hook, output_hook = required_hooks(path, hints)
    threshold = file.get(f"threshold_{i}")
    activation, k = activation_of(path, file, threshold, hints)

    def forget_pages() -> None:
        for opened in files:
            opened.forget_pages()

    transcoder = Transcoder(
        W_enc=W_enc,
        W_dec=decoder[:, 0],
        b_enc=b_enc,
        b_dec=b_dec,
        W_skip=None if W_skip is None else shaped(path, f"W_skip_{i}", W_skip, (d_in, d_out)).T,
        threshold=None
        if threshold is None or activation == "topk"
        else valid_threshold(path, f"threshold_{i}", threshold, width),
        activation=activation,
        k=k,
        clamp=activation == "relu",
        input_hook=input_hook,
        output_hook=output_hook,
        forget_pages=forget_pages,
    )
    return LayerWeights(transcoder, decoder)


def _skip(repository: Repository, layer: int, files: Sequence[MappedFile]) -> Tensor | None:
    """The layer's skip connection, if the set has them; DictionaryError if only other layers have one."""
    found = next((file[f"W_skip_{layer}"] for file in files if f"W_skip_{layer}" in file), None)
    if layer > 0:
        first = [
            MappedFile(repository.local(name))
            for name in ("W_enc_0.safetensors", "W_skip_0.safetensors")
            if name in repository.paths
        ]
        if any("W_skip_0" in file for file in first) != (found is not None):
            lacking, having = (layer, 0) if found is None else (0, layer)
            raise DictionaryError(
                f"{repository.name}: layer {having} has a skip connection (W_skip_{having}) and layer {lacking} has "
                "none. Is a file missing?"
            )
    return found


LAYOUT = Layout("circuit-tracer cross-layer (W_enc_*, W_dec_*.safetensors)", find, read)
