"""Several answers at once: slots of one cache, decoded together."""
