"""The whole program: all commands together."""

from tl_circuits.cli import (  # noqa: F401  importing a module adds its command to `app`
    aggregate,
    batch,
    circuit,
    course,
    demo,
    doctor,
    heads,
    models,
    neuronpedia,
    steer,
    trace,
    train,
    view,
)
from tl_circuits.cli.app import app


def main() -> None:
    """Entry point of the ``tl-circuits`` program."""
    app()
