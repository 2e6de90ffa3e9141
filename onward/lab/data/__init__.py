"""Data sets: read, checked, and served in batches."""

from onward.lab.data.images import DATASETS, ImageData, Split, held_out, load

__all__ = ["DATASETS", "ImageData", "Split", "held_out", "load"]
