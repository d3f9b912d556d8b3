"""Prompts on a CPU's matrix units (AMX): compiled kernels, and the decoder layer that is made of them."""
