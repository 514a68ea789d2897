"""The settings reference: every key of run and space files, read from the JSON schema of the pydantic models."""

import json
from dataclasses import dataclass, field
from typing import Any

from docs_build.markdown import cell, code, table
from raydistill.config import presets
from raydistill.config.run import Run
from raydistill.config.schema import json_schema
from raydistill.config.space import COST_METRICS, Space

Schema = dict[str, Any]
COLUMNS = ["key", "type", "default", "meaning"]
INTRODUCTION = """\
# Settings reference

`make docs` generates this page from the schema that reads the files, so every key is listed.
An unknown key, a value of the wrong type and a value out of bounds are errors that name file, line and key.
`make schema` writes `search_spaces/schema.json`, with which editors check and complete space files.

A **run file** describes one training (`raydistill train`). A **space file** describes a sweep (`raydistill sweep`):
its `run` section holds the same keys, and some of their values may be distributions.
"""


@dataclass
class Section:
    """The keys of one model, under the dotted key where the model is used."""

    key: str
    description: str
    rows: list[list[str]] = field(default_factory=list)


class MissingDescription(Exception):
    """A key of the models has no `Field(description=...)`."""


VARIES = "\\*"
DISTRIBUTIONS = """\
A distribution takes the place of a value in the `run` section. It has exactly one of the keys `choice`, `uniform`,
`log_uniform` and `int`, and may have `when`. `{cases: [...]}` lists several distributions for one key,
each with its own `when`.
"""
BUDGETS = """\
`budgets` maps a name to upper bounds. A bound is a number, or a share of the teacher's value such as `"50%"`.
Bounds are inclusive.
"""


def settings_page() -> str:
    """The page in Markdown; MissingDescription if a key of the schema has no description."""
    run, space = Run.model_json_schema(), json_schema()
    varying = varying_keys(space)
    missing: list[str] = []
    # The section `run` of a space has the keys of the run file, which are listed once.
    space["properties"]["run"] = {"type": "object", "description": Space.model_fields["run"].description}
    distribution = {"properties": space["$defs"]["Distribution"]["anyOf"][0]["properties"]}
    parts = [INTRODUCTION, "## Run files", "", f"Keys marked with {VARIES} may be distributions in a space file.", ""]
    parts += [_rendered(section) for section in sections(run, "", missing, varying)]
    parts += ["## Space files", ""]
    parts += [_rendered(section) for section in sections(space, "", missing)]
    parts += ["### Distributions", "", DISTRIBUTIONS]
    parts += [_rendered(section) for section in sections(distribution, "", missing)]
    parts += ["### Budgets", "", BUDGETS]
    parts += [table(["bound", "meaning"], [[code(name), cell(text)] for name, text in COST_METRICS.items()]), ""]
    parts += _preset_tables()
    if missing:
        raise MissingDescription(f"add Field(description=...) to the models for these keys: {', '.join(missing)}")
    return "\n".join(parts)


def varying_keys(space: Schema) -> set[str]:
    """Dotted keys of the run section whose value may be a distribution, by the schema of a space."""
    definitions = space["$defs"]

    def walk(model: Schema, at: str) -> set[str]:
        keys = set()
        for name, value in model.get("properties", {}).items():
            key = f"{at}.{name}" if at else name
            options = value.get("anyOf", [value])
            if any(option.get("$ref") == "#/$defs/Distribution" for option in options):
                keys.add(key)
            for option in options:
                if (inner := _model(option, definitions)) and not option["$ref"].endswith("/Distribution"):
                    keys |= walk(inner, key)
        return keys

    return walk(definitions["RunSpace"], "") - {"name"}  # of a trial, not of the space


def sections(schema: Schema, at: str, missing: list[str], varying: set[str] | None = None) -> list[Section]:
    """A section for the keys of `schema`, and one for each nested model, depth first.

    Args:
        schema: the JSON schema of a model.
        at: the dotted key where the model is used; empty for the file itself.
        missing: receives the keys without a description.
        varying: dotted keys to mark.
    """
    definitions = schema.get("$defs", {})
    section = Section(at, schema.get("description", ""))
    nested_sections: list[Section] = []
    for name, value in schema["properties"].items():
        key = f"{at}.{name}" if at else name
        if nested := _model(value, definitions):
            # The description of a field is more specific than the docstring of its model.
            description = value.get("description") or nested.get("description", "")
            nested = {**nested, "$defs": definitions, "description": description}
            nested_sections += sections(nested, key, missing, varying)
            continue
        if not value.get("description"):
            missing.append(key)
        default = "required" if name in schema.get("required", ()) else _default(value)
        mark = VARIES if varying and key in varying else ""
        description = cell(value.get("description", ""))
        section.rows.append([code(key) + mark, cell(type_name(value, definitions)), default, description])
    return ([section] if section.rows else []) + nested_sections


def type_name(value: Schema, definitions: Schema) -> str:
    """The type of a JSON schema in words, such as `integer ≥ 1`."""
    if "$ref" in value:
        return type_name(definitions[value["$ref"].rsplit("/", 1)[1]], definitions)
    if "anyOf" in value:
        names = [type_name(option, definitions) for option in value["anyOf"] if option.get("type") != "null"]
        return " or ".join(dict.fromkeys(names))
    if "enum" in value:
        return ", ".join(code(str(item)) for item in value["enum"])
    kind = str(value.get("type", "any value"))
    if kind == "array":
        return _array(value, definitions)
    if kind == "object":
        return "mapping"
    return _bounded({"string": "text", "boolean": "`true` or `false`"}.get(kind, kind), value)


def _array(value: Schema, definitions: Schema) -> str:
    if items := value.get("prefixItems"):
        return "list [" + ", ".join(type_name(item, definitions) for item in items) + "]"
    items = value.get("items") or {}
    return "list" if not items else "list of " + type_name(items, definitions)


def _bounded(kind: str, value: Schema) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {value[key]:g}" for key, sign in signs.items() if key in value]
    return " ".join([kind, ", ".join(bounds)]).strip()


def _default(value: Schema) -> str:
    default = value.get("default")
    if default is None:
        return "none"
    return code(default if isinstance(default, str) and default else json.dumps(default))


def _model(value: Schema, definitions: Schema) -> Schema | None:
    """The model that a property refers to, optional or not; None if the property is a plain value."""
    options = [option for option in value.get("anyOf", [value]) if option.get("type") != "null"]
    for option in options:
        definition = definitions.get(option.get("$ref", "").rsplit("/", 1)[-1], {})
        if "properties" in definition:
            return dict(definition)
    return None


def _rendered(section: Section) -> str:
    heading = [f"### `{section.key}`", ""] if section.key else []
    text = [section.description.strip(), ""] if section.description and section.key else []
    return "\n".join([*heading, *text, table(COLUMNS, section.rows), ""])


def _preset_tables() -> list[str]:
    """The tables of named data sets and teachers."""
    data = [
        [code(name), code(preset.hub), preset.metric, str(preset.max_source_tokens), str(preset.max_target_tokens)]
        for name, preset in presets.DATASETS.items()
    ]
    teachers = []
    for name, by_dataset in presets.TEACHERS.items():
        for dataset, preset in by_dataset.items():
            decoding = preset.decoding.model_dump(exclude_none=True)
            shown = ", ".join(f"{key} {value:g}" for key, value in decoding.items()) or "the checkpoint's own"
            teachers.append([code(name), dataset, code(preset.hub), code(preset.revision[:12]), shown])
    return [
        "## Named data sets",
        "",
        table(["name", "data set", "metric", "source tokens", "target tokens"], data),
        "",
        "## Named teachers",
        "",
        table(["name", "data set", "checkpoint", "revision", "decoding"], teachers),
        "",
    ]
