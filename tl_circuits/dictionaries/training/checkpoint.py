"""Checkpoints of a training run: a folder that sparsify and ``load_transcoders`` open, with what is needed to go on."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tl_circuits.dictionaries.formats.sparsify_config import WEIGHTS
from tl_circuits.dictionaries.training.layer import LayerTraining, restored
from tl_circuits.dictionaries.training.network import Network
from tl_circuits.errors import OutputError

HISTORY, SETTINGS, STATE = "history.json", "training.json", "state.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """Where a run stood: layers, steps done, and the rows of its history."""

    layers: Mapping[int, LayerTraining]
    step: int
    history: list[dict[str, Any]]


def write_checkpoint(
    out: Path, network: Network, settings: dict[str, Any], reached: Checkpoint, finished: bool
) -> None:
    """Write a checkpoint beside ``out`` and put it in its place, whole or not at all.

    A finished run keeps no optimiser: that is most of a checkpoint, and there is nothing to go on with.
    """
    half, old = _beside(out, "saving"), _beside(out, "old")
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir()
    state = {f"{n}.{name}": t.contiguous() for n, layer in reached.layers.items() for name, t in layer.state().items()}
    if not finished:
        save_file(state, half / STATE)
    for number, layer in reached.layers.items():
        folder = half / network.names[number]
        folder.mkdir()
        weights = layer.folded()
        names = {"W_enc": "encoder.weight", "b_enc": "encoder.bias"}
        tensors = {names.get(name, name): tensor.contiguous() for name, tensor in weights.named().items()}
        save_file(tensors, folder / WEIGHTS)
        (folder / "cfg.json").write_text(json.dumps(_sae(settings) | {"d_in": weights.W_enc.shape[1]}))
    run = {"model": settings["model"], "ctx_len": settings["context"], "batch_size": settings["batch_size"]}
    points = [network.names[number] for number in reached.layers]
    (half / "config.json").write_text(json.dumps({"sae": _sae(settings)} | run | {"hookpoints": points}))
    (half / HISTORY).write_text(json.dumps(reached.history))
    (half / SETTINGS).write_text(json.dumps(settings | {"step": reached.step, "finished": finished}))
    if out.exists():
        os.replace(out, old)
    os.replace(half, out)
    shutil.rmtree(old, ignore_errors=True)


def _sae(settings: dict[str, Any]) -> dict[str, Any]:
    """A layer's configuration as sparsify writes it."""
    return {
        "activation": "topk",
        "expansion_factor": 32,
        "normalize_decoder": False,
        "num_latents": settings["features"],
        "k": settings["k"],
        "multi_topk": False,
        "skip_connection": settings["skip"],
        "transcode": True,
    }


def recover(out: Path) -> None:
    """Put the last whole checkpoint back if a run was killed just between moving it away and putting the next there."""
    old = _beside(out, "old")
    if old.exists() and not out.exists():
        os.replace(old, out)


def check_out(out: Path, resume: bool) -> None:
    """Refuse a folder that cannot be written to, and one that exists unless ``resume``.

    Raises:
        OutputError: as said; also if there is nothing to resume.
    """
    if not out.parent.is_dir():
        raise OutputError(f"cannot write {out}: the folder {out.parent} does not exist.")
    recover(out)
    if out.exists() and not resume:
        raise OutputError(
            f"{out} exists already. Go on from its last checkpoint with resume (--resume), or choose another."
        )
    if out.exists() and not (out / SETTINGS).is_file():
        raise OutputError(f"{out} holds no checkpoint to resume from: it has no {SETTINGS}.")


def check_settings(out: Path, settings: dict[str, Any]) -> None:
    """Refuse to go on with other settings than the run began with.

    Raises:
        OutputError: the first setting that differs is named.
    """
    before = json.loads((out / SETTINGS).read_text(encoding="utf-8"))
    for name, value in settings.items():
        if before.get(name) != value:
            raise OutputError(
                f"{out / SETTINGS}: {name} is {before.get(name)!r}, now {value!r}. Resume with the same settings."
            )


def read_checkpoint(out: Path, k: int, window: int, device: str) -> Checkpoint | None:
    """Where the run in ``out`` stood; None if it has finished."""
    settings = json.loads((out / SETTINGS).read_text(encoding="utf-8"))
    if settings["finished"]:
        return None
    state = load_file(out / STATE)
    parts: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in state.items():
        number, _, rest = name.partition(".")
        parts.setdefault(int(number), {})[rest] = tensor if rest.endswith(".step") else tensor.to(device)
    layers = {number: restored(part, k, window) for number, part in sorted(parts.items())}
    return Checkpoint(layers, settings["step"], json.loads((out / HISTORY).read_text(encoding="utf-8")))


def read_history(out: Path) -> list[dict[str, Any]]:
    """The rows of a run's history."""
    return json.loads((out / HISTORY).read_text(encoding="utf-8"))


def _beside(out: Path, what: str) -> Path:
    return out.with_name(f".{out.name}.{what}")
