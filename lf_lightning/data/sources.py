"""Where rows come from: names in dataset_info.json or inline entries become sources, and sources become rows."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from dataclasses import fields as dataclass_fields
from itertools import islice
from pathlib import Path
from typing import Any

from lf_lightning.data.confinement import check_inside
from lf_lightning.data.files import READERS, kind_of, kind_of_value, object_row, parse_json, read_rows, read_text
from lf_lightning.data.source import Source
from lf_lightning.types import InputError

FORMATTINGS = ("alpaca", "sharegpt", "openai", "text")
COLUMNS = (
    "prompt",
    "query",
    "response",
    "history",
    "messages",
    "system",
    "tools",
    "text",
    "chosen",
    "rejected",
    "kto_tag",
    "margin",
)
UNSUPPORTED_COLUMNS = ("images", "videos", "audios")
TAGS = ("role_tag", "content_tag", "user_tag", "assistant_tag", "observation_tag", "function_tag", "system_tag")
ENTRY_KEYS = ("file_name", "formatting", "columns", "tags", "ranking")
INLINE_KEYS = ("path", "name", "records", *ENTRY_KEYS)
HUB_KEYS = ("hf_hub_url", "subset", "split", "folder")
PLACES = ("path", "file_name", "records", "hf_hub_url")
UNSUPPORTED_KEYS = (*HUB_KEYS, "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name", "num_samples")


@dataclass(frozen=True)
class HubSource(Source):
    """A dataset of the hub, or a local folder laid out like one, which the datasets library reads.

    Args:
        repo: Its name on the hub, or the folder.
        subset: The configuration of it; None where it has one only.
        split: The split.
        folder: A folder inside of it; None for all of it.
    """

    repo: str = ""
    subset: str | None = None
    split: str = "train"
    folder: str | None = None


def nearest(word: str, words: Iterable[str]) -> str:
    """The end of an error line: ` Did you mean 'x'?` with the closest of `words`, or the list of all."""
    known = sorted(words)
    close = difflib.get_close_matches(word, known, n=1)
    return f" Did you mean {close[0]!r}?" if close else f" Choose one of: {', '.join(known)}."


def resolve_sources(
    datasets: list[str | dict[str, Any]], dataset_dir: str, *, allow_outside: bool = False, streaming: bool = False
) -> list[Source]:
    """The sources that the entries of `data.datasets` mean.

    Args:
        datasets: Each a name in `<dataset_dir>/dataset_info.json`, or an inline entry: the same keys plus `path`
            (relative to the working folder, else to `dataset_dir`), or `records` with the rows themselves, and `name`.
        dataset_dir: Folder of dataset_info.json and of its files.
        allow_outside: Whether dataset_info.json may name files elsewhere.
        streaming: Whether entries may name datasets of the hub, which are streamed alone.

    Raises:
        InputError: An unknown name or key, a key that is not supported yet, a missing or broken file.
    """
    folder = Path(dataset_dir)
    info = _read_info(folder) if any(isinstance(entry, str) for entry in datasets) else {}
    sources = []
    for position, entry in enumerate(datasets):
        if isinstance(entry, str):
            sources.append(_named_source(entry, info, folder, allow_outside=allow_outside, streaming=streaming))
        elif isinstance(entry, dict):
            sources.append(_inline_source(entry, f"data.datasets[{position}]", folder, streaming=streaming))
        else:
            raise InputError(
                f"data.datasets[{position}]: must be a name or a mapping, got {entry!r}. Write a name of "
                f"{folder / 'dataset_info.json'}, or {{path: rows.jsonl, ...}}."
            )
    twice = [name for name, count in Counter(source.name for source in sources).items() if count > 1]
    if twice:
        raise InputError(f"data.datasets: {twice[0]!r} names two datasets. Give each inline entry a name of its own.")
    return sources


def _read_info(folder: Path) -> dict[str, Any]:
    path = folder / "dataset_info.json"
    if not path.is_file():
        raise InputError(f"{path}: no such file. Set data.dataset_dir to its folder, or give datasets inline.")
    info = parse_json(read_text(path), str(path))
    if not isinstance(info, dict):
        raise InputError(
            f"{path}: must be an object of name -> entry, got {kind_of_value(info)}. Put the entries in {{...}}."
        )
    return info


def _named_source(name: str, info: dict[str, Any], folder: Path, *, allow_outside: bool, streaming: bool) -> Source:
    where = folder / "dataset_info.json"
    if name not in info:
        raise InputError(f"{where}: no dataset is called {name!r}.{nearest(name, info)}")
    entry = info[name]
    if not isinstance(entry, dict):
        raise InputError(f'{where}, {name}: must be an object, got {kind_of_value(entry)}. Write {{"file_name": ...}}.')
    where_entry = f"{where}, {name}"
    _check_keys(entry, ENTRY_KEYS, where_entry, streaming=streaming)
    if "hf_hub_url" in entry:
        return _hub_source(name, entry, where_entry)
    file_name = _text_value(entry, "file_name", where_entry)
    if not allow_outside:
        check_inside(file_name, folder, where_entry)
    return _source(name, folder / file_name, entry, where_entry)


def _inline_source(entry: dict[str, Any], where: str, folder: Path, *, streaming: bool) -> Source:
    _check_keys(entry, INLINE_KEYS, where, streaming=streaming)
    given = [place for place in PLACES if place in entry]
    if len(given) != 1:
        got = " and ".join(given) or "none"
        raise InputError(f"{where}: give one of path, file_name or records, got {got}. Write {{path: rows.jsonl}}.")
    if given == ["hf_hub_url"]:
        return _hub_source(entry.get("name") or _text_value(entry, "hf_hub_url", where), entry, where)
    path = None if given == ["records"] else _inline_path(entry, where, folder)
    name = _text_value(entry, "name", where) if "name" in entry else path.stem if path else "records"
    return _source(name, path, entry, where)


def _hub_source(name: str, entry: dict[str, Any], where: str) -> HubSource:
    if "file_name" in entry:
        raise InputError(f"{where}: give one of hf_hub_url or file_name, got both. Remove one.")
    place: dict[str, Any] = {key: _text_value(entry, key, where) for key in HUB_KEYS if entry.get(key) is not None}
    plain = _source(name, None, {"records": [{}], **entry}, where)
    fields = {field.name: vars(plain)[field.name] for field in dataclass_fields(plain)}
    return HubSource(**{**fields, "records": ()}, repo=place.pop("hf_hub_url"), **place)


def _inline_path(entry: dict[str, Any], where: str, folder: Path) -> Path:
    if "path" not in entry:
        return folder / _text_value(entry, "file_name", where)
    path = Path(_text_value(entry, "path", where)).expanduser()
    return path if path.exists() or not (folder / path).exists() else folder / path


def _source(name: str, path: Path | None, entry: dict[str, Any], where: str) -> Source:
    if path is not None and not path.exists():
        raise InputError(f"{where}: {path} does not exist. Correct the path, or put the file there.")
    formatting = entry.get("formatting", "text" if path is not None and kind_of(path) == ".txt" else "alpaca")
    if formatting not in FORMATTINGS:
        raise InputError(f"{where}: unknown formatting {formatting!r}.{nearest(str(formatting), FORMATTINGS)}")
    ranking = entry.get("ranking", False)
    if not isinstance(ranking, bool):
        raise InputError(f"{where}: ranking must be true or false, got {ranking!r}. Write true without quotes.")
    columns = _mapping(entry, "columns", (*COLUMNS, *UNSUPPORTED_COLUMNS), where)
    for column in UNSUPPORTED_COLUMNS:
        if column in columns:
            raise InputError(f"{where}: the column {column!r} is not supported yet. Use a dataset of text only.")
    records = () if path is not None else _records(entry["records"], where)
    return Source(name, path, formatting, columns, _mapping(entry, "tags", TAGS, where), ranking, records)


def _records(value: Any, where: str) -> tuple[dict[str, Any], ...]:
    if not isinstance(value, list | tuple) or not value:
        raise InputError(f"{where}: records must be a list of rows, got {value!r}. Write [{{column: value}}, ...].")
    return tuple(object_row(row, f"{where}, records", number) for number, row in enumerate(value, start=1))


def _check_keys(entry: dict[str, Any], known: tuple[str, ...], where: str, *, streaming: bool) -> None:
    for key in entry:
        if key in HUB_KEYS and streaming:
            if "hf_hub_url" not in entry:
                raise InputError(f"{where}: {key} is read with hf_hub_url alone. Remove it.")
            continue
        if key in UNSUPPORTED_KEYS:
            instead = " but in data.datasets with data.streaming: true" if key in HUB_KEYS else ""
            raise InputError(f"{where}: {key} is not supported yet{instead}. Download the rows and give file_name.")
        if key not in known:
            raise InputError(f"{where}: unknown key {key!r}.{nearest(str(key), known)}")


def _text_value(entry: dict[str, Any], key: str, where: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str) or not value:
        raise InputError(
            f"{where}: {key} must be a non-empty string, got {value!r}. Give the name of a file or folder."
        )
    return value


def _mapping(entry: dict[str, Any], key: str, known: tuple[str, ...], where: str) -> dict[str, str]:
    value = entry.get(key) or {}
    if not isinstance(value, dict):
        raise InputError(f"{where}: {key} must be a mapping, got {value!r}. Write {{{known[0]}: name in the file}}.")
    for ours, theirs in value.items():
        if ours not in known:
            raise InputError(f"{where}: unknown key {ours!r} in {key}.{nearest(str(ours), known)}")
        if theirs is not None and not isinstance(theirs, str):
            raise InputError(f"{where}: {key}.{ours} must be a string, got {theirs!r}. Name what the file calls it.")
    return {ours: theirs for ours, theirs in value.items() if theirs is not None}


def source_files(source: Source) -> list[Path]:
    """The files of a source in reading order: the file itself, or all files of the folder by name; none of records.

    Raises:
        InputError: The folder is empty or mixes types, or the type is not one of json, jsonl, csv, parquet,
            arrow, txt.
    """
    if source.path is None:
        return []
    if not source.path.exists():
        raise InputError(f"{source.name}: {source.path} does not exist. Correct the path, or put the file there.")
    files = [source.path]
    if source.path.is_dir():
        files = sorted(path for path in source.path.iterdir() if path.is_file() and not path.name.startswith("."))
        suffixes = sorted({kind_of(path) for path in files})
        if len(suffixes) != 1:
            got = "no file" if not files else f"the types {', '.join(suffixes)}"
            raise InputError(f"{source.path}: a folder must hold files of one type, got {got}. Give each type its own.")
    if kind_of(files[0]) not in READERS:
        raise InputError(
            f"{files[0]}: the type {files[0].suffix!r} is not supported. Write the rows as {', '.join(READERS)}."
        )
    return files


def load_rows(source: Source, limit: int | None = None) -> list[dict[str, Any]]:
    """The rows of a source as its files have them, see `read_rows`.

    Args:
        source: The dataset.
        limit: Read only the first rows, this many; None reads all.

    Raises:
        InputError: A file is empty, broken or of an unsupported type, or a row is not an object.
    """
    files = source_files(source)
    rows = (row for path in files for row, _ in read_rows(path)) if files else source.records
    return list(islice(rows, limit))
