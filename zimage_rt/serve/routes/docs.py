"""The API's documentation as a page, made from the OpenAPI document, with nothing from elsewhere."""

import json
from collections.abc import Mapping
from html import escape
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, Response

from ..service import Service

_POLICY = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
_METHODS = ("get", "post", "delete")


def router(service: Service) -> APIRouter:
    """The route."""
    docs = APIRouter()

    @docs.get("/docs", include_in_schema=False)
    async def page(request: Request) -> Response:
        html = documentation(request.app.openapi())
        return HTMLResponse(html, headers={"Content-Security-Policy": _POLICY})

    return docs


def documentation(document: Mapping[str, Any]) -> str:
    """An OpenAPI document as HTML: the routes by tag, with their parameters and fields."""
    by_tag: dict[str, list[str]] = {}
    for path, operations in document["paths"].items():
        for method in _METHODS:
            if (operation := operations.get(method)) is not None:
                tag = (operation.get("tags") or ["other"])[0]
                by_tag.setdefault(tag, []).append(_operation(document, method, path, operation))
    parts = "".join(f"<h2>{escape(tag)}</h2>{''.join(each)}" for tag, each in by_tag.items())
    title = f"{document['info']['title']} {document['info']['version']}"
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><h1>{escape(title)}</h1>"
        f'<p>The same for programs: <a href="/openapi.json">/openapi.json</a></p>{parts}</html>'
    )


def _operation(document: Mapping[str, Any], method: str, path: str, operation: Mapping[str, Any]) -> str:
    text = operation.get("description") or operation.get("summary") or ""
    rows = [_row(one["name"], one.get("schema", {}), one["in"]) for one in operation.get("parameters", ())]
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        schema = _resolved(document, content.get("schema", {}))
        rows += [_row(name, field, kind) for name, field in schema.get("properties", {}).items()]
    table = f"<table><tr><th>name<th>type<th>default<th>in<th>{''.join(rows)}</table>" if rows else ""
    return f"<h3><code>{method.upper()} {escape(path)}</code></h3><p>{escape(text)}</p>{table}"


def _resolved(document: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    reference = schema.get("$ref")
    if reference is None:
        return schema
    found: Mapping[str, Any] = document["components"]["schemas"][reference.rpartition("/")[2]]
    return found


def _row(name: str, field: Mapping[str, Any], where: str) -> str:
    default = json.dumps(field["default"]) if field.get("default") is not None else ""
    cells = (name, _type(field), default, where, field.get("description", ""))
    return "<tr>" + "".join(f"<td>{escape(cell)}" for cell in cells)


def _type(field: Mapping[str, Any]) -> str:
    if "enum" in field:
        return " | ".join(map(json.dumps, field["enum"]))
    if "$ref" in field:
        return str(field["$ref"]).rpartition("/")[2]
    if "anyOf" in field:
        return " | ".join(_type(one) for one in field["anyOf"] if one.get("type") != "null")
    if field.get("type") == "array":
        return f"list of {_type(field.get('items', {}))}"
    return str(field.get("type", "any"))
