"""Gemma Scope 1: ``layer_{l}/width_{w}/average_l0_{x}/params.npz`` (Lieberum et al. 2024)."""

import re
from collections.abc import Sequence

from torch import Tensor

from tl_circuits.dictionaries.formats.layout import Entry, Hints, LayerWeights, Layout
from tl_circuits.dictionaries.formats.npz import NpzFile
from tl_circuits.dictionaries.formats.reading import decoder_rows, shaped, valid_threshold
from tl_circuits.dictionaries.repository import Repository
from tl_circuits.dictionaries.transcoder import Transcoder
from tl_circuits.errors import DictionaryError

PATH = re.compile(r"(?:.*/)?layer_(\d+)/width_([^/]+)/average_l0_([^/]+)/params\.npz")
_AUTOENCODERS = re.compile(r"gemma-scope-\w+-(?:pt|it)-(res|att|mlp)$")


def find(repository: Repository) -> Sequence[Entry]:
    """One entry for each npz file. Autoencoders have the same layout, so they are recognised by name and refused."""
    kind = _AUTOENCODERS.search(repository.name.rstrip("/"))
    if kind:
        raise DictionaryError(
            f"{repository.name} holds autoencoders ({kind[1]}), not transcoders. They are opened by their release in "
            f"SAELens, such as tlc.load_dictionary('gemma-scope-2b-pt-{kind[1]}-canonical'); transcoders are "
            "google/gemma-scope-2b-pt-transcoders ('gemma')."
        )
    matches = ((path, PATH.fullmatch(path)) for path in repository.paths)
    return [Entry(int(m[1]), (path,), m[2], m[3]) for path, m in matches if m]


def read(repository: Repository, entry: Entry, hints: Hints) -> LayerWeights:
    """One layer. It reads the MLP's norm before the gain is applied, and writes what is added to the stream."""
    path = repository.local(entry.files[0])
    file = NpzFile(path, ("W_enc", "W_dec", "b_enc", "b_dec", "threshold"))
    b_enc, b_dec, threshold = (file.tensor(name) for name in ("b_enc", "b_dec", "threshold"))
    width, d_out = b_enc.numel(), b_dec.numel()

    def wide(W_enc: Tensor, W_dec: Tensor) -> dict[str, Tensor]:
        return {
            "W_enc": shaped(path, "W_enc", W_enc, (None, width)).T,
            "W_dec": decoder_rows(path, W_dec, width, d_out),
        }

    without_numbers = wide(file.empty("W_enc"), file.empty("W_dec"))

    return LayerWeights(
        Transcoder(
            W_enc=without_numbers["W_enc"],
            W_dec=without_numbers["W_dec"],
            b_enc=b_enc,
            b_dec=b_dec,
            threshold=valid_threshold(path, "threshold", threshold, width),
            activation="jumprelu",
            clamp=False,
            input_hook=hints.input_hook or "ln2.hook_normalized",
            output_hook=hints.output_hook or "hook_mlp_out",
        ),
        make=lambda: wide(file.tensor("W_enc"), file.tensor("W_dec")),
    )


def model(repository: Repository, entry: Entry) -> str | None:
    """The model's name. This layout does not store it, so it is taken from the repository's name."""
    return "google/gemma-2-2b" if "gemma-scope-2b-" in repository.name else None


LAYOUT = Layout("Gemma Scope 1 (params.npz)", find, read, model)
