"""The command lines of the papers' own codes, translated to the configuration of `onward train`."""
