"""A headless Chromium for tests of the report: opens a file, measures its layout, takes pictures.

The copy that is measured carries a script at its end, and lacks the policy that would forbid it;
the report itself has no script.
"""

import html
import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
MEASURE = """
<script>
const box = e => {
  const r = e.getBoundingClientRect();
  return [r.left, r.top, r.right, r.bottom];
};
const charts = [...document.querySelectorAll('svg[role=img]')].map(svg => {
  const texts = [...svg.querySelectorAll('text')].filter(t => t.textContent.trim());
  return {name: svg.id, box: box(svg), texts: texts.map(t => [t.textContent, ...box(t)])};
});
const late = [...document.querySelectorAll('body *')].filter(e =>
  !e.closest('.scroll') && !e.closest('svg') && !e.closest('pre') && e.offsetParent !== null
  && e.getBoundingClientRect().right > innerWidth + 1
).map(e => e.tagName + ' ' + e.textContent.slice(0, 40));
const fetched = performance.getEntriesByType('resource').map(e => e.name);
parent.postMessage(JSON.stringify({
  charts, late, fetched, width: innerWidth, page: document.documentElement.scrollWidth
}), '*');
</script>
"""
FRAME = """<!doctype html>
<script>
addEventListener('message', event => {{
  const out = document.createElement('pre');
  out.id = 'measured';
  out.textContent = event.data;
  document.body.append(out);
}});
</script>
<body style="margin:0">
<iframe src="{name}" style="border:0;width:{width}px;height:{height}px"></iframe>
"""
"""A window is never narrower than 500 pixels, a frame is."""


@dataclass(frozen=True, kw_only=True)
class Text:
    """A label as it stands on the screen."""

    content: str
    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: "Text", slack: float) -> bool:
        """Whether two labels share more than `slack` pixels in both directions."""
        across = min(self.right, other.right) - max(self.left, other.left)
        down = min(self.bottom, other.bottom) - max(self.top, other.top)
        return across > slack and down > slack


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A drawing as it stands on the screen."""

    name: str
    box: tuple[float, float, float, float]
    texts: tuple[Text, ...]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a page looks like at one width."""

    charts: tuple[Chart, ...]
    late: tuple[str, ...]
    """Elements that reach beyond the right edge."""
    fetched: tuple[str, ...]
    width: int
    page: int
    """Width of all that can be scrolled to."""
    console: str
    """What the console said."""


def find_browser() -> str | None:
    """Path of a browser that starts, or None."""
    for path in filter(None, map(shutil.which, BROWSERS)):
        if subprocess.run([path, "--version"], check=False, capture_output=True).returncode == 0:
            return path
    return None


def _run(browser: str, file: Path, folder: Path, *flags: str) -> tuple[str, str]:
    command = [
        browser,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-extensions",
        "--hide-scrollbars",
        "--no-first-run",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--enable-logging=stderr",
        f"--user-data-dir={folder / 'profile'}",
        "--virtual-time-budget=4000",
        *flags,
        file.as_uri(),
    ]
    ran = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env={**os.environ, "HOME": str(folder)},
    )
    return ran.stdout, ran.stderr


def measure(browser: str, report: bytes, folder: Path, width: int) -> Measured:
    """Opens a report at a width, without a network, and reads where everything stands."""
    text = POLICY.sub("", report.decode()).replace("</body>", f"{MEASURE}</body>")
    file = folder / f"measured-{width}.html"
    file.write_text(text)
    frame = folder / f"frame-{width}.html"
    frame.write_text(FRAME.format(name=file.name, width=width, height=2000))
    dom, log = _run(browser, frame, folder, "--window-size=1400,2000", "--dump-dom")
    found = re.search(r'<pre id="measured">(.*?)</pre>', dom, re.DOTALL)
    assert found is not None, log
    answer = json.loads(html.unescape(found[1]))
    charts = tuple(
        Chart(
            name=each["name"],
            box=tuple(each["box"]),
            texts=tuple(
                Text(content=content, left=left, top=top, right=right, bottom=bottom)
                for content, left, top, right, bottom in each["texts"]
            ),
        )
        for each in answer["charts"]
    )
    return Measured(
        charts=charts,
        late=tuple(answer["late"]),
        fetched=tuple(answer["fetched"]),
        width=answer["width"],
        page=answer["page"],
        console="\n".join(line for line in log.splitlines() if "CONSOLE" in line),
    )


def console_of(browser: str, report: bytes, folder: Path) -> str:
    """What the console says of the untouched file."""
    file = folder / "report.html"
    file.write_bytes(report)
    _, log = _run(browser, file, folder, "--window-size=1280,2000", "--dump-dom")
    return "\n".join(line for line in log.splitlines() if "CONSOLE" in line)
