"""One number for a layer and a feature, as circuit-tracer's graphs and files of features write it."""

import math


def cantor_pair(layer: int, feature: int) -> int:
    """Layer and feature index as one number (Cantor's pairing; graph schema 1)."""
    return (layer + feature) * (layer + feature + 1) // 2 + feature


def cantor_unpair(code: int) -> tuple[int, int]:
    """Layer and feature index of :func:`cantor_pair`'s number, in whole numbers throughout."""
    diagonal = (math.isqrt(8 * code + 1) - 1) // 2
    feature = code - diagonal * (diagonal + 1) // 2
    return diagonal - feature, feature


def feature_of_code(layer: int, code: int) -> int:
    """The feature index in an encoded ``feature`` whose layer is known.

    Graph schema 1 pairs; before it, the layer's digits stood in front of the zero-padded index
    (five digits for 16,384 features); before that the index stood alone.
    """
    if cantor_unpair(code)[0] == layer:
        return cantor_unpair(code)[1]
    for digits in (5, 6, 7, 4):
        if layer > 0 and code // 10**digits == layer:
            return code % 10**digits
    return code
