"""The graphs of a bundle, written as modules, and what becomes of each weight of them."""
