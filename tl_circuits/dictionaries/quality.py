"""Measure how well a dictionary replaces a model's MLPs: sparsity, explained variance, change in loss."""

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_circuits.dictionaries.cross_layer import CrossLayerTranscoders
from tl_circuits.dictionaries.explained_variance import Outputs
from tl_circuits.dictionaries.several_sites import refuse_several
from tl_circuits.errors import PromptError
from tl_circuits.hooks import ReadPrompt, Replacement, added_hooks, in_turn, own_site, read_prompt, resolve
from tl_circuits.support.checked import checked

POOR = 0.1  # with less explained variance than this, a dictionary is probably on the wrong tensor
_READS = ("ln2.hook_normalized", "mlp.hook_in", "hook_resid_mid")
_WRITES = ("hook_mlp_out", "mlp.hook_out")


@checked
@in_turn
def dictionary_quality(replacement: Replacement, prompts: Sequence[Any], *, progress: bool = False) -> pd.DataFrame:
    """Measure how well the attached dictionary replaces the model's MLPs on some prompts.

    Positions that the dictionary's ``prompt_rule`` leaves out, such as a beginning-of-sequence token, are not counted
    and keep their MLP.

    Args:
        replacement: the model with the dictionary attached.
        prompts: texts or token ids, of at least two tokens each.
        progress: show a progress bar on stderr.

    Returns:
        A frame with a row a layer, and a last row with ``layer`` -1 for all layers together. ``l0`` is how many
        features are active on a token. ``explained_variance`` of the MLP's output: ``1 - Σ|y - ŷ|² / Σ|y - mean y|²``;
        1 is perfect, at 0 or below the mean would do as well. ``loss``: cross entropy of the next token, in nats a
        token, with this layer's MLP output replaced by its reconstruction. ``loss_change``: that minus the untouched
        model's loss.

    Raises:
        PromptError: there are no prompts, or one has fewer than two tokens.
        DictionaryError: some layer has several dictionaries.

    Examples:
        >>> quality = tlc.dictionary_quality(replacement, [prompt, "the bird of Texas is"])
        >>> print(quality[["layer", "l0", "explained_variance"]].round(2).to_string(index=False))
         layer   l0  explained_variance
             0 2.08                0.97
             1 5.69                1.00
             2 2.46                0.94
             3 3.15                0.92
            -1 3.35                0.96
    """
    replacement.require_attached()
    if len(prompts) == 0:
        raise PromptError("there are no prompts to measure the dictionary on; give at least one.")
    if isinstance(prompts, str):
        raise PromptError("dictionary_quality takes a list of prompts, got one text; write [prompt].")
    model, dictionary = replacement.model, replacement.dictionary
    refuse_several(dictionary, "dictionary_quality measures")
    layers = list(dictionary.layers)
    sums = {layer: Outputs() for layer in layers}
    plain, replaced, predicted = 0.0, dict.fromkeys([*layers, -1], 0.0), 0
    for prompt in tqdm(prompts, desc="measuring", unit="prompt", disable=not progress):
        read = read_prompt(model, dictionary, prompt)
        tokens = read.tokens
        if tokens.numel() < 2:
            raise PromptError("a prompt needs at least two tokens to have a loss.")
        keep = torch.ones(tokens.numel(), dtype=torch.bool)  # each layer takes it to its own device
        keep[list(read.skipped)] = False
        if not keep.any():
            raise PromptError(
                f"all {tokens.numel()} positions of the prompt are left out, so there is nothing to measure on."
            )
        plain += _loss(model, tokens, _listening(replacement, layers, keep, sums))
        for layer in replaced:
            some = layers if layer == -1 else [layer]
            hooks = [(f"{replacement.site(i)}.hook_sae_error", _without_error(keep)) for i in some]
            replaced[layer] += _loss(model, tokens, hooks)
        predicted += tokens.numel() - 1
    rows = [
        (
            layer,
            s.active / s.tokens,
            s.explained_variance(),
            replaced[layer] / predicted,
            (replaced[layer] - plain) / predicted,
        )
        for layer, s in sums.items()
    ]
    l0, variance = (sum(row[i] for row in rows) / len(rows) for i in (1, 2))
    rows.append((-1, l0, variance, replaced[-1] / predicted, (replaced[-1] - plain) / predicted))
    return pd.DataFrame(rows, columns=["layer", "l0", "explained_variance", "loss", "loss_change"])


def _loss(model: Any, tokens: Int[Tensor, " pos"], hooks: list[tuple[str, Callable[..., Any]]]) -> float:
    """The next-token loss, summed over tokens, in nats."""
    with torch.no_grad(), added_hooks(model, hooks):
        logits = model(tokens[None])[0, :-1].float()
    return float(torch.nn.functional.cross_entropy(logits, tokens[1:].to(logits.device), reduction="sum"))


def _listening(
    replacement: Replacement, layers: Sequence[int], keep: Bool[Tensor, " pos"], sums: dict[int, Outputs]
) -> list[tuple[str, Callable[..., Any]]]:
    hooks: list[tuple[str, Callable[..., Any]]] = []
    for layer in layers:
        site = replacement.site(layer)
        recons: dict[str, Tensor] = {}

        def count(acts: Tensor, hook: Any, layer: int = layer) -> None:
            sums[layer].active += int((acts[0, keep.to(acts.device)] != 0).sum())

        def rebuilt(value: Tensor, hook: Any, recons: dict = recons) -> None:
            recons["here"] = value[0, keep.to(value.device)].float()

        def missed(error: Tensor, hook: Any, layer: int = layer, recons: dict = recons) -> None:
            left = error[0, keep.to(error.device)].float()
            sums[layer].add(recons["here"] + left, left)

        hooks += [(f"{site}.hook_sae_acts_post", count), (f"{site}.hook_sae_recons", rebuilt)]
        hooks.append((f"{site}.hook_sae_error", missed))
    return hooks


def _without_error(keep: Bool[Tensor, " pos"]) -> Callable[..., Tensor]:
    def hook(error: Tensor, hook: Any) -> Tensor:
        return torch.where(keep.to(error.device)[None, :, None], 0.0, error)

    return hook


@checked
@in_turn
def hook_hint(replacement: Replacement, quality: pd.DataFrame, prompt: Any) -> str | None:
    """Suggest the right hooks if a dictionary seems to be on the wrong tensors: a sentence, or None if it is not.

    If the explained variance is near or below zero, the middle layer's dictionary is tried on every pair of tensors
    that a transcoder can read and write, and the pair that it explains best is named.

    Args:
        replacement: the model with the dictionary attached.
        quality: what :func:`dictionary_quality` returned.
        prompt: a text or token ids to try on.

    Returns:
        What is wrong and what to do about it; None if the median layer explains at least 10 % of the variance.

    Examples:
        >>> quality = tlc.dictionary_quality(replacement, [prompt])
        >>> tlc.hook_hint(replacement, quality, prompt) is None
        True
    """
    if not float(quality.explained_variance.iloc[:-1].median()) < POOR:
        return None
    model, dictionary = replacement.model, replacement.dictionary
    said = (
        "The explained variance is near or below zero: the dictionary is likely on another tensor than it was "
        "trained on"
    )
    layer = dictionary.layers[len(dictionary.layers) // 2]
    if dictionary.exact or isinstance(dictionary, CrossLayerTranscoders) or own_site(dictionary, layer) is not None:
        return f"{said}, or for another model."
    seen = _tensors(model, read_prompt(model, dictionary, prompt), layer)
    values = {}
    for read in (r for r in _READS if r in seen):
        x = seen[read]
        recons = dictionary.decode(
            layer, {layer: dictionary.activate(layer, dictionary.pre_activations(layer, x), x)}, x
        )
        for write in (w for w in _WRITES if w in seen):
            sums = Outputs()
            sums.add(seen[write].float(), seen[write].float() - recons)
            values[read, write] = sums.explained_variance()
    (read, write), best = max(values.items(), key=lambda item: item[1])
    used = dictionary.input_hook(layer).split(".", 2)[2], dictionary.output_hook(layer).split(".", 2)[2]
    if best < POOR or (read, write) == used:
        return f"{said}, or for another model: no pair of hooks of layer {layer} explains it."
    return (
        f"{said}. Layer {layer} reading {read} and writing {write} would explain {best:.0%} (now {used[0]} to "
        f"{used[1]}): load it with input_hook={read!r}, output_hook={write!r}."
    )


def _tensors(model: Any, prompt: ReadPrompt, layer: int) -> dict[str, Float[Tensor, "kept d"]]:
    """The tensors of one layer that a transcoder can read or write, at the positions that count."""
    tokens = prompt.tokens
    keep = [p for p in range(tokens.numel()) if p not in prompt.skipped]
    seen: dict[str, Tensor] = {}

    def keeper(name: str) -> Callable[..., None]:
        def hook(value: Tensor, hook: Any) -> None:
            seen[name] = value[0, keep].detach()

        return hook

    present = [n for n in (*_READS, *_WRITES) if f"blocks.{layer}.{n}" in model.hook_dict]
    for name in present:
        resolve(model, f"blocks.{layer}.{name}")
    with torch.no_grad(), added_hooks(model, [(f"blocks.{layer}.{n}", keeper(n)) for n in present]):
        model(tokens[None])
    return seen
