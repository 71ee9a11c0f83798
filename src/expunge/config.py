"""Sections: frozen, documented parts of a recipe, read from YAML with one readable error."""

import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from expunge.errors import RecipeError
from expunge.registry import did_you_mean


class Section(BaseModel):
    """Base of every part of a recipe: immutable, closed to unknown fields, documented by field."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        protected_namespaces=(),
        validate_default=True,
        allow_inf_nan=False,
    )

    def keyed(self) -> dict[str, Any]:
        """The fields that a result depends on, as JSON: all, where a section says nothing else."""
        fields = self.model_dump(mode="json")
        for name in fields:
            if isinstance(held := getattr(self, name), Section):
                fields[name] = held.keyed()
        return fields


AnySection = TypeVar("AnySection", bound=Section)

SeedNumber = Annotated[int, Field(gt=-(2**32), lt=2**32)]
"""A seed; steps, layers and draws have seeds of 64 bits that are made from it."""


BROKEN_YAML = (yaml.YAMLError, ValueError, TypeError, RecursionError)
"""What yaml raises: of dates that do not exist, keys that are lists, and lists without end, too."""


def read_yaml(path: Path | str) -> dict[str, Any]:
    """The named fields of a YAML file; a missing or broken one is a `RecipeError`."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"there is no file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read {path}: {error}") from None
    try:
        fields = yaml.load(text, Loader=_UniqueKeys)
    except BROKEN_YAML as error:
        where = " ".join(str(error).split())
        raise RecipeError(f"{path} is not valid YAML: {where}") from None
    if not isinstance(fields, dict):
        raise RecipeError(
            f"{path} must hold named fields (key: value), not {type(fields).__name__}"
        )
    return fields


def parse_section(fields: Any, section: type[AnySection], *, origin: str) -> AnySection:
    """Check `fields` against `section`; `origin` is named in the error."""
    try:
        return section.model_validate(fields)
    except ValidationError as error:
        raise RecipeError(f"{origin}: {_explain(error, section)}") from None
    except RecipeError as error:  # of a name that a field does not know
        raise type(error)(f"{origin}: {error}") from None


def read_options(texts: Sequence[str], flag: str) -> dict[str, Any]:
    """Fields as options of the command line set them: `path=value`, values as in YAML.

    `flag` is named in the `RecipeError` that a text ends in which is not of this form.
    """
    fields: dict[str, Any] = {}
    for text in texts:
        path, equals, value = text.partition("=")
        if not (path.strip() and equals):
            raise RecipeError(f"{flag} takes name=value; '{text}' is not that")
        try:
            given = yaml.safe_load(value)
        except BROKEN_YAML:
            raise RecipeError(f"{flag} {text}: the value is not valid YAML") from None
        put_field(fields, path.strip(), given, origin=flag)
    return fields


def put_field(fields: Any, path: str, value: Any, *, origin: str) -> None:
    """Set a field within nested fields and lists by its path, `branches.strong.optimizer.lr`.

    One that leads nowhere is a `RecipeError` that names `origin`.
    """
    *above, last = path.split(".")
    here = fields
    for part in above:
        if isinstance(here, dict):
            here = here.setdefault(part, {})
        elif isinstance(here, list) and part.isdecimal() and int(part) < len(here):
            here = here[int(part)]
        else:
            raise RecipeError(f"{origin} {path}: there is no '{part}' there")
    if isinstance(here, list) and last.isdecimal() and int(last) < len(here):
        here[int(last)] = value
    elif isinstance(here, dict):
        here[last] = value
    else:
        raise RecipeError(f"{origin} {path}: there is no '{last}' there")


def first_fault(error: ValidationError) -> str:
    """The first fault that pydantic found, on one line."""
    fault = error.errors()[0]
    return f"{'.'.join(str(part) for part in fault['loc'])}: {fault['msg']}"


def _explain(error: ValidationError, section: type[Section]) -> str:
    """Say on one line what the first faults are, the nearest right name beside an unknown one."""
    sentences = []
    for fault in error.errors()[:3]:
        place = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            known = _known_fields(section, fault["loc"][:-1])
            near = did_you_mean(str(fault["loc"][-1]), known)
            sentences.append(f"unknown field {place}.{near} Known here: {', '.join(sorted(known))}")
        elif fault["type"] == "missing":
            sentences.append(f"field {place} is missing")
        elif fault["type"] in ("union_tag_not_found", "union_tag_invalid"):
            sentences.append(_explain_tag(place, fault.get("ctx", {})))
        else:
            reason = fault["msg"].removeprefix("Value error, ")
            got = fault["input"]
            shown = "" if isinstance(got, dict) else f" (got {str(got)[:80]!r})"
            sentences.append(f"{place}: {reason}{shown}" if place else f"{reason}{shown}")
    more = error.error_count() - len(sentences)
    return "; ".join(sentences) + (f"; and {more} more" if more > 0 else "")


def _explain_tag(place: str, said: dict[str, Any]) -> str:
    """Say that the field that chooses a kind of section is missing, or names none."""
    field = f"{place}.{said['discriminator'].strip(chr(39))}"
    if "tag" not in said:
        return f"field {field} is missing"
    known = [tag.strip("'") for tag in said["expected_tags"].split(", ")]
    near = did_you_mean(said["tag"], known)
    return f"no {field} is called '{said['tag']}'.{near} Known: {', '.join(sorted(known))}"


def _known_fields(section: type[Section], location: tuple[int | str, ...]) -> list[str]:
    """Names of the fields of the section that `location` leads to."""
    here: Any = section
    for part in location:
        inner = _section_types(here)
        if not inner:
            return []
        chosen = [s for s in inner if len(inner) > 1 and _has_tag(s, part)]
        fields = (chosen or inner)[0].model_fields
        here = chosen[0] if chosen else fields[part].annotation if part in fields else here
    found = _section_types(here)
    return sorted(found[0].model_fields) if found else []


def _has_tag(section: type[Section], tag: int | str) -> bool:
    """Whether a field of the section names it by `tag` among others."""
    kinds = (field.annotation for field in section.model_fields.values())
    return any(tag in typing.get_args(k) for k in kinds if typing.get_origin(k) is Literal)


def _section_types(annotation: Any) -> list[type[Section]]:
    """Every Section class inside a type such as `dict[str, Branch] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is not None:
        return [kind for arg in typing.get_args(annotation) for kind in _section_types(arg)]
    return []


class _UniqueKeys(yaml.SafeLoader):
    """The safe loader, refusing a key that is given twice."""


def _mapping(loader: _UniqueKeys, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key '{key}' is given twice", key_node.start_mark
            )
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_UniqueKeys.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
