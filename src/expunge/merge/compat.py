"""Merge files: mergekit's YAML as it is, and the same with our own defaults.

A file that says `merge_method` gets the defaults under which a method is mergekit's; one that says
`method` gets ours. A parameter is a value, a gradient over the layers of its slice, or a list of
those with filters on tensor names; the narrowest place where it is given decides.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from expunge.config import Section, parse_section, read_yaml
from expunge.errors import RecipeError
from expunge.merge.families import Method
from expunge.merge.methods import METHODS
from expunge.merge.options import check_options, resolved
from expunge.registry import did_you_mean, lookup

Scalar = bool | int | float | str
Setting = Any
"""A scalar, a list of numbers, or a list of {filter, value}."""
Parameters = Mapping[str, Setting]
Dtype = Literal["float32", "bfloat16", "float16"]

_ALL_OPTIONS = {name for method in METHODS.values() for name in method.options}
_KNOWN = _ALL_OPTIONS | {"weight", "normalize", "int8_mask"}


class Input(Section):
    """One model of a merge."""

    model: str | dict[str, Any]
    """A folder or Hugging Face id; `model+lora` puts an adapter on it."""

    parameters: dict[str, Any] = Field(default_factory=dict)
    """Parameters of this model."""

    statistics: str | None = None
    """A safetensors file of what regmean and fisher need, by tensor name: the Gram matrix XᵀX
    (in, in) of a layer's inputs, or the Fisher information in the tensor's own shape."""


class SliceInput(Input):
    """Layers of one model."""

    layer_range: tuple[int, int]
    """First layer, and the one after the last."""

    @model_validator(mode="after")
    def _forward(self) -> "SliceInput":
        low, high = self.layer_range
        if not 0 <= low < high:
            raise ValueError(f"layer_range [{low}, {high}] holds no layer")
        return self


class OutputSlice(Section):
    """Layers of the output: the same number from each source."""

    sources: tuple[SliceInput, ...] = Field(min_length=1)
    """Where they come from."""

    base_model: str | dict[str, Any] | None = None
    """The base of this slice alone."""

    residual_weight: float | None = None
    """Read and unused, as in mergekit."""

    parameters: dict[str, Any] = Field(default_factory=dict)
    """Parameters of this slice."""

    @model_validator(mode="after")
    def _even(self) -> "OutputSlice":
        lengths = {s.layer_range[1] - s.layer_range[0] for s in self.sources}
        if len(lengths) > 1:
            raise ValueError("the sources of a slice must have equally many layers")
        return self


class Tokenizer(Section):
    """Which tokenizer the output has."""

    source: str = "union"
    """`union`, `base`, or a model of the merge."""

    pad_to_multiple_of: int | None = Field(default=None, ge=1)
    """Round the rows of the embeddings up to this."""

    tokens: dict[str, Any] = Field(default_factory=dict)
    """By token: {source: model} or {source: {kind: zero}}; `force: true` replaces it everywhere."""


class MergeFile(Section):
    """A merge of models, as `expunge merge CONFIG OUT` reads it."""

    merge_method: str | None = None
    """A method with mergekit's defaults."""

    method: str | None = None
    """A method with our defaults."""

    base_model: str | dict[str, Any] | None = None
    """The model whose changes are merged."""

    models: tuple[Input, ...] | None = None
    """Whole models to merge."""

    slices: tuple[OutputSlice, ...] | None = None
    """Layers to merge and to stack."""

    modules: dict[str, Any] | None = None
    """Parts of a multimodal model; refused."""

    parameters: dict[str, Any] = Field(default_factory=dict)
    """Parameters of all."""

    dtype: Dtype | None = None
    """Type of the output, where out_dtype is not given. Sums are always taken in float32."""

    out_dtype: Dtype | None = None
    """Type of the output; null keeps that of the models."""

    tokenizer_source: str | None = None
    """As `tokenizer: {source: …}`."""

    tokenizer: Tokenizer | None = None
    """The output's tokenizer; null copies that of the base or the first model."""

    chat_template: str | None = None
    """A Jinja template; `auto` takes that of most models; null keeps the tokenizer's own."""

    output: Literal["model", "adapter"] = "model"
    """`adapter`: every model is `base+lora`, and the merge of the adapters is one."""

    rank: int | None = Field(default=None, ge=1)
    """Rank of an adapter; null means the sum of the ranks."""

    space: Literal["factors", "delta"] = "delta"
    """How adapters are merged into an adapter; see the recipe's merge section."""

    seed: int = Field(default=42, ge=0)
    """Seeds what is drawn."""

    @model_validator(mode="after")
    def _whole(self) -> "MergeFile":
        if (self.merge_method is None) == (self.method is None):
            raise ValueError("give either merge_method (mergekit's defaults) or method (ours)")
        lookup(METHODS, self.name, "merge method")
        if self.modules is not None:
            raise ValueError("modules are not merged; give models or slices of one module")
        if (self.models is None) == (self.slices is None):
            raise ValueError("give either models or slices")
        if self.tokenizer is not None and self.tokenizer_source is not None:
            raise ValueError("give either tokenizer or tokenizer_source")
        if not (self.models or self.slices):
            raise ValueError("there is nothing to merge")
        for parameters in self._all_parameters():
            for name in parameters:
                if name not in _KNOWN:
                    raise ValueError(f"unknown parameter {name}.{did_you_mean(name, _KNOWN)}")
        return self

    @property
    def name(self) -> str:
        """The method's."""
        return self.merge_method or self.method or ""

    @property
    def row(self) -> Method:
        """The method."""
        return METHODS[self.name]

    @property
    def stored(self) -> Dtype | None:
        """The type of the output, where it is given."""
        return self.out_dtype or self.dtype

    def _all_parameters(self) -> Iterable[Parameters]:
        yield self.parameters
        for given in self.models or ():
            yield given.parameters
        for one in self.slices or ():
            yield one.parameters
            for source in one.sources:
                yield source.parameters


def read_merge_file(path: Path) -> MergeFile:
    """The merge file at `path`."""
    return parse_section(read_yaml(path), MergeFile, origin=str(path))


def is_merge_file(path: Path) -> bool:
    """Whether the YAML file at `path` is one, rather than a recipe."""
    fields = read_yaml(path)
    return bool(fields.keys() & {"merge_method", "method"})


def settle(
    file: MergeFile,
    scopes: Sequence[Sequence[Parameters]],
    shared: Sequence[Parameters],
    *,
    tensor: str,
    inputs: Sequence[str],
    t: float,
) -> tuple[tuple[float, ...], dict[str, Any]]:
    """The weight of each model, and every option, for one tensor.

    `scopes` are the places that may give a parameter of each model, narrowest first; `shared` those
    for parameters of all; `inputs` the tensor's name in each model; t its place among the layers.
    """
    method, mergekit = file.row, file.merge_method is not None
    defaults = dict(method.mergekit) if mergekit else {}
    given: dict[str, Any] = {}
    for option in method.options:
        if method.each(option):
            default = defaults.get(option, method.options[option])
            values = [
                evaluate(option, scope, name, t, default)
                for scope, name in zip(scopes, inputs, strict=True)
            ]
            for value in values:
                if value is not default:
                    check_options(file.name, method, {option: value})
            given[option] = tuple(values)
            continue
        value = evaluate(option, shared, tensor, t, defaults.get(option))
        if option == "rescale" and isinstance(value, bool):
            value = "l1" if value else "none"
        if value is not None:
            check_options(file.name, method, {option: value})
            given[option] = value
    if "divide" in method.options:
        normalize = evaluate("normalize", shared, tensor, t, None)
        if normalize is not None:
            given["divide"] = "weights" if normalize else "none"
    weights = tuple(
        float(evaluate("weight", scope, name, t, 1.0))
        for scope, name in zip(scopes, inputs, strict=True)
    )
    return weights, resolved(file.name, method, given, len(inputs), where=tensor)


def evaluate(name: str, scopes: Iterable[Parameters], tensor: str, t: float, default: Any) -> Any:
    """The value of a parameter for one tensor: from the first scope that has one for it."""
    for scope in scopes:
        if name in scope:
            value = _value(name, scope[name], tensor, t)
            if value is not None:
                return value
    return default


def _value(name: str, setting: Setting, tensor: str, t: float) -> Any:
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, list | tuple):
        return _scalar(setting)
    if all(isinstance(entry, Mapping) for entry in setting) and setting:
        for entry in setting:
            unknown = entry.keys() - {"filter", "value"}
            if unknown or "value" not in entry:
                raise RecipeError(f"parameter {name}: {entry} needs value, and may have filter")
            wanted = entry.get("filter")
            if wanted in (None, "*") or wanted in tensor:
                return _value(name, entry["value"], tensor, t)
        return None
    values = [_scalar(entry) for entry in setting]
    if not values:
        return None
    if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        return values[int(t * (len(values) - 1))]
    place = t * (len(values) - 1)
    low = int(place)
    high, share = min(len(values) - 1, low + 1), place - low
    return (1 - share) * values[low] + share * values[high]


def _scalar(value: Any) -> Any:
    """A scalar; text that is a number in scientific notation, which YAML leaves as text, is one."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    if value is None or isinstance(value, bool | int | float):
        return value
    raise RecipeError(f"a parameter is a number, true or false, or a word, not {value!r}")
