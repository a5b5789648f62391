#!/usr/bin/env -S uv run --script
# /// script
# dependencies = ["nox>=2025.2.9"]
# ///
"""The project's tasks: `nox --list` names them, `nox -s NAME` runs one."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_venv = "yes"

PYPROJECT = nox.project.load_toml("pyproject.toml")


def group(*names: str) -> list[str]:
    """Returns the requirements of the named dependency groups."""
    return list(nox.project.dependency_groups(PYPROJECT, *names))


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, formatting and spelling; `-- --fix` repairs what it can."""
    session.install(*group("lint"))
    session.run("codespell")
    if "--fix" in session.posargs:
        session.run("ruff", "check", "--fix")
        session.run("ruff", "format")
    else:
        session.run("ruff", "check")
        session.run("ruff", "format", "--check")


@nox.session
def typecheck(session: nox.Session) -> None:
    """Check the type annotations."""
    session.install(*group("typecheck"))
    session.run("mypy", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests on TensorFlow; `-- ARGS` go to pytest."""
    # The pipelines use TensorFlow, so their tests run here.
    session.install("-e", ".[repro]", *group("test", "tensorflow", "ecosystem"))
    run_pytest(session, "tensorflow")


@nox.session(default=False)
def tests_jax(session: nox.Session) -> None:
    """Run the tests on JAX."""
    session.install("-e", ".", *group("test", "jax"))
    run_pytest(session, "jax")


# pip, so that a CPU build which its configuration offers is taken.
@nox.session(venv_backend="virtualenv", default=False)
def tests_torch(session: nox.Session) -> None:
    """Run the tests on PyTorch."""
    session.install("-e", ".", *group("test", "torch"))
    run_pytest(session, "torch")


@nox.session(default=False)
def minimums(session: nox.Session) -> None:
    """Run the tests with the oldest dependencies that are allowed."""
    oldest = [
        requirement.replace(">=", "==")
        for requirement in (
            *PYPROJECT["project"]["dependencies"],
            *group("tensorflow"),
        )
    ]
    session.install("-e", ".", *oldest, *group("test"))
    # Old releases warn about newer ones.
    run_pytest(session, "tensorflow", "-W", "ignore::DeprecationWarning")


def run_pytest(
    session: nox.Session,
    backend: str,
    *args: str,
    env: Mapping[str, str] | None = None,
) -> None:
    """Runs pytest on one backend, a few files at a time."""
    session.run(
        "pytest",
        "--numprocesses=auto",
        "--maxprocesses=4",
        "--dist=loadfile",
        # tests/conftest.py has an order of files; by default it would be another one.
        "--no-loadscope-reorder",
        *args,
        *session.posargs,
        env={
            "KERAS_BACKEND": backend,
            "TF_CPP_MIN_LOG_LEVEL": "2",
            # Each process has one core: their threads would wait for each other.
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
            **(env or {}),
        },
    )


@nox.session(venv_backend="virtualenv", default=False)
@nox.parametrize("backend", ["tensorflow", "jax", "torch"])
def coverage(session: nox.Session, backend: str) -> None:
    """Run the tests of a backend under coverage; `coverage_report` adds them up."""
    extra = ".[repro]" if backend == "tensorflow" else "."
    session.install("-e", extra, *group("test", "coverage", backend))
    # A file for each backend, as each has an environment of its own.
    data = Path("build", "coverage", f".coverage.{backend}").resolve()
    data.parent.mkdir(parents=True, exist_ok=True)
    run_pytest(
        session,
        backend,
        "--cov",
        "--cov-report=",
        env={"COVERAGE_FILE": str(data)},
    )


@nox.session(default=False)
def coverage_report(session: nox.Session) -> None:
    """Add up what `coverage` recorded, and write the figures beside their targets."""
    session.install("-e", ".[repro]", *group("test", "coverage", "tensorflow"))
    session.run(
        "python",
        "-m",
        "reliability",
        "code_coverage",
        *session.posargs,
        env={"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "2"},
    )


@nox.session(default=False, python=["3.11", "3.12", "3.13", "3.14"])
@nox.parametrize("dependencies", ["newest", "minimum"])
def versions(session: nox.Session, dependencies: str) -> None:
    """Run the tests on each Python, with the newest and the oldest dependencies.

    Each Python has the oldest releases that were built for it, not older ones.
    """
    wanted = [*PYPROJECT["project"]["dependencies"], *group("tensorflow")]
    session.install("-e", ".", *wanted, *group("test"))
    if dependencies == "newest":
        run_pytest(session, "tensorflow")
        return
    session.install("uv")
    session.run(
        "uv",
        "pip",
        "install",
        f"--python={Path(session.bin) / 'python'}",
        "--resolution=lowest-direct",
        # Sources of releases older than a Python do not build there.
        "--only-binary=:all:",
        *wanted,
    )
    run_pytest(session, "tensorflow", "-W", "ignore::DeprecationWarning")


@nox.session(default=False)
def audit(session: nox.Session) -> None:
    """Look for known vulnerabilities in what the package and its checks depend on."""
    session.install("pip-audit")
    declared = Path(session.create_tmp()).resolve() / "requirements.txt"
    project = PYPROJECT["project"]
    requirements = [
        *project["dependencies"],
        *project["optional-dependencies"]["repro"],
        *group("tensorflow", "jax", "torch", "test", "coverage", "docs", "lock"),
    ]
    declared.write_text("\n".join(requirements) + "\n", encoding="utf-8")
    session.run("pip-audit", "--requirement", str(declared), *session.posargs)


@nox.session(default=False)
def quickstart(session: nox.Session) -> None:
    """Train, certify, and draw the digits grid."""
    session.install("-e", ".[repro]", *group("tensorflow"))
    session.run(
        "python",
        "-m",
        "pipelines.quickstart",
        *session.posargs,
        env={"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "2"},
    )


@nox.session(default=False)
def reproduce(session: nox.Session) -> None:
    """Run `quick` again and compare; `-- --profile NAME --dataset NAME` of another."""
    session.install("-e", ".[repro]", *group("tensorflow"))
    session.run(
        "python",
        "pipelines",
        "reproduce",
        *session.posargs,
        env={"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "2"},
    )


@nox.session(default=False)
def reliability(session: nox.Session) -> None:
    """Measure how reliable the package is; `-- NAME [options]`, `-- --help` lists."""
    session.install("-e", ".[repro]", *group("test", "tensorflow"))
    if "architectures" in session.posargs:
        # Without its tokenizer for TensorFlow, which comes with GPU libraries.
        session.install(*group("keras_hub"))
        session.install("--no-deps", "keras-hub>=0.32")
    session.run(
        "python",
        "-m",
        "reliability",
        *session.posargs,
        env={
            "KERAS_BACKEND": "tensorflow",
            "TF_CPP_MIN_LOG_LEVEL": "2",
            # Programs run as forks of a process that has no threads yet.
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
        },
    )


@nox.session(default=False)
def lock(session: nox.Session) -> None:
    """Check that results belong to the code: `quick`; `-- --all` for all profiles."""
    session.install(*group("lock"))
    session.run(
        "python",
        "pipelines",
        "gate",
        *session.posargs,
        env={"DVC_NO_ANALYTICS": "1"},
    )


@nox.session(default=False)
def docs(session: nox.Session) -> None:
    """Build the documentation, in build/site; `-- serve` shows it while you write."""
    session.install(*group("docs"))
    command = session.posargs or ["build", "--strict"]
    session.run("mkdocs", *command, env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session(default=False)
def notebooks(session: nox.Session) -> None:
    """Execute the notebooks and keep their output; `-- NAME...` for some of them."""
    session.install("-e", ".[repro]", *group("notebooks", "tensorflow"))
    session.run(
        "python",
        "notebooks/execute.py",
        *session.posargs,
        env={"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"},
    )


@nox.session(default=False)
def build(session: nox.Session) -> None:
    """Build the wheel and import it where nothing else is installed."""
    session.install("build")
    dist = Path(session.create_tmp()).resolve() / "dist"
    for old in dist.glob("*"):
        old.unlink()
    session.run("python", "-m", "build", "--outdir", str(dist))
    (wheel,) = dist.glob("*.whl")
    empty = dist.parent / "empty"
    session.run("python", "-m", "venv", "--clear", str(empty))
    python = empty / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    # Keras cannot be imported without a backend; JAX is the smallest.
    session.run(python, "-m", "pip", "install", "-q", f"{wheel}[jax]", external=True)
    session.chdir(dist)
    session.run(
        python,
        "-c",
        "import keras_dalign; print(keras_dalign.__version__, keras_dalign.__file__)",
        env={"KERAS_BACKEND": "jax"},
        external=True,
    )


if __name__ == "__main__":
    nox.main()
