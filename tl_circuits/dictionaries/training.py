"""Train transcoders for any model on plain text files, with EleutherAI's sparsify."""

import importlib.util
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from tl_circuits.errors import ModelError, OutputError, PromptError
from tl_circuits.hooks import plain_ids, special_token, without_first
from tl_circuits.models import PACKAGED, open_packaged
from tl_circuits.support.checked import checked
from tl_circuits.support.extras import how_to_install

HISTORY = "history.json"
_MLPS = ["layers.*.mlp", "h.*.mlp"]


@checked
def train_transcoders(
    model: str,
    texts: Sequence[str | Path],
    out: str | Path,
    *,
    layers: Sequence[int] | None = None,
    expansion: int = 16,
    k: int = 32,
    skip: bool = True,
    context: int = 256,
    batch_size: int = 8,
    epochs: int = 1,
    lr: float | None = None,
    save_every: int = 200,
    resume: bool = False,
    device: str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Train a TopK transcoder for every MLP of a model; ``load_transcoders(out)`` opens them afterwards.

    Needs the extra: ``pip install 'tl_circuits[train]'``.

    Args:
        model: ``smollm2-135m`` or ``gemma-3-270m``, a folder with a Hugging Face checkpoint, or a hub name.
        texts: UTF-8 text files; they are joined and cut into pieces of ``context`` tokens.
        out: a folder that does not exist yet; with ``resume``, that of an earlier, interrupted run.
        layers: which MLPs; None for all.
        expansion: how many features a layer gets, as a multiple of d_model.
        k: how many features are active on a token.
        skip: with a linear skip connection (Paulo et al. 2025), which explains more with the same ``k``.
        context: tokens in a piece of text.
        batch_size: pieces in a training step.
        epochs: how often the text is gone through.
        lr: learning rate; None lets sparsify choose it by the number of features.
        save_every: steps between checkpoints. Each replaces the one before, whole or not at all.
        resume: go on from the last checkpoint in ``out``.
        device: where to train; None for a GPU if there is one.
        seed: of the order of the text and of the first weights.
        progress: show a progress bar on stderr, with the explained variance.

    Returns:
        A frame with ``step``, ``layer`` and ``explained_variance`` on that step's text; also kept as ``history.json``.

    Raises:
        ImportError: sparsify is not installed.
        ModelError: the model cannot be opened, or has no MLPs under the usual names.
        OutputError: ``out`` exists already, cannot be written, or was trained with other settings.
        PromptError: a text cannot be read, or all texts together are shorter than one batch.

    Examples:
        >>> from tl_circuits.models import BUILTIN_FOLDER  # the checkpoint of tiny-facts
        >>> text = folder / "facts.txt"
        >>> _ = text.write_text("the capital of Texas is Austin " * 400)
        >>> history = tlc.train_transcoders(str(BUILTIN_FOLDER), [text], folder / "mine", expansion=4, k=8, context=32)
        >>> tlc.load_transcoders(folder / "mine").width(0)
        384
    """
    if importlib.util.find_spec("sparsify") is None:
        raise ImportError(f"training needs EleutherAI's sparsify. Run: {how_to_install('train')}")
    out = Path(out)
    _check_out(out, resume, {"k": k, "expansion_factor": expansion, "skip_connection": skip})
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    source = str(open_packaged(PACKAGED[model])) if model in PACKAGED else model
    with (
        torch.inference_mode(False),
        torch.enable_grad(),  # notebooks switch gradients off for good
        _silent(),
        _restored_precision(),
        _decoder_for(device),
        _bar(progress) as bars,
    ):
        network, tokenizer = _open(source, device, layers)
        first = special_token(tokenizer)  # as text is traced with the set (dictionaries/prompt_rules.py)
        pieces = _pieces(tokenizer, texts, context, first)
        trainer = _trainer(
            network,
            _ordered(pieces, epochs, batch_size, seed),
            out,
            {"activation": "topk", "expansion_factor": expansion, "k": k, "skip_connection": skip, "transcode": True},
            {
                "model": model, "dataset": "text files", "ctx_len": context, "batch_size": batch_size, "lr": lr,
                "save_every": save_every, "init_seeds": [seed], "log_to_wandb": False, "save_dir": str(out.parent),
                "run_name": out.name, "exclude_tokens": [] if first is None else [first],
                "hookpoints": _MLPS if layers is None else [p.replace("*", str(i)) for i in layers for p in _MLPS],
            },
            bars,
        )
        history = trainer.history
        if resume and (out / "state.pt").is_file():
            trainer.load_state(str(out))
            # sparsify repeats the step after which it saved, so that step's rows are dropped
            history += [row for row in json.loads((out / HISTORY).read_text()) if row[0] < trainer.global_step]
        trainer.fit()
    return pd.DataFrame(history, columns=["step", "layer", "explained_variance"])


def _check_out(out: Path, resume: bool, settings: dict[str, Any]) -> None:
    if not out.parent.is_dir():
        raise OutputError(f"cannot write {out}: the folder {out.parent} does not exist.")
    if not out.exists():
        return
    if not resume:
        raise OutputError(f"{out} exists already. Go on from its last checkpoint with resume (--resume), or choose another.")
    config = out / "config.json"
    if not config.is_file():
        raise OutputError(f"{out} holds no checkpoint to resume from.")
    before = json.loads(config.read_text()).get("sae", {})
    for field, value in settings.items():
        if before.get(field) != value:
            raise OutputError(f"{config}: {field} is {before.get(field)!r}, now {value!r}. Resume with the same settings.")


@contextmanager
def _silent() -> Iterator[None]:
    """Keep sparsify's messages off stdout, which is for results."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield


@contextmanager
def _bar(progress: bool) -> Iterator[list[Any]]:
    """Yield a list that will hold sparsify's progress bars, so that the explained variance can be shown on them."""
    from sparsify import trainer
    from tqdm.auto import tqdm

    bars: list[Any] = []

    def make(**kwargs: Any) -> Any:
        bars.append(tqdm(**kwargs | {"desc": "training", "unit": "step", "disable": not progress}))
        return bars[-1]

    before = trainer.tqdm
    trainer.tqdm = make
    try:
        yield bars
    finally:
        trainer.tqdm = before
        for bar in bars:
            bar.close()


@contextmanager
def _restored_precision() -> Iterator[None]:
    """Undo afterwards that sparsify changes the precision of all matrix products of this process."""
    before = torch.get_float32_matmul_precision()
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _decoder_for(device: str) -> Iterator[None]:
    """Without a GPU, let sparsify decode in plain torch.

    It would use Triton, which comes with torch's builds for CUDA, and fail on a CPU.
    """
    from sparsify import sparse_coder, utils

    before = sparse_coder.decoder_impl
    if torch.device(device).type != "cuda":
        sparse_coder.decoder_impl = utils.eager_decode
    try:
        yield
    finally:
        sparse_coder.decoder_impl = before


def _open(source: str, device: str, layers: Sequence[int] | None) -> tuple[Any, Any]:
    """The model, without the blocks after the last of ``layers``, and its tokenizer."""
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        network = AutoModel.from_pretrained(source, dtype=torch.float32).to(device).eval()
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot open the model {source!r} for training: {' '.join(str(error).split())[:300]}") from error
    network.config.use_cache = False
    blocks = next((b for b in (getattr(network, name, None) for name in ("layers", "h")) if b is not None), None)
    if layers and blocks is not None and max(layers) < len(blocks):
        del blocks[max(layers) + 1 :]  # running the model takes most of the time
    return network, tokenizer


def _pieces(tokenizer: Any, texts: Sequence[str | Path], context: int, first: int | None) -> list[list[int]]:
    """The texts as token ids, cut into pieces of equal length; what is left over is dropped."""
    ids: list[int] = []
    for path in texts:
        if not Path(path).is_file():
            raise PromptError(f"there is no text file {path}.")
        try:
            text = Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise PromptError(f"{path} is not UTF-8 text: {error}.") from error
        ids += without_first(plain_ids(tokenizer, text), [] if first is None else [first])
        if tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
    start = [] if first is None else [first]
    step = context - len(start)
    return [start + ids[i : i + step] for i in range(0, len(ids) - step + 1, step)]


def _ordered(pieces: list[list[int]], epochs: int, batch_size: int, seed: int) -> Any:
    """The pieces as a dataset, in another random order in each epoch."""
    from datasets import Dataset

    if len(pieces) * epochs < batch_size:
        raise PromptError(
            f"the text gives {len(pieces)} pieces, fewer than one batch of {batch_size}. Give more text, or a smaller "
            "context."
        )
    order = [
        i
        for epoch in range(epochs)
        for i in torch.randperm(len(pieces), generator=torch.Generator().manual_seed(seed + epoch)).tolist()
    ]
    whole = order[: len(order) // batch_size * batch_size]
    return Dataset.from_dict({"input_ids": [pieces[i] for i in whole]}).with_format("torch")


def _trainer(
    network: Any, dataset: Any, out: Path, sae: dict[str, Any], run: dict[str, Any], bars: list[Any]
) -> Any:
    """sparsify's trainer, changed to record the explained variance, and to replace a checkpoint as a whole."""
    from sparsify import SparseCoderConfig, Trainer
    from sparsify.__main__ import RunConfig

    class Recording(Trainer):
        def __init__(self) -> None:
            self.history: list[tuple[int, int, float]] = []
            super().__init__(RunConfig(sae=SparseCoderConfig(**sae), **run), dataset, network)
            for name, coder in self.saes.items():
                layer = int(name.split(".")[-2])
                coder.register_forward_hook(lambda module, args, output, layer=layer: self._note(layer, output))

        def _note(self, layer: int, output: Any) -> None:
            self.history.append((self.global_step, layer, 1.0 - float(output.fvu.detach())))
            latest = [row[2] for row in self.history[-len(self.saes) :]]
            for bar in bars:
                bar.set_postfix_str(f"explained variance {sum(latest) / len(latest):.3f}", refresh=False)

        def save(self) -> None:
            half = out.with_name(f".{out.name}.saving")
            shutil.rmtree(half, ignore_errors=True)
            self._checkpoint(self.saes, str(half), True)
            (half / HISTORY).write_text(json.dumps(self.history))
            old = out.with_name(f".{out.name}.old")
            if out.exists():
                os.replace(out, old)
            os.replace(half, out)
            shutil.rmtree(old, ignore_errors=True)

    trainer = Recording()
    if not trainer.saes:
        raise ModelError(f"no MLP of the model matches {' or '.join(run['hookpoints'])}.")
    return trainer
