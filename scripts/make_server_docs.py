"""Write the tables of docs/server.md that come from the code: flags, and fields that are refused.

python scripts/make_server_docs.py            # write them between their markers
python scripts/make_server_docs.py --check    # exit 1 if they differ
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import click

from autoglm_edge.commands.serve import serve
from autoglm_edge.server.asking.options import UNSUPPORTED

PAGE = Path(__file__).resolve().parent.parent / "docs" / "server.md"


def flags() -> str:
    """A row per option of `autoglm serve`."""
    context = click.Context(serve, info_name="autoglm serve", terminal_width=1000, max_content_width=1000)
    rows = ["| flag | |", "|---|---|"]
    for option in serve.get_params(context):
        record = option.get_help_record(context) if isinstance(option, click.Option) else None
        if record is not None and record[0] != "--help":
            name, about = (text.replace("|", "\\|") for text in record)
            rows.append(f"| `{name}` | {about} |")
    return "\n".join(rows)


def unsupported() -> str:
    """A row per field that is refused."""
    rows = ["| field | values that ask for nothing | why not |", "|---|---|---|"]
    for name, (harmless, why) in UNSUPPORTED.items():
        values = ", ".join(f"`{json.dumps(value)}`" for value in harmless)
        rows.append(f"| `{name}` | {values} | {why} |")
    return "\n".join(rows)


def filled(page: str) -> str:
    """The page with its tables as they should be."""
    for name, table in (("flags", flags()), ("unsupported", unsupported())):
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, _, rest = page.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise SystemExit(f"{PAGE.name} lacks the markers {begin.strip()} and {end}")
        page = f"{before}{begin}{table}\n{end}{after}"
    return page


def main(arguments: list[str] | None = None) -> int:
    """Write or check; returns the exit status."""
    parser = argparse.ArgumentParser(description="Write the tables of docs/server.md.")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    now = PAGE.read_text(encoding="utf-8")
    if not parser.parse_args(arguments).check:
        PAGE.write_text(filled(now), encoding="utf-8")
        return 0
    if now != filled(now):
        print(f"{PAGE.name} is out of date; run python scripts/make_server_docs.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
