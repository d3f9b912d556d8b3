"""Many clients at one server: tokens per second, time to the first token, and how evenly tokens come.

    python benchmarks/serving.py OUT --concurrency 1,2,4,8 --tokens 64

Each client is a phone agent: a long system prompt that all share, an instruction of its own, a new screenshot
in every request. It sends one request after the other and reads the stream. An answer has a fixed number of
tokens, with end tokens out of reach. The server is a process of its own (`autoglm serve`), started anew for
each number of clients. Then one agent takes two steps, at a server that keeps what it has between steps and
at one that does not: the time to the first token of the second step, warm against cold. A gap is the time
between two pieces of one answer's text; the longest stall is the longest gap of any answer. A table goes to
stdout; the last line is one JSON document, which is also written to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import math
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import httpx
from agent_step import SESSION, conversations

from autoglm_edge.measure.figures import rounded
from autoglm_edge.measure.machine import this_machine
from autoglm_edge.measure.memory import read_memory
from autoglm_edge.measure.screen import screenshot
from autoglm_edge.runtime.bundle import Bundle

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
from server_process import Running, Streamed, server_process, stream

HERE = Path(__file__).resolve().parent
FREQUENCY_PENALTY = 0.2
"""What the client sends."""
_PATIENCE_SECONDS = 1800.0


@dataclass(frozen=True)
class Level:
    """What so many clients at once had of a server.

    Attributes:
        concurrency: clients.
        requests: that were answered in full.
        wall_s: from the first request to the last answer.
        prompt_tokens: of all requests.
        cached_tokens: of those.
        answer_tokens: of all answers.
        answer_tokens_per_s: of all clients together.
        ttft_p50_s: time to the first piece of text, half of the requests within.
        ttft_p95_s: 95 of 100 within.
        gap_p50_s: between two pieces of an answer.
        gap_p95_s: the same.
        longest_stall_s: the longest of them.
        anon_bytes: RssAnon of the server at the end; None where the system does not tell.
    """

    concurrency: int
    requests: int
    wall_s: float
    prompt_tokens: int
    cached_tokens: int
    answer_tokens: int
    answer_tokens_per_s: float
    ttft_p50_s: float
    ttft_p95_s: float
    gap_p50_s: float
    gap_p95_s: float
    longest_stall_s: float
    anon_bytes: int | None = None


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least that share of the values does not exceed; nan of none."""
    if not values:
        return math.nan
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def level_of(concurrency: int, answers: Sequence[Streamed], wall_s: float, anon: int | None = None) -> Level:
    """Figures of the answers to all clients.

    Raises:
        SystemExit: one of them failed, or has no text; says how.
    """
    for answer in answers:
        if answer.status != 200 or answer.error or not answer.pieces_s or not answer.usage:
            raise SystemExit(
                f"a request failed with status {answer.status}: {answer.error or 'no text came'}"
            )
    first = [answer.pieces_s[0] - answer.sent_s for answer in answers]
    gaps = [
        later - earlier
        for answer in answers
        for earlier, later in zip(answer.pieces_s, answer.pieces_s[1:], strict=False)
    ]
    tokens = sum(answer.usage["completion_tokens"] for answer in answers)
    return Level(
        concurrency=concurrency,
        requests=len(answers),
        wall_s=wall_s,
        prompt_tokens=sum(answer.usage["prompt_tokens"] for answer in answers),
        cached_tokens=sum(answer.usage["prompt_tokens_details"]["cached_tokens"] for answer in answers),
        answer_tokens=tokens,
        answer_tokens_per_s=tokens / wall_s,
        ttft_p50_s=quantile(first, 0.5),
        ttft_p95_s=quantile(first, 0.95),
        gap_p50_s=quantile(gaps, 0.5),
        gap_p95_s=quantile(gaps, 0.95),
        longest_stall_s=max(gaps, default=math.nan),
        anon_bytes=anon,
    )


def as_request(messages: Sequence[dict[str, Any]], eos: Sequence[int], tokens: int) -> dict[str, Any]:
    """A request of the agent; its pictures become data URIs."""
    sent = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            content = [_picture(part["image"]) if part["type"] == "image" else part for part in content]
        sent.append({**message, "content": content})
    return {
        "messages": sent,
        "max_tokens": tokens,
        "temperature": 0.0,
        "frequency_penalty": FREQUENCY_PENALTY,
        "logit_bias": {str(token): -100 for token in eos},
    }


def _picture(image: Any) -> dict[str, Any]:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def first_turns(session: dict[str, Any], client: int, rounds: int) -> list[list[dict[str, Any]]]:
    """What one client asks: the system prompt of all, its own instruction, a new screen each time."""
    system = {"role": "system", "content": "\n".join(session["system"])}
    asked: list[list[dict[str, Any]]] = []
    for number in range(rounds):
        words = f"{session['task']} ({client + 1})\n\n{json.dumps({'current_app': f'App {client}'})}"
        picture = {"type": "image", "image": screenshot(seed=1000 * client + number)}
        asked.append([system, {"role": "user", "content": [picture, {"type": "text", "text": words}]}])
    return asked


def load(server: Running, session: dict[str, Any], clients: int, options: argparse.Namespace) -> Level:
    """All clients at once, each with its requests one after the other."""
    eos = Bundle.open(options.bundle).manifest.tokens.eos
    asked = [
        [as_request(turn, eos, options.tokens) for turn in first_turns(session, client, options.rounds)]
        for client in range(clients)
    ]
    warm_up = as_request(first_turns(session, clients, 1)[0], eos, 8)
    begin = threading.Barrier(clients + 1)

    def work(requests: list[dict[str, Any]]) -> list[Streamed]:
        with httpx.Client(base_url=server.url, trust_env=False, timeout=_PATIENCE_SECONDS) as http:
            begin.wait()
            return [stream(http, request) for request in requests]

    with httpx.Client(base_url=server.url, trust_env=False, timeout=_PATIENCE_SECONDS) as http:
        stream(http, warm_up)
    with ThreadPoolExecutor(clients) as pool:
        futures = [pool.submit(work, requests) for requests in asked]
        begin.wait()
        started = time.perf_counter()
        answers = [answer for future in futures for answer in future.result()]
        wall = time.perf_counter() - started
    return level_of(clients, answers, wall, read_memory(server.pid).anon_bytes)


def second_step(session: dict[str, Any], options: argparse.Namespace, *, warm: bool) -> dict[str, Any]:
    """Time to the first token of an agent's second step."""
    eos = Bundle.open(options.bundle).manifest.tokens.eos
    steps = conversations(session)
    requests = [as_request(next(steps), eos, options.tokens) for _ in range(2)]
    with (
        server_process(options.bundle, [*_flags(options), *([] if warm else ["--no-reuse"])]) as server,
        httpx.Client(base_url=server.url, trust_env=False, timeout=_PATIENCE_SECONDS) as http,
    ):
        answers = [stream(http, request) for request in requests]
    return {"warm": warm, **asdict(level_of(1, answers[1:], answers[1].pieces_s[-1] - answers[1].sent_s))}


def table(document: dict[str, Any]) -> str:
    """A row per number of clients, then the second step."""
    head = (
        "clients",
        "requests",
        "tokens/s",
        "first token p50, s",
        "p95, s",
        "gap p50, ms",
        "p95, ms",
        "longest, ms",
    )
    lines = ["| " + " | ".join(head) + " |", "|" + "---:|" * len(head)]
    for level in document["levels"]:
        cells = [
            str(level["concurrency"]),
            str(level["requests"]),
            f"**{level['answer_tokens_per_s']:.1f}**",
            f"{level['ttft_p50_s']:.2f}",
            f"{level['ttft_p95_s']:.2f}",
            *(f"{1e3 * level[name]:.0f}" for name in ("gap_p50_s", "gap_p95_s", "longest_stall_s")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    for step in document["second_step"]:
        lines += [
            "",
            f"second step, {'warm' if step['warm'] else 'cold'}: first token after {step['ttft_p50_s']:.2f} "
            f"s, {step['cached_tokens']} of {step['prompt_tokens']} tokens cached",
        ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve, ask, print, write."""
    options = _parse(arguments)
    session = json.loads(options.session.read_text(encoding="utf-8"))
    levels = []
    for clients in options.concurrency:
        print(f"{options.bundle.name}: {clients} clients", file=sys.stderr)
        flags = [*_flags(options), "--max-concurrency", str(clients), "--max-queue", str(max(32, clients))]
        with server_process(options.bundle, flags) as server:
            levels.append(asdict(load(server, session, clients, options)))
    steps = []
    for warm in (False, True):
        print(f"{options.bundle.name}: second step, {'warm' if warm else 'cold'}", file=sys.stderr)
        steps.append(second_step(session, options, warm=warm))
    machine = this_machine()
    document = rounded(
        {
            "date": date.today().isoformat(),
            "machine": machine.to_json(),
            "threads": options.threads or machine.cores,
            "bundle": options.bundle.name,
            "recipe": str(Bundle.open(options.bundle).manifest.recipe.get("name", "?")),
            "answer_tokens": options.tokens,
            "rounds": options.rounds,
            "levels": levels,
            "second_step": steps,
        }
    )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document, ensure_ascii=False, indent=1)
    options.output.write_text(text + "\n", encoding="utf-8")
    print(table(document))
    print(json.dumps(document, ensure_ascii=False))
    return 0


def _flags(options: argparse.Namespace) -> list[str]:
    """Of the server, in every run."""
    flags = ["--no-access-log"]
    if options.threads:
        flags += ["--threads", str(options.threads)]
    if options.max_image_tokens:
        flags += ["--max-image-tokens", str(options.max_image_tokens)]
    return flags


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path, metavar="OUT")
    parser.add_argument("--concurrency", type=_counts, default=(1, 2, 4, 8), help="default 1,2,4,8")
    parser.add_argument("--rounds", type=int, default=3, help="requests of each client (default 3)")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer (default 64)")
    parser.add_argument("--session", type=Path, default=SESSION)
    parser.add_argument("--max-image-tokens", type=int, default=0, help="default the bundle's")
    parser.add_argument("--threads", type=int, default=0, help="default one per core")
    parser.add_argument("-o", "--output", type=Path, default=HERE / "results" / "serving.json")
    return parser.parse_args(arguments)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(int(item) for item in text.split(","))


if __name__ == "__main__":
    raise SystemExit(main())
