"""Features that Neuronpedia was asked for are kept on this computer, also those that do not exist."""

import json
import logging
import sqlite3
import time
import zlib
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

from tl_circuits.support.cache import cache_dir

logger = logging.getLogger(__name__)

_DAY = 86400.0
KEPT_FOR = 90 * _DAY
MISSING_FOR = 7 * _DAY
"""A feature that did not exist is asked for again after this time, because new labels appear."""


class FeatureCache:
    """A SQLite file that several processes may use. If it cannot be written, nothing is kept.

    Keys are (server, model, source, index). A value is the feature as JSON, or None if the server has none.
    """

    def __init__(self, path: Path | None = None):
        self.path = path if path is not None else cache_dir() / "neuronpedia" / "features.sqlite"

    def _open(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(self.path, timeout=10)
        try:
            connection.execute(
                "CREATE TABLE IF NOT EXISTS feature (server TEXT, model TEXT, source TEXT, idx INTEGER, asked REAL, "
                "body BLOB, PRIMARY KEY (server, model, source, idx)) WITHOUT ROWID"
            )
        except sqlite3.DatabaseError:
            connection.close()
            raise
        return connection

    def read(
        self, server: str, model: str, wanted: Iterable[tuple[str, int]], any_age: bool = False
    ) -> dict[tuple[str, int], Any]:
        """What is known of the ``(source, index)`` pairs: the feature, or None if it is known not to exist. Unknown
        pairs are left out.
        """
        found: dict[tuple[str, int], Any] = {}
        now = time.time()
        try:
            with closing(self._open()) as connection:
                for source, index in wanted:
                    row = connection.execute(
                        "SELECT asked, body FROM feature WHERE server=? AND model=? AND source=? AND idx=?",
                        (server, model, source, index),
                    ).fetchone()
                    if row is None or (not any_age and now - row[0] > (MISSING_FOR if row[1] is None else KEPT_FOR)):
                        continue
                    found[source, index] = None if row[1] is None else json.loads(zlib.decompress(row[1]))
        except (sqlite3.Error, OSError, zlib.error, ValueError) as error:
            self._damaged(error)
        return found

    def write(self, server: str, model: str, features: dict[tuple[str, int], Any]) -> None:
        """Keep what the server answered."""
        now = time.time()
        rows = [
            (server, model, source, index, now, None if body is None else zlib.compress(json.dumps(body).encode(), 1))
            for (source, index), body in features.items()
        ]
        try:
            with closing(self._open()) as connection, connection:
                connection.executemany("INSERT OR REPLACE INTO feature VALUES (?, ?, ?, ?, ?, ?)", rows)
        except (sqlite3.Error, OSError) as error:
            self._damaged(error)

    def _damaged(self, error: Exception) -> None:
        """A damaged cache is no reason to fail: log it, move the file aside if possible, and go on without."""
        logger.warning("the cache %s cannot be used: %s", self.path, error)
        if isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError):
            try:
                self.path.replace(self.path.with_suffix(".damaged"))
            except OSError as problem:
                logger.warning("nor can it be moved away: %s", problem)
