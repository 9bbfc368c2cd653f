"""Exceptions raised by everything that touches a TransformerLens model.

Every exception of the package derives from :class:`TLCircuitsError`, so that one ``except`` catches them all, and from
the built-in exception that fits, so that code which knows nothing of this package can catch it too.
"""


class TLCircuitsError(Exception):
    """Base class of every error this package raises on purpose."""


class ArgumentError(TLCircuitsError, TypeError):
    """An argument has the wrong type; the message says what is expected and how to get it."""


class UnknownHookError(TLCircuitsError, KeyError):
    """A hook name that the model does not have."""

    def __str__(self) -> str:  # KeyError would print the repr of its argument
        return str(self.args[0])


class HookFiringError(TLCircuitsError, RuntimeError):
    """A hook that is needed did not fire, or fired more than once, in one forward pass."""


class AttachError(TLCircuitsError, RuntimeError):
    """A dictionary cannot be attached or detached now; for instance, the model carries one already."""


class BusyError(TLCircuitsError, RuntimeError):
    """A thread ran a model while another thread was tracing or editing it."""


class ArchitectureError(TLCircuitsError, ValueError):
    """The model's architecture does not allow what was asked for."""


class PromptError(TLCircuitsError, ValueError):
    """A prompt that cannot be run on the model."""


class NotFiniteError(TLCircuitsError, ValueError):
    """A weight or an activation holds NaN or infinity."""


class DictionaryError(TLCircuitsError, ValueError):
    """A dictionary does not fit the model, or its tensors contradict each other."""


class DivergenceError(TLCircuitsError, ArithmeticError):
    """In a run with edits, numbers became too large for floating point, so it has no result."""


class EditError(TLCircuitsError, ValueError):
    """An edit names something that does not exist, or contradicts another edit."""
