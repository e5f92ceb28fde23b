"""Everything that must pass, in one command: `uv run nox`.

Two kinds of environment are used. Sessions that look at the whole house run in the workspace's own `.venv`, the one
that `uv run` keeps: every package is there, editable. `tests` makes a fresh environment for one package and installs
the wheels of that package and of the siblings that it declares, nothing else, so that an undeclared dependency cannot
hide. Versions come from constraints.txt everywhere but in `.venv`, and the session `constraints` keeps the two equal.
`oldest_torch` and `lowest` alone take the oldest versions that the packages declare; `lowest` is not part of the whole.

Another Python: `uv run --python 3.13 nox`.
"""

from __future__ import annotations

import functools
import os
import shutil
import sys
from pathlib import Path

import nox

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))

from workspace import CONSTRAINTS, Member, closure, read_members  # noqa: E402 - tools/ is no package

MEMBERS = read_members()
DEVICES = ("cpu", "cuda")
DIST = ROOT / ".nox" / "dist"
SOURCES = [str(member.source) for member in MEMBERS.values()]
PYTEST = ("-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider", "--durations=5")
# A test process for each core; the tests of a file share their fixtures and stay together.
IN_PARALLEL = ("-n", "auto", "--maxprocesses", "8", "--dist", "loadfile")

nox.needs_version = ">=2025.5"
nox.options.default_venv_backend = "uv"
nox.options.sessions = [
    "lint",
    "imports",
    "constraints",
    "types",
    "build",
    *(f"tests(package={name!r}, device='cpu')" for name in MEMBERS),
    "oldest_torch",
    "house",
]
# An empty value counts as unset: every environment is imported from many times, and compiling torch anew takes seconds.
ENV = {
    "PYTHONDONTWRITEBYTECODE": "",
    "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
}


def in_workspace(session: nox.Session, *arguments: str, **env: str) -> None:
    """Run a Python module with the interpreter that runs nox: that of the workspace under `uv run`."""
    session.run(sys.executable, "-m", *arguments, external=True, env={**ENV, **env})


@functools.cache
def build_all() -> Path:
    """Build the sdist of every member, and the wheel from the sdist, once per run of nox."""
    shutil.rmtree(DIST, ignore_errors=True)
    session_free = ("uv", "build", "--quiet", "--all-packages", "--no-sources", "--no-create-gitignore")
    nox.command.run([*session_free, "--build-constraints", str(CONSTRAINTS), "--out-dir", str(DIST)])
    return DIST


@nox.session(venv_backend="none")
def lint(session: nox.Session) -> None:
    """Check style and formatting."""
    in_workspace(session, "ruff", "check", ".")
    in_workspace(session, "ruff", "format", "--check", ".")


@nox.session(venv_backend="none")
def imports(session: nox.Session) -> None:
    """Check that no package imports one that it must not know."""
    session.run(str(Path(sys.executable).with_name("lint-imports")), external=True)


@nox.session(venv_backend="none")
def types(session: nox.Session) -> None:
    """Check the types of every package, strictly."""
    in_workspace(session, "mypy", *SOURCES, "tools", "noxfile.py")


@nox.session(venv_backend="none")
def constraints(session: nox.Session) -> None:
    """Check that constraints.txt is what the workspace resolves to."""
    session.run(sys.executable, "tools/pin.py", "--check", external=True)


@nox.session(venv_backend="none")
def build(session: nox.Session) -> None:
    """Build every sdist, every wheel out of its sdist, and check their metadata."""
    session.run(sys.executable, "tools/check_dist.py", str(build_all()), external=True)


@nox.session
@nox.parametrize("device", DEVICES)
@nox.parametrize("package", list(MEMBERS))
def tests(session: nox.Session, package: str, device: str) -> None:
    """Test a package, its doctests and its README where only its own wheels are installed."""
    member = MEMBERS[package]
    own = closure(package, MEMBERS)
    dist = build_all()
    wheels = [str(dist / f"{MEMBERS[n].module}-{MEMBERS[n].version}-py3-none-any.whl") for n in own]
    # Wheels go in by path and anew: looked up by name, a cached wheel of the same version would pass for the new one.
    fresh = [f"--reinstall-package={n}" for n in own]
    session.install("--no-sources", *fresh, *wheels, *member.test_requirements, "--constraints", str(CONSTRAINTS))
    session.run("uv", "pip", "check", external=True)

    session.chdir(session.create_tmp())
    tools = ROOT / "tools"
    absent = [name for name in MEMBERS if name not in own]
    session.run("python", str(tools / "check_isolated.py"), "--present", *own, "--absent", *absent, env=ENV)
    if device == "cuda":
        session.run("python", str(tools / "check_cuda.py"), env=ENV)
    run_suite(session, device, *suite_of(member))
    session.run("python", str(tools / "run_readme.py"), str(member.folder / "README.md"), env=ENV)


def suite_of(member: Member) -> tuple[str, ...]:
    """Return the tests of a package and its doctests."""
    return ("--doctest-modules", str(member.folder / "tests"), "--pyargs", member.module)


def run_suite(session: nox.Session, device: str, *suite: str) -> None:
    """Run tests in the session's environment."""
    spread = () if device == "cuda" else IN_PARALLEL
    session.run("pytest", *PYTEST, *spread, *suite, *session.posargs, env={**ENV, "HJEPA_TEST_DEVICE": device})


def run_lowest(session: nox.Session, package: str, *suite: str) -> None:
    """Run tests with the lowest versions that a package and its siblings declare."""
    # Editable, since uv counts only the requirements of what is built here as direct.
    editable = [word for name in closure(package, MEMBERS) for word in ("--editable", str(MEMBERS[name].folder))]
    session.install("--resolution", "lowest-direct", *editable, *MEMBERS[package].test_requirements)
    # Warnings of old releases about themselves are no errors.
    run_suite(session, "cpu", "-o", "filterwarnings=default", *suite)


@nox.session
def oldest_torch(session: nox.Session) -> None:
    """Compile every kind of step with the oldest torch, in one process and in two: what it traces, and how, differs."""
    files = [str(MEMBERS["hjepa-models"].folder / "tests" / f"test_{name}.py") for name in ("compile", "distributed")]
    # What the default compiler makes of a graph takes minutes, and is compared with the newest.
    run_lowest(session, "hjepa-models", "--dist=load", "-k", "not default_compiler", *files)


@nox.session
@nox.parametrize("package", list(MEMBERS))
def lowest(session: nox.Session, package: str) -> None:
    """Test a package with the lowest versions that it and its siblings declare."""
    run_lowest(session, package, *suite_of(MEMBERS[package]))


@nox.session(venv_backend="none")
def house(session: nox.Session) -> None:
    """Test what crosses packages, and the rules of the house."""
    in_workspace(session, "pytest", *PYTEST, *IN_PARALLEL, "tests", *session.posargs)
