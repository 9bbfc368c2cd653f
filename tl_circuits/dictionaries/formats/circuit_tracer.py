"""circuit-tracer's per-layer transcoders: ``layer_{l}.safetensors`` (published by mntss and mwhanna)."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from tl_circuits.dictionaries.formats.layout import Entry, Hints, LayerWeights, Layout
from tl_circuits.dictionaries.formats.reading import (
    decoder_rows,
    need,
    positive_int,
    require_known_tensors,
    shaped,
    valid_threshold,
)
from tl_circuits.dictionaries.mapped import MappedFile
from tl_circuits.dictionaries.repository import Repository
from tl_circuits.dictionaries.transcoder import Activation, Transcoder
from tl_circuits.errors import DictionaryError

PATH = re.compile(r"layer_(\d+)\.safetensors")
_THRESHOLD = "activation_function.threshold"
_TENSORS = re.compile(r"W_enc|W_dec|b_enc|b_dec|W_skip|k|activation_function\.threshold")


def find(repository: Repository) -> Sequence[Entry]:
    """One entry for each layer's file in the repository's top folder."""
    matches = ((path, PATH.fullmatch(path)) for path in repository.paths)
    return [Entry(int(m[1]), (path,)) for path, m in matches if m]


def read(repository: Repository, entry: Entry, hints: Hints) -> LayerWeights:
    """One layer. The file does not say which hooks it reads and writes; ``config.yaml`` or the caller must."""
    path = repository.local(entry.files[0])
    file = MappedFile(path)
    require_known_tensors(path, file, _TENSORS)
    W_enc, W_dec, b_enc, b_dec = need(path, file, "W_enc", "W_dec", "b_enc", "b_dec")
    width, d_out = b_enc.numel(), b_dec.numel()
    d_in = shaped(path, "W_enc", W_enc, (width, None)).shape[1]
    W_skip = file.get("W_skip")
    if W_skip is not None:
        shaped(path, "W_skip", W_skip, (d_out, d_in))
    input_hook, output_hook = required_hooks(path, hints)
    threshold = file.get(_THRESHOLD)
    activation, k = activation_of(path, file, threshold, hints)
    return LayerWeights(
        Transcoder(
            W_enc=W_enc,
            W_dec=decoder_rows(path, W_dec, width, d_out),
            b_enc=b_enc,
            b_dec=b_dec,
            W_skip=W_skip,
            # A config's "topk" overrides a threshold that is stored, as in circuit-tracer.
            threshold=None
            if threshold is None or activation == "topk"
            else valid_threshold(path, _THRESHOLD, threshold, width),
            activation=activation,
            k=k,
            # circuit-tracer keeps negative values that are above the threshold or among the k largest.
            clamp=activation == "relu",
            input_hook=input_hook,
            output_hook=output_hook,
            forget_pages=file.forget_pages,
        )
    )


def required_hooks(path: Path, hints: Hints) -> tuple[str, str]:
    """The hooks read and written, from the config or the caller; DictionaryError if neither says them."""
    if hints.input_hook is None or hints.output_hook is None:
        raise DictionaryError(
            f"{path.parent}: nothing says which tensors these transcoders read and write (there is no config.yaml). "
            "Give input_hook= and output_hook=, such as 'mlp.hook_in' and 'hook_mlp_out'."
        )
    return hints.input_hook, hints.output_hook


def activation_of(
    path: Path, file: Mapping[str, Tensor], threshold: Tensor | None, hints: Hints
) -> tuple[Activation, int | None]:
    """The activation function and, for TopK, its k: from the config, else from which tensors there are."""
    stored = file.get("k")
    k = hints.k if stored is None else int(stored)
    said = hints.activation or ("jumprelu" if threshold is not None else "relu" if k is None else "topk")
    said = {"jump_relu": "jumprelu", "batchtopk": "batch top-k"}.get(said.lower(), said.lower())
    if said not in ("relu", "jumprelu", "topk"):
        raise DictionaryError(f"{path}: the activation {hints.activation!r} is not one of relu, jumprelu, topk.")
    if said == "topk":
        return "topk", positive_int(path, "k", k)
    if (said == "jumprelu") != (threshold is not None):
        state = "there is no" if threshold is None else "the file holds a"
        raise DictionaryError(f"{path}: the config's activation is {said!r}, but {state} threshold tensor.")
    return ("relu" if said == "relu" else "jumprelu"), None


LAYOUT = Layout("circuit-tracer per-layer (layer_*.safetensors)", find, read)
