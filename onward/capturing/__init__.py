"""A step that is traced once and then replayed or compiled; ``onward.capture`` is the door."""
