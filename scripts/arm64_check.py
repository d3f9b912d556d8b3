"""Ask a bundle on emulated ARM CPUs, or write its weights as such a CPU wants them.

    python scripts/arm64_check.py pocket-int4
    python scripts/arm64_check.py pocket-int4 --cpu cortex-a76 --onnxruntime 1.27.0 -i screen.png
    python scripts/arm64_check.py pocket-int4 --cpu cortex-a76 --onnxruntime 1.27.0 --prepare weights/

The first two compare answers and logits with this machine's (docs/android.md has what came of it), and exit
with 1 if they are apart. The third makes prepared weights. Fetches some 140 MB at the first time. `autoglm
simulate OUT --arm64` does the first.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from autoglm_edge.android_sim.arm64.check import MAX_TOKENS, PROMPT, Question, check_arm64, prepare_arm64
from autoglm_edge.android_sim.arm64.qemu import CPUS
from autoglm_edge.commands.progress import ProgressLine
from autoglm_edge.errors import EdgeError


def main() -> int:
    """Do what the command line asks; the exit status."""
    options = _options()
    progress = ProgressLine()
    cpus = options.cpu or list(CPUS)
    try:
        if options.prepare is not None:
            for cpu in cpus:
                made = prepare_arm64(
                    options.bundle, options.prepare, cpu, progress, onnxruntime=options.onnxruntime
                )
                print(json.dumps(made.to_json()))
            return 0
        report = check_arm64(
            options.bundle,
            cpus,
            progress,
            question=Question(options.prompt, tuple(options.image), options.max_tokens),
            onnxruntime=options.onnxruntime,
        )
    except EdgeError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted", file=sys.stderr)
        return 130
    finally:
        progress.close()
    print(report.to_table())
    if options.json is not None:
        options.json.write_text(json.dumps(json.loads(report.to_json()), indent=2, ensure_ascii=False) + "\n")
    return 0 if report.passed else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--cpu", action="append", help=f"{', '.join(CPUS)}; repeatable; default all")
    parser.add_argument("--onnxruntime", help="release on the ARM side; default the one here")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("-i", "--image", action="append", type=Path, default=[])
    parser.add_argument("--max-tokens", type=int, default=MAX_TOKENS)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there, too")
    parser.add_argument("--prepare", type=Path, metavar="DIR", help="make prepared weights there instead")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
