"""One run inside the limits: the child with the real runtime, and who watches it."""
