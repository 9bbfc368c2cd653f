"""``attach`` as people call it: takes whatever dictionary they have, and SAELens' own attachments."""

from typing import Any

from tl_circuits.dictionaries import Dictionary, load_transcoders
from tl_circuits.hooks import Replacement
from tl_circuits.hooks import attach as attach_dictionary


def attach(model: Any, transcoders: Any) -> Replacement:
    """Register a dictionary's layers as HookPoints on ``model``; detach, or leave the ``with``, to undo.

    Args:
        model: any HookedTransformer or TransformerBridge; it is not copied and not changed.
        transcoders: a dictionary (:func:`load_transcoders`, :func:`mlp_neurons`) or anything
            that :func:`load_transcoders` takes.

    Raises AttachError if something is attached already, DictionaryError if widths, layers or
    hook names do not fit, UnknownHookError for hooks the model does not have.
    """
    dictionary = transcoders if isinstance(transcoders, Dictionary) else load_transcoders(transcoders)
    return attach_dictionary(model, dictionary)
