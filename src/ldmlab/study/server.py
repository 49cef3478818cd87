"""The study as a page: consent, practice, items in random order and sides, resumable; Starlette behind uvicorn."""

import json
import sys
from collections.abc import Awaitable, Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from ldmlab.disks import open_regular
from ldmlab.errors import InputError
from ldmlab.study.answers import Answers, Refused
from ldmlab.study.design import IMAGES, Study, copy_name

_MOST_BYTES = 2048  # of a request


def application(folder: Path, study: Study) -> Starlette:
    """The pages of a study; one process serves it."""
    known = {name for item in study.items for name in (*item.images, item.given) if name}
    check_copies(folder / IMAGES, known)
    answers = Answers(folder, study)
    page = files("ldmlab.study").joinpath("templates", "study.html").read_text(encoding="utf-8")
    shown = {"title": study.title, "consent": study.consent, "question": study.question, "seconds": study.seconds}
    page = page.replace("{{study}}", json.dumps(shown).replace("<", "\\u003c"))

    async def index(request: Request) -> Response:
        return HTMLResponse(page, headers={"Cache-Control": "no-store"})

    async def image(request: Request) -> Response:
        if (name := request.path_params["name"]) not in known:
            raise Refused(404, "no such image")
        return FileResponse(folder / IMAGES / name, headers={"Cache-Control": "max-age=3600"})

    async def start(request: Request) -> Response:
        if (await _body(request)).get("agree") is not True:
            raise Refused(400, "a session starts with consent")
        return JSONResponse({"session": answers.start()})

    async def next_item(request: Request) -> Response:
        return JSONResponse(_state(answers, request.query_params.get("session")))

    async def answer(request: Request) -> Response:
        body = await _body(request)
        answers.put(body.get("session"), body.get("item"), body.get("side"), body.get("seconds"))
        return JSONResponse(_state(answers, body["session"]))

    return Starlette(
        routes=[
            Route("/", index),
            Route("/image/{name}", image),
            Route("/start", _refusing(start), methods=["POST"]),
            Route("/next", _refusing(next_item)),
            Route("/answer", _refusing(answer), methods=["POST"]),
        ],
        exception_handlers={Refused: _refusal, InputError: _of_disk},
    )


def check_copies(folder: Path, names: set[str]) -> None:
    """InputError for a copy of an image that is missing or has other bytes than those it is named after."""
    for path in (folder / name for name in sorted(names)):
        try:
            with open_regular(path) as file:
                whole = copy_name(file.read()) == path.name
        except OSError:
            whole = False
        if not whole:
            raise InputError(f"{path} is missing, damaged or not allowed to be read; make the study again.")


Endpoint = Callable[[Request], Awaitable[Response]]


def _refusing(endpoint: Endpoint) -> Endpoint:
    """Answers that no browser keeps."""

    async def fresh(request: Request) -> Response:
        response = await endpoint(request)
        response.headers["Cache-Control"] = "no-store"
        return response

    return fresh


async def _refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return JSONResponse({"error": str(error)}, status_code=error.status)


async def _of_disk(request: Request, error: Exception) -> Response:
    print(f"ldmlab: {error}", file=sys.stderr, flush=True)
    return JSONResponse({"error": "the server cannot store answers now"}, status_code=507)


async def _body(request: Request) -> dict[str, Any]:
    """The JSON object of a request, of bounded size."""
    content = b""
    async for part in request.stream():
        content += part
        if len(content) > _MOST_BYTES:
            raise Refused(413, f"a request has at most {_MOST_BYTES} bytes")
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise Refused(400, "a request holds a JSON object")
    return value


def _state(answers: Answers, name: Any) -> dict[str, Any]:
    """What the page shows next; nothing tells which method an image is of."""
    session = answers.session(name)
    progress = {"done": len(session.answers), "of": len(session.order)}
    if session.next is None:
        return {**progress, "item": None}
    item, swapped = session.next
    left, right = reversed(item.images) if swapped else item.images
    shown = {"id": item.id, "left": left, "right": right, "given": item.given, "caption": item.caption}
    return {**progress, "item": {**shown, "practice": item.kind == "practice"}}
