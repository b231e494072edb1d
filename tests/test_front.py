import re
import subprocess
import sys
from pathlib import Path

import pytest

import lf_lightning
from lf_lightning.__main__ import COMMANDS, main

HEAVY = {"torch", "transformers", "lightning", "peft", "datasets", "jsonargparse", "numpy", "matplotlib"}


def python(*arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=folder, timeout=120)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["--help"], 0), (["--version"], 0), (["fitt"], 2), ([], 2), (["score", "--help"], 0)],
    ids=["help", "version", "unknown command", "no command", "help of score"],
)
def test_the_front_imports_nothing_heavy(arguments: list[str], code: int, root: Path):
    done = python("-X", "importtime", "-m", "lf_lightning", *arguments, folder=root)
    imported = {line.rsplit("|", 1)[1].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert done.returncode == code
    assert "lf_lightning" in imported
    assert not imported & HEAVY


def test_importing_the_package_imports_nothing_heavy(root: Path):
    code = f"import sys, lf_lightning; print(sorted({HEAVY!r} & set(sys.modules)), 'SFT' in dir(lf_lightning))"
    assert python("-c", code, folder=root).stdout == "[] True\n"


@pytest.mark.parametrize("name", sorted(lf_lightning.PUBLIC))
def test_every_public_name_is_a_class_of_the_module_that_the_table_gives(name: str):
    public = getattr(lf_lightning, name)
    assert isinstance(public, type)
    assert public.__module__ == lf_lightning.PUBLIC[name]


def test_a_name_that_the_package_lacks_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'lf_lightning' has no attribute 'DPOO'"):
        _ = lf_lightning.DPOO


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_the_help_names_every_command_in_lines_that_fit_a_terminal(option: str, capsys: pytest.CaptureFixture[str]):
    assert main([option]) == 0
    text = capsys.readouterr().out
    for name, (_, summary) in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(summary)}$", text, flags=re.MULTILINE)
    assert max(len(line) for line in text.splitlines()) <= 120


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lf-lightning {lf_lightning.__version__}\n"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("fitt", "command: there is no 'fitt'. Did you mean 'fit'?"),
        ("Predict", "command: there is no 'Predict'. Did you mean 'predict'?"),
        (
            "xyz",
            "command: there is no 'xyz'. "
            "Choose one of fit, prepare, validate, test, predict, verify-resume, schedule, score, schema.",
        ),
        ("--config", "command: expected before the options, got '--config'."),
    ],
)
def test_an_unknown_command_is_one_line_with_the_nearest_right_name(
    argument: str, message: str, capsys: pytest.CaptureFixture[str]
):
    assert main([argument]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"lf-lightning: error: {message}")
    assert error.count("\n") == 1


COMMANDS_OF_A_USER = """
from lf_lightning.types import InputError, TrainingStopped

def stopped(arguments):
    raise TrainingStopped("step 3: the loss is nan.")

def wrong(arguments):
    raise InputError("a.yaml: must be\\n  right, got wrong. Mend it.")

def broken(arguments):
    raise ValueError("a bug of ours")

def interrupted(arguments):
    raise KeyboardInterrupt

def counted(arguments):
    return len(arguments)

def silent(arguments):
    return None
"""


@pytest.fixture
def user_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module in the current folder, and a command for each of its functions."""
    (tmp_path / "user_commands.py").write_text(COMMANDS_OF_A_USER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("stopped", "wrong", "broken", "interrupted", "counted", "silent"):
        monkeypatch.setitem(COMMANDS, name, (f"user_commands:{name}", ""))


@pytest.mark.usefixtures("user_commands")
def test_a_mistake_of_the_user_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]):
    assert main(["wrong"]) == 2
    assert capsys.readouterr().err == "lf-lightning: error: a.yaml: must be right, got wrong. Mend it.\n"


@pytest.mark.usefixtures("user_commands")
def test_training_that_cannot_go_on_is_one_line_and_exit_code_1(capsys: pytest.CaptureFixture[str]):
    assert main(["stopped"]) == 1
    assert capsys.readouterr().err == "lf-lightning: error: step 3: the loss is nan.\n"


@pytest.mark.usefixtures("user_commands")
def test_a_mistake_of_ours_keeps_its_traceback():
    with pytest.raises(ValueError, match="a bug of ours"):
        main(["broken"])


@pytest.mark.usefixtures("user_commands")
def test_an_interrupt_exits_with_130(capsys: pytest.CaptureFixture[str]):
    assert main(["interrupted"]) == 130
    assert capsys.readouterr().err == "lf-lightning: interrupted\n"


@pytest.mark.usefixtures("user_commands")
def test_a_command_gets_the_arguments_after_its_name_and_gives_the_exit_code():
    assert main(["counted", "--a", "1", "-b"]) == 3
    assert main(["silent"]) == 0


@pytest.mark.usefixtures("user_commands")
def test_classes_in_the_current_folder_can_be_imported_by_a_command(tmp_path: Path):
    main(["silent"])
    assert sys.path[0] == str(tmp_path)
    main(["silent"])
    assert sys.path.count(str(tmp_path)) == 1
