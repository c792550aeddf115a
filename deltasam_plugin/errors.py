"""The error for what cannot be trained as asked."""


class Refused(RuntimeError):
    """A model or a way of training for which the gradient would not be what was asked for.

    The message names the rule and the remedy.
    """
