"""Networks, one file each: a file that is put here is found. `models` builds them, or the user's own, by name."""
