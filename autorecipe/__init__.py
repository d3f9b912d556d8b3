"""Recipes by measurement: what each group of tensors costs at few bits, and the best choice for a size."""
