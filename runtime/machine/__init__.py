"""The machine's side: its limits, its cores and products of bytes, weights packed for it."""
