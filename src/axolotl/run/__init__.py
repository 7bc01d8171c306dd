"""The verbs, one file each: the straight line from a config to its result. Only these files see the whole Config."""
