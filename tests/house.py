"""The rules of the house, as functions on a file: each yields the lines that break it, and why."""

import ast
import importlib.util
import inspect
import io
import re
import tokenize
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import lf_lightning

ROOT = Path(__file__).resolve().parent.parent
LAYOUT = ("pyproject.toml", "README.md", "Makefile", "constraints.txt", ".ci", "lf_lightning", "configs", "tests")
LAYOUT += ("notebooks", "bench", "docs")
FLOORS = {
    **dict.fromkeys(("cli", "refusal", "__main__", "commands", "quickstart", "testing"), 3),
    **dict.fromkeys(("stages", "callbacks"), 2),
    **dict.fromkeys(("losses", "data", "models", "optim"), 1),
    **dict.fromkeys(("types", "console", "shards", "lightning_private", "__init__"), 0),
}
WRAPPED = ("lightning", "pytorch_lightning", "lightning_fabric", "jsonargparse")  # private in one module only
Function = ast.FunctionDef | ast.AsyncFunctionDef
Breaches = Iterator[tuple[int, str]]


class File(NamedTuple):
    """A text file; `path` is relative to the package for its modules, to the repository otherwise."""

    path: str
    text: str

    @property
    def room(self) -> str:
        """The folder or module on a floor, such as `data` or `types`."""
        return self.path.split("/", 1)[0].removesuffix(".py")

    @property
    def nodes(self) -> list[ast.AST]:
        """Every node of the syntax tree."""
        return nodes_of(self.text)


Rule = Callable[[File], Breaches]


@cache
def nodes_of(text: str) -> list[ast.AST]:
    return list(ast.walk(ast.parse(text)))


def package_files() -> Iterator[File]:
    package = ROOT / "lf_lightning"
    for path in sorted(package.rglob("*.py")):
        yield File(path.relative_to(package).as_posix(), path.read_text(encoding="utf-8"))


def repository_files() -> Iterator[File]:
    suffixes = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".json", ".ipynb", ".jinja", ".sh", ".html", ""}
    for top in (ROOT / name for name in LAYOUT):
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.is_file() and path.suffix in suffixes and "__pycache__" not in path.parts:
                yield File(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))


def breaches(rule: Rule, files: Callable[[], Iterator[File]] = package_files) -> str:
    return "\n".join(f"{file.path}:{line}: {problem}" for file in files() for line, problem in rule(file))


def imported(file: File) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything that a file imports, inside functions too."""
    for node in file.nodes:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)


def room_of(name: str) -> str | None:
    """The room that an imported name lies in; None where it is not ours."""
    parts = name.split(".")
    if parts[0] != "lf_lightning":
        return None
    first = parts[1] if len(parts) > 1 else "__init__"
    return lf_lightning.PUBLIC[first].split(".")[1] if first in lf_lightning.PUBLIC else first


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def imports_go_down(file: File) -> Breaches:
    here = file.room
    if here not in FLOORS:
        yield 1, "stands on no floor: give it one in FLOORS"
    for line, name in imported(file):
        there = room_of(name) if not name.startswith(".") else here
        if name.startswith("."):
            yield line, f"imports {name} by a relative name: write it in full"
        if there in (None, here, "__init__") or here not in FLOORS or (there == "__version__"):
            continue
        if there not in FLOORS or FLOORS[there] > FLOORS[here]:
            yield line, f"imports {name}, which lies higher"
        elif FLOORS[there] == FLOORS[here] == 1:
            yield line, f"imports {name}: neighbours of floor 1 do not know each other"
        elif here == "types":
            yield line, f"imports {name}: types.py imports nothing of ours"


def stages_import_no_data(file: File) -> Breaches:
    for line, name in imported(file):
        if file.room == "stages" and room_of(name) == "data":
            yield line, f"imports {name}"


@cache
def private_names_of_libraries() -> frozenset[str]:
    """Private functions, attributes and variables in the sources of Lightning and jsonargparse."""
    pattern = re.compile(r"(?:\bdef |\bclass |\bself\.|^ *)(_[a-z]\w*)(?=\(| ?[:=])", flags=re.MULTILINE)
    found: set[str] = set()
    for library in ("lightning", "jsonargparse"):
        spec = importlib.util.find_spec(library)
        assert spec is not None
        for folder in spec.submodule_search_locations or ():
            for path in Path(folder).rglob("*.py"):
                found |= set(pattern.findall(path.read_text(encoding="utf-8")))
    return frozenset(name for name in found if is_private(name)) - {"_replace", "_asdict", "_make", "_fields"}


def private_names_stay_in_their_room(file: File) -> Breaches:
    if file.path == "lightning_private.py":
        return
    for line, name in imported(file):
        if name.split(".")[0] in WRAPPED and any(is_private(part) for part in name.split(".")):
            yield line, f"imports {name}"
    for node in file.nodes:
        if isinstance(node, ast.Attribute) and node.attr in private_names_of_libraries():
            owner = ast.unparse(node.value)
            if owner not in ("self", "cls", "super()"):  # those: see the test on classes below
                yield node.lineno, f"touches {owner}.{node.attr}"


def private_names_of_bases(module: ModuleType) -> list[str]:
    """Private names of Lightning's and jsonargparse's classes that the classes of a module override or use on self."""
    found = []
    for name, cls in inspect.getmembers(module, inspect.isclass):
        bases = [base for base in cls.__mro__ if base.__module__.split(".")[0] in WRAPPED]
        if cls.__module__ == module.__name__ and bases:
            owned = {attribute for base in bases for attribute in vars(base)}
            owned |= {used for base in bases for used in re.findall(r"\bself\.(_[a-z]\w*)", inspect.getsource(base))}
            ours = {*vars(cls), *re.findall(r"(?:\bself|\bcls|\bsuper\(\))\.(_[a-z]\w*)", inspect.getsource(cls))}
            private = {used for used in owned & ours if is_private(used) and not used.startswith("_abc_")}
            found += [f"{module.__name__}.{name} touches {used}" for used in sorted(private)]
    return found


def files_are_short(file: File) -> Breaches:
    if (size := file.text.count("\n")) > 350:
        yield 351, f"{size} lines, 350 at most"


def functions_are_short(file: File) -> Breaches:
    for node in file.nodes:
        if isinstance(node, Function):
            doc = ast.get_docstring(node, clean=False)
            size = (node.end_lineno or 0) - node.lineno - (doc.count("\n") + 1 if doc is not None else 0)
            if size > 45:
                yield node.lineno, f"{node.name} has {size} lines without its docstring, 45 at most"


def functions_take_few_positional_arguments(file: File) -> Breaches:
    dictated = [node for node in file.nodes if isinstance(node, ast.ClassDef) and node.bases]  # hooks of a library
    methods = {id(method) for node in dictated for method in node.body}
    for node in file.nodes:
        if isinstance(node, Function) and id(node) not in methods:
            names = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args) if arg.arg not in ("self", "cls")]
            if len(names) > 5:  # as many as transformers' attention functions must take
                yield node.lineno, f"{node.name} takes {len(names)} positional arguments, 5 at most"


def stages_take_few_arguments(file: File) -> Breaches:
    for node in file.nodes:
        if file.room == "stages" and isinstance(node, Function) and node.name == "__init__":
            count = len(node.args.posonlyargs) + len(node.args.args) + len(node.args.kwonlyargs) - 1
            if count > 14:
                yield node.lineno, f"__init__ takes {count} arguments, 14 at most"


def files_are_named_by_what_one_looks_for(file: File) -> Breaches:
    if shelf := set(file.path.removesuffix(".py").split("/")) & {"utils", "util", "helpers", "misc", "common"}:
        yield 1, f"is named {shelf.pop()}"


def nothing_is_left_open(file: File) -> Breaches:
    swallowed = r"\bexcept( Base| \(.*\b| )?Exception\b|\bexcept:"
    word = re.compile(swallowed + r"|\bhasattr\(|\bwarnings\.simplefilter|\bTODO\b|\bFIXME\b")
    for number, line in enumerate(file.text.splitlines(), start=1):
        if found := word.search(line):
            yield number, f"says {found.group()}"


def odd_means_say_why(file: File) -> Breaches:
    tokens = tokenize.generate_tokens(io.StringIO(file.text).readline)
    commented = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}
    for node in file.nodes:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):  # a docstring may say it too
            commented |= set(range(node.lineno, (node.end_lineno or 0) + 1))
    odd = re.compile(r"(getattr|os\.getenv)\(.*|os\.environ|global .*", flags=re.DOTALL)
    for node in file.nodes:
        if not isinstance(node, ast.Call | ast.Attribute | ast.Global) or not odd.fullmatch(ast.unparse(node)):
            continue
        if not commented & set(range(node.lineno - 1, (node.end_lineno or 0) + 1)):
            yield node.lineno, f"uses {ast.unparse(node)[:40]} without a comment that says why"


def bound_names(file: File) -> Iterator[tuple[int, str]]:
    """Line and name of all that a file names itself; not what it calls by a library's name."""
    for node in file.nodes:
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id if isinstance(node, ast.Name) else node.attr
        elif isinstance(node, Function | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg


def names_are_the_houses(file: File) -> Breaches:
    never = {"lp", "ref_model", "actor", "cutoff_len", "pref_beta", "ppo_target"}
    never |= {"completion", "completions"}
    never |= {"query", "queries"} if file.room != "models" else set()  # attention has queries, which are no prompts
    for line, name in bound_names(file):
        plain = name.strip("_")
        if plain.lower() in never or "logps" in plain.lower().split("_") or re.match(r"(n|len)_\w", plain):
            yield line, f"names {name}: see the table of names in STYLE.md"


def public_things_are_documented(file: File) -> Breaches:
    def walk(node: ast.Module | ast.ClassDef) -> Breaches:
        for child in node.body:
            if isinstance(child, Function | ast.ClassDef) and not child.name.startswith("_"):
                if ast.get_docstring(child) is None:
                    yield child.lineno, f"{child.name} has no docstring"
                if isinstance(child, ast.ClassDef):
                    yield from walk(child)

    tree = ast.parse(file.text)
    if tree.body and ast.get_docstring(tree) is None:
        yield 1, "the module has no docstring"
    yield from walk(tree)


def versions_are_not_probed(file: File) -> Breaches:
    for line, name in imported(file):
        if name.startswith(("packaging", "pkg_resources", "lightning_utilities.core.imports")):
            yield line, f"imports {name}"
    probe = re.compile(r"__version__|version_info|metadata\.version\(")
    for node in file.nodes:
        if isinstance(node, ast.Compare) and probe.search(ast.unparse(node)):
            yield node.lineno, f"compares versions: {ast.unparse(node)}"


def no_machine_is_named(file: File) -> Breaches:
    hosts = r"pypi\.org|pythonhosted\.org|download\.pytorch\.org|--(extra-)?index-url|--find-(?:links)"
    folders = r"(?<![\w./:~-])/(work|home|root|Users|mnt|tmp|scratch)/\w"
    for number, line in enumerate(file.text.splitlines(), start=1):
        if found := re.search(f"{hosts}|{folders}", line):
            yield number, f"names {found.group()!r}"
