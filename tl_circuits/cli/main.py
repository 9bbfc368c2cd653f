"""The whole program: all commands together."""

import os

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
    # Torch's threads spin while they wait for each other, unless told otherwise before torch is imported. Beside
    # another busy program they then wait for threads that have no core, and a trace takes several times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    app()
