"""Metrics of several processes as one text, in Prometheus' format.

In: the text of each, by a name. Out: one text, where each sample has that name as the label `replica`. Knows
nothing of what is measured.
"""

from __future__ import annotations

from collections.abc import Mapping


def joined(texts: Mapping[str, str]) -> str:
    """All samples, those of one metric together.

    Args:
        texts: by the value of the label.
    """
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for name, text in texts.items():
        metric = ""
        for line in text.splitlines():
            if line.startswith("# "):
                metric = line.split(" ", 3)[2]
                lines = heads.setdefault(metric, [])
                if line not in lines:
                    lines.append(line)
            elif line:
                samples.setdefault(metric, []).append(_labelled(line, name))
    metrics = [line for metric, head in heads.items() for line in (*head, *samples.get(metric, ()))]
    return "\n".join(metrics) + "\n"


def _labelled(line: str, name: str) -> str:
    sample, _, value = line.rpartition(" ")
    metric, brace, rest = sample.partition("{")
    return f'{metric}{{replica="{name}"{f",{rest}" if brace else "}"} {value}'
