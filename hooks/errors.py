"""Exceptions raised where a TransformerLens model is touched.

Every exception of the package derives from :class:`TLCircuitsError`, so one
``except`` catches them all; each also derives from the built-in it refines.
"""


class TLCircuitsError(Exception):
    """Base class of every error this package raises on purpose."""


class ArgumentError(TLCircuitsError, TypeError):
    """An argument of another type than the function takes; the message says which is meant, and how to get it."""


class UnknownHookError(TLCircuitsError, KeyError):
    """A hook name that the model does not have."""

    def __str__(self) -> str:  # KeyError would print the repr of its argument
        return str(self.args[0])


class HookFiringError(TLCircuitsError, RuntimeError):
    """A hook we rely on fired never, or more often than once, in one forward pass."""


class AttachError(TLCircuitsError, RuntimeError):
    """Attaching or detaching is not possible in the model's present state."""


class ArchitectureError(TLCircuitsError, ValueError):
    """The model is built in a way that the requested computation does not cover."""


class PromptError(TLCircuitsError, ValueError):
    """A prompt that cannot be run on the model."""


class NotFiniteError(TLCircuitsError, ValueError):
    """A weight or an activation holds NaN or infinity."""


class DictionaryError(TLCircuitsError, ValueError):
    """A dictionary that does not fit the model, or whose tensors contradict each other."""


class DivergenceError(TLCircuitsError, ArithmeticError):
    """An edited run whose numbers outgrew floating point, so that it has no outcome."""


class EditError(TLCircuitsError, ValueError):
    """An edit that names what does not exist, or contradicts another edit."""
