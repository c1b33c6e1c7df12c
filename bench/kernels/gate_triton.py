"""The compile gate under another Triton than the one installed.

    python bench/kernels/gate_triton.py 3.6.0 [--wheels DIR] [--out FILE]

Installs that version by pip into a folder of its own, without what it depends on, and compiles with
it every kernel that codegen/gate.py knows, for sm_90, without a GPU. This environment stays as it
is. The exit status is the gate's, 1 if anything is rejected. `--wheels` takes the package from a
folder instead of pip's index.
"""

import argparse
import datetime as dt
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def installing(version: str, into: Path, wheels: Path | None) -> list[str]:
    """The command that puts Triton into a folder."""
    source = ["--no-index", "--find-links", str(wheels)] if wheels else []
    return [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
            "--no-deps", "--target", str(into), *source, f"triton=={version}"]  # fmt: skip


def gated(packages: Path, cache: Path, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Runs Python with a folder of packages before all others."""
    paths = [str(packages), str(ROOT)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    environment["TRITON_CACHE_DIR"] = str(cache)
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


def main() -> None:
    """Installs, asks the version, runs the gate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("version")
    parser.add_argument("--wheels", type=Path)
    parser.add_argument("--out", type=Path, help="writes the table there, too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        packages, cache = Path(folder) / "packages", Path(folder) / "cache"
        subprocess.run(installing(options.version, packages, options.wheels), check=True)
        asked = gated(packages, cache, ["-c", "import triton; print(triton.__version__)"])
        found = asked.stdout.strip()
        if found != options.version:
            sys.exit(f"asked for Triton {options.version}, Python imports {found or asked.stderr}")
        began = time.monotonic()
        done = gated(packages, cache, ["-m", "codegen.gate"])
        seconds = time.monotonic() - began
    rejected = done.stdout.count(": REJECTED")
    kernels = max(len(done.stdout.splitlines()) - 1, 0)
    text = (
        f"date: {dt.datetime.now(dt.UTC):%Y-%m-%d %H:%M} UTC\n"
        f"command: python bench/kernels/gate_triton.py {options.version}\n"
        f"Triton {found}, sm_90, Python {sys.version.split()[0]}: {kernels} compilations, "
        f"{rejected} rejected, {seconds:.0f} s\n\n{done.stdout}{done.stderr}"
    )
    print(text, end="")
    if options.out:
        options.out.write_text(text)
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
