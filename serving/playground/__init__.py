"""The playground: one static page at `/` that talks to the endpoint it came from, and to nothing else.

The page holds no data of its own and needs no key; what it asks the endpoint for does. Its Content-Security-Policy
allows its own script and style and connections to its own origin, so that no text of a model can load or run anything;
Trusted Types make the browser refuse a script that would make markup of text.
"""

from __future__ import annotations

import hashlib
from importlib import resources
from typing import Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from cluster.languages import CATALOGUE, Direction

SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_REVALIDATED = "no-cache"
"""A browser asks each time and is told 304: page, script and style are always of one version."""
_LANGUAGES_SECONDS = 3600

_SCRIPTS = ("app.js", "endpoint.js", "languages.js", "page.js", "turn.js")
_FILES = {
    "/": ("index.html", "text/html"),
    "/playground/style.css": ("style.css", "text/css"),
    **{f"/playground/{name}": (name, "text/javascript") for name in _SCRIPTS},
}
"""name and media type of what lies at each path"""


class LanguageEntry(BaseModel):
    """A language that can be asked for as `reasoning_language`, by its BCP-47 tag or one of its names."""

    tag: str
    name: str
    autonym: str
    direction: Direction


class LanguageList(BaseModel):
    """The catalogue in the form of OpenAI's lists."""

    object: Literal["list"] = "list"
    data: list[LanguageEntry]


def router() -> APIRouter:
    """Routes of the page, and `GET /v1/languages`. The files are read here, once."""
    routes = APIRouter()
    for path, (name, media_type) in _FILES.items():
        routes.add_api_route(path, _Page(name, media_type).respond, methods=["GET", "HEAD"], include_in_schema=False)
    languages = LanguageList(
        data=[
            LanguageEntry(tag=each.tag, name=each.name, autonym=each.autonym, direction=each.direction)
            for each in CATALOGUE.values()
        ]
    )

    @routes.get("/v1/languages")
    async def list_languages(response: Response) -> LanguageList:
        """The languages that a request can ask the model to reason in; needs no key."""
        response.headers["Cache-Control"] = f"public, max-age={_LANGUAGES_SECONDS}"
        return languages

    return routes


class _Page:
    """One of the page's files."""

    def __init__(self, name: str, media_type: str) -> None:
        self._content = resources.files(__package__).joinpath(name).read_bytes()
        self._media_type = media_type
        tag = f'"{hashlib.sha256(self._content).hexdigest()[:32]}"'
        self._headers = {**SECURITY_HEADERS, "Cache-Control": _REVALIDATED, "ETag": tag}

    async def respond(self, request: Request) -> Response:
        """The file, or 304 where the client has this version of it."""
        known = request.headers.get("if-none-match", "")
        if self._headers["ETag"] in (tag.strip().removeprefix("W/") for tag in known.split(",")):
            return Response(status_code=304, headers=self._headers)
        return Response(self._content, media_type=self._media_type, headers=self._headers)
