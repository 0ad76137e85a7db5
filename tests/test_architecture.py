"""The import rule and the homes of the heavy libraries, read from the source and not from what happens to be loaded."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "system": {"system"},
    "actors": {"actors", "system"},
    "learner": {"learner", "system"},
    "deploy": {"deploy", "actors", "learner", "system"},
}
HOMES = {
    "vllm": {"actors/engine.py", "actors/prompt_sharing.py"},
    "peft": {"learner/policy.py"},
    "mlflow": {"system/mlflow_run.py", "system/mlflow_results.py", "system/mlflow_views.py"},
    "ray": {"deploy/"},
}
NUMPY_ONLY = ["system/trajectory.py", "system/prefix_tree.py", "system/posterior.py"]
UNSAFE_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}

SOURCES = {path.relative_to(ROOT).as_posix(): path for folder in MAY_IMPORT for path in sorted((ROOT / folder).rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in SOURCES.items()}


def imports(tree: ast.AST) -> Iterator[str]:
    """Top-level names of all modules that a file imports, wherever in the file, by statement or by importlib."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield str(node.module).split(".")[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            yield from (str(arg.value).split(".")[0] for arg in node.args if isinstance(arg, ast.Constant))


def test_there_is_something_to_check() -> None:
    assert {name.split("/")[0] for name in SOURCES} == set(MAY_IMPORT)
    assert {"system/config.py", "deploy/job.py", "learner/policy.py", *NUMPY_ONLY} <= set(SOURCES)


@pytest.mark.parametrize("name", SOURCES)
def test_folders_import_only_what_is_below_them(name: str) -> None:
    own = set(imports(TREES[name])) & {*MAY_IMPORT, "tests"}
    assert own <= MAY_IMPORT[name.split("/")[0]]


@pytest.mark.parametrize("library", HOMES)
def test_each_heavy_library_has_one_home(library: str) -> None:
    users = {name for name, tree in TREES.items() if library in set(imports(tree))}
    assert users, f"{library} is imported nowhere: is the table out of date?"
    assert not {name for name in users if not any(name.startswith(home) for home in HOMES[library])}


def third_party(name: str) -> set[str]:
    return set(imports(TREES[name])) - set(sys.stdlib_module_names) - set(MAY_IMPORT)


def test_the_config_needs_pydantic_and_yaml_alone() -> None:
    files = [
        name for name in SOURCES if name.startswith("system/") and name.endswith(("config.py", "config_file.py", "section.py"))
    ]
    assert len(files) >= 7
    assert set().union(*map(third_party, files)) == {"pydantic", "yaml"}
    assert {name for file in files for name in imports(TREES[file])} & set(MAY_IMPORT) == {"system"}


@pytest.mark.parametrize("name", NUMPY_ONLY)
def test_data_and_its_arithmetic_need_numpy_alone(name: str) -> None:
    assert third_party(name) == {"numpy"}


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("system.config_file", {"torch", "numpy", "transformers", "ray", "mlflow", "vllm", "peft"}),
        ("system.trajectory", {"torch", "transformers", "ray", "mlflow", "vllm", "peft", "pydantic"}),
        ("system.prefix_tree", {"torch", "transformers", "ray", "mlflow", "vllm", "peft", "pydantic"}),
        ("system.posterior", {"torch", "transformers", "ray", "mlflow", "vllm", "peft", "pydantic"}),
        ("deploy.job", {"torch", "numpy", "transformers", "ray", "mlflow", "vllm", "peft"}),
    ],
)
def test_a_light_module_loads_nothing_heavy(module: str, absent: set[str]) -> None:
    code = f"import {module}, sys; print(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    loaded = set(done.stdout.split())
    assert module.split(".")[0] in loaded
    assert not loaded & absent


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_each_folder_is_the_package_that_is_imported(folder: str) -> None:
    """Some wheel may well have a top-level package of the same name: one without __init__.py would lose against it."""
    assert (ROOT / folder / "__init__.py").is_file()
    code = f"import {folder}; print({folder}.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert Path(done.stdout.strip()) == ROOT / folder / "__init__.py"


def unsafe(tree: ast.AST) -> Iterator[str]:
    """What runs code from a file or a text: pickles, eval, exec, a model's own code."""
    yield from (f"import {name}" for name in set(imports(tree)) & UNSAFE_MODULES)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called in ("eval", "exec", "compile", "torch.load", "os.system", "yaml.unsafe_load", "yaml.full_load"):
            yield called
        if keywords.get("shell", "False") != "False":
            yield f"{called} with shell"
        for flag in ("trust_remote_code", "allow_pickle"):
            if keywords.get(flag, "False") != "False":
                yield f"{called} with {flag}={keywords[flag]}"


@pytest.mark.parametrize("name", SOURCES)
def test_nothing_runs_code_from_data(name: str) -> None:
    assert list(unsafe(TREES[name])) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    from pickle import loads",
        "eval('1')",
        "exec(text)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=flag)",
        "np.load(x, allow_pickle=True)",
        "torch.load(x)",
        "subprocess.run(x, shell=True)",
        "importlib.import_module('pickle')",
    ],
)
def test_the_check_for_unsafe_code_sees_it(source: str) -> None:
    assert list(unsafe(ast.parse(source)))


def test_every_model_and_tokenizer_is_loaded_without_its_own_code() -> None:
    """The library's default may change; ours is written down wherever something is loaded from a folder."""
    calls = [node for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.Call)]
    loads = [ast.unparse(call) for call in calls if ast.unparse(call.func).startswith("Auto")]
    loads = [call for call in loads if ".from_pretrained(" in call]
    assert loads
    assert [call for call in loads if "trust_remote_code=False" not in call] == []
