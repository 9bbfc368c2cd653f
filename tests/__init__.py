"""Tests. ``check`` checks the annotations of the whole package meanwhile, with the settings that callers get."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
