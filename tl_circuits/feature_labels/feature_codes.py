"""One number for a layer and a feature, as graphs and feature files of circuit-tracer write it."""

import math


def cantor_pair(layer: int, feature: int) -> int:
    """Layer and feature index as one number (Cantor's pairing function; graph schema 1)."""
    return (layer + feature) * (layer + feature + 1) // 2 + feature


def cantor_unpair(code: int) -> tuple[int, int]:
    """The layer and the feature index in a number of :func:`cantor_pair`. Computed with whole numbers alone."""
    diagonal = (math.isqrt(8 * code + 1) - 1) // 2
    feature = code - diagonal * (diagonal + 1) // 2
    return diagonal - feature, feature


def feature_of_code(layer: int, code: int) -> int:
    """The feature index in a ``feature`` of a graph file, if its layer is known.

    Graph schema 1 uses :func:`cantor_pair`. Older files put the layer's digits in front of the zero-padded index (five
    digits for 16,384 features); still older ones write the index alone.
    """
    if cantor_unpair(code)[0] == layer:
        return cantor_unpair(code)[1]
    for digits in (5, 6, 7, 4):
        if layer > 0 and code // 10**digits == layer:
            return code % 10**digits
    return code
