"""The engine in closed form that fits a dictionary: one for MLPs replaced in place, one for any site."""

from typing import Any

from tl_circuits.attribution.engines.linear import LinearEngine
from tl_circuits.attribution.engines.site_sweep import SiteEngine
from tl_circuits.attribution.sources import Sources
from tl_circuits.hooks import Recording, at_any_site

ClosedForm = LinearEngine | SiteEngine
"""An engine whose rows are matrix products."""


def closed_form(model: Any, recording: Recording, sources: Sources) -> ClosedForm:
    """The fast engine for these sources.

    Raises:
        ArchitectureError: a frozen map gives something else than the model on this prompt; then only automatic
            differentiation can trace it.
    """
    if at_any_site(sources.dictionary):
        return SiteEngine(model, recording, sources)
    return LinearEngine(model, recording, sources)
