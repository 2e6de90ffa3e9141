"""Estimates over several processes: shards of a batch, or groups of blocks."""
