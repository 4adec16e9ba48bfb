"""User errors and the exit codes of the commands.

A user's mistake is a `UserError`: one line with the value and the remedy, exit code 2. A failure of the disk
or the data is an `OSError`: one line, exit code 74. Any other exception is a bug and shows its traceback.
"""

BAD_SETTING = 2  # wrong usage or settings; starting again does not help
DIVERGED = 70
NO_DATA = 74  # the data or the disk failed
STOPPED = 75  # by a signal; the same command resumes


class UserError(ValueError):
    """A mistake that the user can fix: one line with the value and the remedy."""
