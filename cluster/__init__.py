"""The same work on many processes and machines, by Ray."""
