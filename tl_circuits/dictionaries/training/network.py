"""The model that is trained on: its MLPs, watched or replaced while it reads, and its loss."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_circuits.errors import ModelError
from tl_circuits.models import PACKAGED, open_packaged

See = Callable[[int, Tensor, Tensor], Tensor | None]
"""What is called with a layer, its MLP's input and its output; a tensor replaces the output."""


@dataclass(frozen=True)
class Network:
    """A Hugging Face model, its blocks without the head, cut after the last layer that is trained, and its MLPs."""

    whole: Any
    trunk: Any
    mlps: Mapping[int, nn.Module]
    names: Mapping[int, str]
    d_model: int
    d_vocab: int


def opened(model: str, device: str, layers: Sequence[int] | None) -> tuple[Network, Any]:
    """The model and its tokenizer.

    Args:
        model: a packaged model's name, a folder with a checkpoint, or a hub name.
        device: where the model runs.
        layers: which layers are trained; None for all.

    Raises:
        ModelError: it cannot be opened, has no MLPs under the usual names, or lacks one of the layers.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = str(open_packaged(PACKAGED[model])) if model in PACKAGED else model
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        whole: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        whole = whole.to(device).eval().requires_grad_(False)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"cannot open the model {source!r} for training: {' '.join(str(error).split())[:300]}"
        ) from error
    base = whole.base_model
    at = next((name for name in ("layers", "h") if isinstance(getattr(base, name, None), nn.ModuleList)), None)
    if at is None or not all(hasattr(block, "mlp") for block in getattr(base, at)):
        raise ModelError(f"{model!r} has no MLPs called layers.<n>.mlp or h.<n>.mlp, so it cannot be trained on.")
    blocks = getattr(base, at)
    missing = sorted(set(layers or []) - set(range(len(blocks))))
    if missing:
        raise ModelError(f"{model!r} has layers 0 to {len(blocks) - 1}, asked for {', '.join(map(str, missing))}.")
    chosen = sorted(set(range(len(blocks)) if layers is None else layers))
    trunk = copy.copy(base)  # another list of blocks, the same blocks: running the model takes most of the time
    trunk._modules = dict(base._modules) | {at: nn.ModuleList(list(blocks)[: chosen[-1] + 1])}
    trunk.config = copy.copy(base.config)
    trunk.config.num_hidden_layers = chosen[-1] + 1
    mlps = {layer: blocks[layer].mlp for layer in chosen}
    size = whole.get_input_embeddings().weight.shape
    return Network(whole, trunk, mlps, {n: f"{at}.{n}.mlp" for n in chosen}, size[1], size[0]), tokenizer


@contextmanager
def watched(mlps: Mapping[int, nn.Module], see: See) -> Iterator[None]:
    """Call ``see`` whenever one of the MLPs has run."""
    handles = []
    try:
        for layer, mlp in mlps.items():
            handles.append(
                mlp.register_forward_hook(lambda module, args, output, layer=layer: see(layer, args[0], output))
            )
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def losses(network: Network, ids: Int[Tensor, "piece context"]) -> Float[Tensor, " piece"]:
    """The mean next-token loss of each piece, in nats."""
    logits = network.whole(input_ids=ids.long(), use_cache=False).logits[:, :-1].float()
    # One token a row: with the vocabulary along another axis, PyTorch's float32 sums over it are off by 0.0001 nats.
    each = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].long().flatten(), reduction="none")
    return each.view(len(ids), -1).mean(1)
