"""`python -m raydistill.config.schema` prints the schema of a space; `make schema` writes it."""

import json
from collections.abc import Iterable
from typing import Any

from raydistill.config.distributions import Distribution
from raydistill.config.run import RUNTIME_ONLY_FIELDS, Run
from raydistill.config.space import SHARED_FIELDS, Space


def json_schema() -> dict[str, Any]:
    """The schema of a space file for editors: in `run`, a value may be a distribution where trials may differ in it."""
    schema = Space.model_json_schema()
    run = Run.model_json_schema()
    definitions: dict[str, Any] = {**schema.pop("$defs", {}), **run.pop("$defs", {})}
    one = Distribution.model_json_schema()
    definitions["Distribution"] = {
        "anyOf": [
            one,
            {
                "type": "object",
                "properties": {"cases": {"type": "array", "items": one}},
                "required": ["cases"],
            },
        ]
    }
    for name in ("Student", "LayerChoice", "Loss"):
        _allow_distributions(definitions[name])
    training = definitions["Training"]
    _allow_distributions(
        training, [key for key in training["properties"] if key not in RUNTIME_ONLY_FIELDS["training"]]
    )
    del run["properties"]["start"], definitions["NewModel"]  # a sweep is of a teacher's students
    _allow_distributions(run, [key for key in run["properties"] if key not in SHARED_FIELDS])
    run["required"] = [key for key in run.get("required", []) if key != "name"]
    dataset = run["properties"]["dataset"]
    run["properties"]["dataset"] = {"anyOf": [{"type": "string"}, dataset]}
    definitions["RunSpace"] = run
    schema["properties"]["run"] = {"$ref": "#/$defs/RunSpace"}
    return {**schema, "$defs": definitions, "$schema": "https://json-schema.org/draft/2020-12/schema"}


def _allow_distributions(model: dict[str, Any], keys: Iterable[str] | None = None) -> None:
    """Let the values of `keys`, or all, be distributions."""
    for key in list(keys or model["properties"]):
        model["properties"][key] = {"anyOf": [model["properties"][key], {"$ref": "#/$defs/Distribution"}]}


if __name__ == "__main__":
    print(json.dumps(json_schema(), indent=1, sort_keys=True))
