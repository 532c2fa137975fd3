"""Which part may import which: read from the source, so that imports inside functions count too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import notellm2_ray

ROOT = Path(notellm2_ray.__file__).parent
NAME = "notellm2_ray"

# What each package may import besides itself. Every module has a rule, including presets, cli and environment.
MAY_IMPORT = {
    "core": set(),
    "data": {"core"},
    "models": {"core"},
    "index": {"core"},
    "live": {"core", "index"},
    "users": {"core", "live"},
    "evaluate": {"core", "index"},
    "baselines": {"core", "models", "evaluate"},
    "lessons": {"core", "data", "models"},
    "train": {"core", "models", "evaluate.recall.metrics"},
    "infer": {"core", "models", "index"},
    "serve": {"core", "models", "index", "live", "users"},
    "pipeline": {"core", "data", "models", "index", "evaluate", "baselines", "lessons", "train", "infer"},
    "online": {"core", "models", "index", "live", "users", "evaluate", "infer", "serve", "pipeline", "presets"},
    "presets": {"core", "baselines"},
    "environment": set(),
    "cli": {"core", "presets", "environment", "pipeline", "online", "serve.doctor"},
    "": {"core.schema", "models.embedder.encoder"},  # what users import, loaded on first use
}
BEYOND = {"evaluate.saliency": {"models"}, "evaluate.efficiency": {"models"}}
SINGLE_DEVICE = ("ray", "vllm", "deepspeed")  # what models/ must run without


def _modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def _imports(path: Path, module: str) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything a file imports, wherever in the file; `from a import b` gives a.b."""
    package = [NAME, *module.split(".")] if module else [NAME]
    package = package if path.name == "__init__.py" else package[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)


def _within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def _violations(module: str, path: Path) -> list[str]:
    package = module.split(".")[0]
    allowed = {package, "__version__"} | MAY_IMPORT[package] | BEYOND.get(module, set())
    ours = [(line, name.removeprefix(f"{NAME}.")) for line, name in _imports(path, module) if _within(name, NAME)]
    return [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for line, name in ours
        if not any(_within(name, one) for one in allowed)
    ]


MODULES = dict(_modules())


def test_every_module_has_its_rule():
    assert {module.split(".")[0] for module in MODULES} == MAY_IMPORT.keys(), "state in MAY_IMPORT what it may import"


def test_the_root_holds_only_the_command_line():
    loose = {path.stem for path in ROOT.glob("*.py")}
    assert loose == {"__init__", "cli", "presets", "environment"}


def test_there_are_no_import_cycles():
    known = {f"{NAME}.{module}".rstrip(".") for module in MODULES}
    needs = {}
    for module, path in MODULES.items():
        found = [name if name in known else name.rpartition(".")[0] for _, name in _imports(path, module)]
        needs[f"{NAME}.{module}".rstrip(".")] = {name for name in found if name in known}
    try:
        tuple(TopologicalSorter(needs).static_order())
    except CycleError as error:
        pytest.fail(f"these import each other: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("package", sorted(MAY_IMPORT))
def test_imports_point_one_way(package):
    modules = {module: path for module, path in MODULES.items() if module.split(".")[0] == package}
    assert [line for module, path in modules.items() for line in _violations(module, path)] == []


@pytest.mark.parametrize("package", ["evaluate", "baselines"])
def test_recall_and_ranking_import_nothing_of_each_other(package):
    halves = {"recall": "ranking", "ranking": "recall"}
    found = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for module, path in MODULES.items()
        for half, other in halves.items()
        if _within(module, f"{package}.{half}")
        for line, name in _imports(path, module)
        if _within(name, f"{NAME}.{package}.{other}")
    ]
    assert found == []


def test_models_run_on_any_machine_with_torch():
    found = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for module, path in MODULES.items()
        if _within(module, "models")
        for line, name in _imports(path, module)
        if name.split(".")[0] in SINGLE_DEVICE
    ]
    assert found == []


def test_jobs_call_the_command_line_and_nothing_else():
    for path in sorted((ROOT.parent / "jobs").glob("*.py")):
        ours = {name for _, name in _imports(path, "") if _within(name, NAME)}
        assert ours <= {f"{NAME}.cli.main", f"{NAME}.cli"}, path.name


def test_the_check_itself_sees_an_import_inside_a_function(tmp_path):
    path = tmp_path / "module.py"
    path.write_text("def f():\n    from notellm2_ray.train import launch\n    import ray\n")
    assert list(_imports(path, "data.module")) == [(2, "notellm2_ray.train.launch"), (3, "ray")]
    relative = tmp_path / "other.py"
    relative.write_text("from ..train import launch\nfrom . import rows\n")
    assert list(_imports(relative, "data.other")) == [
        (1, "notellm2_ray.train.launch"),
        (2, "notellm2_ray.data.rows"),
    ]
