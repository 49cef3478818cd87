"""Where the pages of a command listen."""

import socket

from ldmlab.errors import InputError


def listening_at(host: str, port: int) -> socket.socket:
    """A socket that takes connections, of the family of the host's address."""
    if not host:
        raise InputError("--host is empty, which is no address; give one such as 127.0.0.1 or 0.0.0.0.")
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError, ValueError, TypeError) as error:  # the last two: a name that is none
        raise InputError(
            f"--host {host!r:.80} --port {port} cannot be used ({error!s:.200}); choose another --port or --host."
        ) from error


def address_of(listening: socket.socket, host: str) -> str:
    """What is typed into a browser."""
    return f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}/"
