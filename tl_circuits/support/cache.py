"""The folder where downloads and opened models are kept. Imports nothing slow: the command line names it in its
help."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """The folder for downloads: ``$TL_CIRCUITS_CACHE``, else ``tl_circuits`` in the user's cache directory."""
    own = os.environ.get("TL_CIRCUITS_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "tl_circuits"
