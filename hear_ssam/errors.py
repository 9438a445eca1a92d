"""The one error class of the package, and "did you mean"."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HearSsamError(ValueError):
    """A problem that the caller can mend; the message names the file or argument and the mend."""


def about(path: object, error: Exception) -> HearSsamError:
    """Whatever was raised on account of one file, as an error that begins with its path."""
    if isinstance(error, HearSsamError):
        return error if str(error).startswith(str(path)) else HearSsamError(f"{path}: {error}")
    return HearSsamError(f"{path}: {type(error).__name__}: {error}; leave it out, and report this if it is sound.")


def said(error: Exception) -> str:
    """What an error says, without the number and the path that the system puts into its own."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def unknown_name(kind: str, name: object, known: Iterable[str]) -> HearSsamError:
    """An error for a name that is not in a table: lists the table, suggests the nearest entry."""
    names = sorted(known)
    lower = {each.lower(): each for each in names}
    close = difflib.get_close_matches(str(name).lower(), lower, n=1, cutoff=0.5)
    hint = f" Did you mean {lower[close[0]]!r}?" if close else ""
    return HearSsamError(f"unknown {kind} {name!r}.{hint} Known: {', '.join(names)}.")
