"""Choose the examples of a batch that are worth a backward (CoLM, arXiv 2407.19580)."""

from .facility_location import facility_location
from .selector import CoresetSelector
from .trainer import apply_coreset

__all__ = ["CoresetSelector", "apply_coreset", "facility_location"]
