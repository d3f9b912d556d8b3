"""Rows of tensors on their way into the data files: balanced, quantized, written."""
