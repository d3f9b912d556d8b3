"""Sounds in requests: the form of /v1/audio/transcriptions, and parts of messages.

In: forms and JSON values of a stranger. Out: `TranscriptionAsked`, `SpokenPart`: checked, and their sounds
decoded within bounds. Knows nothing of models.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from autoglm_edge.errors import DependencyError, RequestError
from autoglm_edge.server.limits import Limits
from autoglm_edge.server.problem import ApiError, problem_of, refuse
from autoglm_edge.speech.sound import FORMATS, Sound, read_sound
from autoglm_edge.speech.transcript import HearingOptions
from autoglm_edge.speech.wav import is_wav

from .fields import kind_of, shown
from .multipart import Part

Form = Literal["json", "text", "srt", "verbose_json", "vtt"]
PART = "input_audio"
_GRANULARITIES = ("segment", "word")
_LISTS = ("timestamp_granularities", "timestamp_granularities[]")
_LONGEST_VALUE = 4096

UNSUPPORTED: Mapping[str, tuple[tuple[str, ...], str]] = {
    "stream": (("false",), "a transcript comes when all of it is there"),
    "chunking_strategy": ((), "windows of 30 seconds are heard one after the other"),
    "include": ((), "this model hands out no probabilities of tokens"),
    "include[]": ((), "this model hands out no probabilities of tokens"),
    "known_speaker_names": ((), "this model does not tell speakers apart"),
    "known_speaker_names[]": ((), "this model does not tell speakers apart"),
    "known_speaker_references": ((), "this model does not tell speakers apart"),
    "known_speaker_references[]": ((), "this model does not tell speakers apart"),
}
"""Fields that clients know and this server does not honour: values that ask for nothing, and why not."""


@dataclass(frozen=True, eq=False)
class TranscriptionAsked:
    """A transcript that is asked for.

    Attributes:
        sound: to listen to.
        options: how.
        model: as named by the client; None if it named none.
        form: of the response.
        granularities: what gets times: "segment", "word".
    """

    sound: Sound
    options: HearingOptions
    model: str | None
    form: Form
    granularities: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class SpokenPart:
    """A part of a message that is heard.

    Attributes:
        part: the object in the request; its place is taken by a text.
        sound: what it holds.
    """

    part: dict[str, Any]
    sound: Sound


def read_transcription(parts: Sequence[Part], limits: Limits) -> TranscriptionAsked:
    """A request of /v1/audio/transcriptions.

    Raises:
        ApiError: something is wrong with it.
    """
    file: Part | None = None
    values: dict[str, str] = {}
    granularities: list[str] = []
    for part in parts:
        if part.name == "file":
            if file is not None:
                raise refuse("file is there twice; send one at a time", "file")
            file = part
        elif part.name in _LISTS:
            granularities.append(_value(part))
        elif part.name in values:
            raise refuse(f"{part.name} is there twice", part.name)
        else:
            values[part.name] = _value(part)
    for name, (harmless, why) in UNSUPPORTED.items():
        if values.pop(name, None) not in (None, "", *harmless):
            raise ApiError(400, f"{name} is not supported: {why}", param=name, code="unsupported_parameter")
    model = values.pop("model", None) or None
    form = _read_form_name(values.pop("response_format", "") or "json")
    checked = _read_granularities(granularities, form)
    options = _read_options(values, words="word" in checked)
    if values:
        name = min(values)
        raise ApiError(
            400,
            f"the request has the field {shown(name)}, which this server does not know; remove it",
            param=name,
            code="unknown_parameter",
        )
    if file is None:
        raise refuse("file is missing; send the content of a sound file", "file", code="missing_field")
    return TranscriptionAsked(
        _decode(file.data, "file", limits.audio_seconds, "file"), options, model, form, checked
    )


def find_spoken(body: Any) -> list[tuple[str, dict[str, Any]]]:
    """The parts of a chat request that are to be heard, with where each stands. Looks at nothing else."""
    messages = body.get("messages") if isinstance(body, dict) else None
    found: list[tuple[str, dict[str, Any]]] = []
    for index, message in enumerate(messages if isinstance(messages, list) else ()):
        content = message.get("content") if isinstance(message, dict) else None
        for number, part in enumerate(content if isinstance(content, list) else ()):
            if isinstance(part, dict) and part.get("type") == PART:
                found.append((f"messages[{index}].content[{number}]", part))
    return found


def read_spoken(found: Sequence[tuple[str, dict[str, Any]]], limits: Limits) -> list[SpokenPart]:
    """Decode the sounds of a chat request.

    Raises:
        ApiError: one of them cannot be read, or they are too many or too long.
    """
    if len(found) > limits.audios:
        raise refuse(f"the request has more than {limits.audios} sounds", "messages", code="too_many_sounds")
    left, spoken = limits.audio_seconds, []
    for where, part in found:
        sound = _decode(_part_data(part, where), f"{where}.{PART}", left, "messages")
        left -= sound.seconds
        spoken.append(SpokenPart(part, sound))
    return spoken


def _part_data(part: Mapping[str, Any], where: str) -> bytes:
    """Bytes of a part, after its keys were judged."""
    inner = part.get(PART)
    if not isinstance(inner, dict):
        raise refuse(
            f"{where}.{PART} is {kind_of(inner)}, must be an object", "messages", code="invalid_type"
        )
    for place, keys, known in ((where, part, ("type", PART)), (f"{where}.{PART}", inner, ("data", "format"))):
        unknown = sorted(key for key, value in keys.items() if key not in known and value is not None)
        if unknown:
            raise refuse(
                f"{place} has the key {shown(unknown[0])}, which nobody hears; remove it", "messages"
            )
    where = f"{where}.{PART}"
    name, data = inner.get("format"), inner.get("data")
    if name is not None and name not in FORMATS:
        raise refuse(f"{where}.format is {shown(name)}, must be one of {', '.join(FORMATS)}", "messages")
    if not isinstance(data, str):
        raise refuse(f"{where}.data is {kind_of(data)}, must be base64", "messages", code="invalid_type")
    comma = data.find(",", 0, 256) if data[:5].lower() == "data:" else -1
    if comma >= 0 and not data[:comma].lower().endswith(";base64"):
        raise _bad(f"{where}.data is a data URI that is not base64", "messages")
    try:
        decoded = base64.b64decode("".join(data[comma + 1 :].split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise _bad(f"{where}.data holds no valid base64 ({error})", "messages") from error
    if name == "wav" and not is_wav(decoded):
        raise _bad(f"{where}.format is wav, but the data is no WAV file", "messages")
    return decoded


def _decode(data: bytes | memoryview, where: str, max_seconds: float, param: str) -> Sound:
    try:
        return read_sound(data, max_seconds=max_seconds)
    except DependencyError as error:  # ffmpeg, which only this server's owner can install
        raise refuse(f"{where}: {error}", param, code="unsupported_audio") from error
    except RequestError as error:
        raise _bad(f"{where}: {error}", param) from error


def _value(part: Part) -> str:
    text = part.text()
    if len(text) > _LONGEST_VALUE:
        raise refuse(f"{part.name} has {len(text)} characters, must have at most {_LONGEST_VALUE}", part.name)
    return text


def _read_form_name(name: str) -> Form:
    for known in get_args(Form):
        if name == known:
            form: Form = known
            return form
    raise refuse(
        f"response_format is {shown(name)}, must be one of {', '.join(get_args(Form))}", "response_format"
    )


def _read_granularities(given: Sequence[str], form: Form) -> tuple[str, ...]:
    for value in given:
        if value not in _GRANULARITIES:
            raise refuse(
                f"timestamp_granularities[] is {shown(value)}, must be word or segment",
                "timestamp_granularities[]",
            )
    if given and form != "verbose_json":
        raise refuse(
            f"timestamp_granularities[] is for the response_format verbose_json, not {form}",
            "timestamp_granularities[]",
        )
    return tuple(dict.fromkeys(given)) or ("segment",)


def _read_options(values: dict[str, str], *, words: bool) -> HearingOptions:
    given = values.pop("temperature", "")
    try:
        temperature = float(given) if given else 0.0
    except ValueError as error:
        raise refuse(f"temperature is {shown(given)}, must be a number from 0 to 1", "temperature") from error
    if not math.isfinite(temperature):
        raise refuse(f"temperature is {shown(given)}, must be a number from 0 to 1", "temperature")
    try:
        return HearingOptions(
            language=values.pop("language", "").strip().lower() or None,
            prompt=values.pop("prompt", ""),
            temperature=temperature,
            words=words,
        )
    except RequestError as error:
        raise problem_of(error, params=("language", "prompt", "temperature")) from error


def _bad(message: str, param: str) -> ApiError:
    return refuse(message, param, code="invalid_audio")
