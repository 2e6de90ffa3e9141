"""What the lab asks of the machine: disk, memory, signals, streams, packages that may be missing."""
