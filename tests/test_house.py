"""The rules of the house: import arrows, text without machine paths, a README that is true, a lock that is installed,
and a wheel that works away from its repository.

Every rule is a function of given text, with a test that it notices a breach: a check that cannot fail proves nothing.
"""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PACKAGES = ("orchestrator", "workers", "benchmarks")
DOCUMENTS = ("README.md", "CONTRIBUTING.md")
TENSORS = {"torch", "torchvision", "diffusers", "peft", "transformers", "safetensors", "accelerate"}
IMPORT_CALLS = {"import_module", "__import__", "find_spec", "importorskip"}

# ---- imports


def imported(source: str) -> set[str]:
    """Every module name that the source imports anywhere, lazily and by import_module("...") included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in IMPORT_CALLS and isinstance(node.args[0].value, str):
                names.add(node.args[0].value)
    return names


def forbidden(path: str) -> set[str]:
    """The top-level modules that the file at `path` (relative, with /) must not import."""
    if path.startswith("workers/"):
        return {"ray", "mlflow", "hydra", "omegaconf", "orchestrator"}
    banned = {"ray", "mlflow"}
    if re.fullmatch(r"orchestrator/executors/ray_\w+\.py", path):
        banned.remove("ray")
    if path.startswith("orchestrator/tracking/"):
        banned.remove("mlflow")
    return banned | TENSORS if path.startswith("orchestrator/") else banned


def breaches(path: str, source: str) -> list[str]:
    """The imports of a file that its place does not allow."""
    return sorted(name for name in imported(source) if name.split(".")[0] in forbidden(path))


def sources() -> list[Path]:
    return [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]


@pytest.mark.parametrize("file", sources(), ids=lambda file: file.relative_to(ROOT).as_posix())
def test_imports_go_one_way(file: Path) -> None:
    """orchestrator -> workers; ray in executors/ray_*.py, mlflow in one package, no tensors in the orchestrator."""
    path = file.relative_to(ROOT).as_posix()
    found = breaches(path, file.read_text(encoding="utf-8"))
    assert not found, f"{path} imports {', '.join(found)}: see the arrows in CONTRIBUTING.md"


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("workers/run.py", "from orchestrator.grid import Plan"),
        ("workers/run.py", "def f():\n    import ray.tune"),
        ("workers/spec.py", "if TYPE_CHECKING:\n    from omegaconf import DictConfig"),
        ("workers/methods/dpok.py", "import importlib\nimportlib.import_module('mlflow')"),
        ("orchestrator/executors/inline.py", "import ray"),
        ("orchestrator/cli.py", "import mlflow"),
        ("orchestrator/tracking/mlflow_view.py", "import ray"),
        ("orchestrator/cluster.py", "from ray.job_submission import JobSubmissionClient"),
        ("orchestrator/sample.py", "import torch"),
    ],
)
def test_a_wrong_arrow_is_seen(path: str, source: str) -> None:
    assert breaches(path, source)


def test_a_right_arrow_is_not() -> None:
    assert not breaches("orchestrator/executors/ray_tune.py", "from ray import tune\nfrom workers.run import run_trial")
    assert not breaches("orchestrator/tracking/mlflow_view.py", "from mlflow.entities import Metric")
    assert not breaches("workers/run.py", "from . import ray\nimport torch\nx = 'import ray'")


IMPORT_ALL = """
import importlib, json, pkgutil, sys, workers
for module in pkgutil.walk_packages(workers.__path__, "workers."):
    importlib.import_module(module.name)
print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})))
"""


@pytest.mark.slow
def test_workers_load_without_the_orchestrators_libraries() -> None:
    """The whole of workers/ in a fresh process: what its libraries drag in counts too."""
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert "workers" in loaded and "torch" in loaded
    assert not loaded & forbidden("workers/any.py")


def test_help_loads_nothing_heavy() -> None:
    """`pift --help` answers at once: the command line imports torch, ray, mlflow and hydra where they are needed."""
    code = "import sys, orchestrator.cli as c; c.main(['--help']); print(*{n.split('.')[0] for n in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    loaded = set(done.stdout.splitlines()[-1].split())
    assert not loaded & (TENSORS | {"ray", "mlflow", "hydra", "matplotlib", "pandas"})


# ---- text: no registry, no path of one machine

HOSTS = re.compile(r"\bpypi\.org|files\.pythonhosted|--(extra-)?index-url[ =]\S*://")
MACHINE = re.compile(r"(?<![\w.~-])/(?:work|tmp|root|home|Users)/\w")


def text_breaches(text: str) -> list[str]:
    """Registry hosts and paths of one machine in a text, with their line numbers."""
    lines = enumerate(text.splitlines(), 1)
    return [f"{number}: {line.strip()[:120]}" for number, line in lines if HOSTS.search(line) or MACHINE.search(line)]


def tracked() -> Iterator[Path]:
    """Files that git tracks or would add; without git, all that no tool made."""
    ask = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(ask, cwd=ROOT, capture_output=True, text=True)
    if listing.returncode == 0:
        yield from (ROOT / name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file())
        return
    made = {".git", ".venv", "store", "build", "dist", "__pycache__", ".ruff_cache", ".mypy_cache", ".pytest_cache"}
    yield from (file for file in ROOT.rglob("*") if file.is_file() and not made & set(file.relative_to(ROOT).parts))


def test_no_registry_and_no_machine_path() -> None:
    found = []
    for file in tracked():
        content = file.read_bytes()
        if b"\0" not in content:
            lines = text_breaches(content.decode("utf-8", errors="replace"))
            found += [f"{file.relative_to(ROOT).as_posix()}:{line}" for line in lines]
    assert not found, "\n".join(found)


# A bar stands for a cut in what this file itself must not hold.
BAD_TEXTS = ("x = https://pypi|.org/simple", "'/t|mp/store'", "cd /wo|rk/main", 'Path("/ho|me/me")', "x=/Us|ers/a")


@pytest.mark.parametrize("text", BAD_TEXTS)
def test_a_machine_path_is_seen(text: str) -> None:
    assert text_breaches(text.replace("|", ""))


@pytest.mark.parametrize(
    "text", ["import workers/run", "https://example.org/work/x", "./tmp/x", "/path/to/it", "a /tmp"]
)
def test_other_paths_are_not(text: str) -> None:
    assert not text_breaches(text)


# ---- documents that are true


def fenced(text: str) -> list[str]:
    """The contents of the ``` blocks of a Markdown text."""
    return re.findall(r"^```\w*\n(.*?)^```", text, flags=re.S | re.M)


def tree_paths(block: str) -> list[str]:
    """The paths of a tree written as two spaces of indent a level, `name  what it is` a line."""
    paths: list[str] = []
    parents: list[str] = []
    for line in block.splitlines():
        if not line.strip():
            continue
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        parents = [*parents[:depth], name.rstrip("/")]
        paths.append("/".join(parents) + ("/" if name.endswith("/") else ""))
    return paths


def document(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_tree_in_the_readme_is_the_tree() -> None:
    """Every path named exists, and every top-level package is named."""
    paths = tree_paths(fenced(document("README.md").partition("## The tree")[2])[0])
    assert {"conf/", "orchestrator/", "workers/", "tests/"} <= set(paths)
    missing = [path for path in paths if not (ROOT / path).exists() or (ROOT / path).is_dir() != path.endswith("/")]
    assert not missing, f"README's tree names what is not there: {missing}"


def test_a_tree_is_read_by_its_indents() -> None:
    assert tree_paths("a/   x\n  b/  y\n    c.py  z\n  d.py\ne/\n") == ["a/", "a/b/", "a/b/c.py", "a/d.py", "e/"]


def commands(name: str, program: str) -> list[str]:
    """The lines of a document's code blocks that call `program`, comments cut off."""
    lines = [line.strip() for block in fenced(document(name)) for line in block.splitlines()]
    return [" ".join(shlex.split(line, comments=True)[1:]) for line in lines if line.split()[:1] == [program]]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_make_targets_in_documents_exist(name: str) -> None:
    targets = set(re.findall(r"^([a-z]+):", document("Makefile"), flags=re.M))
    named = set(re.findall(r"`make ([a-z]+)`", document(name))) | {line.split()[0] for line in commands(name, "make")}
    assert named and named <= targets, f"{name} names make targets that do not exist: {sorted(named - targets)}"


def documented_grids() -> Iterator[list[str]]:
    """The OVERRIDES of every `pift plan` and `pift launch` in the documents that needs no file of the reader's own, as
    the command line reads them."""
    from orchestrator.cli import _parser

    for name in DOCUMENTS:
        for block in fenced(document(name)):
            for line in block.splitlines():
                words = shlex.split(line, comments=True) if line.startswith("pift ") else []
                if words[1:2] in (["plan"], ["launch"]) and "--conf" not in words:
                    yield _parser().parse_args(words[1:]).overrides


@pytest.mark.parametrize("overrides", documented_grids(), ids=" ".join)
def test_documented_grids_resolve(overrides: list[str]) -> None:
    from orchestrator.grid import compose

    assert compose(overrides).cells


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documented_subcommands_exist(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    from orchestrator.cli import main

    for command in {line.split()[0] for line in commands(name, "pift")} - {"--conf"}:
        assert main([command, "--help"]) == 0, f"{name} names pift {command}"
    capsys.readouterr()


# ---- what is installed


def test_console_script() -> None:
    [script] = importlib.metadata.entry_points(group="console_scripts", name="pift")
    assert script.value == "orchestrator.cli:main"
    done = subprocess.run([Path(sys.executable).parent / "pift", "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "launch" in done.stdout


def locked() -> dict[str, set[str]]:
    """Distribution -> the versions that the lock pins on this Python and platform."""
    pins: dict[str, set[str]] = {}
    for line in document("requirements.lock").splitlines():
        if line.strip() and not line.startswith("#"):
            pin = Requirement(line)
            if pin.marker is None or pin.marker.evaluate():
                [specifier] = pin.specifier
                assert specifier.operator == "==", line
                pins.setdefault(canonicalize_name(pin.name), set()).add(specifier.version)
    return pins


def declared() -> Iterable[Requirement]:
    project = tomllib.loads(document("pyproject.toml"))
    groups = (
        project["project"]["dependencies"],
        project["dependency-groups"]["dev"],
        project["build-system"]["requires"],
    )
    return map(Requirement, sum(groups, []))


def test_the_lock_holds_what_pyproject_asks_for() -> None:
    pins = locked()
    assert all(len(versions) == 1 for versions in pins.values()), "two versions of one package in the lock"
    wrong = []
    for want in declared():
        if not any(want.specifier.contains(pin) for pin in pins.get(canonicalize_name(want.name), ())):
            wrong.append(str(want))
    assert not wrong, f"not in requirements.lock, or another version: {wrong}; make lock"


def test_the_environment_is_the_lock() -> None:
    """Results are tagged with the lock's hash, so the lock must be what runs."""
    wrong = []
    for name, versions in locked().items():
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed = "absent"
        if installed.partition("+")[0] not in versions:
            wrong.append(f"{name} {installed}, locked {', '.join(versions)}")
    assert not wrong, f"{wrong}; make setup"


def test_ci_runs_the_tests() -> None:
    assert "make test" in document(".ci/run")


# ---- the wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [built] = folder.glob("pift-*.whl")
    return built


@pytest.mark.slow
def test_the_wheel_holds_what_it_needs_and_no_more(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        assert archive.read("orchestrator/requirements.lock") == (ROOT / "requirements.lock").read_bytes()
    settings = {f"orchestrator/{file.relative_to(ROOT).as_posix()}" for file in (ROOT / "conf").rglob("*.yaml")}
    weights = ROOT / "workers" / "models" / "toyland" / "weights"
    shipped = {file.relative_to(ROOT).as_posix() for file in tracked() if weights in file.parents}
    assert settings and shipped
    assert not (settings | shipped) - names
    assert not [name for name in names if "__pycache__" in name or "/." in name]
    about = f"pift-{wheel.name.split('-')[1]}.dist-info"
    assert {name.split("/")[0] for name in names} == {"orchestrator", "workers", about}
    assert f"{about}/licenses/LICENSE" in names


@pytest.fixture(scope="module")
def elsewhere(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel, the libraries of this one, and not this repository."""
    folder = tmp_path_factory.mktemp("elsewhere")
    for command in (
        [sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")],
        [sys.executable, "-m", "pip", "--python", str(folder / "venv" / "bin" / "python"), "install", "--quiet"]
        + ["--no-deps", "--no-index", str(wheel)],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    # A .pth file's folder is searched last, and the .pth files inside it (our editable install) are not read.
    [packages] = (folder / "venv").glob("lib/python*/site-packages")
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def away(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the environment in `folder`, standing in `folder`."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    program = str(folder / "venv" / "bin" / command[0])
    return subprocess.run([program, *command[1:]], cwd=folder, capture_output=True, text=True, env=environment)


@pytest.mark.slow
def test_the_wheel_plans_and_launches_away_from_home(elsewhere: Path) -> None:
    ask = "import orchestrator.cli, workers; print(orchestrator.cli.__file__, workers.__file__)"
    where = away(elsewhere, "python", "-c", ask)
    assert where.returncode == 0, where.stderr
    assert all(Path(file).is_relative_to(elsewhere) for file in where.stdout.split()), where.stdout

    planned = away(elsewhere, "pift", "plan", "sweep=tiny", "--json")
    assert planned.returncode == 0, planned.stderr
    keys = {cell["key"] for cell in json.loads(planned.stdout)["cells"]}
    assert not (elsewhere / "store").exists(), "plan writes nothing"

    launched = away(elsewhere, "pift", "launch", "sweep=tiny", "executor=inline")
    assert launched.returncode == 0, launched.stderr[-4000:]
    assert keys and keys == {done.parent.name for done in elsewhere.glob("store/trials/*/DONE.json")}
