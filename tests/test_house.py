"""Whether the package keeps the rules of the house, and whether each rule catches what it forbids."""

import importlib
import pkgutil
from types import ModuleType

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

import lf_lightning
from tests.house import (
    File,
    Rule,
    breaches,
    files_are_named_by_what_one_looks_for,
    files_are_short,
    functions_are_short,
    functions_take_few_positional_arguments,
    imports_go_down,
    names_are_the_houses,
    no_machine_is_named,
    nothing_is_left_open,
    odd_means_say_why,
    private_names_of_bases,
    private_names_stay_in_their_room,
    public_things_are_documented,
    repository_files,
    stages_import_no_data,
    stages_take_few_arguments,
    versions_are_not_probed,
)

HOUSE: dict[str, Rule] = {
    "imports only go down, and never sideways on floor 1": imports_go_down,
    "stages never import data": stages_import_no_data,
    "private names of Lightning and jsonargparse are touched in one module only": private_names_stay_in_their_room,
    "a file has at most 350 lines": files_are_short,
    "a function has at most 45 lines without its docstring": functions_are_short,
    "a function takes at most five positional arguments": functions_take_few_positional_arguments,
    "a stage takes at most 14 arguments": stages_take_few_arguments,
    "no file is a shelf of odds and ends": files_are_named_by_what_one_looks_for,
    "nothing is left open or swallowed": nothing_is_left_open,
    "string attributes, globals and the environment come with a reason": odd_means_say_why,
    "names are those of the style table": names_are_the_houses,
    "every public class and function has a docstring": public_things_are_documented,
    "versions are pinned, not probed": versions_are_not_probed,
}


@pytest.mark.parametrize("rule", HOUSE.values(), ids=HOUSE)
def test_in_this_house(rule: Rule):
    found = breaches(rule)
    assert not found, found


def test_in_this_repository_no_registry_host_and_no_machine_path_is_named():
    found = breaches(no_machine_is_named, repository_files)
    assert not found, found


def test_no_class_overrides_or_uses_a_private_name_of_its_lightning_base():
    walked = pkgutil.walk_packages(lf_lightning.__path__, prefix="lf_lightning.")
    names = [info.name for info in walked if info.name != "lf_lightning.lightning_private"]
    assert [touch for name in names for touch in private_names_of_bases(importlib.import_module(name))] == []


def test_every_rule_has_a_planted_breach_below():
    assert {*HOUSE.values(), no_machine_is_named} == {rule for rule, _, _ in PLANTED}


LONG = "def f():\n" + "    pass\n" * 46
WIDE = "class A:\n    def __init__(self, *, {}): ...".format(", ".join(f"a{i}" for i in range(15)))
PLANTED: list[tuple[Rule, str, str]] = [
    (imports_go_down, "losses/a.py", "def f():\n    from lf_lightning.stages import base"),
    (imports_go_down, "losses/a.py", "import lf_lightning.data.encode"),
    (imports_go_down, "models/a.py", "from lf_lightning import DataModule"),
    (imports_go_down, "types.py", "from lf_lightning import lightning_private"),
    (imports_go_down, "data/a.py", "from .encode import encode"),
    (imports_go_down, "attic/a.py", ""),
    (stages_import_no_data, "stages/a.py", "from lf_lightning.data.datamodule import DataModule"),
    (private_names_stay_in_their_room, "cli.py", "from jsonargparse._core import ArgumentGroup"),
    (private_names_stay_in_their_room, "cli.py", "from lightning.pytorch.loops.fit_loop import _FitLoop"),
    (private_names_stay_in_their_room, "stages/a.py", "self.trainer.fit_loop._should_accumulate()"),
    (files_are_short, "data/a.py", "x = 1\n" * 351),
    (functions_are_short, "data/a.py", LONG),
    (functions_take_few_positional_arguments, "data/a.py", "def f(a, b, c, d, e, g): ..."),
    (functions_take_few_positional_arguments, "data/a.py", "class A:\n    def f(self, a, b, c, d, e, g): ..."),
    (stages_take_few_arguments, "stages/a.py", WIDE),
    (files_are_named_by_what_one_looks_for, "data/utils.py", ""),
    (nothing_is_left_open, "data/a.py", "hasattr(a, 'b')"),
    (nothing_is_left_open, "data/a.py", "try: f()\nexcept Exception as error: pass"),
    (nothing_is_left_open, "data/a.py", "try: f()\nexcept (OSError, Exception): pass"),
    (nothing_is_left_open, "data/a.py", "try: f()\nexcept: pass"),
    (nothing_is_left_open, "data/a.py", "# TODO: mend"),
    (nothing_is_left_open, "data/a.py", "warnings.simplefilter('ignore')"),
    (odd_means_say_why, "data/a.py", "getattr(a, 'b')"),
    (odd_means_say_why, "data/a.py", "os.environ['HOME']"),
    (odd_means_say_why, "data/a.py", "def f():\n    global x"),
    (names_are_the_houses, "losses/a.py", "def f(chosen_logps): ..."),
    (names_are_the_houses, "losses/a.py", "self.ref_model = 1"),
    (names_are_the_houses, "losses/a.py", "class A:\n    cutoff_len: int = 1"),
    (names_are_the_houses, "losses/a.py", "n_tokens = 1"),
    (names_are_the_houses, "losses/a.py", "for query in rows: pass"),
    (public_things_are_documented, "data/a.py", '"""Why."""\nclass A:\n    """What."""\n    def f(self): ...'),
    (public_things_are_documented, "data/a.py", "x = 1"),
    (versions_are_not_probed, "data/a.py", "from packaging.version import Version"),
    (versions_are_not_probed, "data/a.py", "torch.__version__ >= '2.13'"),
    (versions_are_not_probed, "data/a.py", "sys.version_info > (3, 12)"),
    (no_machine_is_named, "README.md", "see /" + "home/me/runs"),
    (no_machine_is_named, "Makefile", "pip install --" + "index-url x torch"),
]
ALLOWED: list[tuple[Rule, str, str]] = [
    (imports_go_down, "stages/a.py", "from lf_lightning.callbacks.checkpoint import RunCheckpoint\nimport torch"),
    (imports_go_down, "data/a.py", "from lf_lightning.types import Unit\nfrom lf_lightning import __version__"),
    (private_names_stay_in_their_room, "lightning_private.py", "trainer.fit_loop._should_accumulate()"),
    (private_names_stay_in_their_room, "data/a.py", "batch._replace(rows=())\nself._rows = 1"),
    (functions_are_short, "data/a.py", 'def f():\n    """' + "x\n" * 60 + '"""\n' + "    pass\n" * 44),
    (functions_take_few_positional_arguments, "stages/a.py", "class A(B):\n    def hook(self, a, b, c, d, e, g): ..."),
    (odd_means_say_why, "data/a.py", "getattr(a, b)  # a Literal of the spec"),
    (odd_means_say_why, "data/a.py", 'def f():\n    """Kept in X and nowhere else."""\n    return os.environ["X"]'),
    (nothing_is_left_open, "data/a.py", "class ExceptionGroup: ...\ntry: f()\nexcept OSError: pass"),
    (names_are_the_houses, "models/attention.py", "def attend(query, key, value): ..."),
    (names_are_the_houses, "data/a.py", "row['query'] = config.n_layer"),
    (public_things_are_documented, "data/a.py", '"""Why."""\ndef f():\n    """What."""\n    def g(): ...'),
    (public_things_are_documented, "data/a.py", '"""Why."""\ndef _h(): ...'),
    (versions_are_not_probed, "data/a.py", "manifest['version'] == 1"),
    (no_machine_is_named, "README.md", "see ../shared/data and https://example.com/" + "home/x"),
]


@pytest.mark.parametrize(("rule", "path", "text"), PLANTED)
def test_a_rule_catches_what_it_forbids(rule: Rule, path: str, text: str):
    assert list(rule(File(path, text)))


@pytest.mark.parametrize(("rule", "path", "text"), ALLOWED)
def test_a_rule_lets_the_rest_pass(rule: Rule, path: str, text: str):
    assert list(rule(File(path, text))) == []


def test_the_rule_on_bases_catches_an_override_and_a_use():
    class Planted(ModelCheckpoint):
        def _save_checkpoint(self, trainer: object, filepath: str) -> None:
            self._last_global_step_saved = 0
            self._ours = 1

    module = ModuleType(__name__)
    module.Planted = Planted
    touched = [touch.split()[-1] for touch in private_names_of_bases(module)]
    assert touched == ["_last_global_step_saved", "_save_checkpoint"]
