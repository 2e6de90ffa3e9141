"""The machine: disk, memory, signals, streams, random generators, packages that may be missing, and files of the user's own."""
