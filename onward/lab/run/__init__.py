"""One training: its loop, its folder, its checkpoints."""
