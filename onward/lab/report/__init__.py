"""What runs have found out, as figures and as a page."""
