import ast
from pathlib import Path

import keras_dalign

PACKAGE = Path(keras_dalign.__file__).parent
# Each imports only itself and those before it; what is in no layer is on top.
LAYERS = [
    "compat",
    "numerics",
    "head",
    "solving",
    "training",
    "diagnostics",
    "certification",
]


def layer(module):
    parts = module.split(".")
    if len(parts) > 1 and parts[1] in LAYERS:
        return LAYERS.index(parts[1])
    return len(LAYERS)


def imported(tree):
    """The modules that a file imports anywhere, also for types alone."""
    nodes = [tree]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        nodes += ast.iter_child_nodes(node)


def test_modules_import_only_what_lies_below_them():
    seen = set()
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(["keras_dalign", *path.relative_to(PACKAGE).parts])
        own = layer(name)
        seen.add(own)
        for module in imported(ast.parse(path.read_text(encoding="utf-8"))):
            if module.startswith("keras_dalign."):
                assert layer(module) <= own, f"{path.name} imports {module}"
    assert seen == set(range(len(LAYERS) + 1))
