"""Add values up by key over many prompts, in memory that depends on the number of different keys only."""

import numpy as np
from jaxtyping import Float64, Int64

MERGED_AT_LEAST = 1_000_000  # so many entries are collected before they are merged; merging sorts all keys


class Tally:
    """For each key, the number of prompts that had it and the sums of its values (float64)."""

    def __init__(self, n_values: int):
        self._merged = (np.empty(0, np.int64), np.empty((0, 1 + n_values)))
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, keys: Int64[np.ndarray, " n"], values: Float64[np.ndarray, "n value"]) -> None:
        """Add one prompt. A key that it has several times counts once, with the sum of its values."""
        keys, sums = _by_key(keys, values)
        self._waiting.append((keys, np.concatenate([np.ones((len(keys), 1)), sums], axis=1)))
        if sum(len(k) for k, _ in self._waiting) > max(MERGED_AT_LEAST, len(self._merged[0])):
            self._merge()

    def totals(
        self,
    ) -> tuple[Int64[np.ndarray, " key"], Int64[np.ndarray, " key"], Float64[np.ndarray, "key value"]]:
        """All keys in ascending order, the number of prompts that had each, and the sums of its values."""
        self._merge()
        keys, table = self._merged
        return keys, table[:, 0].astype(np.int64), table[:, 1:]

    def _merge(self) -> None:
        parts = [self._merged, *self._waiting]
        self._merged = _by_key(np.concatenate([k for k, _ in parts]), np.concatenate([v for _, v in parts]))
        self._waiting = []


def _by_key(keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    found, row = np.unique(keys, return_inverse=True)
    sums = [np.bincount(row, weights=column, minlength=len(found)) for column in values.T]
    return found, np.stack(sums, axis=1).astype(np.float64)  # bincount of nothing gives integers
