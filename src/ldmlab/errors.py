"""The one exception for people."""


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one sentence: option, value, why, way out.

    Commands print the message and end with exit code 2; any other exception is a fault of ours and keeps its
    traceback.
    """
