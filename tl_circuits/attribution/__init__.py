"""Attribution: from a prompt on a model with a dictionary attached to a graph of direct effects."""

from tl_circuits.attribution.attribute import attribute
from tl_circuits.attribution.targets import FeatureTarget, LogitDifference, LogitDirection

__all__ = ["FeatureTarget", "LogitDifference", "LogitDirection", "attribute"]
