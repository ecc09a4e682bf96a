"""`codmd-distill eval study serve`: puts the page of app/study.py before a study, until told to stop.

The page imports nothing of ours; it is given the session.
"""

from __future__ import annotations

import signal
import socket
import sys
from pathlib import Path

import uvicorn

from codmd_serve.commands import app_module, listening_socket
from codmd_serve.errors import ConflictError, InvalidRequestError, StorageFullError
from distill.evaluate.study.session import StudySession, UnknownRaterError

STATUSES: dict[type[Exception], int] = {
    UnknownRaterError: 404,
    ConflictError: 409,
    InvalidRequestError: 422,
    StorageFullError: 507,
}
LAST_ANSWERS_S = 5


class _Server(uvicorn.Server):
    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        # uvicorn would raise SIGTERM again; a server that did what it was told ends with 0.
        self._captured_signals = [number for number in self._captured_signals if number != signal.SIGTERM]


def serve_study(folder: Path, host: str, port: int, *, is_rehearsal: bool) -> int:
    """Serve a study; print one line with the address when ready.

    Args:
        folder: of the study.
        host, port: to listen on; port 0 takes a free one.
        is_rehearsal: whether raters only try it out.

    Returns:
        0 when told to stop.

    Raises:
        ConfigError: no study, or an address that cannot be listened on.
    """
    session = StudySession(folder, is_rehearsal=is_rehearsal)
    try:
        with listening_socket(host, port) as listener:
            config = uvicorn.Config(
                app_module("study").build_app(session, STATUSES),
                log_config=None,
                access_log=False,
                server_header=False,
                ws="none",
                timeout_graceful_shutdown=LAST_ANSWERS_S,
            )
            name = f"[{host}]" if ":" in host else host
            if session.num_damaged:
                print(f"note: {session.num_damaged} damaged lines of the log are skipped", file=sys.stderr)
            print(
                f"ready: http://{name}:{listener.getsockname()[1]} raters={session.num_raters} "
                f"pairs={session.study.num_trials}{' rehearsal' if is_rehearsal else ''}",
                flush=True,
            )
            _Server(config).run(sockets=[listener])
    finally:
        session.close()
    return 0
