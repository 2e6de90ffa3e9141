"""Data sets: read, checked, and served in batches."""

from onward.lab.data.sets import DATASETS, load
from onward.lab.data.split import Data, Split, held_out

__all__ = ["DATASETS", "Data", "Split", "held_out", "load"]
