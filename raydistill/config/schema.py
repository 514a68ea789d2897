"""`python -m raydistill.config.schema` prints the schema of a space; `make schema` writes it."""

import json

from raydistill.config.space import json_schema

if __name__ == "__main__":
    print(json.dumps(json_schema(), indent=1, sort_keys=True))
