"""A checkpoint as it lies on the disk or on a hub: its tensors, its config, its tokenizer."""
