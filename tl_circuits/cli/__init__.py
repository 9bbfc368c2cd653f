"""The command line, ``tl-circuits``: one file a command, put together in :mod:`tl_circuits.cli.main`."""
