"""Runs the real runtime inside a device's memory limits and says whether it lives."""
