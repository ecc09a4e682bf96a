"""Pages of docs/reference about HTTP; made from the OpenAPI document and the error table."""

from types import SimpleNamespace
from typing import Any

from reference_commands import escape, table

METHODS = ("get", "post", "put", "patch", "delete")
INTRO = """\
Base URL: `http://127.0.0.1:8000` unless `--host` and `--port` say otherwise. A running server shows this page at
`/docs` and the document behind it at `/openapi.json`. HEAD works wherever GET does. Bodies are JSON; unknown fields are
refused.

With `--api-keys`, send a key as `Authorization: Bearer KEY` or `X-API-Key: KEY`. `/health` and `/ready` need none. A
key sees its own jobs only.

Every answer that is not a success has the body `{"error": {"code", "message", "field"}}`; [errors](errors.md) lists
the codes."""
WEBHOOKS = """\
## Webhooks

Off unless `--webhook-hosts` allows the host of `webhook_url` and `--webhook-secret-file` names a secret. When the job
is finished, the server sends `POST` to that address, up to five times until it is answered with 2xx. Only https, port
443 and public addresses are called, checked again at every redirect.

Body: `{"id", "status", "seed", "error", "video"}`; `error` is null or `{"code", "message"}`, `video` is there when the
job completed."""


def document() -> dict[str, Any]:
    """Return the OpenAPI document of the server with default settings."""
    from codmd_serve.api.app import create_app
    from codmd_serve.config import ServeConfig

    # The document depends on routes and settings only; nothing is started.
    backend: Any = SimpleNamespace(config=ServeConfig(), known_queue=lambda: None, is_ready=False, dispatcher=None)
    return create_app(backend).openapi()


def errors_page() -> str:
    """Return the page of error codes."""
    from codmd_serve.api.errors import CODES, RETRY_AFTER_S

    rows = []
    for code, text in CODES.items():
        status, _, meaning = text.partition(": ")
        retry = f"{RETRY_AFTER_S[code]} s" if code in RETRY_AFTER_S else "when a place frees" if status == "429" else ""
        rows.append((f"`{code}`", status, escape(meaning), retry))
    lines = [
        "# Error codes",
        "",
        "The `code` of an error body, of a failed job, and of a `failed` event. Codes are stable.",
    ]
    lines += ["The message says what was expected, what came and what to do; it names no path of the server.", ""]
    return "\n".join([*lines, *table(("code", "status", "meaning", "Retry-After"), rows)])


def routes_page() -> str:
    """Return the page of routes."""
    api = document()
    lines = ["# HTTP routes", "", INTRO, ""]
    rows = []
    for path, operations in api["paths"].items():
        for method in METHODS:
            if method in operations:
                title = f"{method.upper()} {path}"
                anchor = title.lower().replace(" ", "-").translate(str.maketrans("", "", "/{}"))
                rows.append((f"[`{title}`](#{anchor})", escape(operations[method]["summary"])))
    lines += table(("route", "what it does"), rows)
    for path, operations in api["paths"].items():
        for method in METHODS:
            if method in operations:
                lines += ["", *_operation(api, f"{method.upper()} {path}", operations[method])]
    lines += ["", "## GET /docs", "", "This API as a page that loads nothing from elsewhere.", "", WEBHOOKS, ""]
    lines += table(("header", "value"), [(f"`{name}`", escape(text)) for name, text in _webhook_headers().items()])
    lines += ["", "## Bodies"]
    for name in sorted(_bodies(api)):
        lines += ["", *_body(api, name)]
    return "\n".join(lines)


def _webhook_headers() -> dict[str, str]:
    return {
        "X-Codmd-Job": "the job",
        "X-Codmd-Timestamp": "Unix seconds",
        "X-Codmd-Signature": "`sha256=` and the HMAC-SHA256 of `TIMESTAMP.BODY` with the secret, in hexadecimal digits",
    }


def _operation(api: dict[str, Any], title: str, operation: dict[str, Any]) -> list[str]:
    lines = [f"## {title}", "", _paragraphs(operation.get("description", operation["summary"]))]
    rows = []
    for parameter in operation.get("parameters", []):
        kind, default = _type(parameter["schema"]), parameter["schema"].get("default")
        shown = "" if default is None else f"`{default}`"
        rows.append((f"`{parameter['name']}`", parameter["in"], kind, shown, escape(parameter.get("description", ""))))
    if rows:
        lines += ["", *table(("parameter", "in", "type", "default", "meaning"), rows)]
    content = operation.get("requestBody", {}).get("content", {})
    for media_types, schema in _by_schema(content):
        lines += ["", f"Body ({', '.join(f'`{each}`' for each in media_types)}): {_type(schema)}"]
        if "properties" in schema:
            lines += ["", *_fields(schema)]
    answers = []
    for status, answer in operation["responses"].items():
        types = [_type(schema) for _, schema in _by_schema(answer.get("content", {}))]
        if "HTTPValidationError" in str(answer):  # FastAPI's default, which the error handlers replace
            types = ["[ErrorBody](#errorbody)"]
        media = ", ".join(f"`{each}`" for each in answer.get("content", {}) if each != "application/json")
        headers = "; ".join(f"`{name}` {each['description']}" for name, each in answer.get("headers", {}).items())
        text = answer.get("description", "").replace("Successful Response", "").replace("Validation Error", "")
        answers.append((status, media or ", ".join(types), escape(text), escape(headers)))
    return [*lines, "", *table(("status", "body", "meaning", "headers"), answers)]


def _by_schema(content: dict[str, Any]) -> list[tuple[list[str], dict[str, Any]]]:
    found: list[tuple[list[str], dict[str, Any]]] = []
    for media_type, entry in content.items():
        schema = entry.get("schema", {})
        same = next((types for types, other in found if other == schema), None)
        if same is None:
            found.append(([media_type], schema))
        else:
            same.append(media_type)
    return found


def _bodies(api: dict[str, Any]) -> set[str]:
    return set(api["components"]["schemas"]) - {"HTTPValidationError", "ValidationError"}


def _body(api: dict[str, Any], name: str) -> list[str]:
    schema = api["components"]["schemas"][name]
    return [f"### {name}", "", _paragraphs(schema.get("description", "")), "", *_fields(schema)]


def _fields(schema: dict[str, Any]) -> list[str]:
    required = schema.get("required", [])
    rows = []
    for name, field in schema["properties"].items():
        default = field.get("default")
        shown = "required" if name in required else "" if default is None else f"`{_json(default)}`"
        rows.append((f"`{name}`", _type(field), shown, escape(field.get("description", ""))))
    return table(("field", "type", "default", "meaning"), rows)


def _json(value: Any) -> str:
    return {True: "true", False: "false"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def _type(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        return " or ".join(_type(each) for each in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{_json(schema['const'])}`"
    kind = schema.get("type", "any")
    if kind == "array":
        return f"list of {_type(schema.get('items', {}))}"
    low = schema.get("minimum", schema.get("minLength"))
    high = schema.get("maximum", schema.get("maxLength"))
    unit = " characters" if "maxLength" in schema or "minLength" in schema else ""
    if low is None and high is None:
        return str(kind)
    return f"{kind}, {'' if low is None else low}..{'' if high is None else high}{unit}"


def _paragraphs(text: str) -> str:
    """A docstring's paragraphs and lists, each paragraph as one line."""
    return "\n\n".join(
        escape(part) if part.lstrip().startswith("- ") else escape(" ".join(part.split()))
        for part in text.strip().split("\n\n")
    )
