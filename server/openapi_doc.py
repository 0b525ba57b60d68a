"""What /openapi.json says about each route. FastAPI cannot see it: the routes read bodies by
themselves.

Refuses to know how a request is answered. Test: pytest server
"""
import json

from fastapi.responses import Response

from server.protocol import IGNORED, Chat, Completion, neutral_values

BODIES = {"/v1/completions": Completion, "/v1/chat/completions": Chat}
FAILURES = {"/health": [503], "/metrics": [401], "/live": [401], "/v1/models": [401],
            "/v1/models/{name:path}": [401, 404],
            **dict.fromkeys(BODIES, [400, 401, 404, 408, 413, 429, 503])}


def describe(path):
    """What /openapi.json says about a route: parameters, body, statuses and content types."""
    def content(kind):
        return {"content": {kind: {}}}
    error = {"description": "an error in OpenAI's shape", **content("application/json")}
    kind = "text/plain" if path == "/metrics" else "application/json"
    extra = {}
    if "{name" in path:
        extra = {"parameters": [{"name": "name", "in": "path", "required": True,
                                 "schema": {"type": "string"}}]}
    body = BODIES.get(path)
    answer = {"description": "the answer", **content(kind)}
    if body:
        answer["content"]["text/event-stream"] = {}
        schema = body.model_json_schema()
        schema = inline(schema, schema.pop("$defs", {})) | {"description": other_fields(body)}
        extra = {"requestBody": {"required": True,
                                 "content": {"application/json": {"schema": schema}}}}
    return {"openapi_extra": extra, "response_class": Response,
            "responses": {200: answer, **{status: error for status in FAILURES[path]}}}


def other_fields(body):
    """What the server does with fields that the schema does not list, in Markdown."""
    neutral = [f"`{name}` ({' or '.join(map(json.dumps, [*values, None]))})"
               for name, values in neutral_values(body).items()]
    ignored = [f"`{name}`" for name in sorted(IGNORED)]
    return ("Accepted with a value that changes nothing, otherwise refused: " + ", ".join(neutral)
            + "; also `best_of` equal to `n`, and `tools` with `tool_choice` \"none\". Ignored: "
            + ", ".join(ignored)
            + ". Any other field is ignored, too, with one warning in the server's log.")


def inline(schema, definitions):
    """A JSON schema with its $refs replaced by what they name."""
    if isinstance(schema, list):
        return [inline(item, definitions) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        schema = definitions[schema["$ref"].rsplit("/", 1)[1]]
    return {key: inline(value, definitions) for key, value in schema.items()}
