"""Whisper checkpoints of the right format for tests: random ones, and one that learns a few commands.

No weights of OpenAI's are here: what these prove is format, plumbing and, for the trained one, that sound
goes in and the right words come out. They prove nothing about how well a real Whisper hears.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import whisper
from numpy.typing import NDArray
from whisper.audio import N_FRAMES, N_SAMPLES, log_mel_spectrogram, pad_or_trim
from whisper.tokenizer import get_tokenizer

_BATCH = 12
END_S = 2.0
"""Where every command that is learnt ends, for the model."""


def tiny_whisper(
    *, state: int = 32, audio_layers: int = 1, vocab: int = 51865, seed: int = 0, **changes: int
) -> whisper.Whisper:
    """A model of Whisper's shape, all dimensions small that may be: (C) state, one layer of text."""
    dims = {
        "n_mels": 80,
        "n_audio_ctx": 1500,
        "n_audio_state": state,
        "n_audio_head": 2,
        "n_audio_layer": audio_layers,
        "n_vocab": vocab,
        "n_text_ctx": 32,
        "n_text_state": state,
        "n_text_head": 2,
        "n_text_layer": 1,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = whisper.Whisper(whisper.ModelDimensions(**dims | changes))
        for name, parameter in model.named_parameters():
            if "embedding" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


def save(model: whisper.Whisper, path: Path) -> Path:
    """A checkpoint as OpenAI's are."""
    torch.save({"dims": asdict(model.dims), "model_state_dict": model.state_dict()}, path)
    return path


def learn(
    said: Mapping[str, Sequence[NDArray[np.float32]]], *, steps: int = 300, seed: int = 0
) -> tuple[whisper.Whisper, float]:
    """A model that hears the given commands, and the loss that it ended with.

    Tokens that no command has stay at zero, so their logits are 0 whatever is heard. That makes the loss over
    all 51,865 tokens cheap: they are one more class, of that many times e^0.

    Args:
        said: recordings (N,) at 16 kHz of each command.
        steps: at most; it ends when it knows them.
        seed: of weights, order and shifts.
    """
    model = tiny_whisper(state=48, audio_layers=0, n_text_head=4, seed=seed).train()
    mels, rows, weights = _examples(said)
    used, rows = torch.unique(rows, return_inverse=True)
    choice = torch.Generator().manual_seed(seed)
    embedding = torch.nn.Parameter(torch.randn(len(used), 48, generator=choice) * 0.05)
    named = model.named_parameters()
    trained = [value for name, value in named if name != "decoder.token_embedding.weight"] + [embedding]
    optimiser = torch.optim.Adam(trained, lr=5e-3, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 5e-3, total_steps=steps, pct_start=0.1)
    others = torch.full((_BATCH, rows.shape[1] - 1, 1), math.log(model.dims.n_vocab - len(used)))
    losses = [math.inf]
    for _ in range(steps):
        picked = torch.randperm(len(mels), generator=choice)[:_BATCH]
        shift = int(torch.randint(0, 40, (1,), generator=choice))  # hundredths of a second of silence before
        logits = _logits(model, torch.roll(mels[picked], shift, dims=2), rows[picked, :-1], embedding)
        entropy = torch.nn.functional.cross_entropy(
            torch.cat([logits, others], dim=2).transpose(1, 2), rows[picked, 1:], reduction="none"
        )
        kept = weights[picked, 1:]
        mean = (entropy * kept).sum() / kept.sum()
        optimiser.zero_grad()
        mean.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        schedule.step()
        losses = [*losses[-2:], float(mean.detach())]
        if max(losses) < 0.005:
            break
    with torch.no_grad():
        model.decoder.token_embedding.weight.zero_()
        model.decoder.token_embedding.weight[used] = embedding
    return model.eval(), max(losses)


def _logits(model: whisper.Whisper, mels: Any, rows: Any, embedding: Any) -> Any:
    """(B, T, used) logits of the tokens that are used, as the decoder would give them."""
    decoder, heard = model.decoder, model.encoder(mels)
    hidden = embedding[rows] + decoder.positional_embedding[: rows.shape[1]]
    for block in decoder.blocks:
        hidden = block(hidden, heard, mask=decoder.mask)
    return decoder.ln(hidden) @ embedding.T


def _examples(said: Mapping[str, Sequence[NDArray[np.float32]]]) -> tuple[Any, Any, Any]:
    """Spectrograms (M, 80, 3000), tokens (M, T), and which of them count."""
    tokenizer = get_tokenizer(True, language="en", task="transcribe")
    mels, lines = [], []
    for text, sounds in said.items():
        begin = tokenizer.timestamp_begin
        line = [*tokenizer.sot_sequence, begin, *tokenizer.encode(f" {text}"), begin + round(END_S / 0.02)]
        for samples in sounds:
            mel = log_mel_spectrogram(samples, 80, padding=N_SAMPLES)
            mels.append(pad_or_trim(mel, N_FRAMES))
            lines.append([*line, tokenizer.eot])
    longest = max(map(len, lines))
    rows = torch.full((len(lines), longest), tokenizer.eot)
    weights = torch.zeros(len(lines), longest)
    for index, line in enumerate(lines):
        rows[index, : len(line)] = torch.tensor(line)
        weights[index, : len(line)] = 1.0
    return torch.stack(mels), rows, weights
