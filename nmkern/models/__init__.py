"""Models made of the modules."""

from nmkern.models.flynet import FlyNet

__all__ = ["FlyNet"]
