"""JSON Schema: what an answer in JSON has to be like, by the library jsonschema.

A schema is read here alone: what it refers to has to stand in it, and nothing is fetched.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmpipe.errors import DATA, UserError
from llmpipe.faults import reading
from llmpipe.scores.verifiers.json import loaded


def schema_check(path: Path) -> Callable[[str], bool]:
    """What says of an answer whether it is JSON (as the verifier `json` has it) that a schema
    allows. Raises UserError for a file that is no schema."""
    import jsonschema
    from jsonschema_specifications import REGISTRY
    from referencing.exceptions import Unresolvable

    with reading(path, "JSON", ValueError, code=DATA):
        schema = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(schema, dict | bool):
        raise UserError(f"{path}: a schema is an object, or true or false")
    kind = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        problem = f"{path}: {error.json_path}: {error.message}"
        raise UserError(problem, "the file is no schema") from None
    validator = kind(schema, registry=REGISTRY)

    def fits(answer: str) -> bool:
        try:
            value: Any = loaded(answer)
        except (ValueError, RecursionError):
            return False
        try:
            return bool(validator.is_valid(value))
        except RecursionError:  # as deep as the answer is
            return False
        except Unresolvable as error:
            problem = f"{path}: {error.ref} is not in it, and nothing is fetched"
            raise UserError(problem) from None

    return fits
