"""Weights of an earlier pocket model under a new tokenizer.

In: a pocket folder and the new tokenizer. Out: a state for `PocketForward` to begin a second training with.
Everything but the embedding and the head is taken over; a row of these is the mean of the rows that the old
tokenizer would have used for the same text. This module knows nothing of screens or losses.
"""

from __future__ import annotations

from pathlib import Path

import torch
from pocket_model import PocketForward, make_model
from pocket_vocabulary import LABELS
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import AutoTokenizer, Glm4vForConditionalGeneration, PreTrainedTokenizerFast


def carry_over(folder: Path, tokenizer: PreTrainedTokenizerFast, seed: int) -> dict[str, Tensor]:
    """The state of fresh weights with all that `folder` knows, without the heads that are thrown away."""
    old = Glm4vForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    pieces = old_pieces(AutoTokenizer.from_pretrained(folder), tokenizer)
    state = PocketForward(make_model(seed), len(LABELS) + 1).state_dict()
    for name, values in old.state_dict().items():
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            values = torch.stack([values[ids].mean(0) for ids in pieces])
        assert state[f"model.{name}"].shape == values.shape, name
        state[f"model.{name}"] = values
    return {name: values for name, values in state.items() if name.startswith("model.")}


def old_pieces(old: PreTrainedTokenizerFast, new: PreTrainedTokenizerFast) -> list[list[int]]:
    """For each token of the new tokenizer the ids of the same bytes in the old one."""
    added = new.get_added_vocab()
    vocabulary = {index: token for token, index in new.get_vocab().items()}
    single = {symbol: old.convert_tokens_to_ids(symbol) for symbol in pre_tokenizers.ByteLevel.alphabet()}
    found = []
    for index in range(len(vocabulary)):
        token = vocabulary[index]
        text = new.decode([index])
        if token in added:
            found.append([old.convert_tokens_to_ids(token)])
        elif "\N{REPLACEMENT CHARACTER}" in text:  # part of a character
            found.append([single[symbol] for symbol in token])
        else:
            found.append(old(text, add_special_tokens=False).input_ids)
    return found
