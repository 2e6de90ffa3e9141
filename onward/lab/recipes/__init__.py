"""Published settings, one file each: a file that is put here is found. `recipe` reads them, or the user's own."""
