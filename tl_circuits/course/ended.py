"""How a process ended, in words."""

import signal


def in_words(code: int) -> str:
    """How a process ended, from its exit code; -n where signal n ended it.

    Examples:
        >>> from tl_circuits.course.ended import in_words
        >>> in_words(3)
        'ended its process (exit code 3)'
    """
    if code < 0 and -code in set(signal.Signals):
        hint = ", perhaps because memory ran out" if -code == 9 else ""
        return f"was ended by the system ({signal.Signals(-code).name}{hint})"
    return f"ended its process (exit code {code})"
