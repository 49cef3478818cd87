"""The playground as a page: a form of what the models can do, a queue, results as files; Starlette behind uvicorn."""

import asyncio
import json
import re
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
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ldmlab.disks import disk_errors
from ldmlab.errors import InputError
from ldmlab.files import beside, put, remove
from ldmlab.inference.grids import read_settings
from ldmlab.inference.model import LoadedModel
from ldmlab.play.form import Limits, Wanted, as_files, read_form
from ldmlab.play.job_queue import JobQueue, Live, Request

UPLOADS = "inputs"  # in the output folder
_UNFINISHED = re.compile(r"\.(\d{4,}(\.removed)?|[0-9a-f]{16}\.png\..+)\.part")  # results and uploads
_SECONDS = 120  # for a request to arrive
_LOCAL = frozenset({"localhost", "127.0.0.1", "[::1]"})
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'",
}
_PAGES = {"/": ("play.html", "text/html"), "/play.js": ("play.js", "text/javascript")}


@dataclass(frozen=True)
class Prepared:
    """The checked request for one model: `run(inputs, folder, live)` writes its images and gives words about them."""

    run: Callable[[dict[str, Any], Path, Live], str]
    size: tuple[int, int]
    total: int  # image steps
    notes: Sequence[str] = ()


Prepare = Callable[[LoadedModel, Wanted], Prepared]


class Playground:
    """Models, their queue and the folder of results; one process serves them."""

    def __init__(
        self,
        models: Sequence[LoadedModel],
        able: dict[str, Any],
        limits: Limits,
        folder: Path,
        prepare: Prepare,
        previews: bool = True,
    ) -> None:
        self.models, self.able, self.limits, self.folder, self.prepare = models, able, limits, folder, prepare
        self.previews = previews
        self.queue = JobQueue(limits.waiting)
        self._last = max((int(one.name) for one in folder.iterdir() if one.name.isdecimal()), default=0)
        for left in [*folder.glob(".*.part"), *(folder / UPLOADS).glob(".*.part")]:  # of a server that was killed
            if _UNFINISHED.fullmatch(left.name):
                remove(left)

    def accept(self, body: dict[str, Any]) -> tuple[Request, list[str]]:
        """Check everything, then queue it."""
        wanted = read_form(body, self.able, self.limits)
        ready = [self.prepare(model, wanted) for model in self.models]
        return self.queue.put(lambda request: self._work(request, wanted, ready)), [n for p in ready for n in p.notes]

    def _work(self, request: Request, wanted: Wanted, ready: Sequence[Prepared]) -> dict[str, Any]:
        """Everything into a folder that gets its name when it is whole."""
        final = self._free()
        filled = beside(final)
        request.total = sum(one.total for one in ready)
        try:
            with disk_errors(final), as_files(wanted.inputs, self.folder / UPLOADS) as inputs:
                parts = []
                for number, (model, one) in enumerate(zip(self.models, ready, strict=True)):
                    part = filled / str(number + 1) if len(ready) > 1 else filled
                    part.mkdir(parents=True)
                    words = one.run(inputs, part, Live(request, model, number, one.size, self.previews))
                    parts.append({**_shown(filled, part, wanted.swept), "size": list(one.size), "words": words})
                put(filled, final)
        finally:
            shutil.rmtree(filled, ignore_errors=True)
        request.folder = final
        return {"folder": str(final), "parts": parts}

    def _free(self) -> Path:
        """The next folder that does not exist."""
        while True:
            self._last += 1
            if not (found := self.folder / f"{self._last:04d}").exists():
                return found


def _shown(filled: Path, part: Path, swept: str | None) -> dict[str, Any]:
    """The files of a part, and the settings in its images."""
    names = sorted(file.relative_to(filled).as_posix() for file in part.glob("*.png"))
    strips = [name for name in names if not Path(name).name[0].isdecimal() and Path(name).stem != "grid"]
    images = [name for name in names if Path(name).name[0].isdecimal()]
    settings = read_settings(filled / images[0]) if images else {}  # a filter may block all
    return {"images": [] if swept else images, "strips": strips, "settings": settings}  # a sweep's strip holds them


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

    async def able(request: HttpRequest) -> Response:
        return _Json(play.able)

    arriving, checking = asyncio.Semaphore(8), asyncio.Lock()  # memory: requests, and those with decoded images

    async def make(request: HttpRequest) -> Response:
        async with arriving:
            body = await _body(request, 3 * play.limits.upload_bytes + (1 << 20))
            async with checking:
                made, notes = await run_in_threadpool(play.accept, body)
        return _Json({"id": made.id, "notes": notes})

    async def state(request: HttpRequest) -> Response:
        found = _found(play, request)
        return _Json({**found.shown(), "before": play.queue.before(found)})

    async def stop(request: HttpRequest) -> Response:
        _found(play, request).stop.set()
        return _Json({})

    async def image(request: HttpRequest) -> Response:
        return _image(play, request)

    @asynccontextmanager
    async def life(app: Starlette) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(play.queue.close)

    routes = [
        *(Route(path, _fresh(_page)) for path in _PAGES),
        Route("/able", _fresh(able)),
        Route("/make", _fresh(make), methods=["POST"]),
        Route("/state/{id}", _fresh(state)),
        Route("/stop/{id}", _fresh(stop), methods=["POST"]),
        Route("/image/{id}/{name:path}", _fresh(image)),
    ]
    return Starlette(routes=routes, middleware=[Middleware(Guard, password=password)], lifespan=life)


async def _page(request: HttpRequest) -> Response:
    name, kind = _PAGES[request.url.path]
    return Response(files("ldmlab.play").joinpath("templates", name).read_bytes(), media_type=kind)


def _image(play: Playground, request: HttpRequest) -> Response:
    """A file of a finished request, none other."""
    found, name = _found(play, request), request.path_params["name"]
    parts = found.result.get("parts", ())
    if name not in {image for part in parts for image in part["images"] + part["strips"]}:
        raise InputError("there is no such image.")
    assert found.folder is not None
    if not (path := found.folder / name).is_file():
        raise InputError(f"{path.name} has been removed on the server; make the images again.")
    return FileResponse(path)


Endpoint = Callable[[HttpRequest], Any]


def _fresh(endpoint: Endpoint) -> Endpoint:
    """Answers that no browser keeps; an InputError is one sentence for the page."""

    async def answer(request: HttpRequest) -> Response:
        try:
            response = await endpoint(request)
        except InputError as error:
            response = _Json({"error": str(error)}, status_code=400)
        response.headers.update(_HEADERS)
        return response

    return answer


class _Json(JSONResponse):
    """In ASCII, since what is shown may hold half of a surrogate pair."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content).encode()


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
    try:
        async with asyncio.timeout(_SECONDS):
            async for part in request.stream():
                content += part
                if len(content) > most:
                    size = f"{most / 2**20:g} MB"
                    raise InputError(f"the request has more than the {size} taken here; upload smaller files.")
        value = json.loads(bytes(content))
    except (ValueError, RecursionError, ClientDisconnect, TimeoutError) as error:
        if isinstance(error, InputError):
            raise
        value = None
    if not isinstance(value, dict):
        raise InputError("the request did not arrive whole; send it again.")
    return value
