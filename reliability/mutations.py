"""Damaged and hostile versions of files, made by a seed."""

from __future__ import annotations

import functools
import io
import json
import marshal
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import h5py
import numpy as np
import yaml

# What no loading may make: a file of this name, or an import of a module of it.
CANARY = "reliability_canary"

Rng = np.random.Generator
Mutate = Callable[[bytes, Rng], bytes]

_COMMAND = f"touch {CANARY}"
_CODE = compile(f"open('{CANARY}', 'w').close()", "<mutated>", "exec")
_HUGE = (10**9, 2**31, 2**63 - 1, 10**30, 1e308, float("inf"))
_VALUES: tuple[Any, ...] = (
    *_HUGE,
    -1,
    0,
    1.5,
    float("nan"),
    -float("inf"),
    None,
    True,
    "",
    "x" * 10_000,
    "os.system",
    "../x",
    "\x00",
    [],
    {},
    [[]],
    [1, 2, 3],
    {"a": 1},
)
_TARGETS: tuple[tuple[str, str, Any], ...] = (
    ("os", "system", _COMMAND),
    ("posix", "system", _COMMAND),
    ("subprocess", "Popen", {"args": _COMMAND, "shell": True}),
    ("builtins", "exec", f"open('{CANARY}', 'w')"),
    ("builtins", "eval", f"open('{CANARY}', 'w')"),
    (CANARY, "Anything", {}),
    ("keras.utils", "get_file", {"fname": CANARY, "origin": "file:///etc/hostname"}),
    ("keras.config", "enable_unsafe_deserialization", {}),
    ("keras.saving", "load_model", {"filepath": "../x.keras", "safe_mode": False}),
    ("keras.layers", "TFSMLayer", {"filepath": "../x"}),
    ("keras.layers", "TorchModuleWrapper", {"module": "../x"}),
    ("numpy", "load", {"file": "../x", "allow_pickle": True}),
    ("pickle", "loads", "x"),
)


def _anywhere(rng: Rng, content: bytes) -> int:
    return int(rng.integers(max(len(content), 1)))


def flipped(content: bytes, rng: Rng) -> bytes:
    """Some bits of some bytes are others."""
    found = bytearray(content)
    for _ in range(int(rng.integers(1, 17)) if found else 0):
        found[_anywhere(rng, content)] ^= 1 << int(rng.integers(8))
    return bytes(found)


def truncated(content: bytes, rng: Rng) -> bytes:
    """The end is missing."""
    return content[: _anywhere(rng, content)]


def swapped(content: bytes, rng: Rng) -> bytes:
    """Two regions have changed places."""
    a, b, c, d = sorted(_anywhere(rng, content) for _ in range(4))
    return content[:a] + content[c:d] + content[b:c] + content[a:b] + content[d:]


def zeroed(content: bytes, rng: Rng) -> bytes:
    """A region is zero."""
    a, b = sorted(_anywhere(rng, content) for _ in range(2))
    return content[:a] + bytes(b - a) + content[b:]


def inserted(content: bytes, rng: Rng) -> bytes:
    """Random bytes stand in between."""
    a = _anywhere(rng, content)
    return content[:a] + rng.bytes(int(rng.integers(1, 200))) + content[a:]


BYTES: dict[str, Mutate] = {
    "bits flipped": flipped,
    "truncated": truncated,
    "regions swapped": swapped,
    "region zeroed": zeroed,
    "bytes inserted": inserted,
}

_Members = list[tuple[str, bytes]]


def _members(content: bytes) -> _Members:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def _packed(members: _Members, **attributes: int) -> bytes:
    buffer = io.BytesIO()
    with (
        warnings.catch_warnings(),
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        warnings.simplefilter("ignore")  # Of names that occur twice.
        for name, content in members:
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            for attribute, value in attributes.items():
                setattr(info, attribute, value)
            archive.writestr(info, content)
    return buffer.getvalue()


def _pick(rng: Rng, choices: Sequence[Any]) -> Any:
    return choices[int(rng.integers(len(choices)))]


def member_removed(content: bytes, rng: Rng) -> bytes:
    """A member of an archive is missing."""
    members = _members(content)
    members.pop(int(rng.integers(len(members))))
    return _packed(members)


def member_repeated(content: bytes, rng: Rng) -> bytes:
    """A member is there twice, the second time damaged."""
    members = _members(content)
    name, inner = _pick(rng, members)
    return _packed([*members, (name, flipped(inner, rng))])


def member_outside(content: bytes, rng: Rng) -> bytes:
    """A member's name leads out of the folder; the others stay, or are renamed."""
    members = _members(content)
    names = ("../x", "/tmp/x", "../../x/y", "assets/../../x", "..\\x", "C:\\x")  # noqa: S108
    name = _pick(rng, names)
    if rng.random() < 0.5:
        members[int(rng.integers(len(members)))] = (name, b"x")
    else:
        members.append((name, b"x"))
    return _packed(members)


def member_linked(content: bytes, rng: Rng) -> bytes:
    """All members say that they are symbolic links, one of them leads out."""
    members = [*_members(content), ("assets/link", b"../../x")]
    return _packed(members, external_attr=int(_pick(rng, (0o120777, 0o104777))) << 16)


def member_damaged(content: bytes, rng: Rng) -> bytes:
    """A member is damaged, and its checksum is that of what is there."""
    members = _members(content)
    index = int(rng.integers(len(members)))
    name, inner = members[index]
    members[index] = name, _pick(rng, list(BYTES.values()))(inner, rng)
    return _packed(members)


ZIP: dict[str, Mutate] = {
    "member removed": member_removed,
    "member repeated": member_repeated,
    "member outside": member_outside,
    "member linked": member_linked,
    "member damaged": member_damaged,
}


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """All places in a tree of dicts and lists: the container and the key."""
    found: list[tuple[Any, Any]] = []
    waiting = [tree]
    while waiting:
        each = waiting.pop()
        pairs = each.items() if isinstance(each, dict) else enumerate(each)
        for key, value in pairs:
            found.append((each, key))
            if isinstance(value, (dict, list)):
                waiting.append(value)
    return found


def _edited(tree: Any, rng: Rng) -> Any:
    """Changes one to three entries of a tree, and returns it."""
    for _ in range(int(rng.integers(1, 4))):
        places = _places(tree)
        if not places:
            break
        container, key = _pick(rng, places)
        if rng.random() < 0.2 and isinstance(container, dict):
            del container[key]
        elif rng.random() < 0.1 and isinstance(container, dict):
            container["unknown"] = 1
        else:
            container[key] = _pick(rng, _VALUES)
    return tree


def _numbers(tree: Any, rng: Rng) -> Any:
    """Replaces some numbers by large ones."""
    places = [
        (container, key)
        for container, key in _places(tree)
        if isinstance(container[key], (int, float))
    ]
    for _ in range(int(rng.integers(1, 4)) if places else 0):
        container, key = _pick(rng, places)
        container[key] = _pick(rng, _HUGE)
    return tree


def _hostile(tree: Any, rng: Rng) -> Any:
    """Puts an object in the place of another that must not be made."""
    objects = [
        (container, key)
        for container, key in _places(tree)
        if isinstance(container[key], dict) and "class_name" in container[key]
    ]
    if not objects:
        return tree
    container, key = _pick(rng, objects)
    old = container[key]
    kind = int(rng.integers(4))
    module, name, argument = _pick(rng, _TARGETS)
    config = argument if isinstance(argument, dict) else {"command": argument}
    if kind == 0:
        new = {"module": module, "class_name": name, "config": config}
    elif kind == 1:
        new = {"module": module, "class_name": "function", "config": name}
    elif kind == 2:
        code = marshal.dumps(_CODE).hex()
        new = {
            "module": "keras.layers",
            "class_name": "Lambda",
            "config": {
                "name": "lambda",
                "function": {
                    "class_name": "__lambda__",
                    "config": {"code": code, "defaults": None, "closure": None},
                },
            },
        }
    else:
        new = {
            "class_name": "__lambda__",
            "config": {"value": [marshal.dumps(_CODE).hex(), None, None]},
        }
    new["registered_name"] = _pick(rng, (None, name, f"keras_dalign>{name}"))
    kept = ("name", "inbound_nodes", "build_config")
    container[key] = {**{k: v for k, v in old.items() if k in kept}, **new}
    return tree


def _nested(tree: Any, rng: Rng) -> Any:
    """Puts a deep list somewhere."""
    deep: Any = []
    for _ in range(int(_pick(rng, (100, 400)))):
        deep = [deep]
    container, key = _pick(rng, _places(tree))
    container[key] = deep
    return tree


TREES: dict[str, Callable[[Any, Rng], Any]] = {
    "entries edited": _edited,
    "numbers made large": _numbers,
    "hostile object": _hostile,
    "nested": _nested,
}


def _of_json(change: Callable[[Any, Rng], Any]) -> Mutate:
    """The change of a tree as one of the `config.json` of an archive."""

    def mutate(content: bytes, rng: Rng) -> bytes:
        members = dict(_members(content))
        tree = change(json.loads(members["config.json"]), rng)
        members["config.json"] = json.dumps(tree).encode()
        return _packed(list(members.items()))

    return mutate


def deep_json(content: bytes, rng: Rng) -> bytes:
    """The configuration is nested beyond what can be read."""
    members = dict(_members(content))
    depth = int(_pick(rng, (10_000, 200_000)))
    members["config.json"] = b"[" * depth + b"]" * depth
    return _packed(list(members.items()))


def _hdf5(content: bytes, rng: Rng) -> bytes:
    """A data set of an HDF5 file has another shape, type or place."""
    buffer = io.BytesIO(content)
    with h5py.File(buffer, "r+") as file:
        found: list[str] = []
        file.visititems(
            lambda name, item: (
                found.append(name) if isinstance(item, h5py.Dataset) else None
            )
        )
        if not found:
            return flipped(content, rng)
        name = _pick(rng, found)
        old = np.asarray(file[name])
        kind = int(rng.integers(9))
        del file[name]
        if kind == 0:
            file[name] = np.resize(old, _pick(rng, ((), (0,), (1,), (7, 3), (2, 2, 2))))
        elif kind == 1:
            file[name] = old.astype(_pick(rng, ("float64", "int8", "complex64", "S3")))
        elif kind == 2:
            file[name] = np.full(old.shape, _pick(rng, (np.nan, np.inf, -1, 1e30)))
        elif kind == 3:
            # Chunks that are not there read as zeros: a small file of a large array.
            shape = _pick(rng, ((2**40,), (2**20, 2**20), (2**31,), old.shape[:1]))
            file.create_dataset(name, shape, "float32", chunks=True)
        elif kind == 4:
            file[name] = h5py.ExternalLink("../x.h5", "/a")
        elif kind == 5:
            file[name] = h5py.SoftLink(_pick(rng, ("/", "/missing", f"/{name}")))
        elif kind == 6:
            shape = old.shape or (1,)
            file.create_dataset(
                name,
                shape,
                "uint8",
                external=[("/etc/hostname", 0, h5py.h5f.UNLIMITED)],
            )
        elif kind == 7:
            file.create_group(name)
        # Else it is missing.
    return buffer.getvalue()


def _within_keras(content: bytes, rng: Rng) -> bytes:
    members = dict(_members(content))
    members["model.weights.h5"] = _hdf5(members["model.weights.h5"], rng)
    return _packed(list(members.items()))


class _Calls:
    """Pickled, it calls something when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (CANARY, "w")


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def pickled(content: bytes, rng: Rng) -> bytes:
    """An array of pickled objects takes the place of another one, or stands beside."""
    members = _members(content)
    hostile = np.array([_Calls()], dtype=object)
    index = int(rng.integers(len(members) + 1))
    name = members[index][0] if index < len(members) else "more.npy"
    members[index : index + 1] = [(name, _npy(hostile))]
    return _packed(members)


def header_edited(content: bytes, rng: Rng) -> bytes:
    """The header of an array tells another shape, type or order."""
    members = _members(content)
    index = int(rng.integers(len(members)))
    name, inner = members[index]
    end = inner.index(b"\n") + 1
    shape = _pick(rng, ("(5,)", "(10**12,)", "(1000000000000,)", "(-1,)", "()", "[1]"))
    kind = _pick(rng, ("<f8", "|O", "|S1000000", "<U3", "V8", "x", "__import__('os')"))
    order = _pick(rng, ("False", "True", "1", "None"))
    header = (
        f"{{'descr': {kind!r}, 'fortran_order': {order}, 'shape': {shape}, }}\n"
    ).encode()
    members[index] = (
        name,
        inner[:8] + len(header).to_bytes(2, "little") + header + inner[end:],
    )
    return _packed(members)


def arrays_edited(content: bytes, rng: Rng) -> bytes:
    """An array has another type, shape or other values."""
    members = _members(content)
    index = int(rng.integers(len(members)))
    name, inner = members[index]
    array = np.lib.format.read_array(io.BytesIO(inner), allow_pickle=False)
    changes: tuple[Callable[[], np.ndarray], ...] = (
        lambda: array[:0],
        lambda: array[..., np.newaxis],
        lambda: array.astype("float64") * np.nan,
        lambda: array.astype("int64") - 7,
        lambda: array.astype("int64") + 2**40,
        lambda: array.astype("complex64"),
        lambda: array.astype("S4"),
        lambda: np.array(3),
    )
    members[index] = (name, _npy(_pick(rng, changes)()))
    return _packed(members)


def _of_yaml(change: Callable[[Any, Rng], Any]) -> Mutate:
    """The change of a tree as one of a YAML file."""

    def mutate(content: bytes, rng: Rng) -> bytes:
        return yaml.safe_dump(change(yaml.safe_load(content), rng)).encode()

    return mutate


def tagged(content: bytes, rng: Rng) -> bytes:
    """A value is a tag that makes PyYAML's unsafe loaders call something."""
    tags = (
        f"!!python/object/apply:os.system ['{_COMMAND}']",
        f"!!python/object/new:subprocess.Popen [['touch', '{CANARY}']]",
        f"!!python/module:{CANARY}",
        f"!!python/name:{CANARY}.x",
        "!!binary 'x'",
        "!!timestamp 'x'",
        "!unknown x",
    )
    lines = content.decode().splitlines()
    places = [i for i, line in enumerate(lines) if ": " in line and "#" not in line]
    if not places:
        return content
    index = _pick(rng, places)
    lines[index] = f"{lines[index].split(': ', 1)[0]}: {_pick(rng, tags)}"
    return "\n".join(lines).encode()


def aliased(content: bytes, rng: Rng) -> bytes:
    """Aliases of aliases: a small file that is large where it is written out."""
    levels = int(rng.integers(5, 26))
    text = ["a0: &a0 [x, x, x, x, x, x, x, x]"]
    eight = ((i, ", ".join([f"*a{i - 1}"] * 8)) for i in range(1, levels))
    text.extend(f"a{i}: &a{i} [{aliases}]" for i, aliases in eight)
    lines = content.decode().splitlines()
    tops = [i for i, line in enumerate(lines) if line[:1].isalpha()]
    end = _pick(rng, tops)
    bombed = f"{lines[end].split(':')[0]}: *a{levels - 1}"
    return "\n".join([*text, *lines[:end], bombed, *lines[end:]]).encode()


def deep_yaml(content: bytes, rng: Rng) -> bytes:
    """Nested beyond what can be read."""
    depth = int(_pick(rng, (500, 5000)))
    return content + b"\nprofile: " + b"[" * depth + b"]" * depth


_YAML_TREES = {k: _of_yaml(TREES[k]) for k in ("entries edited", "numbers made large")}
KINDS: Mapping[str, Mapping[str, Mutate]] = {
    "keras": {
        **BYTES,
        **ZIP,
        **{name: _of_json(change) for name, change in TREES.items()},
        "configuration too deep": deep_json,
        "HDF5 edited": _within_keras,
    },
    "weights": {**BYTES, "HDF5 edited": _hdf5},
    "npz": {
        **BYTES,
        **ZIP,
        "pickled objects": pickled,
        "header edited": header_edited,
        "arrays edited": arrays_edited,
    },
    "yaml": {
        **BYTES,
        **_YAML_TREES,
        "tags": tagged,
        "aliases": aliased,
        "too deep": deep_yaml,
    },
}


def mutated(kind: str, content: bytes, seed: Sequence[int]) -> tuple[str, bytes]:
    """A mutated version of a file.

    Args:
        kind: One of `KINDS`.
        content: The file.
        seed: Says which mutation.

    Returns:
        The mutation's name, and the content.
    """
    rng = np.random.default_rng(list(seed))
    # The more a mutation knows of the format, the deeper it goes: those go first.
    names = sorted(KINDS[kind], key=list(BYTES).__contains__)
    weights = np.array([1.0 if name in BYTES else 2.0 for name in names])
    name = str(rng.choice(names, p=weights / weights.sum()))
    return name, functools.partial(KINDS[kind][name])(content, rng)
