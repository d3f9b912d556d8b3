"""Added tokens of the GLM-4 vocabulary, which the checkpoints made here have, too.

In: nothing. Out: the tokens in GLM's order. Knows nothing of ids.
"""

from __future__ import annotations

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "<sop>",
    "<eop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
    "<|image|>",
    "<|video|>",
)
"""In the order of the GLM-4 vocabulary."""
PLAIN_TOKENS = ("<think>", "</think>", "<answer>", "</answer>")
"""Added tokens that are text to a decoder; they follow the special ones."""
ADDED_TOKENS = SPECIAL_TOKENS + PLAIN_TOKENS
EOS_TOKENS = ("<|endoftext|>", "<|user|>", "<|observation|>", "</answer>")
"""Any of these ends an answer."""
