"""Attribution: from a prompt on a model with a dictionary attached to a graph of direct effects."""

from tl_circuits.attribution.attribute import attribute
from tl_circuits.attribution.targets import FeatureTarget, LogitDifference, LogitDirection
from tl_circuits.attribution.text_baseline import Baseline, make_baseline

__all__ = ["Baseline", "FeatureTarget", "LogitDifference", "LogitDirection", "attribute", "make_baseline"]
