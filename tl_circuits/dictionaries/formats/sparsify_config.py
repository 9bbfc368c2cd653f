"""What configurations of EleutherAI's sparsify and clt-training say about a hookpoint's file.

These are ``cfg.json`` and the training configuration.

clt-training (github.com/EleutherAI/clt-training) is a fork of sparsify (github.com/EleutherAI/sparsify) that adds
cross-layer transcoders, an affine step after the encoder, and scaled inputs and outputs. Both write the same files.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from tl_circuits.dictionaries.formats.layout import Hints
from tl_circuits.dictionaries.formats.reading import need, read_json, require_known_fields
from tl_circuits.dictionaries.repository import Repository
from tl_circuits.errors import DictionaryError

WEIGHTS = "sae.safetensors"
_MODULE = re.compile(r"(?:.*\.)?(?:layers|h)\.(\d+)\.(mlp|post_feedforward_layernorm)")
_KNOWN = (
    *("activation", "d_in", "expansion_factor", "k", "num_latents", "signed", "skip_connection", "transcode"),
    *("coalesce_topk", "divide_cross_layer", "n_sources", "n_targets", "normalize_io", "per_source_tied"),
    *("post_encoder_scale", "secondary_target_tied", "topk_coalesced"),
)
# These decide how the file was trained, not what its weights compute. `normalize_decoder` is for autoencoders alone.
_HARMLESS = ("dtype", "multi_topk", "normalize_decoder", "tp_output", "train_post_encoder", "use_fp8")
# A module whose input is read: a norm before the MLP reads the residual stream, the MLP the norm's output.
_READS = {
    "post_attention_layernorm": "hook_resid_mid",
    "pre_feedforward_layernorm": "hook_resid_mid",
    "ln_2": "hook_resid_mid",
    "mlp": "mlp.hook_in",
}


def layer_of(repository: Repository, hookpoint: str) -> int:
    """The layer of a hookpoint's folder; DictionaryError if the hookpoint is not an MLP or the norm after it."""
    match = _MODULE.fullmatch(hookpoint)
    if match is None:
        raise DictionaryError(
            f"{repository.name}: the hookpoint {hookpoint!r} is not an MLP (layers.<n>.mlp), so it leaves no linear "
            "path through the MLP. Use transcoders, trained with --transcode on layers.*.mlp."
        )
    return int(match[1])


@dataclass(frozen=True)
class Settings:
    """The parts of a hookpoint's configuration that decide what its weights compute.

    ``n_targets``: how many layers its features write to if it belongs to a cross-layer set; 0 if it stands alone.
    ``subtracts_bias``: whether ``b_dec`` is subtracted from what is read, as sparsify did before February 2025.
    """

    path: Path
    fields: Mapping[str, Any]
    subtracts_bias: bool

    @property
    def n_targets(self) -> int:
        return int(self.fields.get("n_targets") or 0)

    def on(self, name: str) -> bool:
        """Whether an option that is off by default is on."""
        return bool(self.fields.get(name))


def settings_of(repository: Repository, config: str) -> Settings:
    """Read a hookpoint's ``cfg.json``.

    Raises:
        DictionaryError: it has a field that is not known, an activation that is not supported, or nothing shows that it
            is a transcoder.
    """
    path = repository.local(config)
    fields = read_json(path)
    require_known_fields(path, fields, _KNOWN, _HARMLESS)
    activation = fields.get("activation", "topk")
    if activation == "batchtopk":
        raise DictionaryError(
            f"{path}: activation 'batchtopk' keeps the largest activations of a whole batch, so what is active on a "
            "prompt would depend on other texts; the file holds no threshold to use instead. It is recognised but "
            "not supported."
        )
    if activation != "topk" or fields.get("signed"):
        which = "topk of absolute values (signed)" if fields.get("signed") else activation
        raise DictionaryError(f"{path}: activation {which!r} is not supported, only topk.")
    old = "transcode" not in fields
    if not (
        fields.get("transcode")
        or (old and (fields.get("skip_connection") or _trained(repository, config).get("transcode")))
    ):
        raise DictionaryError(
            f"{path}: transcode is {fields.get('transcode')!r}: this is an autoencoder, and of sparsify's files only "
            "transcoders are opened. Give its tensors as tlc.Transcoder with one hook to read and write, or train "
            "with transcode=True (tl-circuits train does)."
        )
    # The field came with the change that stopped subtracting b_dec for transcoders (sparsify f02711e). An older file
    # with a skip connection is a transcoder all the same: an autoencoder's skip could copy what it reads.
    return Settings(path, fields, subtracts_bias=old)


def _trained(repository: Repository, config: str) -> Mapping[str, Any]:
    """The training configuration beside the hookpoints' folders; empty if it is not there."""
    beside = str(PurePosixPath(config).parent.parent / "config.json")
    return read_json(repository.local(beside)) if beside in repository.paths else {}


def model_of(repository: Repository, config: str) -> str | None:
    """The model named in the training configuration, if it is there."""
    name = _trained(repository, config).get("model")
    return name if isinstance(name, str) else None


def hooks_of(repository: Repository, config: str, hints: Hints) -> tuple[str, str]:
    """The hooks read and written: as the caller or the set's name says, else from the hookpoint and its training.

    A hookpoint is a module, whose input is read and whose output is written. ``hookpoints_in`` in the training
    configuration names other modules whose inputs were read instead.
    """
    hookpoint = PurePosixPath(config).parent.name
    match = _MODULE.fullmatch(hookpoint)
    writes = "mlp.hook_out" if match is None or match[2] == "mlp" else "hook_mlp_out"
    if hints.input_hook is not None:
        return hints.input_hook, hints.output_hook or writes
    return _read_by_training(repository, config, hookpoint, writes), hints.output_hook or writes


def _read_by_training(repository: Repository, config: str, hookpoint: str, writes: str) -> str:
    trained = _trained(repository, config)
    points, inputs = (trained.get(name) or [] for name in ("hookpoints", "hookpoints_in"))
    at = points.index(hookpoint) if isinstance(points, list) and hookpoint in points else -1
    where = f"{repository.name}: the training configuration config.json"
    if not inputs:
        if writes == "hook_mlp_out":
            raise DictionaryError(
                f"{repository.name}: the hookpoint {hookpoint!r} reads and writes the norm behind the MLP, and "
                "nothing says that it reads another module. If it was trained with other inputs, say so with "
                "input_hook=, such as 'hook_resid_mid'."
            )
        return "mlp.hook_in"
    if not isinstance(inputs, list) or not 0 <= at < len(inputs):
        raise DictionaryError(
            f"{where} has hookpoints_in, but they do not say what {hookpoint!r} reads. Give input_hook=."
        )
    layer = layer_of(repository, hookpoint)
    read = re.fullmatch(rf"(?:.*\.)?(?:layers|h)\.{layer}\.(\w+)", str(inputs[at]))
    name = read[1] if read else ""
    # On Gemma this norm stands behind the attention, so its input is the attention's output.
    behind_attention = name == "post_attention_layernorm" and "gemma" in str(trained.get("model", "")).lower()
    if name not in _READS or behind_attention:
        raise DictionaryError(
            f"{where} says that {hookpoint!r} reads the input of {inputs[at]!r}, expected one of {', '.join(_READS)} "
            "of the same layer, which hold the residual stream before the MLP or the MLP's input. Give input_hook= "
            "if you know the hook."
        )
    return _READS[name]


def scales_of(settings: Settings, file: Mapping[str, Tensor], d_in: int, d_out: int) -> tuple[float, float]:
    """The factors of what is read and of what is written.

    With ``normalize_io`` they are ``√d / in_norm`` and ``out_norm / √d``, else 1.
    """
    if not settings.on("normalize_io"):
        return 1.0, 1.0
    norms = []
    for name, tensor in zip(("in_norm", "out_norm"), need(settings.path, file, "in_norm", "out_norm"), strict=True):
        value = float(tensor) if tensor.numel() == 1 else float("nan")
        if not 0 < value < float("inf"):
            raise DictionaryError(f"{settings.path}: {name} is {value}, expected one positive number.")
        norms.append(value)
    return d_in**0.5 / norms[0], norms[1] / d_out**0.5
