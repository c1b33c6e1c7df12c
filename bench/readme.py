"""Renews the command output that the README shows: `python bench/readme.py`, or `--check` it.

A block starts with the comment `<!-- output: COMMAND -->` and is the fenced text behind it. The
commands run one after the other in a temporary folder, so a later one sees what an earlier one
wrote. Lines that hold real time (`simulated in`) are left out: they differ from run to run.
"""

import argparse
import difflib
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
BLOCK = re.compile(
    r"(<!-- output: (?P<command>.+?) -->\n```text\n)(?P<text>.*?)(?=```\n)", re.DOTALL
)
COLUMNS = "100"


def main() -> int:
    """Rewrites the README, or with --check returns 1 where it would change."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; 1 where it differs")
    check = parser.parse_args().check
    old = README.read_text()
    with tempfile.TemporaryDirectory() as folder:
        new = BLOCK.sub(lambda block: block[1] + output(block["command"], folder), old)
    if not check:
        README.write_text(new)
        return 0
    if new != old:
        lines = difflib.unified_diff(old.splitlines(), new.splitlines(), "shown", "now", n=0)
        print("\n".join(lines), file=sys.stderr)
        print(f"{README.name} shows old output; renew it: python bench/readme.py", file=sys.stderr)
    return int(new != old)


def output(command: str, folder: str) -> str:
    """Stdout of a command of this project behind a prompt, trailing blanks removed."""
    name, *arguments = shlex.split(command)
    result = subprocess.run(
        [Path(sys.executable).parent / name, *arguments],
        cwd=folder,
        env={**os.environ, "COLUMNS": COLUMNS, "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    shown = [line.rstrip() for line in result.stdout.splitlines() if "simulated in" not in line]
    text = "\n".join(["$ " + command, *shown])
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


if __name__ == "__main__":
    sys.exit(main())
