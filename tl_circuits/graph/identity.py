"""Which graph is which: a hash by which notes know the graph they were made for."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from tl_circuits.graph.nodes import OPTIONAL, GraphInfo

# Fields of GraphInfo that came later. They stay out of the earlier hash, so that notes of older files still fit.
LATER_FIELDS = (
    "recurring",
    "sample",
    "prompt_exact",
    "skip_positions",
    "prepended",
    "select",
    "baseline",
    "compared_with",
    "sites",
)


def fingerprint(info: GraphInfo, node_ids: Iterable[str]) -> str:
    """A hash of what was traced: model, dictionary, tokens, targets and nodes.

    Activations and edges are left out. Their last bits depend on the number of threads and on the file format, and
    notes are about nodes, whatever those bits are.

    Args:
        info: what the graph is of.
        node_ids: the ids of its nodes, in any order.
    """
    said = {
        "model": _without_folder(info.model),
        "dictionary": _without_folder(info.dictionary),
        "tokens": list(info.token_ids),
        "targets": list(info.target_names),
        "compared_with": list(info.compared_with),
        "recurring": info.recurring,
        "nodes": sorted(node_ids),
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:32]


def _without_folder(name: str) -> str:
    """The last part of an absolute path: exports leave out where on a machine a model lies."""
    return Path(name).name if Path(name).is_absolute() else name


def earlier_fingerprint(info: GraphInfo, *tables: Any) -> str:
    """The hash that notes carried before: also of every bit of the nodes and edges. Such notes are still accepted."""
    stored = asdict(info)
    for later in LATER_FIELDS:
        stored.pop(later, None)
    made = hashlib.sha256(json.dumps(stored, sort_keys=True).encode())
    for table in tables:
        for column in fields(table):
            if column.name in OPTIONAL:
                continue
            made.update(getattr(table, column.name).contiguous().numpy().tobytes())
    return made.hexdigest()[:32]
