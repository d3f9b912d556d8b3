"""Long prompts through a decoder of 4-bit weights, layer by layer in 8 bits."""
