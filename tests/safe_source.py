"""What in a Python source could execute what a file holds."""

import ast
from collections.abc import Iterator

MODULES = (
    *("pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle"),
    *("joblib", "jsonpickle", "yaml", "runpy", "code", "imp", "xml"),
)
NAMES = ("eval", "exec", "compile", "__import__", "execfile")
# By the last part of what is called; None: whatever it is called of.
CALLS = {
    "import_module": ("importlib",),
    "read_pickle": None,
    "read_hdf": None,
    "to_pickle": None,
    "loads": ("pickle", "marshal", "dill"),
    "system": ("os",),
    "popen": ("os",),
    "extractall": None,
    "unpack_archive": None,
    "query": None,
}


def dangers(source: str) -> Iterator[str]:
    """What there is, with its line."""
    for node in ast.walk(ast.parse(source)):
        for what in _of(node):
            yield f"line {node.lineno}: {what}"


def _of(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (a.name for a in node.names if a.name.split(".")[0] in MODULES)
    if isinstance(node, ast.ImportFrom) and node.module:
        names = {node.module.split(".")[0], *(a.name for a in node.names)}
        yield from sorted(names & {*MODULES, *NAMES, "import_module"})
    if isinstance(node, ast.Name) and node.id in NAMES:
        yield node.id
    if isinstance(node, ast.Call):
        yield from _of_call(node)


def _of_call(node: ast.Call) -> Iterator[str]:
    keywords = {k.arg: k.value for k in node.keywords}
    for name in ("allow_pickle", "shell"):
        if name in keywords and not _is(keywords[name], False):
            yield f"{name}={ast.unparse(keywords[name])}"
    if not isinstance(node.func, ast.Attribute):
        return
    of, name = ast.unparse(node.func.value), node.func.attr
    if name in CALLS and (CALLS[name] is None or of in CALLS[name]):
        yield f"{of}.{name}"
    if (
        name == "load"
        and of in ("np", "numpy", "jnp")
        and "allow_pickle" not in keywords
    ):
        yield f"{of}.load without allow_pickle=False"
    if name == "load" and of == "torch":
        yield "torch.load"
    if name == "eval" and (node.args or keywords):  # that of a network has none
        yield f"{of}.eval"


def _is(node: ast.AST, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value
