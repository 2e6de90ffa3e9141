"""A network: cut into blocks, run, looked at before it is trained, with heads, and the part of a batch it sees."""
