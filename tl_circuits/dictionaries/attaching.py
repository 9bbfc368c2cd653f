"""``tlc.attach``: put a dictionary in any form on a model, or take over what SAELens has attached already."""

import re
from typing import Any, Literal

from tl_circuits.dictionaries import Dictionary, load_dictionary
from tl_circuits.dictionaries.combined import combined, one_a_layer
from tl_circuits.errors import DictionaryError
from tl_circuits.hooks import Replacement, attach_dictionary, carried_saes, layer_device, own_sites, restore
from tl_circuits.support.checked import checked, require_model


@checked
def attach(model: Any, transcoders: Any = None, *, mlps: Literal["auto", "ratio", "error"] = "auto") -> Replacement:
    """Put a dictionary on a model: its features become hook points that can be read, edited and traced.

    The model computes exactly what it did before (the reconstruction plus its error is the MLP's output), so it can
    be used as usual while a dictionary is attached. Each layer with output site ``S``, such as
    ``blocks.3.hook_mlp_out``, gets the points that SAELens has: ``S.hook_sae_input``, ``S.hook_sae_acts_pre``,
    ``S.hook_sae_acts_post``, ``S.hook_sae_recons``, ``S.hook_sae_error`` and ``S.hook_sae_output``.

    Args:
        model: any HookedTransformer or TransformerBridge. It is neither copied nor changed.
        transcoders: a dictionary (:func:`load_dictionary`, :func:`mlp_neurons`), or anything that
            :func:`load_dictionary` takes. None takes over what SAELens' ``add_sae`` put on the
            model, and gives them back on detaching. If the model is on other devices than the dictionary, the
            replacement works with a copy there; encoders and decoders kept in the machine's memory or on disk stay
            where they are.
        mlps: what becomes of MLPs that no dictionary replaces. ``"error"``: in graphs the whole output is one error
            node at each position. ``"ratio"``: it is passed, with the ratio of each neuron's activation to its input
            held at its value on the prompt (half of it for each factor of a gated neuron), so that effects are traced
            on to what wrote the MLP's input (docs/method.md, "Any site"). ``"auto"``: ``"ratio"`` if there are
            autoencoders, which need it, else ``"error"``.

    Returns:
        The model with its dictionary. Use it in a ``with`` statement, or call ``detach()`` when done.

    Raises:
        AttachError: the model already carries a dictionary.
        DictionaryError: widths, layers or hook names do not fit the model, or autoencoders are given with
            ``mlps="error"``.
        UnknownHookError: the model does not have a hook that the dictionary names.
        ArgumentError: ``model`` is not a TransformerLens model.

    Examples:
        >>> model = tlc.load_model("tiny-facts")
        >>> with tlc.attach(model, transcoders) as replacement:
        ...     _, cache = model.run_with_cache(prompt)
        >>> cache["blocks.0.hook_mlp_out.hook_sae_acts_post"].shape  # [batch, pos, feature]
        torch.Size([1, 9, 768])
        >>> "blocks.0.hook_mlp_out.hook_sae_acts_post" in model.hook_dict  # detached again
        False
    """
    require_model("attach", model)
    if transcoders is not None:
        dictionary = transcoders if isinstance(transcoders, Dictionary) else load_dictionary(transcoders)
        return attach_dictionary(model, _with_its_layers(model, _with_mlps(dictionary, mlps)))
    name = "taken over from SAELens"
    sets = [load_dictionary(found, layers=list(found), name=name) for found in one_a_layer(_carried(model))]
    dictionary = combined(sets)
    dictionary = _with_its_layers(model, _with_mlps(dictionary, mlps))
    return attach_dictionary(model, dictionary, take_over=True)


@checked
def detach(model: Any) -> None:
    """Give a model back as it was before :func:`attach`, whatever happened since.

    It goes by the marks that everything of this package on a model carries, so it needs no :class:`Replacement`: for
    instance when Ctrl-C came before ``replacement = tlc.attach(...)`` was done. It takes off the dictionary with its
    hook points, and hooks that a run left behind; it puts back what ``add_sae`` had attached. Hooks of others stay,
    also those that you added yourself from :func:`intervention_hooks`. If another thread traces the model, it waits for
    it. Calling it again, or on a model without a dictionary, does nothing.

    Args:
        model: any HookedTransformer or TransformerBridge.

    Raises:
        ArgumentError: ``model`` is not a TransformerLens model.

    Examples:
        >>> model = tlc.load_model("tiny-facts")
        >>> lost = tlc.attach(model, transcoders)
        >>> tlc.detach(model)
        >>> lost.attached, "blocks.0.hook_mlp_out.hook_sae_acts_post" in model.hook_dict
        (False, False)
    """
    require_model("detach", model)
    restore(model)


def _with_mlps(dictionary: Dictionary, mlps: Literal["auto", "ratio", "error"]) -> Dictionary:
    """``dictionary`` with the rule for MLPs that no dictionary replaces."""
    own = next(iter(own_sites(dictionary)), None)
    if mlps == "error" and own is not None:
        _, layer, site = own.split(".", 2)
        raise DictionaryError(
            f'mlps="error" is for transcoders, and layer {layer} has an autoencoder of {site}: what it reads '
            'comes through MLPs, which must be passed for its features to have inputs. Leave mlps= out, or say "ratio".'
        )
    if mlps == "auto":
        return dictionary if own is None else dictionary.with_mlps("ratio")
    return dictionary.with_mlps(mlps)


def _with_its_layers(model: Any, dictionary: Dictionary) -> Dictionary:
    """``dictionary`` with each layer on the device of the model's layer."""
    n_layers = int(model.cfg.n_layers)
    # A layer that the model does not have is refused later, by the dictionary's `check`, with a clear message.
    devices = {layer: layer_device(model, layer if layer < n_layers else 0) for layer in dictionary.layers}
    return dictionary.placed(devices)


def _carried(model: Any) -> list[tuple[int, Any]]:
    """What SAELens attached, each with its layer, ascending."""
    saes = carried_saes(model)
    if not saes:
        raise DictionaryError(
            "tlc.attach(model) takes over what SAELens' add_sae attached, and this model carries nothing. "
            "Give transcoders: tlc.attach(model, tlc.mlp_neurons(model)) works on any model."
        )
    found: list[tuple[int, Any]] = []
    for read, sae in saes.items():
        match = re.match(r"blocks\.(\d+)\.", read)
        if match is None:
            raise DictionaryError(f"SAELens attached a dictionary reading {read!r}, which belongs to no block.")
        found.append((int(match.group(1)), sae))
    return sorted(found, key=lambda one: one[0])
