"""What codmd-serve and codmd-distill share on the command line: one-line errors, exit codes, and the pages of app/.

Exit codes: 0 done, 1 failed, 2 for what the user can mend, 128 + N when signal N ended the command.
"""

import argparse
import importlib
import importlib.util
import signal
import socket
import sys
from collections.abc import Callable
from types import ModuleType
from typing import NoReturn

from codmd_serve.errors import (
    CheckpointError,
    CodmdError,
    ConfigError,
    InvalidRequestError,
    StorageFullError,
    StoreError,
)
from codmd_serve.textfiles import escape_console

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
MENDABLE = (ConfigError, CheckpointError, InvalidRequestError, StoreError, StorageFullError)


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that raises a mistake as an error of one line, in place of printing the whole usage."""

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError with the message of argparse."""
        raise ConfigError(f"{message}; see {self.prog} --help")


def run_command(program: str, run: Callable[[], int]) -> int:
    """Run a command; print an error of ours as one line on stderr.

    Args:
        program: starts that line.
        run: returns the exit code.

    Returns:
        What `run` returned, or the exit code of its error. Any other exception propagates: it is a bug of ours, and
        Python prints its traceback.
    """
    escape_console()
    try:
        return run()
    except CodmdError as error:
        print_error(program, error)
        return EXIT_BAD_INPUT if isinstance(error, MENDABLE) else EXIT_FAILED
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def app_module(name: str) -> ModuleType:
    """Import a module of app/, which an installed wheel carries as `codmd_serve._app`.

    Args:
        name: of the module, such as demo.
    """
    package = "codmd_serve._app" if importlib.util.find_spec("codmd_serve._app") else "app"
    return importlib.import_module(f"{package}.{name}")


def print_error(program: str, error: CodmdError | str) -> None:
    """Print one line on stderr: the program and the message, its line breaks as spaces."""
    print(f"{program}: {' '.join(str(error).split())}", file=sys.stderr)


def listening_socket(host: str, port: int) -> socket.socket:
    """Take a port before anything is loaded, so that a port in use costs a second and not a minute.

    Raises:
        ConfigError: no such port or host, or the port is taken.
    """
    if not 0 <= port <= 65535:  # getaddrinfo would take it modulo 65536
        raise ConfigError(f"--port must be in 0..65535, got {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}: {error.strerror}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        # At once: on Linux two sockets may be bound to a port until one of them listens.
        listener.listen()
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}; choose another with --port") from None
    return listener
