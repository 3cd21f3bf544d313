"""What the studio's page does not serve."""

from __future__ import annotations

import re

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send


class NothingFromElsewhere:
    """Refuses the addresses under which Gradio would fetch a file from another host."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request."""
        refused = re.search(r"/(file|proxy)=\s*https?:", scope.get("path", ""), re.IGNORECASE)
        app = PlainTextResponse("Only files of this page are served.", 403) if refused else self._app
        await app(scope, receive, send)
