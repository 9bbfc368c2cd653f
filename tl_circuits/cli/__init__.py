"""The command line: ``tl-circuits trace | models | doctor``."""

from tl_circuits.cli.app import app, main

__all__ = ["app", "main"]
