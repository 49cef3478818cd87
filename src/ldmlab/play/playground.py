"""The playground as a page: a form of what the models can do, a queue, results as files; Starlette behind uvicorn."""

import asyncio
import json
import secrets
import shutil
from base64 import b64decode
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request as HttpRequest
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ldmlab.errors import InputError
from ldmlab.files import beside, put, remove
from ldmlab.inference.grids import read_settings
from ldmlab.inference.model import LoadedModel
from ldmlab.play.abilities import Limits
from ldmlab.play.form import Wanted, read_form
from ldmlab.play.job_queue import JobQueue, Live, Request

UPLOADS = "inputs"  # in the output folder
_LOCAL = frozenset({"localhost", "127.0.0.1", "[::1]"})
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'",
}
_PAGES = {"/": ("play.html", "text/html"), "/play.js": ("play.js", "text/javascript")}


@dataclass(frozen=True)
class Prepared:
    """The checked request for one model: `run(folder, live)` writes its images."""

    run: Callable[[Path, Live], None]
    size: tuple[int, int]
    total: int  # image steps
    notes: Sequence[str] = ()


Prepare = Callable[[LoadedModel, Wanted], Prepared]


class Playground:
    """Models, their queue and the folder of results; one process serves them."""

    def __init__(
        self, models: Sequence[LoadedModel], able: dict[str, Any], limits: Limits, folder: Path, prepare: Prepare
    ) -> None:
        self.models, self.able, self.limits, self.folder, self.prepare = models, able, limits, folder, prepare
        self.queue = JobQueue(limits.waiting)
        self._last = max((int(one.name) for one in folder.iterdir() if one.name.isdecimal()), default=0)
        for left in [*folder.rglob(".*.part")]:  # of a server that was killed
            remove(left)

    def accept(self, body: dict[str, Any]) -> tuple[Request, list[str]]:
        """Check everything, then queue it."""
        wanted = read_form(body, self.able, self.limits, self.folder / UPLOADS)
        ready = [self.prepare(model, wanted) for model in self.models]
        return self.queue.put(lambda request: self._work(request, wanted, ready)), [n for p in ready for n in p.notes]

    def _work(self, request: Request, wanted: Wanted, ready: Sequence[Prepared]) -> dict[str, Any]:
        """Everything into a folder that gets its name when it is whole."""
        self._last += 1
        final = self.folder / f"{self._last:04d}"
        filled = beside(final)
        request.total = sum(one.total for one in ready)
        try:
            parts = []
            for number, (model, one) in enumerate(zip(self.models, ready, strict=True)):
                part = filled / str(number + 1) if len(ready) > 1 else filled
                part.mkdir(parents=True)
                one.run(part, Live(request, model, number, one.size))
                names = sorted(file.relative_to(filled).as_posix() for file in part.glob("*.png"))
                strips = [name for name in names if not Path(name).name[0].isdecimal() and Path(name).stem != "grid"]
                images = [name for name in names if Path(name).name[0].isdecimal()]
                settings = read_settings(filled / images[0])
                images = [] if wanted.swept else images  # the strip holds them
                parts.append({"images": images, "strips": strips, "settings": settings, "size": list(one.size)})
            put(filled, final)
        finally:
            shutil.rmtree(filled, ignore_errors=True)
        request.folder = final
        return {"folder": str(final), "parts": parts}


class Guard:
    """Refuses foreign hosts and pages where there is no password, and a wrong password where there is one."""

    def __init__(self, app: ASGIApp, password: str | None) -> None:
        self.app, self.password = app, password

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = await self._refusal(HttpRequest(scope)) if scope["type"] == "http" else None
        await (refusal or self.app)(scope, receive, send)

    async def _refusal(self, request: HttpRequest) -> Response | None:
        if self.password is None:
            host = request.headers.get("host", "").rpartition(":")[0] or request.headers.get("host", "")
            return None if host in _LOCAL else PlainTextResponse("this server is for its own machine", 421)
        kind, _, text = request.headers.get("authorization", "").partition(" ")
        try:
            word = b64decode(text, validate=True).partition(b":")[2] if kind.lower() == "basic" else None
        except ValueError:
            word = None
        if word is not None and secrets.compare_digest(word, self.password.encode()):
            return None
        if word is not None:
            await asyncio.sleep(1)  # guessing takes long
        asked = {"WWW-Authenticate": 'Basic realm="ldmlab play, any user name", charset="UTF-8"'}
        return PlainTextResponse("a password is needed", 401, headers=asked)


def application(play: Playground, password: str | None) -> Starlette:
    """The pages; password None: for this machine alone."""

    async def page(request: HttpRequest) -> Response:
        name, kind = _PAGES[request.url.path]
        return Response(files("ldmlab.play").joinpath("templates", name).read_bytes(), media_type=kind)

    async def able(request: HttpRequest) -> Response:
        return JSONResponse(play.able)

    async def make(request: HttpRequest) -> Response:
        body = await _body(request, 3 * play.limits.upload_bytes + (1 << 20))
        made, notes = await run_in_threadpool(play.accept, body)
        return JSONResponse({"id": made.id, "notes": notes})

    async def state(request: HttpRequest) -> Response:
        found = _found(play, request)
        return JSONResponse({**found.shown(), "before": play.queue.before(found)})

    async def stop(request: HttpRequest) -> Response:
        _found(play, request).stop.set()
        return JSONResponse({})

    async def image(request: HttpRequest) -> Response:
        found = _found(play, request)
        parts = found.result.get("parts", ())
        if request.path_params["name"] not in {name for part in parts for name in part["images"] + part["strips"]}:
            raise InputError("there is no such image.")
        assert found.folder is not None
        return FileResponse(found.folder / request.path_params["name"])

    @asynccontextmanager
    async def life(app: Starlette) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(play.queue.close)

    routes = [
        *(Route(path, _fresh(page)) for path in _PAGES),
        Route("/able", _fresh(able)),
        Route("/make", _fresh(make), methods=["POST"]),
        Route("/state/{id}", _fresh(state)),
        Route("/stop/{id}", _fresh(stop), methods=["POST"]),
        Route("/image/{id}/{name:path}", _fresh(image)),
    ]
    return Starlette(routes=routes, middleware=[Middleware(Guard, password=password)], lifespan=life)


Endpoint = Callable[[HttpRequest], Any]


def _fresh(endpoint: Endpoint) -> Endpoint:
    """Answers that no browser keeps; an InputError is one sentence for the page."""

    async def answer(request: HttpRequest) -> Response:
        try:
            response = await endpoint(request)
        except InputError as error:
            response = JSONResponse({"error": str(error)}, status_code=400)
        response.headers.update(_HEADERS)
        return response

    return answer


def _found(play: Playground, request: HttpRequest) -> Request:
    found = play.queue.get(request.path_params["id"])
    if found is None:
        raise InputError("the server does not know this request any more; make the images again.")
    return found


async def _body(request: HttpRequest, most: int) -> dict[str, Any]:
    """The JSON object of a request of this page, of bounded size."""
    if request.headers.get("content-type") != "application/json":  # another site's form cannot send it unasked
        raise InputError("the request is not one of this page; load the page again.")
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > most:
            raise InputError(f"the request has more than the {most / 2**20:g} MB taken here; upload smaller files.")
    try:
        value = json.loads(bytes(content))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise InputError("the request did not arrive whole; send it again.")
    return value
