"""The float model run on prompts, layer by layer: what rounding and scales are found from."""
