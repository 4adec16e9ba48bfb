"""A user's mistake, and the exit codes of the commands.

A mistake of the user is a `UserError`: one line with the value and the remedy, exit code 2. What the disk or
the data refuse is an `OSError`: one line, exit code 74. Any other exception is a bug and shows its trace.
"""

BAD_SETTING = 2  # wrong usage or settings; starting again will not help
DIVERGED = 70
NO_DATA = 74  # data or disk failed
STOPPED = 75  # by a signal: start the same command again


class UserError(ValueError):
    """What the user can fix: one line that names the value and the remedy."""
