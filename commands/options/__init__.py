"""Blocks of options: what the command line says of a subject, as one value each."""
