"""Videos in folders, in split tars and at URLs: found by name, read in place, whatever the tar's state."""

import io
import os
import pickle
import tarfile

import fsspec
import pytest
from support.published import write_split_tar

from refalign_jax.data.sources.videos import open_videos
from refalign_jax.data.stored import JoinedFile, Stored


def contents(folder, count=9):
    """Files of odd sizes, of which some lie across pieces."""
    folder.mkdir()
    for n in range(count):
        (folder / f"v{n}.mp4").write_bytes(os.urandom(700 + 611 * n))
    return sorted(folder.iterdir())


@pytest.mark.parametrize("pieces", [1, 3, 5, 11])
def test_a_split_tar_gives_the_bytes_of_its_files(tmp_path, pieces):
    files = contents(tmp_path / "files")
    write_split_tar(tmp_path / "tars", files, pieces)
    videos, notes = open_videos(str(tmp_path / "tars"), tmp_path / "tables")
    assert notes == []
    videos = pickle.loads(pickle.dumps(videos))
    for path in files:
        found = videos.find(path.name, "total_part1")
        assert isinstance(found, Stored)
        assert found.name == f"total_part1/total_part1/{path.name}"
        assert found.read() == path.read_bytes()
    assert videos.find("none.mp4") is None
    assert videos.find("../files/v0.mp4") is None
    crossing = [len(videos.find(path.name).pieces) for path in files]
    assert (max(crossing) > 1) == (pieces > 1)


def test_ten_pieces_without_leading_zeros_are_in_order(tmp_path):
    files = contents(tmp_path / "files")
    for number, path in enumerate(write_split_tar(tmp_path / "tars", files, 11)):
        path.rename(path.with_name(f"total_part1.tar.split.{number}"))
    videos, notes = open_videos(str(tmp_path / "tars"), tmp_path / "tables")
    assert notes == []
    assert all(videos.find(path.name).read() == path.read_bytes() for path in files)


def test_a_tar_cut_in_the_middle_keeps_all_before_with_one_sentence(tmp_path):
    files = contents(tmp_path / "files")
    (whole,) = write_split_tar(tmp_path / "tars", files, 1)
    data = whole.read_bytes()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = tar.getmembers()
    cuts = {
        members[6].offset_data + 100: 6,  # within a file
        members[6].offset + 200: 6,  # within a header
        members[6].offset: 6,  # between two files
        members[0].offset_data + 5: 0,
    }
    for cut, count in cuts.items():
        whole.write_bytes(data[:cut])
        videos, notes = open_videos(str(tmp_path / "tars"), tmp_path / "tables")
        assert len(notes) == 1, cut
        said = f"total_part1.tar is not whole, it ends in the middle; the {count} files before are used."
        assert notes[0].endswith(said)
        found = [videos.find(path.name) for path in files]
        assert [file is not None for file in found] == [n < count for n in range(9)]
        assert all(file.read() == path.read_bytes() for file, path in zip(found[:count], files, strict=False))


def test_a_piece_that_is_missing_ends_the_tar(tmp_path):
    files = contents(tmp_path / "files")
    paths = write_split_tar(tmp_path / "tars", files, 4)
    paths[2].unlink()
    videos, notes = open_videos(str(tmp_path / "tars"), tmp_path / "tables")
    assert len(notes) == 1
    assert "the piece before total_part1.tar.split.003 is missing; the " in notes[0]
    there = [path for path in files if videos.find(path.name) is not None]
    assert 2 <= len(there) < 9
    assert all(videos.find(path.name).read() == path.read_bytes() for path in there)


def test_a_tar_damaged_in_the_middle_and_one_that_is_none(tmp_path):
    files = contents(tmp_path / "files", 40)
    (whole,) = write_split_tar(tmp_path / "tars", files, 1)
    data = bytearray(whole.read_bytes())
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        at = tar.getmembers()[5].offset
    data[at : at + 512] = b"x" * 512
    whole.write_bytes(data)
    _, notes = open_videos(str(tmp_path / "tars"), tmp_path / "tables")
    assert f"it is damaged at byte {at}" in notes[0]
    assert "the 5 files before are used." in notes[0]
    whole.write_bytes(b"no tar" * 1000)
    _, notes = open_videos(str(tmp_path / "tars"), tmp_path / "tables")
    assert len(notes) == 1
    assert "the 0 files before are used." in notes[0]


def test_the_table_is_made_once_and_again_when_a_tar_changes(tmp_path):
    files = contents(tmp_path / "files")
    write_split_tar(tmp_path / "tars", files[:4])
    open_videos(str(tmp_path / "tars"), tmp_path / "tables")
    before = (tmp_path / "tables" / "videos.sqlite").stat().st_mtime_ns
    open_videos(str(tmp_path / "tars"), tmp_path / "tables")
    assert (tmp_path / "tables" / "videos.sqlite").stat().st_mtime_ns == before
    write_split_tar(tmp_path / "tars", files)
    videos, _ = open_videos(str(tmp_path / "tars"), tmp_path / "tables")
    assert videos.find("v8.mp4").read() == files[8].read_bytes()
    assert [path.name for path in (tmp_path / "tables").iterdir()] == ["videos.sqlite"]


def test_folders_and_urls(tmp_path):
    files = contents(tmp_path / "total_part1")
    local, _ = open_videos(str(tmp_path), tmp_path / "tables")
    assert local.find("v3.mp4", "total_part1") == files[3]
    assert local.find("total_part1/v3.mp4") == files[3]
    assert local.find("v3.mp4", "total_part2") is None
    memory = fsspec.filesystem("memory")
    for path in files:
        memory.pipe(f"/videos_test/a/{path.name}", path.read_bytes())
    tars = write_split_tar(tmp_path / "tars", files, 3)
    for path in tars:
        memory.pipe(f"/tars_test/{path.name}", path.read_bytes())
    try:
        for root in ("memory://videos_test", "memory://tars_test"):
            remote, notes = open_videos(root, tmp_path / "tables")
            assert notes == []
            assert all(remote.find(path.name).read() == path.read_bytes() for path in files)
            assert remote.find("none.mp4") is None
    finally:
        memory.rm("/videos_test", recursive=True)
        memory.rm("/tars_test", recursive=True)


@pytest.mark.parametrize(
    ("root", "message"),
    [
        ("none", r"none does not exist; expected the folder, tar or URL of the videos\.$"),
        ("file.txt", r"file\.txt is neither a folder nor a tar"),
        ("memory://nothing_here", r"memory://nothing_here (can't be listed|holds no file)"),
    ],
)
def test_roots_that_hold_nothing(tmp_path, monkeypatch, root, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").write_text("x")
    with pytest.raises(ValueError, match=message):
        open_videos(root, tmp_path / "tables")


def test_a_joined_file_reads_as_one(tmp_path):
    data = os.urandom(1000)
    paths = [tmp_path / str(n) for n in range(4)]
    for path, (low, high) in zip(paths, [(0, 1), (1, 400), (400, 400), (400, 1000)], strict=True):
        path.write_bytes(data[low:high])
    with JoinedFile([str(path) for path in paths]) as file:
        assert io.BufferedReader(file).read() == data
    with JoinedFile([str(path) for path in paths]) as file:
        for start, length in ((0, 1000), (0, 1), (390, 20), (1, 399), (999, 1)):
            joined = Stored("x", file.pieces(start, length))
            assert joined.read() == data[start : start + length]
    short = Stored("x", ((str(paths[1]), 390, 20),))
    with pytest.raises(ValueError, match=r"x is cut: 9 of 20 bytes are in "):
        short.read()
