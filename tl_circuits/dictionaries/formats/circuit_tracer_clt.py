"""circuit-tracer's cross-layer transcoders: ``W_enc_{l}.safetensors`` and ``W_dec_{l}.safetensors``."""

import re
from collections.abc import Sequence

from tl_circuits.dictionaries.formats.circuit_tracer import activation_of, required_hooks
from tl_circuits.dictionaries.formats.layout import Entry, Hints, LayerWeights, Layout
from tl_circuits.dictionaries.formats.reading import need, shaped, valid_threshold
from tl_circuits.dictionaries.mapped import MappedFile
from tl_circuits.dictionaries.repository import Repository
from tl_circuits.dictionaries.transcoders import Transcoder
from tl_circuits.errors import DictionaryError

_ENCODER = re.compile(r"W_enc_(\d+)\.safetensors")
_DECODER = re.compile(r"W_dec_(\d+)\.safetensors")


def find(repository: Repository) -> Sequence[Entry]:
    """One entry for each layer; both of its files must be there."""
    encoders = {int(m[1]) for m in map(_ENCODER.fullmatch, repository.paths) if m}
    decoders = {int(m[1]) for m in map(_DECODER.fullmatch, repository.paths) if m}
    if encoders != decoders:
        kind, lacking = ("W_dec", encoders - decoders) if encoders - decoders else ("W_enc", decoders - encoders)
        raise DictionaryError(f"{repository.name}: {kind}_{min(lacking)}.safetensors is missing.")
    return [Entry(i, (f"W_enc_{i}.safetensors", f"W_dec_{i}.safetensors")) for i in sorted(encoders)]


def read(repository: Repository, entry: Entry, hints: Hints) -> LayerWeights:
    """One layer. A feature writes to layer ``l + j`` through ``W_dec[:, j]``; ``b_dec`` is layer ``l``'s alone."""
    i = entry.layer
    path, decoder_path = (repository.local(file) for file in entry.files)
    file, decoder_file = MappedFile(path), MappedFile(decoder_path)
    W_enc, b_enc, b_dec = need(path, file, f"W_enc_{i}", f"b_enc_{i}", f"b_dec_{i}")
    (decoder,) = need(decoder_path, decoder_file, f"W_dec_{i}")
    width = b_enc.numel()
    shaped(path, f"W_enc_{i}", W_enc, (width, None))
    shaped(decoder_path, f"W_dec_{i}", decoder, (width, None, b_dec.numel()))
    input_hook, output_hook = required_hooks(path, hints)
    threshold = file.get(f"threshold_{i}")
    activation, k = activation_of(path, file, threshold, hints)

    def forget_pages() -> None:
        file.forget_pages()
        decoder_file.forget_pages()

    transcoder = Transcoder(
        W_enc=W_enc,
        W_dec=decoder[:, 0],
        b_enc=b_enc,
        b_dec=b_dec,
        threshold=None if threshold is None else valid_threshold(path, f"threshold_{i}", threshold, width),
        activation=activation,
        k=k,
        clamp=activation == "relu",
        input_hook=input_hook,
        output_hook=output_hook,
        forget_pages=forget_pages,
    )
    return LayerWeights(transcoder, decoder)


LAYOUT = Layout("circuit-tracer cross-layer (W_enc_*, W_dec_*.safetensors)", find, read)
