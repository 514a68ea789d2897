"""Typed records: JSON files with a schema version, each read and written by one pydantic model."""

from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from raydistill.core.files import SCHEMA_VERSION, check_schema, corrupt_file_error, read_json, write_json_atomic


class Record(BaseModel):
    """A JSON file as a frozen pydantic model. The file also holds the schema version, as `schema`.

    A subclass declares the fields. Keys that a subclass does not declare are an error, unless its `model_config` says
    otherwise.

    Attributes:
        remedy: What the user can do about a damaged file or one of another schema version, as a sentence without its
            period; None for the default advice to delete the folder of the file.
        indent: Spaces per level of the file; None for a file of one line, for records of thousands of entries.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    remedy: ClassVar[str | None] = None
    indent: ClassVar[int | None] = 1

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a record.

        Raises:
            UserError: The file is missing, is damaged, or has another schema version. The message names the file, the
                first wrong key and the remedy.
        """
        return cls.from_json(read_json(path, cls.remedy), path)

    @classmethod
    def from_json(cls, content: dict[str, Any], path: Path) -> Self:
        """Validate the content of a file, with its schema version. `path` names the file in messages.

        Raises:
            UserError: The content is wrong or has another schema version.
        """
        check_schema(path, content, cls.remedy)
        fields = {name: value for name, value in content.items() if name != "schema"}
        with corrupt_file_error(path, cls.remedy):
            return cls.parse(fields)

    @classmethod
    def read_if_present(cls, path: Path) -> Self | None:
        """Read a record; None if there is no such file. Raises as `read`."""
        return cls.read(path) if path.is_file() else None

    @classmethod
    def parse(cls, content: dict[str, Any]) -> Self:
        """Validate the content of a file without its schema version; a ValueError names the first wrong key."""
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            problem = error.errors()[0]
            raise ValueError(f"{'.'.join(map(str, problem['loc'])) or 'record'}: {problem['msg']}") from None

    def to_json(self) -> dict[str, Any]:
        """The content of the file: the schema version and all fields as JSON values."""
        return {"schema": SCHEMA_VERSION, **self.model_dump(mode="json", by_alias=True)}

    def write(self, path: Path) -> None:
        """Write the record atomically.

        Raises:
            ValueError: A number is not finite.
            OSError: The disk is full, for example.
        """
        write_json_atomic(path, self.to_json(), self.indent)
