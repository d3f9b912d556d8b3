"""Minutes of everything at once against a server of its own: its memory stays flat, and nothing is a fault.

    python scripts/soak_server.py --minutes 10

Clients stream answers, take them whole, hold them to JSON, go away in the middle of a stream, of a request or
before the answer, ask for what cannot be, and send what is no request. The server is a fresh process with the
embedded model and small caches, which are full after the warm-up. RssAnon is read every second, and a line is
laid through what comes after the warm-up by least squares. Exit status 1 if it rises by more than
--max-growth-mb over the time measured, at any status of 500 or above, any answer that is no JSON though it
had to be, any client that hears nothing for a minute, and if work is left when all clients are gone. The last
line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from server_process import Running, server_process
from soak_clients import SILENCE_SECONDS, Client, Ledger

from autoglm_edge.embedded import pocket_path
from autoglm_edge.measure.machine import this_machine
from autoglm_edge.measure.memory import read_memory

_DRAIN_SECONDS = 30.0


def slope_mb_per_s(seconds: Sequence[float], mb: Sequence[float]) -> float:
    """Of the line through the samples, by least squares; 0 for fewer than two."""
    if len(seconds) < 2:
        return 0.0
    return float(np.polyfit(np.asarray(seconds) - seconds[0], np.asarray(mb), 1)[0])


def growth_mb(samples: Sequence[tuple[float, float]], warm_up_s: float) -> float:
    """How much the line through the samples after the warm-up rises from its first to its last.

    Args:
        samples: seconds since the start, and MB.
        warm_up_s: samples before it do not count.
    """
    counted = [sample for sample in samples if sample[0] >= warm_up_s]
    if len(counted) < 2:
        return 0.0
    seconds = [second for second, _ in counted]
    return slope_mb_per_s(seconds, [mb for _, mb in counted]) * (seconds[-1] - seconds[0])


def watch(server: Running, stop: threading.Event, samples: list[tuple[float, float]]) -> None:
    """RssAnon of the server every second, as (seconds, MB)."""
    started = time.monotonic()
    while not stop.wait(1.0):
        anon = read_memory(server.pid).anon_bytes
        if anon is not None:
            samples.append((time.monotonic() - started, anon / 1e6))


def drained(server: Running) -> str:
    """Wait until nothing is queued or answered; what is left, or ""."""
    end = time.monotonic() + _DRAIN_SECONDS
    left = "the server does not answer"
    while time.monotonic() < end:
        try:
            text = httpx.get(f"{server.url}/metrics", trust_env=False, timeout=5).text
        except httpx.TransportError:
            time.sleep(0.5)
            continue
        names = ("queued_requests", "running_requests", "admitted_requests")
        busy = [line for line in text.splitlines() if any(f"{name} " in line for name in names)]
        busy = [line for line in busy if not line.startswith("#") and float(line.rsplit(" ", 1)[1]) > 0]
        if not busy:
            return ""
        left = "; ".join(busy)
        time.sleep(0.5)
    return left


def soak(bundle: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Serve, and let all clients loose; what came of it."""
    flags = ["--no-access-log", "--cache-bytes", "8MB", "--image-cache-bytes", "4MB"]
    flags += ["--context", "2000", "--max-concurrency", str(options.max_concurrency)]
    if options.threads:
        flags += ["--threads", str(options.threads)]
    ledger = Ledger()
    samples: list[tuple[float, float]] = []
    stop = threading.Event()
    with server_process(bundle, flags) as server:
        end = time.monotonic() + 60 * options.minutes
        clients = [Client(server, ledger, options.seed + number) for number in range(options.clients)]
        threads = [threading.Thread(target=client.run, args=(end,)) for client in clients]
        threads.append(threading.Thread(target=watch, args=(server, stop, samples)))
        for thread in threads:
            thread.start()
        for thread in threads[:-1]:
            thread.join(60 * options.minutes + 5 * SILENCE_SECONDS)
            if thread.is_alive():
                ledger.fault("a client did not come back")
        stop.set()
        threads[-1].join()
        if server.process.poll() is not None:
            ledger.fault(f"the server ended with status {server.process.returncode}")
        elif left := drained(server):
            ledger.fault(f"all clients are gone, and this is left: {left}")
    warm_up = 60 * options.minutes * options.warm_up
    return {
        "date": date.today().isoformat(),
        "machine": this_machine().to_json(),
        "minutes": options.minutes,
        "clients": options.clients,
        "max_concurrency": options.max_concurrency,
        "seed": options.seed,
        "requests": sum(ledger.done.values()),
        "outcomes": dict(sorted(ledger.done.items())),
        "faults": ledger.faults,
        "warm_up_s": warm_up,
        "anon_mb": [round(mb, 1) for _, mb in samples],
        "growth_mb": round(growth_mb(samples, warm_up), 2),
        "max_growth_mb": options.max_growth_mb,
    }


def verdict(document: dict[str, Any]) -> list[str]:
    """Why the run failed; empty if it did not."""
    said = [f"{document['outcomes']['fault']} faults: {document['faults'][0]}"] if document["faults"] else []
    if document["growth_mb"] > document["max_growth_mb"]:
        said.append(
            f"RssAnon grew by {document['growth_mb']} MB, {document['max_growth_mb']} are allowed; "
            "something is kept that should not be"
        )
    if not any(name.endswith(" 200") for name in document["outcomes"]):
        said.append("no request was answered")
    return said


def main(arguments: Sequence[str] | None = None) -> int:
    """Soak, print, judge."""
    options = _parse(arguments)
    if options.bundle is None:
        from autoglm_edge.export.pipeline import export

        with tempfile.TemporaryDirectory() as folder:
            export(pocket_path(), Path(folder) / "pocket", precision="int8")
            document = soak(Path(folder) / "pocket", options)
    else:
        document = soak(options.bundle, options)
    for name, count in document["outcomes"].items():
        print(f"{name:24} {count}")
    anon = document["anon_mb"]
    if anon:
        print(f"RssAnon {anon[0]:.0f} MB at first, {anon[-1]:.0f} at last, {max(anon):.0f} at most")
    print(f"growth after {document['warm_up_s']:g} s: {document['growth_mb']} MB")
    failed = verdict(document)
    for line in failed:
        print(line, file=sys.stderr)
    text = json.dumps(document, ensure_ascii=False)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 1 if failed else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "bundle", type=Path, nargs="?", metavar="OUT", help="default the embedded model, int8"
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="default 10")
    parser.add_argument("--clients", type=int, default=6, help="default 6")
    parser.add_argument("--max-concurrency", type=int, default=4, help="of the server (default 4)")
    parser.add_argument("--threads", type=int, default=0, help="of the server; default one per core")
    parser.add_argument("--warm-up", type=float, default=0.25, help="share of the time that does not count")
    parser.add_argument("--max-growth-mb", type=float, default=16.0, help="after the warm-up (default 16)")
    parser.add_argument("--seed", type=int, default=6)
    parser.add_argument("-o", "--output", type=Path)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
