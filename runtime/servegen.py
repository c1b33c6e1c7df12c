"""Samples single requests from an archive of ServeGen (arXiv 2505.09999).

The archive describes clients, not requests: for each client a rate and a burstiness in windows of
ten minutes, and the probabilities of its lengths in windows of six hours.

    *-trace.csv      window start s, requests/s, CV of the gaps, fitted family, two parameters
    *-dataset.json   window start s -> {"input_tokens": "{tokens: probability, ...}", ...}

Gaps follow the fitted family with the window's rate and CV (the two parameters in the file were
fitted to gaps inside bursts, and their mean is not 1 / rate); input and output lengths are drawn
independently, since the archive holds no joint distribution.
"""

import math
import tarfile
import zlib
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct

from plans.errors import InvalidFile
from runtime.executor.base import Floats, Ints
from runtime.traces import Trace, TraceRow

WINDOW_S = 600.0
"""Length of the windows of a trace file."""
DURATION_S = 600.0
"""How much is sampled where nobody says: the archive spans a day."""


class Window(Struct, frozen=True, kw_only=True):
    """One client in one window of ten minutes."""

    start_s: float
    rate: float
    """Requests a second."""
    cv: float
    """Standard deviation of the gaps over their mean; 0 where the client was silent."""
    family: str
    """`Gamma`, `Weibull`, or empty for exponential gaps."""


class Client(Struct, frozen=True, kw_only=True):
    """What one client sends."""

    windows: tuple[Window, ...]
    lengths: tuple[tuple[float, "Lengths", "Lengths"], ...]
    """(window start s, input lengths, output lengths), rising; windows without data left out."""


class Lengths(Struct, frozen=True, kw_only=True):
    """A distribution of lengths."""

    tokens: Ints
    chances: Floats
    """Sum to 1."""


def is_archive(path: Path) -> bool:
    """Whether the name is one of an archive."""
    return path.name.endswith((".tar.gz", ".tgz"))


def sample_archive(
    path: Path, rng: np.random.Generator, *, qps: float | None, duration_s: float | None
) -> Trace:
    """Requests of all clients from the start of the archive on; timed rows, by arrival.

    qps       scales the rates of all clients alike, so that their mean over the time is this
    errors    InvalidFile
    """
    clients = _read(path)
    until_s = DURATION_S if duration_s is None else duration_s
    mean_rate = _mean_rate(clients, until_s)
    if mean_rate == 0:
        raise InvalidFile(str(path), "", f"no client sends anything in the first {until_s:g} s")
    scale = 1.0 if qps is None else qps / mean_rate
    rows = [row for client in clients for row in _client_rows(client, rng, scale, until_s)]
    if not rows:
        raise InvalidFile(str(path), "", f"no request falls in the first {until_s:g} s")
    rows.sort(key=lambda row: row.arrival_s or 0.0)
    note = (
        f"sampled from {len(clients)} clients of a ServeGen archive, first {until_s:g} s,"
        f" rates x {scale:.4g}"
    )
    return Trace(source=str(path), rows=tuple(rows), timed=True, notes=(note,))


def gaps_s(rng: np.random.Generator, family: str, *, rate: float, cv: float, count: int) -> Floats:
    """Gaps of mean 1 / rate whose standard deviation is cv times it."""
    if family == "Weibull" and cv > 0:
        shape = weibull_shape(cv)
        return rng.weibull(shape, size=count) / (rate * math.gamma(1 + 1 / shape))
    if family == "Gamma" and cv > 0:
        shape = 1 / cv**2
        return rng.gamma(shape, 1 / (rate * shape), size=count)
    return rng.exponential(1 / rate, size=count)


def weibull_shape(cv: float) -> float:
    """The shape k whose Weibull gaps have this CV: cv^2 + 1 = G(1 + 2/k) / G(1 + 1/k)^2."""
    low, high = 0.1, 20.0  # CV 429 and 0.06; falls as the shape rises, so bisect
    for _ in range(60):
        shape = (low + high) / 2
        ratio = math.exp(math.lgamma(1 + 2 / shape) - 2 * math.lgamma(1 + 1 / shape))
        low, high = (shape, high) if ratio > cv**2 + 1 else (low, shape)
    return (low + high) / 2


def _mean_rate(clients: list[Client], until_s: float) -> float:
    sent = sum(
        window.rate * max(0.0, min(until_s - window.start_s, WINDOW_S))
        for client in clients
        for window in client.windows
    )
    return sent / until_s


def _client_rows(
    client: Client, rng: np.random.Generator, scale: float, until_s: float
) -> list[TraceRow]:
    times: list[float] = []
    for window in client.windows:
        length_s = min(until_s - window.start_s, WINDOW_S)
        if length_s <= 0 or window.rate <= 0:
            continue
        rate = window.rate * scale
        # The window opens somewhere inside a gap, not at the start of one.
        at_s = -float(rng.random()) * float(
            gaps_s(rng, window.family, rate=rate, cv=window.cv, count=1)[0]
        )
        while at_s < length_s:
            gaps = gaps_s(rng, window.family, rate=rate, cv=window.cv, count=256)
            after = at_s + np.cumsum(gaps)
            inside = after[(after >= 0) & (after < length_s)]
            times += (window.start_s + inside).tolist()
            at_s = float(after[-1])
    rows = []
    for at_s in times:
        known = [row for row in client.lengths if row[0] <= at_s] or client.lengths[:1]
        _, inputs, outputs = known[-1]
        rows.append(
            TraceRow(
                line=0,
                input_tokens=max(1, int(rng.choice(inputs.tokens, p=inputs.chances))),
                output_tokens=max(1, int(rng.choice(outputs.tokens, p=outputs.chances))),
                arrival_s=at_s,
            )
        )
    return rows


def _read(path: Path) -> list[Client]:
    """Clients in the order of their names; those without any length data are left out."""
    texts: dict[str, str] = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                file = archive.extractfile(member)
                if file is not None and member.name.endswith(("-trace.csv", "-dataset.json")):
                    texts[member.name] = file.read().decode()
    except FileNotFoundError:
        raise InvalidFile(str(path), "", "no such file") from None
    except (OSError, EOFError, UnicodeDecodeError, tarfile.TarError, zlib.error) as error:
        raise InvalidFile(str(path), "", f"cannot be read: {error}") from None
    clients = []
    for name in sorted(texts):
        stem = name.removesuffix("-trace.csv")
        if stem == name or f"{stem}-dataset.json" not in texts:
            continue
        lengths = _lengths(f"{path}: {stem}-dataset.json", texts[f"{stem}-dataset.json"])
        if lengths:
            windows = _windows(f"{path}: {name}", texts[name])
            clients.append(Client(windows=windows, lengths=lengths))
    if not clients:
        raise InvalidFile(
            str(path), "", "no client in it: a client is NAME-trace.csv beside NAME-dataset.json"
        )
    return clients


def _windows(where: str, text: str) -> tuple[Window, ...]:
    windows = []
    for line, row in enumerate(text.splitlines(), 1):
        try:
            start, rate, cv, family, _, _ = row.split(",")
            window = Window(start_s=float(start), rate=float(rate), cv=float(cv), family=family)
        except ValueError:
            raise InvalidFile(where, f"line {line}", f"{row!r} is no window") from None
        if not all(
            math.isfinite(value) and value >= 0
            for value in (window.start_s, window.rate, window.cv)
        ):
            raise InvalidFile(where, f"line {line}", f"{row!r}: numbers are finite and at least 0")
        windows.append(window)
    return tuple(windows)


def _lengths(where: str, text: str) -> tuple[tuple[float, Lengths, Lengths], ...]:
    rows = []
    try:
        for start, columns in msgspec.json.decode(text, type=dict[str, dict[str, Any]]).items():
            inputs, outputs = (_parse(columns[name]) for name in ("input_tokens", "output_tokens"))
            if inputs is not None and outputs is not None:
                rows.append((float(start), inputs, outputs))
    except (
        msgspec.DecodeError,
        AttributeError,  # a table that is no text
        KeyError,
        OverflowError,
        RecursionError,
        ValueError,
    ) as error:
        raise InvalidFile(where, "", f"no length distribution: {error}") from None
    return tuple(sorted(rows, key=lambda row: row[0]))


def _parse(text: str) -> Lengths | None:
    """A table written as {tokens: probability, ...}; None for an empty one."""
    pairs = [pair.split(":") for pair in text.strip("{} ").split(",") if pair.strip()]
    if not pairs:
        return None
    tokens = np.array([int(tokens) for tokens, _ in pairs], dtype=np.int64)
    chances = np.array([float(chance) for _, chance in pairs])
    if not (np.isfinite(chances).all() and (chances >= 0).all() and chances.sum() > 0):
        raise ValueError("probabilities must be finite, not negative and not all 0")
    return Lengths(tokens=tokens, chances=chances / chances.sum())
