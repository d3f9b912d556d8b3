"""From a line to what the engine is asked, and back: all that can be wrong with it is found here.

In: a line, an engine that makes prompts. Out: a `Job`, or the record of what is wrong. Runs in a thread
beside the engine's own; answers nothing.
"""

from __future__ import annotations

import logging
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from autoglm_edge.errors import EdgeError, RequestError
from autoglm_edge.server.asking.asked import read_chat, read_completion
from autoglm_edge.server.asking.options import Options
from autoglm_edge.server.limits import Limits
from autoglm_edge.server.prepared import Prepared, prepare_chat, prepare_text
from autoglm_edge.server.problem import ApiError, internal, problem_of, refuse
from autoglm_edge.server.replying.forms import ChatForm, Form, Frame, Telling, TextForm
from autoglm_edge.server.work.answering import Answering
from autoglm_edge.server.work.scheduler import trace_of

from .pictures import with_pictures
from .record import Answered, answered, no_request, refused
from .request import Request, name_of, read_request
from .source import Line

LOG = logging.getLogger("autoglm_edge.offline")


@dataclass(frozen=True)
class Rules:
    """What requests of a file may ask for.

    Attributes:
        names: that they may call the model by; the first one is its own.
        limits: of one request.
        images_from: folder of pictures that are named by file; None for none.
    """

    names: tuple[str, ...]
    limits: Limits = field(default_factory=Limits)
    images_from: Path | None = None

    def __post_init__(self) -> None:
        if not self.names or not all(self.names):
            raise RequestError(f"the model's names are {self.names!r}; give at least one")
        if self.images_from is not None and not self.images_from.is_dir():
            raise RequestError(f"{self.images_from} is no folder that pictures could come from")


@dataclass(frozen=True, eq=False)
class Job:
    """A request that can be answered.

    Attributes:
        number: of its line.
        name: custom_id.
        prepared: prompts and how to answer them.
        telling: its answers, as they grow.
    """

    number: int
    name: str
    prepared: Prepared
    telling: Telling

    def done(self, error: Exception | None = None) -> Answered:
        """What stands in the output.

        Args:
            error: that ended it before its answers were complete.
        """
        if error is None:
            return answered(self.number, self.name, self.telling.whole(0.0))
        return refused(self.number, self.name, _problem(self.number, error))


def make_job(line: Line, engine: Answering, rules: Rules) -> Job | Answered:
    """Take a line, check it as the server does, and make its prompts."""
    name: str | None = None
    try:
        request = _request(line, rules.limits)
        name = request.name
    except ApiError as problem:
        return no_request(line.number, name_of(line.data or b"", line.number, rules.limits), problem)
    try:
        return _prepare(request, engine, rules)
    # Whatever a line sets off in a decoder of pictures or a template, the next one is to be answered.
    except Exception as error:
        return refused(line.number, name, _problem(line.number, error))


def _request(line: Line, limits: Limits) -> Request:
    if line.data is None:
        raise ApiError(
            413, f"the line is longer than the {limits.body_bytes} bytes of a request", code="body_too_large"
        )
    return read_request(line.data, line.number, limits)


def _prepare(request: Request, engine: Answering, rules: Rules) -> Job:
    started = time.perf_counter()
    form: Form
    if request.kind == "chat":
        folder = rules.images_from
        body = request.body if folder is None else with_pictures(request.body, folder, rules.limits)
        chat = read_chat(body, rules.limits, None)
        form = ChatForm(_frame("chatcmpl", chat.options, engine, rules))
        prepared, split = prepare_chat(chat, engine, started), chat.split
    else:
        text = read_completion(request.body, rules.limits)
        form = TextForm(_frame("cmpl", text.options, engine, rules))
        prepared, split = prepare_text(text, engine, started), False
    telling = Telling(
        form,
        answers=len(prepared.wanted),
        per_prompt=prepared.per_prompt,
        split=split,
        prepare_s=prepared.prepare_s,
    )
    return Job(request.number, request.name, prepared, telling)


def _frame(kind: str, options: Options, engine: Answering, rules: Rules) -> Frame:
    """What the document repeats.

    Raises:
        ApiError: another model is asked for, or a stream.
    """
    if options.stream:
        raise refuse("stream is for the server, a file gets whole answers; leave it out", "stream")
    if options.model is not None and options.model not in rules.names:
        raise ApiError(
            404,
            f"the model {options.model[:64]!r} is not the one that answers, which is called "
            f"{', '.join(rules.names)}; another name can be given with --served-model-name",
            code="model_not_found",
            param="model",
        )
    name = options.model or rules.names[0]
    return Frame(f"{kind}-{uuid.uuid4().hex}", int(time.time()), name, engine.fingerprint)


def _problem(number: int, error: Exception) -> ApiError:
    """What a request ran into; where it was a fault of ours, the log has more."""
    if isinstance(error, EdgeError):
        problem = problem_of(error)
        if problem.status >= 500:
            LOG.error("line %d: %s: %s", number, type(error).__name__, error)
        return problem
    LOG.error("line %d failed:\n%s", number, trace_of(error))
    return internal(f"line {number}")
