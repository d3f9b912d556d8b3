"""Runs a bundle: prompt, image, decode loop. Needs numpy, onnxruntime, tokenizers, jinja2 and pillow only."""
