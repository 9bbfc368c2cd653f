"""One module for each layout in which transcoders are published; ``LAYOUTS`` lists all that can be read."""

from tl_circuits.dictionaries.formats import (
    circuit_tracer,
    circuit_tracer_clt,
    gemma_scope,
    gemma_scope_2,
    llamascopium,
    saelens_autoencoders,
    saelens_files,
    sparsify_files,
)
from tl_circuits.dictionaries.formats.layout import Entry, Hints, LayerWeights, Layout

LAYOUTS = (
    gemma_scope.LAYOUT,
    gemma_scope_2.LAYOUT,
    circuit_tracer_clt.LAYOUT,
    circuit_tracer.LAYOUT,
    saelens_autoencoders.LAYOUT,
    saelens_files.LAYOUT,
    llamascopium.LAYOUT,
    sparsify_files.LAYOUT,
)

__all__ = ["LAYOUTS", "Entry", "Hints", "LayerWeights", "Layout"]
