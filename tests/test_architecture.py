"""The shape of the program holds: each check is run over the code, and over a bad snippet too."""

import ast
import importlib
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import expunge
from expunge.config import Section

ROOT = Path(__file__).parents[1]
PACKAGE = Path(expunge.__file__).parent
ORDER = [
    *(
        "errors",
        "registry",
        "needs",
        "config",
        "parallel",
        "zero",
        "sharding",
        "progress",
        "tracking",
        "cells",
        "on_ray",
        "memory",
        "provenance",
        "disk",
        "runs",
        "finished",
        "products",
        "low_rank",
        "short_attention",
        "attention",
        "fused",
        "affine_heads",
        "packs",
        "quantized",
    ),
    *("models", "model_section", "adapter_files", "linear", "lora", "softmax", "heads", "scores"),
    # An edit writes with the merge engine and finds concepts as the evaluation does.
    *("data", "unlearn", "merge", "guard", "evaluate", "edit", "companions"),
    *("attack", "calibrate", "analyse"),
    *(
        "report",
        "methods",
        "recipe",
        "doctor",
        "inputs",
        "guarding",
        "training",
        "calibrating",
        "choosing",
        "cards",
        "pipeline",
        "publish",
        "analysing",
        "reporting",
        "runner",
        "leaderboard",
        "plan",
        "semeval",
        "cli",
    ),
]
MAX_LINES = 300
SOURCES = sorted(PACKAGE.rglob("*.py"))


def bad_imports(text: str, module: str) -> list[str]:
    """Imports that look right in ORDER; `module` is dotted, as in `expunge.data.batches`."""
    room = _room(module)
    if room is None:
        return []  # the public surface and __main__ may import anything
    found = []
    for line, target in _imported(ast.parse(text), module):
        there = _room(target)
        if there is not None and _place(there) > _place(room):
            found.append(f"{module}:{line} imports {there}, which stands to its right")
    return found


def unsafe_code(text: str) -> list[str]:
    """Pickle, remote code, and handlers that would swallow our own bugs."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            found += [n for n in names if n.split(".")[0] in ("pickle", "dill", "cloudpickle")]
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load":
            found.append("torch.load")
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            found += ["torch.load" for alias in node.names if alias.name == "load"]
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            refused = isinstance(node.value, ast.Constant) and node.value.value is False
            found += [] if refused else ["trust_remote_code"]
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            if {"everything", "Exception", "BaseException"} & set(re.findall(r"\w+", caught)):
                found.append(f"line {node.lineno} catches {caught}")
    return found


def undocumented(text: str) -> list[str]:
    """Public functions, classes, and public methods of public classes without a docstring."""

    def walk(body: list[ast.stmt], prefix: str) -> Iterator[str]:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                if node.name.startswith("_"):
                    continue
                if ast.get_docstring(node) is None:
                    yield prefix + node.name
                if isinstance(node, ast.ClassDef):
                    yield from walk(node.body, f"{prefix}{node.name}.")

    return list(walk(ast.parse(text).body, ""))


def undescribed_fields(sections: list[type[Section]]) -> list[str]:
    """Fields of recipe sections that say nothing about themselves."""
    return [
        f"{section.__module__}.{section.__name__}.{name}"
        for section in sections
        for name, field in section.model_fields.items()
        if not field.description
    ]


def mapped_paths(readme: str) -> list[str]:
    """The paths in the README's map: the fenced block that mentions src/expunge/.

    Each line begins with a path; an indented one lies in the nearest folder line (ending in `/`)
    above it with less indentation. Lines that do not begin with a path are continued text.
    """
    blocks = [b for b in re.findall(r"```\w*\n(.*?)```", readme, re.DOTALL) if "src/expunge/" in b]
    paths, folders = [], []
    for line in blocks[0].splitlines() if blocks else []:
        name = line.split()[0] if line.strip() else ""
        if not re.fullmatch(r"\.?[\w-]+/|[\w.-]*(/[\w.-]+)*/?", name) or not re.search(
            r"[./]|^Makefile$|^LICENSE$", name
        ):
            continue
        indent = len(line) - len(line.lstrip())
        folders = [(depth, folder) for depth, folder in folders if depth < indent]
        path = (folders[-1][1] if folders else "") + name
        paths.append(path)
        if name.endswith("/"):
            folders.append((indent, path))
    return paths


def false_map(readme: str, root: Path) -> list[str]:
    """What the map names and is not there, and what stands in src/expunge/ and is not named."""
    paths = mapped_paths(readme)
    if not paths:
        return ["there is no map: a fenced block with src/expunge/ in it"]
    package = root / "src" / "expunge"
    rooms = {
        f"src/expunge/{path.name}" + ("/" if path.is_dir() else "")
        for path in package.iterdir()
        if path.name not in ("__pycache__", "__init__.py", "__main__.py")
        and (path.suffix == ".py" or (path / "__init__.py").exists())
    }
    missing = [f"{path} is not there" for path in paths if not (root / path).exists()]
    return missing + [f"{room} is not named" for room in sorted(rooms - set(paths))]


def _place(room: str) -> int:
    return ORDER.index(room) if room in ORDER else len(ORDER)


def _room(module: str) -> str | None:
    """`data` of `expunge.data.batches`; none for `expunge` itself and for other packages."""
    parts = module.split(".")
    if parts[0] != "expunge" or len(parts) < 2 or parts[1].startswith("__"):
        return None
    return parts[1]


def _imported(tree: ast.Module, module: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of each import, relative ones resolved."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            if base == "expunge":
                names = [alias.name for alias in node.names]
                known = [n for n in names if n in ORDER or (PACKAGE / f"{n}.py").exists()]
                yield from ((node.lineno, f"expunge.{name}") for name in known)
            else:
                yield node.lineno, base


def _module(path: Path) -> str:
    return ".".join(("expunge", *path.relative_to(PACKAGE).with_suffix("").parts))


def _sections(kind: type[Section] = Section) -> list[type[Section]]:
    children = [c for c in kind.__subclasses__() if c.__module__.startswith("expunge")]
    return children + [deeper for child in children for deeper in _sections(child)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
class TestEveryFile:
    def test_imports_look_left(self, path):
        assert not bad_imports(path.read_text(encoding="utf-8"), _module(path))

    def test_runs_no_foreign_code_and_swallows_no_bug(self, path):
        assert not unsafe_code(path.read_text(encoding="utf-8"))

    def test_documents_what_is_public(self, path):
        assert not undocumented(path.read_text(encoding="utf-8"))

    def test_is_one_room(self, path):
        assert path.name != "utils.py"
        assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_every_module_has_a_place_in_the_order():
    rooms = {_room(_module(path)) for path in SOURCES} - {None}
    assert rooms <= set(ORDER)


def test_every_field_of_a_recipe_says_what_it_is():
    for module in pkgutil.walk_packages([str(PACKAGE)], "expunge."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    assert len(_sections()) > 1
    assert not undescribed_fields(_sections())


def test_the_map_in_the_readme_is_true():
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("there is no README")
    assert not false_map(readme.read_text(encoding="utf-8"), ROOT)


@pytest.mark.parametrize(
    "text",
    [
        "from expunge.report import rows",
        "from expunge import pipeline",
        "import expunge.cli",
        "def f():\n    from ..unlearn import forget",
    ],
)
def test_an_import_that_looks_right_is_found(text):
    assert bad_imports(text, "expunge.data.batches")
    assert not bad_imports(text, "expunge.cli")  # control: from the far right all is left


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from cloudpickle import loads",
        "torch.load(path)",
        "from torch import load",
        "load(path, trust_remote_code=True)",
        "load(path, trust_remote_code=flag)",
        "try:\n    f()\nexcept Exception:\n    pass",
        "try:\n    f()\nexcept (OSError, BaseException):\n    pass",
        "try:\n    f()\nexcept:\n    pass",
    ],
)
def test_unsafe_code_is_found(text):
    assert unsafe_code(text)


def test_safe_code_is_left_alone():
    assert not unsafe_code("try:\n    load(trust_remote_code=False)\nexcept OSError:\n    pass")


def test_a_missing_docstring_is_found():
    assert undocumented("def f(): ...\nclass A:\n    '''A.'''\n    def g(self): ...") == [
        "f",
        "A.g",
    ]
    assert not undocumented("def _f(): ...\nclass _A:\n    def g(self): ...")


def test_a_field_without_a_description_is_found():
    class Silent(Section):
        spoken: int = 1
        """Says what it is."""

        silent: int = 1

    assert [name.rpartition(".")[2] for name in undescribed_fields([Silent])] == ["silent"]


def test_a_false_map_is_found(tmp_path):
    package = tmp_path / "src" / "expunge"
    (package / "data").mkdir(parents=True)
    for name in ("data/__init__.py", "cli.py", "__init__.py"):
        (package / name).touch()
    (tmp_path / "Makefile").touch()
    true = "```\nMakefile   demo\nsrc/expunge/\n  data/    sources\n  cli.py   commands\n```\n"
    assert mapped_paths(true) == [
        "Makefile",
        "src/expunge/",
        "src/expunge/data/",
        "src/expunge/cli.py",
    ]
    assert not false_map(true, tmp_path)
    assert false_map(true.replace("cli.py", "gone.py"), tmp_path) == [
        "src/expunge/gone.py is not there",
        "src/expunge/cli.py is not named",
    ]
    assert false_map("no map", tmp_path)
