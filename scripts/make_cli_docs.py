"""Write docs/cli.md from the live --help of every command, or say whether it is up to date.

    python scripts/make_cli_docs.py            # write docs/cli.md
    python scripts/make_cli_docs.py --check    # exit 1 if it differs

The width is fixed, so terminal and environment do not matter.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from autoglm_edge.cli import EXPORT_PROGRAM, PROGRAM, cli, export_command

PAGE = Path(__file__).resolve().parent.parent / "docs" / "cli.md"
WIDTH = 100

HEAD = """# Commands

Made by `python scripts/make_cli_docs.py` from the commands themselves; do not edit it by hand.

```bash
autoglm export -o pocket-int4                                   # a bundle of the small embedded model
autoglm info pocket-int4                                        # what is in it
autoglm run pocket-int4 "Open the settings" -i screen.png       # ask it
```

What all commands have in common:

- A folder goes in, a folder comes out; a checkpoint is read by `export` only.
- Results go to stdout. Progress, counts and errors go to stderr: a bar on a terminal, else a line per tenth.
- `--json` prints one document as the last line of stdout.
- Exit status: 0 done; 1 failed, with one sentence `Error: ...`; 2 wrong usage; 130 stopped by Ctrl-C.

## The document of `autoglm run --json`

| key | value |
|---|---|
| `text` | the answer |
| `thinking` | what it says before the action, without tags |
| `action` | null, or `type` and the arguments; each point as written (`element`, 0 to 999 of width and height) and, if there was a picture, where the phone agent touches the screen (`element_pixels`) |
| `finish_reason` | `stop`, `length` or `cancelled` |
| `usage` | `prompt_tokens` (images included), `image_tokens`, `completion_tokens`, `cached_tokens` (of the prompt, not computed again) |
| `timings` | `ttft_ms`, `reuse_ms`, `image_ms`, `prefill_ms`, `decode_ms`, `prefill_tokens_per_s`, `decode_tokens_per_s`; `reused_tokens`, `encoded_images`, `cached_images`; `decoder_runs`, `drafted_tokens`, `accepted_tokens` |
| `plan` | what reads prompts, where weights are, how many threads, and why |
| `bundle`, `image_size`, `drawing` | the folder; width and height of the last picture; the file that `--draw` wrote |

"""  # noqa: E501


def commands() -> Iterator[tuple[str, click.Command]]:
    """Every command with what is typed for it."""
    yield PROGRAM, cli
    context = click.Context(cli)
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command is not None
        yield f"{PROGRAM} {name}", command
    yield EXPORT_PROGRAM, export_command()


def page() -> str:
    """The page as it should be."""
    sections = []
    for name, command in commands():
        context = click.Context(
            command, info_name=name, terminal_width=WIDTH, max_content_width=WIDTH, color=False
        )
        text = click.unstyle(command.get_help(context))
        lines = [line.rstrip() for line in text.splitlines()]
        sections.append(f"## {name}\n\n```text\n" + "\n".join(lines).strip() + "\n```\n")
    return HEAD + "\n".join(sections)


def main(arguments: list[str] | None = None) -> int:
    """Write or check; returns the exit status."""
    parser = argparse.ArgumentParser(description="Write docs/cli.md from the live --help of every command.")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    if not parser.parse_args(arguments).check:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page(), encoding="utf-8")
        return 0
    if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page():
        print(f"{PAGE.name} is out of date; run python scripts/make_cli_docs.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
