"""``attach`` as people call it: takes whatever dictionary they have, and SAELens' own attachments."""

import re
from contextlib import ExitStack
from typing import Any

from tl_circuits.dictionaries import Dictionary, load_transcoders
from tl_circuits.errors import DictionaryError
from tl_circuits.hooks import Replacement, carried_saes, layer_device, lifted
from tl_circuits.hooks import attach as attach_dictionary
from tl_circuits.support.checked import checked, require_model


@checked
def attach(model: Any, transcoders: Any = None) -> Replacement:
    """Register a dictionary's layers as HookPoints on ``model``; detach, or leave the ``with``, to undo.

    Args:
        model: any HookedTransformer or TransformerBridge; it is not copied and not changed.
        transcoders: a dictionary (:func:`load_transcoders`, :func:`mlp_neurons`) or anything
            that :func:`load_transcoders` takes. Each layer's is put on the device of the model's layer
            (encoders and decoders in the machine's memory or on disk stay, and the rows wanted follow):
            a copy belonging to the replacement, where it lies elsewhere. None takes over the transcoders that SAELens'
            ``add_sae`` put on the model, and gives them back on detaching.

    Raises AttachError if something is attached already, DictionaryError if widths, layers or
    hook names do not fit, UnknownHookError for hooks the model does not have, ArgumentError for what is no model.
    """
    require_model("attach", model)
    if transcoders is not None:
        dictionary = transcoders if isinstance(transcoders, Dictionary) else load_transcoders(transcoders)
        return attach_dictionary(model, _with_its_layers(model, dictionary))
    carried = _carried(model)
    dictionary = load_transcoders(carried, layers=list(carried), name="taken over from SAELens")
    dictionary = _with_its_layers(model, dictionary)
    with ExitStack() as undo:
        undo.enter_context(lifted(model))
        replacement = attach_dictionary(model, dictionary)
        replacement.also_undo(undo.pop_all())
        return replacement
    raise AssertionError("unreachable")


def _with_its_layers(model: Any, dictionary: Dictionary) -> Dictionary:
    """``dictionary`` placed where the model's layers lie; layers the model lacks are for ``check`` to refuse."""
    n_layers = int(model.cfg.n_layers)
    devices = {layer: layer_device(model, layer if layer < n_layers else 0) for layer in dictionary.layers}
    return dictionary.placed(devices)


def _carried(model: Any) -> dict[int, Any]:
    saes = carried_saes(model)
    if not saes:
        raise DictionaryError(
            "tlc.attach(model) takes over what SAELens' add_sae attached, and this model carries nothing. "
            "Give transcoders: tlc.attach(model, tlc.mlp_neurons(model)) works on any model."
        )
    layers = {}
    for read, sae in saes.items():
        match = re.match(r"blocks\.(\d+)\.", read)
        if match is None:
            raise DictionaryError(f"SAELens attached a dictionary reading {read!r}, which belongs to no block.")
        layers[int(match.group(1))] = sae
    return dict(sorted(layers.items()))
