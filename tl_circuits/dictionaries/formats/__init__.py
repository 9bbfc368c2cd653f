"""One module for each layout in which transcoders are published; ``LAYOUTS`` lists all that can be read."""

from tl_circuits.dictionaries.formats import (
    arena_files,
    circuit_tracer,
    circuit_tracer_clt,
    clt_training,
    four_bit_files,
    gemma_scope,
    gemma_scope_2,
    llamascopium,
    saelens_autoencoders,
    saelens_files,
    sparsify_files,
)
from tl_circuits.dictionaries.formats.layout import Entry, Hints, LayerWeights, Layout

LAYOUTS = (
    four_bit_files.LAYOUT,
    arena_files.LAYOUT,  # before SAELens', whose file names and configs are the same
    gemma_scope.LAYOUT,
    gemma_scope_2.LAYOUT,
    circuit_tracer_clt.LAYOUT,
    circuit_tracer.LAYOUT,
    saelens_autoencoders.LAYOUT,
    saelens_files.LAYOUT,
    llamascopium.LAYOUT,
    clt_training.LAYOUT,  # before sparsify's, whose files are the same except for the config
    sparsify_files.LAYOUT,
)

__all__ = ["LAYOUTS", "Entry", "Hints", "LayerWeights", "Layout"]
