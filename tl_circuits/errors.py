"""All exceptions of the package in one place; those about the model itself live in ``hooks``."""

from tl_circuits.hooks.errors import (
    ArchitectureError,
    ArgumentError,
    AttachError,
    BusyError,
    DictionaryError,
    DivergenceError,
    EditError,
    HookFiringError,
    NotFiniteError,
    PromptError,
    TLCircuitsError,
    UnknownHookError,
)

__all__ = [
    "ArchitectureError",
    "ArgumentError",
    "AttachError",
    "BaselineError",
    "BelongingError",
    "BusyError",
    "CourseError",
    "DictionaryError",
    "DivergenceError",
    "DownloadError",
    "EditError",
    "ExportError",
    "GraphFileError",
    "HookFiringError",
    "ModelError",
    "NeuronpediaError",
    "NotFiniteError",
    "OutputError",
    "PromptError",
    "TLCircuitsError",
    "TargetError",
    "UnknownHookError",
]


class ModelError(TLCircuitsError, ValueError):
    """A model that cannot be found or opened by the name given."""


class TargetError(TLCircuitsError, ValueError):
    """An attribution target that does not exist on this model or prompt."""


class BaselineError(TLCircuitsError, ValueError):
    """Other prompts that a prompt cannot be compared with."""


class BelongingError(TargetError):
    """A graph of another model or dictionary than the attached ones."""


class GraphFileError(TLCircuitsError, ValueError):
    """A file that does not hold a graph, or holds a damaged one."""


class OutputError(TLCircuitsError, OSError):
    """A place that cannot be written to."""


class DownloadError(TLCircuitsError, OSError):
    """A published file that cannot be had: no network, no permission, no such thing, no disk space."""


class ExportError(TLCircuitsError, ValueError):
    """A graph or a name that the program which is to read the file cannot take."""


class CourseError(TLCircuitsError, ValueError):
    """An assignment that does not exist, or a notebook that cannot be graded."""


class NeuronpediaError(TLCircuitsError, OSError):
    """Neuronpedia refused, cannot be reached, or answers what cannot be read."""
