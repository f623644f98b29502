"""The one exception that means "the user's input was wrong": the command line prints its sentence and exits 2."""


class UserError(ValueError):
    """A mistake that the user can mend. The message is one sentence: what, where, and the remedy."""
