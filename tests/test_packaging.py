"""What an installed jaxtune promises: light to import, commands that answer, dependencies declared."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import jaxtune
from jaxtune.cli import COMMANDS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# The packages of extras that jaxtune/ itself imports.
OPTIONAL = ("wandb", "lm-eval", "tokamax", "absl-py")


def run(*words):
    return subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=120)


def canonical(name):
    """`ml_collections` and `ml-collections` are one distribution."""
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(requirements):
    """The distributions named by lines such as `jax>=0.10`; `jaxtune[extra]` stands for that extra's lines."""
    names = set()
    for line in requirements:
        name, extra = re.match(r"([\w.-]+)(?:\[(\w+)\])?", line).groups()
        if name == PROJECT["name"]:
            names |= declared(PROJECT["optional-dependencies"][extra])
        else:
            names.add(canonical(name))
    return names


def imported(folder):
    """{distribution: a file that imports it}, the standard library and this repository's own names left out."""
    owners = importlib.metadata.packages_distributions()
    own = {"jaxtune", "torch_gpu", *(path.stem for place in ("tests", "tools") for path in (ROOT / place).iterdir())}
    found = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in {name.split(".")[0] for name in names} - sys.stdlib_module_names - own:
                for owner in owners.get(name, [name]):
                    found[canonical(owner)] = path.relative_to(ROOT).as_posix()
    return found


def test_importing_jaxtune_loads_neither_jax_nor_torch():
    code = "import jaxtune, sys; print(sorted({'jax', 'jaxlib', 'flax', 'torch', 'transformers'} & set(sys.modules)))"
    answer = run(sys.executable, "-c", code)
    assert (answer.stdout.strip(), answer.returncode) == ("[]", 0), answer.stderr


def test_both_versions_agree():
    assert jaxtune.__version__ == PROJECT["version"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_answers_to_help(command):
    answer = run(sys.executable, "-W", "error", "-m", f"jaxtune.{command}", "--help")
    assert answer.returncode == 0, answer.stderr
    assert f"python -m jaxtune.{command}" in answer.stdout


def test_the_script_lists_the_commands():
    answer = run(Path(sys.executable).parent / "jaxtune", "--help")
    assert answer.returncode == 0, answer.stderr
    assert all(command in answer.stdout + answer.stderr for command in COMMANDS)


def test_dependencies_are_what_the_code_imports():
    needed, named = imported("jaxtune"), declared(PROJECT["dependencies"])
    # Imported where a setting asks for it; a message names the package.
    for name in OPTIONAL:
        assert needed.pop(name, None), name
    undeclared = {name: file for name, file in needed.items() if name not in named}
    assert (undeclared, named - needed.keys()) == ({}, set())


@pytest.mark.parametrize(("folder", "extra"), [("tests", "test"), ("tools", "test"), ("torch_gpu", "torch_gpu")])
def test_other_folders_import_what_their_extra_declares(folder, extra):
    named = declared([*PROJECT["dependencies"], f"jaxtune[{extra}]"])
    undeclared = {name: file for name, file in imported(folder).items() if name not in named}
    for name in OPTIONAL:  # tests of these skip where they are not installed
        undeclared.pop(name, None)
    assert undeclared == {}


def test_every_dependency_is_pinned():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {canonical(line.split("==")[0]) for line in lines if not line.startswith("#")}
    assert declared([*PROJECT["dependencies"], "jaxtune[test]"]) <= pinned
