"""Every error that a user can meet, in one tree.

MedhaError (1)
  UsageError (2)
    UnknownName      a model, device, policy ... that no registry knows
    InvalidFile      a plan, catalog, trace, request or checkpoint file that breaks a rule
  Infeasible         no plan exists; says what binds and the nearest feasible value
  BundleMismatch     bundle, weights or machine do not belong together
  Refused            a request that this deployment cannot serve (HTTP 503 or 400)

The number is the exit status of a command that ends with the error. A message has the value, the
rule, the place and what to try next, and fits one screen.
"""

import difflib
from collections.abc import Iterable


class MedhaError(Exception):
    """Root of all errors that are the user's to read, never a bug of ours."""

    exit_status = 1


class UsageError(MedhaError):
    """Wrong flags, names or files: nothing was started."""

    exit_status = 2


class UnknownName(UsageError):
    """A name that a registry does not hold; the message lists the nearest ones."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        """Builds the message from the kind of thing, the name given and the names known."""
        self.kind = kind
        self.name = name
        choices = sorted(known)
        self.nearest = tuple(difflib.get_close_matches(name, choices, n=3, cutoff=0.4))
        hint = f"nearest: {', '.join(self.nearest)}" if self.nearest else "none is near"
        super().__init__(f"unknown {kind} {name!r}; {hint}\nknown: {', '.join(choices)}")


class InvalidFile(UsageError):
    """A file that breaks a rule: `where` is the file, `path` the field or row in it."""

    def __init__(self, where: str, path: str, problem: str) -> None:
        """Builds `where: path: problem`; path may be empty when the whole file is meant."""
        self.where = where
        self.path = path
        self.problem = problem
        super().__init__(": ".join(part for part in (where, path, problem) if part))


class Infeasible(MedhaError):
    """No plan (or one candidate not) satisfies a constraint.

    constraint  short name of what binds, e.g. "memory", "heads"
    need, have  the two sides of the broken inequality, with units, for the ledger
    nearest     what to change to get a feasible plan, or empty
    """

    def __init__(self, constraint: str, need: str, have: str, nearest: str = "") -> None:
        """Builds one sentence from the broken inequality."""
        self.constraint = constraint
        self.need = need
        self.have = have
        self.nearest = nearest
        hint = f"; nearest: {nearest}" if nearest else ""
        super().__init__(f"{constraint}: {need}, {have}{hint}")


class BundleMismatch(MedhaError):
    """Bundle, weights or machine do not belong together."""


class Refused(MedhaError):
    """A request that cannot be served by this deployment, ever."""
