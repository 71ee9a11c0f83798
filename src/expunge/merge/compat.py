"""Merge files: mergekit's YAML as it is, and the same with our own defaults.

A file that says `merge_method` gets the defaults under which a method is mergekit's; one that says
`method` gets ours. A parameter is a value, a gradient over the layers of its slice, or a list of
those with filters on tensor names; the narrowest place where it is given decides.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from expunge.config import Section, parse_section, read_yaml
from expunge.merge.families import Method
from expunge.merge.methods import METHODS
from expunge.merge.options import check_options, no_option, resolved
from expunge.merge.parameters import Parameters, evaluate, switch_of, weight_of, within
from expunge.registry import did_you_mean, lookup


def _named(given: Any) -> Any:
    if not isinstance(given, str | dict):
        raise ValueError("a model is a name, or {model: NAME, lora: NAME}")
    return given


def _typed(given: Any) -> Any:
    return given.removeprefix("torch.") if isinstance(given, str) else given


def _filled(given: Any) -> Any:
    return {} if given is None else given


Model = Annotated[str | dict[str, Any], BeforeValidator(_named)]
Given = Annotated[dict[str, Any], BeforeValidator(_filled)]
Dtype = Annotated[Literal["float32", "bfloat16", "float16"], BeforeValidator(_typed)]


class Input(Section):
    """One model of a merge."""

    model: Model
    """A folder or Hugging Face id; `model+lora` puts an adapter on it. An adapter alone is for
    output: adapter."""

    parameters: Given = Field(default_factory=dict)
    """Parameters of this model."""

    statistics: str | None = None
    """A safetensors file of what regmean and fisher need, by tensor name: the Gram matrix XᵀX
    (in, in) of a layer's inputs, or the Fisher information in the tensor's own shape."""

    @model_validator(mode="before")
    @classmethod
    def _listed(cls, given: Any) -> Any:
        if not isinstance(given, Mapping | Input):
            raise ValueError("each model is written as `- model: NAME`")
        return given


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

    base_model: Model | None = None
    """The base of this slice alone."""

    residual_weight: float | None = None
    """Read and unused, as in mergekit."""

    parameters: Given = Field(default_factory=dict)
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

    pad_to_multiple_of: int | None = Field(default=None, ge=1, le=1 << 16)
    """Round the rows of the embeddings up to this."""

    tokens: dict[str, Any] = Field(default_factory=dict)
    """By token: {source: model} or {source: {kind: zero}}; `force: true` replaces it everywhere."""


class MergeFile(Section):
    """A merge of models, as `expunge merge CONFIG OUT` reads it."""

    merge_method: str | None = None
    """A method with mergekit's defaults."""

    method: str | None = None
    """A method with our defaults."""

    base_model: Model | None = None
    """The model whose changes are merged."""

    models: tuple[Input, ...] | None = None
    """Whole models to merge."""

    slices: tuple[OutputSlice, ...] | None = None
    """Layers to merge and to stack."""

    parameters: Given = Field(default_factory=dict)
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
    """`adapter`: every model is `base+lora`, or `lora` alone, and their merge is an adapter."""

    rank: int | None = Field(default=None, ge=1)
    """Rank of an adapter; null means the sum of the ranks."""

    space: Literal["factors", "delta"] = "delta"
    """How adapters are merged into an adapter; see the recipe's merge section."""

    seed: int = Field(default=42, ge=0)
    """Seeds what is drawn."""

    @model_validator(mode="before")
    @classmethod
    def _mergekits(cls, fields: Any) -> Any:
        """Without what mergekit leaves unread, and with its only module as the whole."""
        if not isinstance(fields, Mapping):
            return fields
        unread = {"name", "modules"} if "merge_method" in fields else {"modules"}
        own = {name: value for name, value in fields.items() if name not in unread}
        return _unwrapped(own, fields["modules"]) if fields.get("modules") else own

    @model_validator(mode="after")
    def _whole(self) -> "MergeFile":
        if (self.merge_method is None) == (self.method is None):
            raise ValueError("give either merge_method (mergekit's defaults) or method (ours)")
        lookup(METHODS, self.name, "merge method")
        if (self.models is None) == (self.slices is None):
            raise ValueError("give either models or slices")
        if self.tokenizer is not None and self.tokenizer_source is not None:
            raise ValueError("give either tokenizer or tokenizer_source")
        if not (self.models or self.slices):
            raise ValueError("there is nothing to merge")
        if self.output != "adapter" and (self.rank is not None or self.space != "delta"):
            raise ValueError("rank and space are for output: adapter")
        if self.method is not None:
            self._check_names()
        return self

    def _check_names(self) -> None:
        """Refuse parameters that the method does not have; mergekit's own files may hold any."""
        for name, _ in self.unread():
            raise ValueError(no_option(self.name, name, self._known()))

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

    def unread(self) -> list[tuple[str, str]]:
        """Parameters that the method does not have, as mergekit's own files may, and what each may
        have been meant to be."""
        found = {name for parameters in self._all_parameters() for name in parameters}
        return [(name, did_you_mean(name, self._known())) for name in sorted(found - self._known())]

    def _known(self) -> set[str]:
        known = {*self.row.options, "weight", "int8_mask"}
        return known | {"normalize"} if "divide" in known else known

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
    """Whether the YAML file at `path` is one, rather than a recipe: it has a field of one alone."""
    return not read_yaml(path).keys().isdisjoint({*MergeFile.model_fields, "modules"})


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
            given["divide"] = "weights" if switch_of("normalize", normalize, tensor) else "none"
    weights = tuple(
        weight_of(evaluate("weight", scope, name, t, 1.0), name)
        for scope, name in zip(scopes, inputs, strict=True)
    )
    return weights, resolved(file.name, method, given, len(inputs), where=tensor)


def _unwrapped(fields: dict[str, Any], modules: Any) -> dict[str, Any]:
    """The fields of a file with those of its only module, as if they had been given for the whole.

    A module's parameters are narrower than the file's.
    """
    if not isinstance(modules, Mapping) or len(modules) > 1:
        raise ValueError("modules holds one module, {default: {models: …}}; merge each by itself")
    ((name, module),) = modules.items()
    if not isinstance(module, Mapping) or module.keys() - {"models", "slices", "parameters"}:
        raise ValueError(f"modules.{name} holds models or slices, and may hold parameters")
    if fields.keys() & {"models", "slices"}:
        raise ValueError("give either models, slices or modules")
    parameters = within(module.get("parameters") or {}, fields.get("parameters") or {})
    return {**fields, **module, "parameters": parameters}
