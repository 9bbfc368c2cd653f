"""Optional parts of the installation (*extras*): what each is for, and the command that installs it here."""

import importlib.util
import sys
from pathlib import Path

EXTRAS = {
    "figure": ("matplotlib", "figures: graph.plot() and all other .plot()"),
    "gguf": ("gguf", "the models from the package index: smollm2-135m, gemma-3-270m"),
    "networkx": ("networkx", "graph.to_networkx(), GraphML"),
    "neuronpedia": ("fastjsonschema", "labels from Neuronpedia, and uploads"),
    "ray": ("ray", "many prompts on several machines: tl-circuits batch --workers"),
    "serve": ("fastapi", "the server: tl-circuits view"),
    "train": ("datasets", "text from a dataset for training transcoders: tl-circuits train --dataset"),
    "widget": ("anywidget", "the page in a notebook: tlc.Widget"),
}
"""For each extra, a module that it brings, and what it is for."""


def installed(extra: str) -> bool:
    """Whether an extra's module can be imported."""
    return importlib.util.find_spec(EXTRAS[extra][0]) is not None


def how_to_install(extra: str) -> str:
    """The command that installs an extra into this Python.

    It installs from the checkout if the package is run from one, else from the package index.

    Examples:
        >>> from tl_circuits.support.extras import how_to_install
        >>> how_to_install("serve").endswith("[serve]'")
        True
    """
    root = Path(__file__).resolve().parents[2]
    python = sys.executable or "python"
    if (root / "setup.cfg").is_file() and (root / "hooks").is_dir():
        return f"{python} -m pip install -e '{root}[{extra}]'"
    return f"{python} -m pip install 'tl_circuits[{extra}]'"
