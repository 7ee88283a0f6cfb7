"""What a disk holds after a power loss, from the calls that a `_C.CallScript(record=True)` has listed.

The page cache survives a killed process but no power cut, so killing processes never shows a missing fsync. Here the
calls up to a cut are replayed on a model that knows two states of everything: durable, and changed since.

    file      "sync" makes its bytes and size durable. Without it each write of the meantime is kept or lost at random
              extents of 512 bytes, the size is any of those it has had since, and bytes that the size covers but no
              write reached are zeros or whatever the disk held before.
    folder    "sync_folder" makes its entries durable: those that were made, renamed and removed in it. Without it each
              of these is kept or lost at random, a rename as one, and in no order: the weakest file system that POSIX
              allows. Syncing a file does not keep its name; a folder's own name is an entry of its parent.

    disk = Disk(root)                   an empty folder that is durable; the calls' paths lie in it
    disk.replay(calls[:cut])
    disk.tree()                         as programs see it while there is power: {name: bytes or a tree}
    disk.tree_after_power_loss(random)  one of the ways it may look afterwards
    write_tree(tree, folder)            puts that on a real disk

A call that was cut short needs no case of its own: it may or may not count, as one that ended but was not synced.
"""

from __future__ import annotations

import random as random_module
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import TypeAlias

Tree: TypeAlias = dict[str, "bytes | Tree"]
Call: TypeAlias = tuple
SECTOR = 512
CHANCES = (0.0, 0.1, 0.5, 0.9, 1.0)  # of keeping: all or nothing is where most mistakes show


class File:
    """A file's bytes: durable ones, and what was done to it since."""

    def __init__(self) -> None:
        self.durable = b""
        self.now = bytearray()
        self.sizes: list[int] = []  # that it has had since the last sync
        self.writes: list[tuple[int, bytes]] = []

    def allocate(self, size: int) -> None:
        if size > len(self.now):
            self.truncate(size)

    def truncate(self, size: int) -> None:
        self.now = self.now[:size].ljust(size, b"\0")
        self.sizes.append(size)

    def write(self, offset: int, content: bytes) -> None:
        self.allocate(offset + len(content))
        self.now[offset : offset + len(content)] = content
        self.writes.append((offset, content))

    def sync(self) -> None:
        self.durable = bytes(self.now)
        self.sizes, self.writes = [], []

    def after_power_loss(self, random: random_module.Random) -> bytes:
        if not self.sizes and not self.writes:
            return self.durable
        size = random.choice([len(self.durable), *self.sizes, len(self.now)])
        kept = bytearray(self.durable)
        if size > len(kept):
            kept += random.randbytes(size - len(kept)) if random.random() < 0.5 else bytes(size - len(kept))
        chance = random.choice(CHANCES)
        for offset, content in self.writes:
            for start, end in _extents(offset, len(content), random):
                if random.random() < chance:
                    kept[start:end] = content[start - offset : end - offset]
        return bytes(kept[:size])


class Folder:
    """A folder's entries: durable ones, and what was done to them since.

    A change is a list of (name, what it names from then on or None), all of which happens or none.
    """

    def __init__(self) -> None:
        self.durable: dict[str, File | Folder] = {}
        self.now: dict[str, File | Folder] = {}
        self.changes: list[list[tuple[str, File | Folder | None]]] = []

    def change(self, entries: list[tuple[str, File | Folder | None]]) -> None:
        _apply(self.now, entries)
        self.changes.append(entries)

    def sync(self) -> None:
        self.durable = dict(self.now)
        self.changes = []

    def tree(self) -> Tree:
        return {name: node.tree() if isinstance(node, Folder) else bytes(node.now) for name, node in self.now.items()}

    def after_power_loss(self, random: random_module.Random) -> Tree:
        kept = dict(self.durable)
        chance = random.choice(CHANCES)
        for entries in self.changes:
            if random.random() < chance:
                _apply(kept, entries)
        return {name: node.after_power_loss(random) for name, node in kept.items()}


class Disk:
    """A disk whose folder `root` is empty and durable. Raises ValueError on a call that could not have succeeded."""

    def __init__(self, root: str | Path) -> None:
        self._root = PurePosixPath(root)
        self._top = Folder()

    def tree(self) -> Tree:
        return self._top.tree()

    def tree_after_power_loss(self, random: random_module.Random) -> Tree:
        return self._top.after_power_loss(random)

    def replay(self, calls: Iterable[Call]) -> Disk:
        for call in calls:
            self._replay(*call)
        return self

    def _replay(self, kind: str, path: str, *rest) -> None:
        if kind == "sync_folder":
            self._folder(path).sync()
        elif kind == "sync":
            self._file(path).sync()
        elif kind == "write":
            self._file(path).write(*rest)
        elif kind == "allocate":
            self._file(path).allocate(*rest)
        elif kind == "truncate":
            self._file(path).truncate(*rest)
        elif kind in ("mkdir", "create"):
            folder, name = self._parent(path)
            if name in folder.now:
                raise ValueError(f"{kind} of {path}, which exists")
            folder.change([(name, Folder() if kind == "mkdir" else File())])
        elif kind in ("remove", "remove_folder"):
            folder, name = self._parent(path)
            gone = self._folder(path) if kind == "remove_folder" else self._file(path)
            if isinstance(gone, Folder) and gone.now:
                raise ValueError(f"remove_folder of {path}, which holds {sorted(gone.now)}")
            folder.change([(name, None)])
        elif kind == "rename":
            self._rename(path, *rest)
        else:
            raise ValueError(f"unknown call {kind}")

    def _rename(self, old: str, new: str) -> None:
        folder, name = self._parent(old)
        target, new_name = self._parent(new)
        if folder is not target:
            raise ValueError(f"rename of {old} to {new}: the model knows renames within one folder")
        moved, there = self._node(old), folder.now.get(new_name)
        if there is not None and (isinstance(moved, Folder) != isinstance(there, Folder) or not _replaceable(there)):
            raise ValueError(f"rename of {old} to {new}, which exists")
        folder.change([(name, None), (new_name, moved)])

    def _node(self, path: str | PurePosixPath) -> File | Folder:
        node: File | Folder = self._top
        for name in PurePosixPath(path).relative_to(self._root).parts:
            if not isinstance(node, Folder) or name not in node.now:
                raise ValueError(f"{path} does not exist")
            node = node.now[name]
        return node

    def _folder(self, path: str | PurePosixPath) -> Folder:
        node = self._node(path)
        if not isinstance(node, Folder):
            raise ValueError(f"{path} is a file")
        return node

    def _file(self, path: str) -> File:
        node = self._node(path)
        if not isinstance(node, File):
            raise ValueError(f"{path} is a folder")
        return node

    def _parent(self, path: str) -> tuple[Folder, str]:
        parent, name = PurePosixPath(path).parent, PurePosixPath(path).name
        return self._folder(parent), name


def read_tree(folder: Path) -> Tree:
    """A real folder as a tree."""
    return {path.name: read_tree(path) if path.is_dir() else path.read_bytes() for path in folder.iterdir()}


def write_tree(tree: Tree, folder: Path) -> None:
    """Make `folder`, which must not exist, look like the tree."""
    folder.mkdir()
    for name, content in tree.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            write_tree(content, folder / name)


def _apply(entries: dict[str, File | Folder], change: list[tuple[str, File | Folder | None]]) -> None:
    for name, node in change:
        if node is None:
            entries.pop(name, None)
        else:
            entries[name] = node


def _replaceable(node: File | Folder) -> bool:
    return isinstance(node, File) or not node.now


def _extents(offset: int, size: int, random: random_module.Random) -> list[tuple[int, int]]:
    """[offset, offset + size) in up to four parts that begin where sectors do."""
    end = offset + size
    inner = range((offset // SECTOR + 1) * SECTOR, end, SECTOR)
    starts = sorted({offset, *random.choices(inner, k=3)} if inner else {offset})
    return list(zip(starts, [*starts[1:], end], strict=True))
