import json
from pathlib import Path

import pytest

from lf_lightning.__main__ import main as front
from lf_lightning.commands.score import ExactMatch, Prediction, exact_match, main, read_predictions
from lf_lightning.types import InputError


@pytest.fixture
def predictions(tmp_path: Path) -> Path:
    """230 rows, of which the first 215 are right."""
    rows = [{"prompt": f"{i}+0", "predict": f" {i}\n", "label": str(i if i < 215 else -1)} for i in range(230)]
    path = tmp_path / "generated_predictions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_outer_whitespace_does_not_count_but_case_and_inner_whitespace_do():
    rows = [Prediction(" a b\n", "a b"), Prediction("A b", "a b"), Prediction("a  b", "a b"), Prediction("", " ")]
    assert exact_match(rows) == ExactMatch(num_right=2, num_rows=4)
    assert exact_match(rows).ratio == 0.5


def test_the_score_is_printed_in_one_line(predictions: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(predictions)]) == 0
    assert capsys.readouterr().out == "exact match: 0.935 (215 of 230)\n"


@pytest.mark.parametrize(("least", "code"), [("0.93", 0), ("0.935", 1), ("1", 1)])
def test_a_score_below_the_asked_one_exits_with_1(predictions: Path, least: str, code: int):
    assert main([str(predictions), "--at-least", least]) == code


def test_a_score_that_only_rounds_up_to_the_asked_one_says_why_it_failed(
    predictions: Path, capsys: pytest.CaptureFixture[str]
):
    main([str(predictions), "--at-least", "0.935"])
    assert capsys.readouterr().err == "lf-lightning: 0.934783 is below --at-least 0.935\n"


def test_separators_inside_a_json_string_do_not_end_the_line(tmp_path: Path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "", "predict": "a\u2028b", "label": "a\u2028b"}', encoding="utf-8")
    assert read_predictions(path) == [Prediction("a\u2028b", "a\u2028b")]


GOOD = '{"prompt": "p", "predict": "a", "label": "a"}\n'
BAD_FILES = {
    "p.jsonl: must hold one JSON object a line, got an empty file": b"",
    "p.jsonl, line 2: is not JSON (Expecting value, column 1)": GOOD.encode() + b"nonsense\n",
    "p.jsonl, line 2: is not JSON (Expecting value, column 1). ": GOOD.encode() + b"\n" + GOOD.encode(),
    "p.jsonl, line 1: must be a JSON object, got '[1, 2]'": b"[1, 2]\n",
    "p.jsonl, line 1: key 'label' must be a string, got only the keys prompt, predict": b'{"prompt":"", "predict":""}',
    "p.jsonl, line 1: key 'predict' must be a string, got 3": b'{"prompt": "", "predict": 3, "label": ""}',
    "p.jsonl: must be UTF-8 text, got byte 0xff at 0": b"\xff\xfe",
}


@pytest.mark.parametrize("message", BAD_FILES)
def test_a_bad_file_is_one_line_that_names_the_place(message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "p.jsonl").write_bytes(BAD_FILES[message])
    assert front(["score", str(tmp_path / "p.jsonl")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.jsonl"], "absent.jsonl: cannot be read (No such file or directory)"),
        ([], "the following arguments are required: FILE"),
        (["x", "--at-least", "90"], "--at-least: must be a number from 0 to 1, got '90'"),
        (["x", "--at-least", "nan"], "--at-least: must be a number from 0 to 1, got 'nan'"),
        (["x", "--at", "0.9"], "unrecognized arguments: --at 0.9"),
    ],
)
def test_a_bad_argument_is_refused(arguments: list[str], message: str):
    with pytest.raises(InputError) as caught:
        main(arguments)
    assert message in str(caught.value)
