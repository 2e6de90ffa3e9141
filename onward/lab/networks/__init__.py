"""The networks that have a name, and networks of one's own."""
