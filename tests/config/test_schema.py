"""The JSON schema of space files."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from raydistill.config.schema import json_schema
from raydistill.config.space import read_space
from tests.factories.spaces import RUN

SPACES = Path(__file__).parents[2] / "search_spaces"


@pytest.mark.parametrize("path", sorted(SPACES.glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_spaces_are_valid_by_models_and_schema(path):
    read_space(path)
    jsonschema.validate(yaml.safe_load(path.read_text()), json_schema())


def test_schema_file_is_current():
    assert json.loads((SPACES / "schema.json").read_text()) == json_schema(), "run `make schema`"


@pytest.mark.parametrize(
    "invalid",
    [
        {"search": {"trials": 0}},
        {"surch": {}},
        {"run": {**RUN, "metod": "kd"}},
        {"run": {**RUN, "training": {"learning_rate": {"uniform": [1, 2], "wen": {}}}}},
        {"run": {**RUN, "loss": {"alpha_hidden": -1}}},
    ],
)
def test_schema_rejects_invalid_spaces(invalid):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"name": "x", "run": RUN} | invalid, json_schema())


@pytest.mark.parametrize("extra", ["more.jsonl", {"name": "more.jsonl", "columns": {"source": "body"}}])
def test_extra_texts_are_a_name_or_a_mapping_and_their_rows_a_choice(extra):
    run = {**RUN, "pseudo": {"extra": extra, "extra_rows": {"choice": [0, 100]}}}
    jsonschema.validate({"name": "x", "run": run}, json_schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"name": "x", "run": {**RUN, "pseudo": {"extra": 3}}}, json_schema())
