"""Give a model back as it was before this package touched it."""

from .interrupts import interrupts_wait
from .owned import take_off
from .sites import Model
from .takeover import give_back
from .turn import turn


def restore(model: Model) -> None:
    """Take everything of ours off a model, and put back what SAELens had attached, whatever state the model is in.

    It goes by the marks on the model, not by what was done before. Doing it again does nothing.
    """
    try:
        _restore(model)
    except BaseException:  # what was begun is finished, so that a model is never half attached
        _restore(model)
        raise


def _restore(model: Model) -> None:
    with turn(model), interrupts_wait():
        take_off(model, lasting=True)
        give_back(model)
