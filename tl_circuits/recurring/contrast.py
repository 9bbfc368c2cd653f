"""Compare what recurs in two sets of prompts."""

import numpy as np
import pandas as pd

from tl_circuits.recurring.aggregate import RecurringCircuit, require_same
from tl_circuits.support.checked import checked


@checked
def contrast(first: RecurringCircuit, second: RecurringCircuit) -> pd.DataFrame:
    """Compare two sets of prompts: which features does the one use more than the other?

    Args:
        first: what recurs in the one set.
        second: what recurs in the other. Features are the same if layer, slot name and number agree.

    Returns:
        A frame ``id layer slot feature share_first share_second influence_first influence_second difference label``
        with a row for each feature that is found in ``min_share`` of either set. ``difference`` is the mean influence
        in the first set minus that in the second; the largest differences come first.

    Raises:
        ValueError: the sets are of different models or dictionaries, or have no slot in common.

    Examples:
        >>> def recurring(*cities):
        ...     questions = [f"the capital of the state containing {city} is" for city in cities]
        ...     return tlc.aggregate([tlc.attribute(replacement, text, max_nodes=20) for text in questions])
        >>> difference = tlc.contrast(recurring("Dallas", "Houston"), recurring("Miami", "Tampa"))
        >>> columns = ["id", "share_first", "share_second", "difference"]
        >>> print(difference[columns].head(2).round(2).to_string(index=False))
                id  share_first  share_second  difference
        L0/F308@-2          0.5           0.0        0.12
        L0/F450@-2          0.0           1.0       -0.10
    """
    require_same([first.info, second.info], ["the first set", "the second set"])
    if not set(first.slots) & set(second.slots):
        raise ValueError(
            f"the two sets have no slot in common ({', '.join(first.slots)} and {', '.join(second.slots)}): "
            "align both in the same way."
        )
    key = ["id", "layer", "slot", "feature"]
    frames = [part.all_features[[*key, "share", "influence", "label"]] for part in (first, second)]
    both = frames[0].merge(frames[1], on=key, how="outer", suffixes=("_first", "_second"))
    numbers = [f"{name}_{which}" for name in ("share", "influence") for which in ("first", "second")]
    both[numbers] = both[numbers].fillna(0.0)
    both = both[(both.share_first >= first.min_share) | (both.share_second >= second.min_share)]
    label = both.label_first.fillna("").where(both.label_first.fillna("") != "", both.label_second.fillna(""))
    both = both[[*key, *numbers]].assign(difference=both.influence_first - both.influence_second, label=label)
    order = np.lexsort([both.id, both.feature, both.layer, -both.difference.abs()])
    return both.iloc[order].reset_index(drop=True)
