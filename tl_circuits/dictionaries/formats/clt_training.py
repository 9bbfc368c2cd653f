"""EleutherAI's clt-training, cross-layer sets: the files of sparsify, whose features also write to later layers.

Their features write through one of four kinds of decoder. *Untied*: a matrix for each pair of layers, either all in the
target's file (``coalesce_topk: per-layer``) or in the source's (``W_decs.{k}``, for ``k`` layers on). *Tied by target*:
one matrix in the target's file for all sources (``concat``). *Tied by source*: one in the source's file
(``per_source_tied``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from tl_circuits.dictionaries.formats.layout import Entry, Hints, LayerWeights, Layout
from tl_circuits.dictionaries.formats.reading import need, shaped
from tl_circuits.dictionaries.formats.sparsify_config import Settings, hooks_of, model_of, scales_of, settings_of
from tl_circuits.dictionaries.formats.sparsify_files import encoder_of, hookpoints, skip_of, written_factor
from tl_circuits.dictionaries.mapped import MappedFile
from tl_circuits.dictionaries.repository import Repository
from tl_circuits.dictionaries.slot_decoders import SlotDecoders
from tl_circuits.dictionaries.transcoder import Transcoder
from tl_circuits.errors import DictionaryError

_COALESCED = ("concat", "per-layer")


@dataclass(frozen=True)
class _Set:
    """All files of a cross-layer set, by layer."""

    repository: Repository
    weights: Mapping[int, str]
    configs: Mapping[int, str]
    settings: Mapping[int, Settings]

    def path(self, layer: int) -> Path:
        return self.repository.local(self.weights[layer])

    def file(self, layer: int) -> MappedFile:
        return self.repository.tensors(self.weights[layer])

    def kind(self, layer: int) -> str:
        return self.settings[layer].fields.get("coalesce_topk") or "none"

    def targets(self, layer: int) -> list[int]:
        return [t for t in sorted(self.settings) if layer <= t < layer + self.settings[layer].n_targets]

    def writers(self, layer: int) -> list[int]:
        return [s for s in sorted(self.settings) if layer in self.targets(s)]

    def shares(self, layer: int) -> float:
        """The factor of what earlier layers write.

        It is divided among them if ``divide_cross_layer`` is on, which needs untied files.
        """
        divided = self.settings[layer].on("divide_cross_layer") and self.kind(layer) == "none"
        return 1 / max(1, len(self.writers(layer)) - 1) if divided else 1.0


def find(repository: Repository) -> Sequence[Entry]:
    """One entry for each layer of a cross-layer set; each needs the files of all layers."""
    found = hookpoints(repository)
    if not any(settings_of(repository, config).n_targets for _, _, config in found):
        return []
    weights, configs = ({layer: names[i] for layer, *names in found} for i in (0, 1))
    entries = []
    for layer in weights:
        others = [layer, *(other for other in weights if other != layer)]
        entries.append(Entry(layer, (*(weights[o] for o in others), *(configs[o] for o in others))))
    return entries


def read(repository: Repository, entry: Entry, hints: Hints) -> LayerWeights:
    """One layer of ``ŷ_t = (Σ_s used_{s→t} W_{s→t} + b_t + x_t W_skipᵀ) · out_norm_t / √d``.

    The encoder is that of sparsify. ``used_{s→t} = (a_s + post_encs.{t-s}) · post_enc_scales.{t-s}`` where the feature
    is active.
    """
    whole = _whole(repository)
    layer, settings = entry.layer, whole.settings[entry.layer]
    path, file = whole.path(layer), whole.file(layer)
    encoder, make = encoder_of(path, settings, file, _post_enc(whole, layer))
    width, d_in = encoder["W_enc"].shape
    b_dec, decoder = _bias(whole, layer), _decoder(whole, layer, width)
    s_in, s_out = scales_of(settings, file, d_in, b_dec.numel())
    input_hook, output_hook = hooks_of(repository, whole.configs[layer], hints)
    opened = [whole.file(other) for other in whole.settings]

    def forget_pages() -> None:
        for other in opened:
            other.forget_pages()

    transcoder = Transcoder(
        **encoder,
        W_dec=decoder.matrices[0],
        b_dec=b_dec,
        W_skip=skip_of(path, settings, file, _first(file, "W_skip"), (b_dec.numel(), d_in), s_in * s_out),
        input_hook=input_hook,
        output_hook=output_hook,
        forget_pages=forget_pages,
    )
    return LayerWeights(transcoder, decoder, (lambda: {name: made() for name, made in make.items()}) if make else None)


def _whole(repository: Repository) -> _Set:
    found = hookpoints(repository)
    weights, configs = ({layer: names[i] for layer, *names in found} for i in (0, 1))
    whole = _Set(repository, weights, configs, {layer: settings_of(repository, config) for layer, _, config in found})
    for layer, settings in whole.settings.items():
        kind = whole.kind(layer)
        refused = {
            "coalesce_topk": kind not in ("none", *_COALESCED),
            "topk_coalesced": settings.on("topk_coalesced") and kind != "none",
            "secondary_target_tied": settings.on("secondary_target_tied"),
        }
        for field, is_refused in refused.items():
            if is_refused:
                raise DictionaryError(
                    f"{settings.path}: a cross-layer transcoder of clt-training with {field} "
                    f"{settings.fields[field]!r} is recognised but not supported."
                )
        first = next(layer for layer, other in whole.settings.items() if other.n_targets)
        if settings.n_targets < 1 or kind != whole.kind(first):
            raise DictionaryError(
                f"{settings.path}: n_targets is {settings.n_targets} and coalesce_topk {kind!r}, but layer {first} "
                f"has n_targets {whole.settings[first].n_targets} and {whole.kind(first)!r}. The layers of one "
                "cross-layer set agree."
            )
    return whole


def _first(file: Mapping[str, Tensor], name: str) -> str:
    """The name of the own layer's tensor, which files with one tensor a target call ``{name}s.0``."""
    return f"{name}s.0" if f"{name}s.0" in file else name


def _post_enc(whole: _Set, layer: int) -> Float[Tensor, " feature"] | None:
    """What is added to active features; DictionaryError if it differs between the layers that they write to."""
    file, names = whole.file(layer), [f"post_encs.{k}" for k in range(len(whole.targets(layer)))]
    if not any(name in file for name in names):
        return None
    first, *others = need(whole.path(layer), file, *names)
    differing = next((t for t, other in enumerate(others, start=1) if not other.equal(first)), None)
    if differing is not None:
        raise DictionaryError(
            f"{whole.path(layer)}: post_encs.{differing} differs from post_encs.0, so that a feature's activation is "
            "another one for each layer it writes to. This is recognised but not supported: a graph has one "
            "activation a feature."
        )
    return first


def _decoder(whole: _Set, source: int, width: int) -> SlotDecoders:
    """The matrices through which a layer's features write, each with its factors."""
    settings, kind = whole.settings[source], whole.kind(source)
    matrices, scales = [], []
    for slot, target in enumerate(whole.targets(source)):
        holder = source if kind == "none" else target
        path, file = whole.path(holder), whole.file(holder)
        untied = kind == "none" and not settings.on("per_source_tied")
        name = f"W_decs.{slot}" if untied else "W_dec"
        (W_dec,) = need(path, file, name)
        d_out = W_dec.shape[-1]
        if kind == "per-layer":
            place = whole.writers(target).index(source)
            sources = max(1, int(whole.settings[target].fields.get("n_sources") or 0))
            if sources < len(whole.writers(target)):
                raise DictionaryError(
                    f"{whole.settings[target].path}: n_sources is {sources}, but {len(whole.writers(target))} layers "
                    "write to this one."
                )
            W_dec = shaped(path, name, W_dec, (width * sources, d_out))[place * width : (place + 1) * width]
        matrices.append(shaped(path, name, W_dec, (width, d_out)))
        _, s_out = scales_of(whole.settings[target], whole.file(target), d_out, d_out)
        factor = s_out * (whole.shares(target) if target > source else 1.0)
        scale = written_factor(
            whole.path(source), settings, whole.file(source), f"post_enc_scales.{slot}", width, factor
        )
        scales.append(scale)
    return SlotDecoders(tuple(matrices), tuple(scales))


def _bias(whole: _Set, layer: int) -> Float[Tensor, " d_out"]:
    """The decoder bias of a layer, with what earlier layers add to it.

    Raises:
        DictionaryError: an earlier layer has a skip connection to this one.
    """
    path, file = whole.path(layer), whole.file(layer)
    (b_dec,) = need(path, file, _first(file, "b_dec"))
    total = b_dec.float()
    if whole.kind(layer) == "none":
        for source in whole.writers(layer)[:-1]:
            where, other, slot = whole.path(source), whole.file(source), layer - source
            (added,) = need(where, other, f"b_decs.{slot}")
            total = total + whole.shares(layer) * shaped(where, f"b_decs.{slot}", added, (b_dec.numel(),)).float()
            if f"W_skips.{slot}" in other and bool(other[f"W_skips.{slot}"].any()):
                raise DictionaryError(
                    f"{where}: W_skips.{slot} is a skip connection from layer {source} to layer {layer}, which is "
                    "recognised but not supported: a skip connection here goes from a layer's MLP input to its own "
                    "output."
                )
    _, s_out = scales_of(whole.settings[layer], file, b_dec.numel(), b_dec.numel())
    return total * s_out


def model(repository: Repository, entry: Entry) -> str | None:
    """The model named in the training configuration beside the hookpoints, if it is there."""
    return model_of(repository, entry.files[len(entry.files) // 2])


LAYOUT = Layout("EleutherAI clt-training, cross-layer (cfg.json with n_targets, sae.safetensors)", find, read, model)
