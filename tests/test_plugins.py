"""Plugins are found by entry point and by file, and a broken one breaks nothing else."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import textwrap

import pytest

from support.paths import ROOT
from vflair_core import hookimpl, plugin_manager
from vflair_core.cli.main import main
from vflair_core.errors import PluginError
from vflair_core.hookspecs import API_VERSION, EXPERIMENTAL, DeprecatedHookWarning, deprecated
from vflair_core.offers import build, find, offers
from vflair_core.plugins import HOOKS, decide, observe

GOOD = """
    from vflair_core import hookimpl

    @hookimpl
    def vflair_attacks():
        return {"coin": flip}

    def flip(lengths):
        "Guess by coin."
"""


@pytest.fixture
def pm():
    return plugin_manager(entry_point_group="vflair.none")


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Put a distribution with one module and an entry point on the path, as pip would."""

    def put(name: str, source: str) -> None:
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
        info = tmp_path / f"{name}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[vflair.test]\n{name} = {name}\n")

    monkeypatch.syspath_prepend(str(tmp_path))
    return put


def written(folder, name: str, source: str):
    path = folder / f"{name}.py"
    path.write_text(textwrap.dedent(source))
    return path


def test_a_plugin_is_found_by_its_entry_point(install):
    install("coinflip", GOOD)
    manager = plugin_manager(entry_point_group="vflair.test")
    assert offers(manager, "attacks")["coin"].source == "coinflip"
    (info,) = manager.about()
    assert (info.version, info.hooks, info.error) == ("1.2", ("vflair_attacks",), None)


def test_a_plugin_is_found_in_one_file(tmp_path):
    manager = plugin_manager([written(tmp_path, "mine", GOOD)], entry_point_group="vflair.none")
    assert find(manager, "attacks", "coin").load().__doc__ == "Guess by coin."


def test_a_plugin_that_fails_on_import_is_named_and_breaks_nothing_else(install):
    install("a_broken", "import a_module_that_is_not_there")
    install("b_coinflip", GOOD)
    manager = plugin_manager(entry_point_group="vflair.test")
    assert "coin" in offers(manager, "attacks")
    (failure,) = manager.failures
    assert failure.name == "a_broken"
    assert "a_module_that_is_not_there" in failure.error


def test_a_name_that_nobody_offers_says_what_there_is_and_which_plugins_failed(install):
    install("a_broken", "1 / 0")
    install("b_coinflip", GOOD)
    manager = plugin_manager(entry_point_group="vflair.test")
    with pytest.raises(PluginError, match=r"Did you mean 'coin'") as error:
        find(manager, "attacks", "coins")
    assert "a_broken (ZeroDivisionError" in str(error.value)


def test_a_misspelt_hook_says_which_one_was_meant(tmp_path):
    file = written(tmp_path, "typo", GOOD.replace("vflair_attacks", "vflair_attaks"))
    with pytest.raises(
        PluginError, match=r"'vflair_attaks', which is not a hook. Did you mean 'vflair_attacks'"
    ):
        plugin_manager([file])


def test_a_hook_with_an_argument_that_does_not_exist_is_refused(tmp_path):
    source = """
        from vflair_core import hookimpl

        @hookimpl
        def vflair_step_finished(step, lose): ...
    """
    with pytest.raises(PluginError, match=r"lose"):
        plugin_manager([written(tmp_path, "argument", source)])


def test_two_plugins_that_offer_one_name_are_both_named(tmp_path):
    files = [written(tmp_path, name, GOOD) for name in ("first", "second")]
    manager = plugin_manager(files, entry_point_group="vflair.none")
    with pytest.raises(PluginError, match=r"first\.py and .*second\.py offer attack 'coin'"):
        offers(manager, "attacks")


def test_an_option_that_does_not_exist_says_which_there_are(pm):
    class Plugin:
        @hookimpl
        def vflair_tasks(self):
            return {"rows": lambda *, count=1: count}

    pm.register(Plugin())
    offered = find(pm, "tasks", "rows")
    assert build(offered, {"count": 3}) == 3
    with pytest.raises(PluginError, match=r"'rows' has no option 'counts'. Did you mean 'count'"):
        build(offered, {"counts": 3})


def test_an_observer_that_raises_is_named_and_stops_nothing_unless_strict(pm):
    heard = []

    class Loud:
        @hookimpl
        def vflair_step_started(self, step):
            raise RuntimeError("no")

    class Quiet:
        @hookimpl
        def vflair_step_started(self, step):
            heard.append(step)

    pm.register(Quiet())
    pm.register(Loud(), "loud")
    observe(pm, "vflair_step_started", step=3)
    assert heard == [3]
    with pytest.raises(PluginError, match=r"loud failed in vflair_step_started"):
        observe(pm, "vflair_step_started", step=4, strict=True)


def test_two_answers_to_one_decision_are_an_error_that_names_both(pm):
    class Answer:
        @hookimpl
        def vflair_place(self, model_party, devices):
            return True

    pm.register(Answer(), "one")
    assert decide(pm, "vflair_place", model_party=None, devices=[]) is True
    pm.register(Answer(), "two")
    with pytest.raises(
        PluginError, match=r"two and one both answer vflair_place|one and two both answer"
    ):
        decide(pm, "vflair_place", model_party=None, devices=[])


@pytest.mark.parametrize(
    ("choice", "taken"),
    [
        (None, ["a", "b", "c"]),
        ("", []),
        ("a,c", ["a", "c"]),
        ("-b", ["a", "c"]),
        ("a, b,-a", ["b"]),
        ("-a,-b,-c", []),
    ],
)
def test_the_environment_chooses_among_installed_plugins(install, monkeypatch, choice, taken):
    for name in "abc":
        install(name, GOOD.replace("coin", f"coin-{name}"))
    if choice is not None:
        monkeypatch.setenv("VFLAIR_PLUGINS", choice)
    manager = plugin_manager(entry_point_group="vflair.test")
    assert [name for name, _ in manager.list_name_plugin()] == taken
    assert [info.name for info in manager.left_out] == [n for n in "abc" if n not in taken]
    assert list(offers(manager, "attacks")) == [f"coin-{name}" for name in taken]


def test_a_choice_of_what_is_not_installed_is_refused_by_name(install, monkeypatch):
    install("coinflip", GOOD)
    monkeypatch.setenv("VFLAIR_PLUGINS", "coinflop")
    with pytest.raises(PluginError, match=r"'coinflop', which is not installed. Did you mean"):
        plugin_manager(entry_point_group="vflair.test")


def test_what_is_left_out_is_never_imported_and_named_where_it_is_missed(install, monkeypatch):
    install("a_broken", "raise SystemError('imported')")
    install("b_coinflip", GOOD)
    monkeypatch.setenv("VFLAIR_PLUGINS", "-a_broken,-b_coinflip")
    manager = plugin_manager(entry_point_group="vflair.test")
    assert not manager.failures
    with pytest.raises(
        PluginError, match=r"Left out by VFLAIR_PLUGINS or --no-plugin: a_broken, b_c"
    ):
        find(manager, "attacks", "coin")


def test_the_option_leaves_plugins_out_for_one_command_only(monkeypatch, capsys):
    monkeypatch.setenv("VFLAIR_PLUGINS", "-tasks")
    with pytest.raises(SystemExit) as ended:
        main(["show", "gaussian-noise", "--no-plugin", "defenses"])
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert "No plugin offers 'gaussian-noise'" in said
    assert "Left out by VFLAIR_PLUGINS or --no-plugin: defenses, tasks" in said
    assert os.environ["VFLAIR_PLUGINS"] == "-tasks"


@pytest.mark.parametrize(
    ("asked", "remedy"),
    [(API_VERSION + 1, "update vflair-core"), (0, "update the plugin"), ("1", "update the plugin")],
)
def test_a_plugin_for_another_api_is_refused_with_what_to_do(tmp_path, asked, remedy):
    source = textwrap.dedent(GOOD) + f"\nVFLAIR_API = {asked!r}\n"
    with pytest.raises(PluginError, match=rf"VFLAIR_API = {asked!r}, and this .*{remedy}"):
        plugin_manager([written(tmp_path, "other", source)])
    fits = textwrap.dedent(GOOD) + f"\nVFLAIR_API = {API_VERSION}\n"
    plugin_manager([written(tmp_path, "fits", fits)], entry_point_group="vflair.none")


def test_an_installed_plugin_for_another_api_breaks_nothing_else(install):
    install("a_newer", textwrap.dedent(GOOD) + f"VFLAIR_API = {API_VERSION + 1}\n")
    install("b_coinflip", GOOD)
    manager = plugin_manager(entry_point_group="vflair.test")
    assert list(offers(manager, "attacks")) == ["coin"]
    assert "update vflair-core" in manager.failures[0].error


def test_who_implements_a_deprecated_hook_is_warned_and_still_called(pm):
    class Old:
        @deprecated("vflair_old", instead="vflair_step_finished", until="0.4")
        def vflair_old(self, step):
            """Called once upon a time."""

    class Plugin:
        @hookimpl
        def vflair_old(self, step):
            return step

    pm.add_hookspecs(Old())
    with pytest.warns(DeprecatedHookWarning, match=r"no more from vflair-core 0.4 on: implement"):
        pm.register(Plugin())
    assert pm.hook.vflair_old(step=3) == [3]


def test_experimental_hooks_exist_and_the_page_marks_them_and_no_other():
    page = (ROOT / "docs" / "hooks.md").read_text()
    marked = set(re.findall(r"^\| `(\w+)\(.*\*experimental\*", page, re.MULTILINE))
    assert marked == EXPERIMENTAL
    assert set(HOOKS) >= EXPERIMENTAL


@pytest.mark.parametrize("arguments", [["--help"], ["plugins"], ["list", "--help"]])
def test_the_program_answers_without_importing_torch(arguments):
    code = (
        "import sys\nsys.argv = ['vflair', *sys.argv[1:]]\nfrom vflair_core.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    subprocess.run(
        [sys.executable, "-c", code, *arguments], check=True, capture_output=True, timeout=60
    )


@pytest.mark.parametrize(
    ("shelf", "name", "options", "told"),
    [
        ("attacks", "vocabulary-search", {"beam": True}, "takes a whole number as beam, not True"),
        ("attacks", "vocabulary-search", {"beam": 2.0}, "takes a whole number as beam, not 2.0"),
        ("attacks", "vocabulary-search", {"prior": "much"}, "takes a number as prior, not 'much'"),
        ("defenses", "permutation", {"seed": "x"}, "takes a whole number as seed, not 'x'"),
        ("defenses", "gaussian-noise", {"noise_multiplier": math.inf}, "noise_multiplier"),
        ("tasks", "planted-records", {"train_examples": "8"}, "takes a whole number as train_examples"),
    ],
)  # fmt: skip
def test_an_option_of_another_type_is_named_before_anything_is_built(shelf, name, options, told):
    with pytest.raises(PluginError, match=told):
        build(find(plugin_manager(), shelf, name), options)


def test_a_whole_number_is_a_number():
    assert build(find(plugin_manager(), "defenses", "gaussian-noise"), {"noise_multiplier": 1})
