"""The engine in closed form that fits a dictionary: one for MLPs replaced in place, one for any site."""

from typing import Any

from tl_circuits.attribution.engines.linear import LinearEngine
from tl_circuits.attribution.engines.site_sweep import SiteEngine
from tl_circuits.attribution.sources import Sources
from tl_circuits.hooks import Recording, at_any_site


def closed_form(model: Any, recording: Recording, sources: Sources) -> LinearEngine | SiteEngine:
    """The fast engine for these sources.

    Raises:
        ArchitectureError: a frozen map gives something else than the model on this prompt; then only automatic
            differentiation can trace it.
    """
    return (SiteEngine if at_any_site(sources.dictionary) else LinearEngine)(model, recording, sources)
