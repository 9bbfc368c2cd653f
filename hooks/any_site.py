"""Dictionaries that rebuild the tensor they read (autoencoders), and what becomes of MLPs that no dictionary replaces.

An autoencoder may sit at six sites of a block, listed in :data:`SITES` in the order of the forward pass. What it leaves
out of account, its error, is added again, so the model computes the same; but in a graph all that is downstream of the
site reads features and error, and nothing passes the site unseen.

A layer may have several dictionaries, each at a place of its own: see :mod:`.places`. Functions here take a place's
number where a dictionary is asked about one of them; it is the layer's number unless some layer has several.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .errors import ArchitectureError, DictionaryError
from .maps import mlp_site
from .norms import attention_norms, is_norm
from .places import by_place, places
from .record import Listener, final_hook, final_stream
from .sites import Model, attention_weights, find, is_parallel
from .turn import added_hooks

RESIDUAL = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post")
"""The sites at which the whole residual stream is rebuilt."""

SITES = ("hook_resid_pre", "attn.hook_z", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post")
"""Where an autoencoder may sit in its block."""

# How far a stream may be from the sum of what the hooks showed, relative to the largest step that was added.
_ARRIVES_WITHIN = {torch.float32: 1e-3, torch.float64: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}


def own_site(dictionary: Any, place: int) -> str | None:
    """The site of the autoencoder at a place, by its name within the block; None if no autoencoder is there."""
    if place not in dictionary.layers:
        return None
    read = dictionary.input_hook(place)
    return read.split(".", 2)[2] if read == dictionary.output_hook(place) else None


def own_sites(dictionary: Any) -> list[str]:
    """The full names of the hooks at which autoencoders sit, in the order of the forward pass."""
    placed = by_place(dictionary)
    return [placed.input_hook(place) for place in placed.layers if own_site(placed, place) is not None]


def at_any_site(dictionary: Any) -> bool:
    """Whether graphs need the wider local replacement model: there are autoencoders, or MLPs passed by their ratios."""
    return getattr(dictionary, "mlps", "error") == "ratio" or bool(own_sites(dictionary))


def mlp_place(dictionary: Any, layer: int) -> int | None:
    """The number of the place where a transcoder or neurons stand for a layer's MLP; None if no dictionary does."""
    placed = by_place(dictionary)
    for number, place in enumerate(places(placed, layer + 1)):
        if place.layer == layer and number in placed.layers and own_site(placed, number) is None:
            return number
    return None


def passed_mlps(dictionary: Any, n_layers: int) -> tuple[int, ...]:
    """The layers whose MLP is passed with its activation ratios held, as no dictionary replaces it."""
    if getattr(dictionary, "mlps", "error") != "ratio":
        return ()
    placed = by_place(dictionary)
    here = ((number, place) for number, place in enumerate(places(placed, n_layers)) if number in placed.layers)
    replaced = {place.layer for number, place in here if own_site(placed, number) is None}
    return tuple(layer for layer in range(n_layers) if layer not in replaced)


def mlp_output(dictionary: Any, layer: int) -> str:
    """The hook at which a layer's MLP output is held or replaced, whether the layer has a dictionary or not."""
    place = mlp_place(dictionary, layer)
    return f"blocks.{layer}.hook_mlp_out" if place is None else by_place(dictionary).output_hook(place)


def passing_points(model: Model, dictionary: Any, layers: Sequence[int]) -> list[str]:
    """The hooks at which the passed MLPs among ``layers`` are read and written: input, then output, layer by layer."""
    passed = [layer for layer in passed_mlps(dictionary, int(model.cfg.n_layers)) if layer in layers]
    return [f"blocks.{layer}.{end}" for layer in passed for end in ("mlp.hook_in", mlp_site(model, layer))]


def width_of(model: Model, layer: int, site: str) -> int:
    """The width of the tensor at an autoencoder's site; that of ``attn.hook_z`` is of all heads together."""
    if site != "attn.hook_z":
        return int(model.cfg.d_model)
    heads = attention_weights(model, layer).W_O
    return heads.shape[0] * heads.shape[1]


def require_site(model: Model, layer: int, site: str) -> None:
    """Raise DictionaryError unless an autoencoder can sit at ``site`` of a block of this model."""
    if site not in SITES:
        raise DictionaryError(
            f"layer {layer}: an autoencoder reads and writes one of {', '.join(SITES)} of its own block, not {site!r}."
        )
    if site == "hook_resid_mid" and is_parallel(model):
        raise DictionaryError(
            f"layer {layer}: this model's attention and MLP are parallel, so a block has no hook_resid_mid. Sites of "
            f"this model are {', '.join(s for s in SITES if s != 'hook_resid_mid')}."
        )
    point = find(model, f"blocks.{layer}.{site}")
    if site == "hook_resid_mid" and point is not None and point is find(model, f"blocks.{layer}.ln2.hook_in"):
        raise DictionaryError(
            f"layer {layer}: on a TransformerBridge, hook_resid_mid is only what the MLP's norm reads, and the "
            "stream does not go through it, so an autoencoder there would have no effect. Open the model as a "
            "HookedTransformer, or take another site."
        )
    if point is None:
        raise DictionaryError(
            f"layer {layer}: the model has no hook {f'blocks.{layer}.{site}'!r}, where the autoencoder sits."
        )


def flat(x: Float[Tensor, "batch pos *width"]) -> Float[Tensor, "batch pos d"]:
    """A site's tensor with one width: a HookedTransformer shows ``attn.hook_z`` with an axis for its heads."""
    return x if x.ndim <= 3 else x.flatten(2)


def require_effective(model: Model, tokens: Int[Tensor, " pos"], dictionary: Any) -> None:
    """Raise ArchitectureError unless an edit at every autoencoder's site reaches all that is downstream of it.

    A hook may show a tensor that the model computes beside the one that it passes on. So a random step is added at
    every site, and then each block must give the stream that the edited tensors make.
    """
    sites = own_sites(dictionary)
    if not sites:
        return
    put, generator = {}, torch.Generator().manual_seed(0)

    def step(name: str) -> Any:
        def add(tensor: Tensor, hook: Any) -> Tensor:
            size = tensor.float().square().mean(-1, keepdim=True).sqrt()
            moved = tensor + (torch.randn(tensor.shape, generator=generator).to(tensor.device) * size).to(tensor.dtype)
            put[name] = moved
            return moved

        return add

    hooks = [(name, step(name)) for name in sites]
    layers = sorted({_block_and_site(name)[0] for name in sites})
    needed = sorted({at for layer in layers for at in (layer, layer + 1)})
    n_layers = int(model.cfg.n_layers)
    kinds = ("hook_resid_pre", "hook_attn_out", "hook_mlp_out", "hook_resid_post")
    names = [f"blocks.{at}.{kind}" for at in needed if at < n_layers for kind in kinds]
    arrived: dict[str, Tensor] = {}
    # What arrives at a site is compared with what the sites before it make, so an earlier step does not hide a later
    # one.
    ends = [name for name in names if name.endswith(("resid_pre", "resid_post"))]
    inner = [name for name in sites if name.endswith(("hook_attn_out", "hook_resid_mid"))]
    arrivals = [(name, _keeper(arrived, name)) for name in [*ends, *inner]]
    # Hooks run in the order in which they were added: arrivals are seen before the step, the listener sees after it.
    with torch.no_grad(), added_hooks(model, [*arrivals, *hooks]):
        with Listener(model, dict.fromkeys([*names, final_hook(model)])) as listener:
            model(tokens[None])
    for name in sites:
        with torch.no_grad():
            _require_arrival(model, name, put, arrived, listener.seen)


def _block_and_site(name: str) -> tuple[int, str]:
    _, layer, site = name.split(".", 2)
    return int(layer), site


def _keeper(kept: dict[str, Tensor], name: str) -> Any:
    def keep(tensor: Tensor, hook: Any) -> None:
        kept[name] = tensor.detach()

    return keep


def _require_arrival(
    model: Model, name: str, put: dict[str, Tensor], arrived: dict[str, Tensor], seen: dict[str, Tensor]
) -> None:
    """Compare what arrives behind the site ``name`` with what the edited tensors make.

    That is the next site's tensor within the block, or the stream that leaves the block (or enters the next one).
    """
    layer, site = _block_and_site(name)
    block = f"blocks.{layer}"
    if site == "hook_resid_post":
        following = f"blocks.{layer + 1}.hook_resid_pre"
        if following in arrived:
            found, expected = arrived[following], put[name]
        else:  # the last block
            found = final_stream(model, seen[final_hook(model)])
            expected = model.ln_final(put[name]) if is_norm(model, "ln_final") else put[name]
    elif site == "attn.hook_z":
        if attention_norms(model, layer)[1] is not None:
            return  # a norm follows; the closed form compares the whole map with the model
        weights = attention_weights(model, layer)
        found = arrived.get(f"{block}.hook_attn_out", seen[f"{block}.hook_attn_out"])
        expected = flat(put[name]).float() @ weights.W_O.flatten(0, 1) + weights.b_O
    else:
        attention, mlp = (seen[f"{block}.{kind}"].float() for kind in ("hook_attn_out", "hook_mlp_out"))
        middle = f"{block}.hook_resid_mid"
        before = seen[f"{block}.hook_resid_pre"].float() + attention
        if middle in put and site in ("hook_resid_pre", "hook_attn_out"):
            found, expected = arrived[middle], before
        else:
            before = put[middle].float() if middle in put else before
            found, expected = arrived[f"{block}.hook_resid_post"], before + mlp
    gap = float((found.float() - expected.float()).abs().max() / expected.float().abs().max().clamp_min(1e-30))
    if not gap <= _ARRIVES_WITHIN[put[name].dtype]:
        raise ArchitectureError(
            f"{name} of this model does not show what the block passes on (an edit there is off by {gap:.0%} "
            "downstream), so an autoencoder at this site would have no effect, or a wrong one. Take another site."
        )
