"""Fidelity: answers of the original model recorded once, and bundles compared with them."""
