"""Names and inline entries become sources, files become rows, and everything wrong is one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from lf_lightning.data.files import file_digest
from lf_lightning.data.source import Source
from lf_lightning.data.sources import load_rows, resolve_sources
from lf_lightning.types import InputError


def write_info(folder: Path, entries: Any) -> str:
    (folder / "rows.json").write_text('[{"a": 1}]')
    (folder / "dataset_info.json").write_text(entries if isinstance(entries, str) else json.dumps(entries))
    return str(folder)


def rows_of(path: Path, text: str | bytes) -> list[dict[str, Any]]:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return load_rows(Source("rows", path))


def test_a_name_is_looked_up_in_dataset_info(tmp_path: Path) -> None:
    entry = {"file_name": "rows.json", "formatting": "sharegpt", "columns": {"messages": "turns"}, "ranking": True}
    (source,) = resolve_sources(["mine"], write_info(tmp_path, {"mine": entry}))
    assert source == Source("mine", tmp_path / "rows.json", "sharegpt", {"messages": "turns"}, {}, True)


def test_an_inline_source_is_found_beside_the_run_or_in_dataset_dir(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_info(tmp_path, {})
    (tmp_path / "here.jsonl").write_text('{"a": 1}')
    monkeypatch.chdir(tmp_path)
    sources = resolve_sources([{"path": "here.jsonl"}, {"file_name": "rows.json", "name": "two"}], folder)
    assert [(source.name, source.path) for source in sources] == [
        ("here", Path("here.jsonl")),
        ("two", tmp_path / "rows.json"),
    ]
    monkeypatch.chdir("/")
    assert resolve_sources([{"path": "here.jsonl"}], folder)[0].path == tmp_path / "here.jsonl"


def test_records_are_rows_without_a_file(tmp_path: Path) -> None:
    rows = [{"q": "a"}, {"q": "b"}]
    entries: list[Any] = [{"records": rows, "columns": {"prompt": "q"}}, {"records": rows[:1], "name": "one"}]
    first, second = resolve_sources(entries, str(tmp_path))
    assert first == Source("records", None, "alpaca", {"prompt": "q"}, {}, False, tuple(rows))
    assert (second.name, load_rows(second)) == ("one", rows[:1])
    assert load_rows(first) == rows
    assert load_rows(first, 1) == rows[:1]
    with pytest.raises(InputError, match="'records' names two datasets"):
        resolve_sources(entries[:1] * 2, str(tmp_path))


def test_a_txt_file_is_plain_text_unless_told_otherwise(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("one\n")
    assert resolve_sources([{"file_name": "book.txt"}], str(tmp_path))[0].formatting == "text"


ENTRY = {"file_name": "rows.json"}


@pytest.mark.parametrize(
    ("entries", "asked", "message"),
    [
        ({"identity": ENTRY}, "identiy", "no dataset is called 'identiy'. Did you mean 'identity'?"),
        ({"a": {"file_nam": "x"}}, "a", "unknown key 'file_nam'. Did you mean 'file_name'?"),
        ({"a": {"hf_hub_url": "org/x"}}, "a", "hf_hub_url is not supported yet"),
        ({"a": ENTRY | {"columns": {"images": "images"}}}, "a", "column 'images' is not supported yet"),
        ({"a": ENTRY | {"columns": {"promt": "x"}}}, "a", "unknown key 'promt' in columns. Did you mean 'prompt'?"),
        ({"a": ENTRY | {"columns": {"prompt": 3}}}, "a", "columns.prompt must be a string, got 3"),
        ({"a": ENTRY | {"columns": ["x"]}}, "a", "columns must be a mapping, got ['x']"),
        ({"a": ENTRY | {"tags": {"role": "x"}}}, "a", "unknown key 'role' in tags. Did you mean 'role_tag'?"),
        ({"a": ENTRY | {"formatting": "sharegtp"}}, "a", "unknown formatting 'sharegtp'. Did you mean 'sharegpt'?"),
        ({"a": ENTRY | {"ranking": "true"}}, "a", "ranking must be true or false, got 'true'"),
        ({"a": {"file_name": "gone.json"}}, "a", "gone.json does not exist"),
        ({"a": {"file_name": "../x.json"}}, "a", "file_name must stay inside"),
        ({"a": {"file_name": "b/../../x.json"}}, "a", "file_name must stay inside"),
        ({"a": {}}, "a", "file_name must be a non-empty string, got None"),
        ({"a": 3}, "a", "must be an object, got a number"),
        ([], "a", "must be an object of name -> entry, got an array"),
        ('{"a": 1,\n }', "a", "broken JSON at line 2, column 2"),
        ({}, {"path": "rows.json", "nam": "x"}, "unknown key 'nam'. Did you mean 'name'?"),
        ({}, {"name": "x"}, "data.datasets[0]: give one of path, file_name or records, got none"),
        (
            {},
            {"path": "x", "records": []},
            "data.datasets[0]: give one of path, file_name or records, got path and records",
        ),
        (
            {},
            {"records": []},
            "data.datasets[0]: records must be a list of rows, got []. Write [{column: value}, ...].",
        ),
        ({}, {"records": "x"}, "data.datasets[0]: records must be a list of rows, got 'x'."),
        ({}, {"records": [{"a": 1}, "x"]}, "data.datasets[0], records, row 2: must be an object, got a string."),
        ({"rows": {"records": [{"a": 1}]}}, "rows", "unknown key 'records'"),
        ({}, 3, "data.datasets[0]: must be a name or a mapping, got 3"),
    ],
)
def test_a_wrong_entry_is_one_line(tmp_path: Path, entries: Any, asked: Any, message: str) -> None:
    folder = write_info(tmp_path, entries)
    with pytest.raises(InputError) as error:
        resolve_sources([asked], folder)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_dataset_info_names_the_option(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"dataset_info\.json: no such file\. Set data\.dataset_dir"):
        resolve_sources(["a"], str(tmp_path))


def test_json_rows_keep_their_own_keys_and_types(tmp_path: Path) -> None:
    rows = [{"a": {"x": 1}, "b": "t"}, {"a": {"y": [1, "two", None]}}, {"a": "text"}]
    assert rows_of(tmp_path / "r.json", json.dumps(rows)) == rows
    assert rows_of(tmp_path / "r.jsonl", "\n\n".join(json.dumps(row) for row in rows) + "\n") == rows


def test_csv_cells_stay_strings(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "r.csv", 'q,a\n007,"two\nlines, and ""quotes"""\n,4.0\n')
    assert rows == [{"q": "007", "a": 'two\nlines, and "quotes"'}, {"q": "", "a": "4.0"}]


def test_txt_gives_a_text_for_each_line_that_is_not_blank(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "r.txt", "one \u2028 still\r\n\n two\n")
    assert rows == [{"text": "one \u2028 still"}, {"text": " two"}]


def test_parquet_gives_python_values(tmp_path: Path) -> None:
    rows = [{"a": "x", "b": [{"c": 1}]}, {"a": None, "b": []}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "r.parquet")
    assert load_rows(Source("r", tmp_path / "r.parquet")) == rows


def test_a_folder_is_read_by_file_name(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text('{"n": 2}')
    (tmp_path / "a.jsonl").write_text('{"n": 1}')
    assert load_rows(Source("r", tmp_path)) == [{"n": 1}, {"n": 2}]
    (tmp_path / "c.txt").write_text("x")
    with pytest.raises(InputError, match=r"files of one type, got the types \.jsonl, \.txt"):
        load_rows(Source("r", tmp_path))


def test_a_limit_reads_the_first_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"n": 1}\n{"n": 2}\nbroken')
    assert load_rows(Source("r", tmp_path / "a.jsonl"), 2) == [{"n": 1}, {"n": 2}]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("r.json", "", "r.json: holds no rows"),
        ("r.json", "[]", "r.json: holds no rows"),
        ("r.json", '{"a": 1}', "must be an array of objects, got an object"),
        ("r.json", '[{"a": 1}, [2]]', "r.json, row 2: must be an object, got an array"),
        ("r.json", '[{"a": 1},\n{"a" 2}]', "broken JSON at line 2, column 6"),
        ("r.jsonl", '{"a": 1}\n{"a": \n', "r.jsonl, row 2: broken JSON at line 2"),
        ("r.jsonl", '{"a": 1}\n"x"\n', "r.jsonl, row 2: must be an object, got a string"),
        ("r.csv", "a,b\n1\n", "r.csv, row 1: must have 2 columns"),
        ("r.csv", "a,b\n1,2,3\n", "r.csv, row 1: must have 2 columns"),
        ("r.csv", 'a,b\n1,"2\n', "broken CSV: unexpected end of data"),
        ("r.parquet", "no parquet", "cannot be read as parquet"),
        ("r.xlsx", "x", "the type '.xlsx' is not supported"),
        ("r.json", b'[{"a": "\xff"}]', "is not UTF-8"),
        ("r.jsonl", b'{"a": "\xff"}', "is not UTF-8"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path: Path, name: str, text: str | bytes, message: str) -> None:
    with pytest.raises(InputError) as error:
        rows_of(tmp_path / name, text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_digest_is_sha256_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert file_digest(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
