"""Choose the examples of a batch that are worth a backward (CoLM, arXiv 2407.19580)."""

from .facility_location import facility_location

__all__ = ["facility_location"]
