"""A transcript as a response: JSON in two forms, plain text, and two kinds of subtitles.

In: a `Transcript`. Out: bytes and their type. Knows nothing of requests and of models.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from autoglm_edge.server.asking.audio import Form
from autoglm_edge.speech.transcript import Segment, Transcript

from .responses import JSON_TYPE, to_bytes

TEXT_TYPE = "text/plain; charset=utf-8"
VTT_TYPE = "text/vtt; charset=utf-8"


def transcript_reply(transcript: Transcript, form: Form, granularities: Collection[str]) -> tuple[bytes, str]:
    """Body and media type of a response.

    Args:
        transcript: what was heard.
        form: `response_format`.
        granularities: of verbose_json: "segment", "word".
    """
    if form == "json":
        return to_bytes({"text": transcript.text, "usage": _usage(transcript)}), JSON_TYPE
    if form == "verbose_json":
        return to_bytes(verbose(transcript, granularities)), JSON_TYPE
    if form == "text":
        return f"{transcript.text}\n".encode("utf-8", "replace"), TEXT_TYPE
    if form == "srt":
        return srt(transcript.segments).encode("utf-8", "replace"), TEXT_TYPE
    return vtt(transcript.segments).encode("utf-8", "replace"), VTT_TYPE


def verbose(transcript: Transcript, granularities: Collection[str]) -> dict[str, Any]:
    """The document of verbose_json."""
    document: dict[str, Any] = {
        "task": "transcribe",
        "language": transcript.language,
        "duration": round(transcript.seconds, 3),
        "text": transcript.text,
        "usage": _usage(transcript),
    }
    if "segment" in granularities:
        document["segments"] = [_segment(index, segment) for index, segment in enumerate(transcript.segments)]
    if "word" in granularities:
        document["words"] = [
            {"word": word.text.strip(), "start": word.start, "end": word.end}
            for segment in transcript.segments
            for word in segment.words
        ]
    return document


def srt(segments: Collection[Segment]) -> str:
    """SubRip subtitles; empty segments are left out."""
    blocks = [
        f"{number}\n{_time(segment.start, ',')} --> {_time(segment.end, ',')}\n{_caption(segment)}\n"
        for number, segment in enumerate(_said(segments), 1)
    ]
    return "\n".join(blocks)


def vtt(segments: Collection[Segment]) -> str:
    """WebVTT subtitles; empty segments are left out."""
    blocks = [
        f"{_time(segment.start, '.')} --> {_time(segment.end, '.')}\n{_escaped(_caption(segment))}\n"
        for segment in _said(segments)
    ]
    return "\n".join(["WEBVTT\n", *blocks])


def _said(segments: Collection[Segment]) -> list[Segment]:
    return [segment for segment in segments if segment.text.strip()]


def _caption(segment: Segment) -> str:
    """One line: an empty one would end the block, and an arrow is what tells times."""
    return " ".join(segment.text.split()).replace("-->", "->")


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _time(seconds: float, mark: str) -> str:
    milliseconds = round(max(0.0, seconds) * 1000)
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest // 1000:02}{mark}{rest % 1000:03}"


def _segment(index: int, segment: Segment) -> dict[str, Any]:
    return {
        "id": index,
        "seek": segment.seek,
        "start": segment.start,
        "end": segment.end,
        "text": segment.text,
        "tokens": list(segment.tokens),
        "temperature": segment.temperature,
        "avg_logprob": segment.avg_logprob,
        "compression_ratio": round(segment.compression_ratio, 4),
        "no_speech_prob": segment.no_speech_prob,
    }


def _usage(transcript: Transcript) -> dict[str, Any]:
    """Seconds are counted from the first moment of each, as OpenAI does."""
    return {"type": "duration", "seconds": math.ceil(transcript.seconds)}
