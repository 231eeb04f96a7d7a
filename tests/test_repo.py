"""What holds for the repository as a whole: layers, names, import cost, headers, clean files."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("kernels", "seqmod", "rl", "experiments")  # each may import those to its left
ARRAYS = {"jax", "chex", "numpy"}
MODELS = ARRAYS | {"flax", "optax", "orbax"}
OUTSIDE = {  # third-party packages that a layer may import
    "kernels": ARRAYS,
    "seqmod": MODELS | {"safetensors"},
    "rl": MODELS | {"matplotlib", "PIL"},
    "rl/envs": MODELS | {"matplotlib", "PIL", "gymnax", "brax", "mujoco"},
    "experiments": MODELS | {"matplotlib", "PIL", "rich", "tyro"},
}


@cache
def files() -> tuple[Path, ...]:
    """Every file that is committed or would be, relative to the root."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return tuple(Path(name) for name in listed.split("\0") if name and (ROOT / name).is_file())


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), str(path))


def sources(*folders: str) -> list[Path]:
    """The Python files below some top-level folders, each of which must have one."""
    found = [path for path in files() if path.suffix == ".py" and path.parts[0] in folders]
    assert {path.parts[0] for path in found} == set(folders)
    return found


def imports(nodes: Iterable[ast.AST]) -> Iterator[tuple[str, int]]:
    """The (module, line) of every import among some nodes."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or ""), node.lineno


def run_at_import(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a module that lie outside its functions."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from run_at_import(child)


def run_python(code: str, **env: str) -> str:
    """Standard output of `code` in a fresh interpreter at the root."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def report(problems: list[str]) -> None:
    assert not problems, "\n" + "\n".join(problems)


# Layers


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_imports_only_what_lies_below_it(layer):
    below = set(LAYERS[: LAYERS.index(layer) + 1])
    problems = []
    for path in sources(layer):
        key = "rl/envs" if path.parts[:2] == ("rl", "envs") else layer
        allowed = below | OUTSIDE[key] | set(sys.stdlib_module_names)
        problems += [
            f"{path}:{line} imports {module}"
            for module, line in imports(ast.walk(tree(path)))
            if module.split(".")[0] not in allowed
        ]
    report(problems)


def test_matplotlib_is_imported_inside_functions():
    report(
        [
            f"{path}:{line} imports {module} when it is imported itself"
            for path in sources(*LAYERS)
            for module, line in imports(run_at_import(tree(path)))
            if module.split(".")[0] == "matplotlib"
        ]
    )


# Names and import cost


@pytest.mark.parametrize("layer", LAYERS)
def test_name_resolves_inside_this_tree(layer):
    spec = importlib.util.find_spec(layer)
    assert spec is not None
    assert Path(spec.origin or "").resolve() == ROOT / layer / "__init__.py"


@pytest.mark.parametrize(
    ("layer", "unwanted"),
    [
        ("kernels", {"flax", "optax", "orbax", "seqmod", "rl", "gymnax", "brax", "matplotlib"}),
        ("seqmod", {"rl", "experiments", "gymnax", "brax", "matplotlib"}),
    ],
)
def test_importing_all_of_a_layer_is_cheap(layer, unwanted):
    modules = [".".join(path.with_suffix("").parts) for path in sources(layer)]
    modules = [name.removesuffix(".__init__") for name in modules if "__main__" not in name]
    code = f"import sys, {', '.join(modules)}; print(*sys.modules)"
    # A platform that doesn't exist: a module that makes an array when it is imported fails.
    loaded = set(run_python(code, JAX_PLATFORMS="absent").split())
    assert set(modules) <= loaded
    assert not unwanted & loaded


def test_importing_rl_loads_no_environments():
    loaded = set(run_python("import sys, rl; print(*sys.modules)", JAX_PLATFORMS="absent").split())
    assert "rl" in loaded
    assert not {"gymnax", "brax", "matplotlib", "experiments"} & loaded


# Experiments


def runnable(path: Path) -> bool:
    """Whether a module does something when it is run with `python -m`."""
    guards = [ast.unparse(node.test) for node in tree(path).body if isinstance(node, ast.If)]
    return path.name == "__main__.py" or "__name__ == '__main__'" in guards


def header(path: Path) -> str:
    """A module's docstring, with the package's before that of a `__main__`."""
    paths = [path.with_name("__init__.py"), path] if path.name == "__main__.py" else [path]
    return "\n".join(ast.get_docstring(tree(each)) or "" for each in paths)


def experiments() -> dict[Path, list[Path]]:
    """For each experiment that reproduces a claim, what is run and every file of it."""
    found = {}
    for path in sources("experiments"):
        if path.match("experiments/*.py") and runnable(path):
            found[path] = [path]
        elif path.match("experiments/*/__main__.py") and path.parts[1] != "bench":
            found[path] = [p for p in sources("experiments") if p.is_relative_to(path.parent)]
    assert Path("experiments/internal_rl/__main__.py") in found
    return found


def test_what_can_be_run_says_how():
    problems = []
    for path in filter(runnable, sources("experiments")):
        command = "python -m " + ".".join(path.with_suffix("").parts).removesuffix(".__main__")
        if command not in header(path):
            problems.append(f"{path}: no `{command}` in its header")
    report(problems)


@pytest.mark.parametrize("word", ["claim", "paper"])
def test_an_experiment_names_its(word):
    report([f"{path}: no {word}" for path in experiments() if word not in header(path).lower()])


def test_an_experiment_has_a_tiny_preset():
    def has_tiny(paths: list[Path]) -> bool:
        nodes = (node for path in paths for node in ast.walk(tree(path)))
        return any(isinstance(node, ast.Constant) and node.value == "tiny" for node in nodes)

    report([f"{main}: no tiny preset" for main, paths in experiments().items() if not has_tiny(paths)])


# Files


def test_every_module_has_a_docstring():
    found = sources(*LAYERS, "tests")
    report([f"{path}: no docstring" for path in found if not ast.get_docstring(tree(path))])


def test_libraries_print_nothing():
    report(
        [
            f"{path}:{node.lineno} prints"
            for path in sources("kernels", "seqmod", "rl")
            for node in ast.walk(tree(path))
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "print"
        ]
    )


def test_files_name_no_machine_and_no_registry():
    pattern = re.compile(
        r"(?<![\w.~-])/(root|home|Users|work|mnt|opt)/\w"
        r"|\bpypi\.|python[h]osted\.|registry\.npmjs|index[-_]url|find[-_]links"
    )
    read = 0
    problems = []
    for path in files():
        try:
            lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        read += 1
        problems += [f"{path}:{n} {hit[0]}" for n, x in enumerate(lines, 1) if (hit := pattern.search(x))]
    assert read > 10
    report(problems)


def test_tests_are_not_packages():
    assert not [path for path in sources("tests") if path.name == "__init__.py"]


def test_lock_is_plain_and_satisfies_the_project():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    report([line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)])
    locked = {canonicalize_name(name): version for name, version in (x.split("==") for x in lines)}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = project["project"]["dependencies"] + project["dependency-groups"]["dev"]
    report(
        [
            f"{text}: locked at {locked.get(canonicalize_name(need.name))}"
            for text in wanted
            if (need := Requirement(text))
            and not need.specifier.contains(locked.get(canonicalize_name(need.name), "0"))
        ]
    )
