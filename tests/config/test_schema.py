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


@pytest.fixture(scope="module")
def validator():
    """Checks data against the schema, which is checked itself."""
    schema = json_schema()
    validator_class = jsonschema.validators.validator_for(schema)
    validator_class.check_schema(schema)
    return validator_class(schema)


@pytest.mark.parametrize("path", sorted(SPACES.glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_spaces_are_valid_by_models_and_schema(path, validator):
    read_space(path)
    validator.validate(yaml.safe_load(path.read_text()))


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
def test_schema_rejects_invalid_spaces(invalid, validator):
    with pytest.raises(jsonschema.ValidationError):
        validator.validate({"name": "x", "run": RUN} | invalid)


@pytest.mark.parametrize("extra", ["more.jsonl", {"name": "more.jsonl", "columns": {"source": "body"}}])
def test_extra_texts_are_a_name_or_a_mapping_and_their_rows_a_choice(extra, validator):
    run = {**RUN, "pseudo": {"extra": extra, "extra_rows": {"choice": [0, 100]}}}
    validator.validate({"name": "x", "run": run})
    with pytest.raises(jsonschema.ValidationError):
        validator.validate({"name": "x", "run": {**RUN, "pseudo": {"extra": 3}}})
