"""The model of a disk, on call lists short enough to say what may survive."""

import importlib.util
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

spec = importlib.util.spec_from_file_location("disk_model", Path(__file__).with_name("disk_model.py"))
disk_model = importlib.util.module_from_spec(spec)
spec.loader.exec_module(disk_model)
Disk = disk_model.Disk

CREATED = [("create", "/r/a"), ("write", "/r/a", 0, b"x" * 2000)]


def _outcomes(calls: list[tuple], seeds: int = 300) -> list[dict]:
    disk = Disk("/r").replay(calls)
    return [disk.tree_after_power_loss(random.Random(seed)) for seed in range(seeds)]


def test_nothing_is_lost_from_what_was_synced_with_its_name() -> None:
    calls = [*CREATED, ("sync", "/r/a"), ("sync_folder", "/r")]
    assert all(tree == {"a": b"x" * 2000} for tree in _outcomes(calls))


def test_a_file_may_survive_without_its_bytes_and_its_bytes_without_its_name() -> None:
    named = [tree["a"] for tree in _outcomes([*CREATED, ("sync_folder", "/r")])]
    assert b"" in named
    assert b"x" * 2000 in named
    assert bytes(2000) in named
    assert any(0 < content.count(b"x") < 2000 for content in named)
    assert {len(content) for content in named} == {0, 2000}
    written = _outcomes([*CREATED, ("sync", "/r/a")])
    assert {} in written
    assert all(tree in ({}, {"a": b"x" * 2000}) for tree in written)


def test_extents_begin_at_sectors_and_the_old_bytes_show_where_new_ones_are_lost() -> None:
    calls = [*CREATED, ("sync", "/r/a"), ("sync_folder", "/r"), ("write", "/r/a", 256, b"y" * 1000)]
    outcomes = {tree["a"] for tree in _outcomes(calls)}
    assert len(outcomes) > 3
    for content in outcomes:
        assert len(content) == 2000
        for first in (256, 512, 1024):  # the parts that the sectors make of the write
            part = content[first : min(1256, (first // 512 + 1) * 512)]
            assert part in (b"x" * len(part), b"y" * len(part))


def test_a_rename_is_there_or_not_and_never_both() -> None:
    calls = [*CREATED, ("sync", "/r/a"), ("sync_folder", "/r"), ("rename", "/r/a", "/r/b")]
    names = [tuple(tree) for tree in _outcomes(calls)]
    assert set(names) == {("a",), ("b",)}


def test_entries_that_were_not_synced_come_in_no_order() -> None:
    calls = [("mkdir", "/r/first"), ("mkdir", "/r/second")]
    assert {tuple(sorted(tree)) for tree in _outcomes(calls)} == {(), ("first",), ("second",), ("first", "second")}
    # the folder's own name is its parent's entry
    inside = [("mkdir", "/r/f"), ("create", "/r/f/a"), ("sync_folder", "/r/f")]
    assert {tuple(tree) for tree in _outcomes(inside)} == {(), ("f",)}
    assert all(tree == {"f": {"a": b""}} for tree in _outcomes([*inside, ("sync_folder", "/r")]))


def test_a_removed_file_may_come_back_until_its_folder_is_synced() -> None:
    calls = [*CREATED, ("sync", "/r/a"), ("sync_folder", "/r"), ("remove", "/r/a")]
    assert {tuple(tree) for tree in _outcomes(calls)} == {(), ("a",)}
    assert all(tree == {} for tree in _outcomes([*calls, ("sync_folder", "/r")]))


def test_the_size_is_one_that_the_file_has_had() -> None:
    calls = [
        ("create", "/r/a"),
        ("sync_folder", "/r"),
        ("allocate", "/r/a", 8192),
        ("write", "/r/a", 0, b"x" * 4096),
        ("truncate", "/r/a", 3000),
    ]
    assert {len(tree["a"]) for tree in _outcomes(calls)} == {0, 8192, 3000}
    assert all(tree["a"] == b"x" * 3000 for tree in _outcomes([*calls, ("sync", "/r/a")]))


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (("mkdir", "/r/a"), "exists"),
        (("create", "/r/f"), "exists"),
        (("write", "/r/none", 0, b""), "does not exist"),
        (("sync", "/r/f"), "is a folder"),
        (("sync_folder", "/r/a"), "is a file"),
        (("remove_folder", "/r/f"), r"holds \['b'\]"),
        (("rename", "/r/a", "/r/f"), "exists"),
        (("rename", "/r/a", "/r/f/c"), "within one folder"),
        (("punch", "/r/a"), "unknown call punch"),
    ],
)
def test_a_call_that_could_not_have_succeeded_is_refused(call: tuple, told: str) -> None:
    disk = Disk("/r").replay([("create", "/r/a"), ("mkdir", "/r/f"), ("create", "/r/f/b")])
    with pytest.raises(ValueError, match=told):
        disk.replay([call])


names = st.sampled_from(["a", "b", "c"])
steps = st.one_of(
    st.tuples(st.just("create"), names),
    st.tuples(st.just("write"), names, st.integers(0, 3000), st.binary(min_size=1, max_size=1500)),
    st.tuples(st.just("truncate"), names, st.integers(0, 3000)),
    st.tuples(st.just("remove"), names),
    st.tuples(st.just("rename"), names, names),
    st.tuples(st.just("sync"), names),
    st.tuples(st.just("sync_folder")),
)


@settings(max_examples=60)
@given(st.lists(steps, max_size=25), st.integers(0, 1000))
def test_the_model_follows_a_real_folder_and_a_full_sync_keeps_all_of_it(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple], seed: int
) -> None:
    real = tmp_path_factory.mktemp("real") / "r"
    real.mkdir()
    calls: list[tuple] = []
    for kind, *rest in steps:
        path = real / rest[0] if rest else real
        if kind == "create" and not path.exists():
            path.touch()
            calls.append((kind, str(path)))
        elif kind == "sync_folder":
            calls.append((kind, str(path)))
        elif kind != "create" and path.exists():
            calls.append((kind, str(path), *(str(real / new) if kind == "rename" else new for new in rest[1:])))
            if kind == "write":
                with open(path, "r+b") as file:
                    file.seek(rest[1])
                    file.write(rest[2])
            elif kind == "truncate":
                with open(path, "r+b") as file:
                    file.truncate(rest[1])
            elif kind == "remove":
                path.unlink()
            elif kind == "rename":
                path.rename(real / rest[1])
    disk = Disk(real).replay(calls)
    assert disk.tree() == disk_model.read_tree(real)
    everything = [("sync", str(path)) for path in real.iterdir()] + [("sync_folder", str(real))]
    kept = disk.replay(everything).tree_after_power_loss(random.Random(seed))
    assert kept == disk_model.read_tree(real)
    disk_model.write_tree(kept, real.with_name("copy"))
    assert disk_model.read_tree(real.with_name("copy")) == kept
