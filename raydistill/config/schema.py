"""The JSON schemas of space and run files, for editors. `make schema` writes them.

`python -m raydistill.config.schema` prints the schema of space files, and with the argument `run` that of run files.
"""

import json
import sys
from collections.abc import Iterable
from typing import Any

from raydistill.config.distributions import Distribution
from raydistill.config.run import RUNTIME_ONLY_FIELDS, Run
from raydistill.config.space import SHARED_FIELDS, Space


def json_schema() -> dict[str, Any]:
    """The JSON schema of a space file, for editors.

    It is the schema of `Space`, in which `run` has the schema of `Run`, and values of the run that may differ between
    trials may also be distributions.
    """
    schema = Space.model_json_schema()
    run = Run.model_json_schema()
    definitions: dict[str, Any] = {**schema.pop("$defs", {}), **run.pop("$defs", {})}
    distribution = Distribution.model_json_schema()
    cases = {
        "type": "object",
        "properties": {"cases": {"type": "array", "items": distribution}},
        "required": ["cases"],
    }
    definitions["Distribution"] = {"anyOf": [distribution, cases]}
    for name in ("Student", "LayerChoice", "Loss"):
        _allow_distributions(definitions[name])
    training = definitions["Training"]
    _allow_distributions(
        training, [key for key in training["properties"] if key not in RUNTIME_ONLY_FIELDS["training"]]
    )
    del run["properties"]["start"], definitions["NewModel"]  # trials are students of a teacher
    _allow_distributions(run, [key for key in run["properties"] if key not in SHARED_FIELDS])
    run["required"] = [key for key in run.get("required", []) if key != "name"]
    _allow_dataset_name(run)
    _allow_extra_name(definitions)
    _allow_distributions(definitions["PseudoLabeling"], ["extra_rows"])
    definitions["RunSpace"] = run
    schema["properties"]["run"] = {"$ref": "#/$defs/RunSpace"}
    return {**schema, "$defs": definitions, "$schema": "https://json-schema.org/draft/2020-12/schema"}


def run_json_schema() -> dict[str, Any]:
    """The JSON schema of a run file, for editors: the schema of `Run`, with `teacher` or `start`."""
    schema = Run.model_json_schema()
    _allow_dataset_name(schema)
    _allow_extra_name(schema["$defs"])
    schema["oneOf"] = [{"required": ["teacher"]}, {"required": ["start"]}]
    return {**schema, "$schema": "https://json-schema.org/draft/2020-12/schema"}


def _allow_dataset_name(run: dict[str, Any]) -> None:
    """Let `dataset` also be the name alone."""
    run["properties"]["dataset"] = {"anyOf": [{"type": "string"}, run["properties"]["dataset"]]}


def _allow_extra_name(definitions: dict[str, Any]) -> None:
    """Let `pseudo.extra` also be the name alone."""
    definitions["PseudoLabeling"]["properties"]["extra"]["anyOf"].append({"type": "string"})


def _allow_distributions(model: dict[str, Any], keys: Iterable[str] | None = None) -> None:
    """Let the values of `keys` (default: of all properties) be distributions."""
    for key in list(keys or model["properties"]):
        model["properties"][key] = {"anyOf": [model["properties"][key], {"$ref": "#/$defs/Distribution"}]}


if __name__ == "__main__":
    shown = run_json_schema() if sys.argv[1:] == ["run"] else json_schema()
    print(json.dumps(shown, indent=1, sort_keys=True))
