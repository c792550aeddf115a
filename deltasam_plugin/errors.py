"""The error for what cannot be trained as asked, and how messages list names."""

from collections.abc import Collection

LISTED = 5  # names in a message


class Refused(RuntimeError):
    """A model or a way of training for which the gradient would not be what was asked for.

    The message names the rule and the remedy.
    """


def listing(names: Collection[str]) -> str:
    """The first names, and how many more there are."""
    shown = ", ".join(list(names)[:LISTED])
    return f"{shown} and {len(names) - LISTED} more" if len(names) > LISTED else shown
