"""Copies of checkpoints on a real S3 server and in a folder: what counts as one, what goes, what is taken back."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import fsspec
import pytest
from typer.testing import CliRunner

from megalm.checkpoint.checkpointer import CheckpointWriter
from megalm.checkpoint.copies import copy_process, copy_store, fetch
from megalm.checkpoint.copies.copy_process import Copier, CopyHandle, CopyRequest, copy_now
from megalm.checkpoint.copies.copy_status import CopyReader, CopyStatus
from megalm.checkpoint.copies.copy_store import CopyStore, LostCopy, copies_due
from megalm.checkpoint.copies.fetch import check_copy_place, fetch_newest, restore_run_files
from megalm.checkpoint.discovery import ResumedFrom, list_checkpoints
from megalm.checkpoint.manifest import MANIFEST, set_status
from megalm.checkpoint.retention import Retention
from megalm.cli.checkpoint import app
from megalm.communicator import SingleProcessCommunicator
from megalm.errors import CheckpointError, ConfigError
from tests import s3_server
from tests.checkpoint_files import assert_holds, fragments, save
from tests.messages import assert_names

ALL = Retention()


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with s3_server.s3_server() as port:
        yield port


@pytest.fixture
def s3(port: int, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """An empty place in S3."""
    s3_server.use(monkeypatch, port)
    bucket = "b" + str(abs(hash(request.node.nodeid)))
    s3_server.make_bucket(bucket)
    return f"s3://{bucket}/backup"


@pytest.fixture
def mounted(tmp_path: Path) -> str:
    (tmp_path / "mounted").mkdir()
    return str(tmp_path / "mounted")


@pytest.fixture(params=["s3", "folder"])
def place(request: pytest.FixtureRequest) -> str:
    """An empty place for copies."""
    if request.param == "s3":
        return request.getfixturevalue("s3")
    return request.getfixturevalue("mounted")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "mine"
    (folder / "checkpoints").mkdir(parents=True)
    return folder


def steps(store: CopyStore) -> list[int]:
    return [entry.step for entry in store.entries()]


def wait_for(true: object, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_copy_comes_back_as_it_was(place: str, run: Path, tmp_path: Path) -> None:
    path, store = save(run / "checkpoints", 10), CopyStore(place, "mine")
    assert steps(store) == []
    sent: list[int] = []
    store.upload(path, sent.append)
    (entry,) = store.entries()
    assert entry.manifest is not None
    assert sum(sent) == entry.manifest.bytes
    assert_holds(store.download(entry, tmp_path / "back"), 10)
    assert [path.name for path in (tmp_path / "back").iterdir()] == ["step-00000010"]


def test_half_a_copy_does_not_count_and_is_completed(place: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, store = save(run / "checkpoints", 10), CopyStore(place, "mine")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store, "_put_bytes", killed)
        with pytest.raises(KeyboardInterrupt):
            store.upload(path)
    assert steps(store) == []
    assert store.upload(path) == 0, "the files are there; only the manifest was missing"
    assert steps(store) == [10]
    place_of = store._place(copy_store.CHECKPOINTS, path.name)
    store._files.rm_file(f"{place_of}/{MANIFEST}")
    assert store.delete_partial([path.name]) == []
    assert store.delete_partial([]) == [path.name]
    assert store._list(copy_store.CHECKPOINTS) == {}


def test_what_arrives_damaged_is_no_copy(
    place: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, store = save(run / "checkpoints", 10), CopyStore(place, "mine")

    def flip(files: fsspec.AbstractFileSystem, source: Path, target: str, *_: object) -> None:
        content = bytearray(source.read_bytes())
        content[-1] ^= 1
        files.pipe_file(target, bytes(content))

    with monkeypatch.context() as patch:
        patch.setattr(copy_store, "put_file", flip)
        patch.setattr(store, "_is_local", False)
        with pytest.raises(LostCopy):
            store.upload(path)
        assert steps(store) == []
    store.upload(path)
    shard = store._place(copy_store.CHECKPOINTS, path.name, "rank-00000.safetensors")
    flip(store._files, path / "rank-00000.safetensors", shard)
    (entry,) = store.entries()
    with pytest.raises(CheckpointError) as error:
        store.download(entry, tmp_path / "back")
    assert_names(error.value, "rank-00000.safetensors", "step-00000010")
    assert list_checkpoints(tmp_path / "back") == []
    path = save(run / "checkpoints", 20)
    (path / "rank-00000.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError):
        store.upload(path)
    assert steps(store) == [10]


def test_the_server_s_own_hash_is_enough(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one part and of several: nothing is read back."""
    files, root = copy_store.open_filesystem(s3)
    for count in (1000, 13 << 20):
        path = tmp_path / str(count)
        path.write_bytes(bytes(range(200)) * (count // 200))
        digest = copy_store._digest(path, 5 << 20)
        copy_store.put_file(files, path, f"{root}/{count}", 5 << 20, lambda _: None)
        tag = copy_store.RemoteVersion.of(files.info(f"{root}/{count}")).tag
        assert ("-" in tag) == (count > 10 << 20)
        assert tag in digest.tags
        path.write_bytes(path.read_bytes()[:-1] + b"?")
        assert tag not in copy_store._digest(path, 5 << 20).tags


def test_copies_have_their_own_retention(place: str, run: Path) -> None:
    request = CopyRequest(run, place, Retention(keep_last=2))
    for step in (10, 20, 30):
        save(run / "checkpoints", step)
        copy_now(request, 5.0, lambda _: None)
    assert steps(request.store()) == [20, 30]
    assert set(CopyStatus.read(run).copied) == {"step-00000020", "step-00000030"}
    save(run / "checkpoints", 5, attempt=2)
    copy_now(request, 5.0, lambda _: None)
    assert steps(request.store()) == [30, 5], "the run was set back: those written last stay"


def test_the_newest_goes_first_and_what_would_not_be_kept_stays_here(run: Path) -> None:
    for step in (10, 20, 30, 40):
        save(run / "checkpoints", step)
    set_status(run / "checkpoints" / "step-00000040", "bad", "why")
    local = list_checkpoints(run / "checkpoints")
    due = lambda copied, keep: [entry.step for entry in copies_due(local, copied, keep, None)]  # noqa: E731
    assert due([], ALL) == [30, 20, 10]
    assert due([], Retention(2)) == [30, 20]
    assert due(local[:2], ALL) == [30]
    assert due(local[:3], ALL) == []


def test_a_mark_reaches_the_copy(place: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(run / "checkpoints", 10)
    request = CopyRequest(run, place, ALL)
    copy_now(request, 5.0, lambda _: None)
    set_status(path, "bad", "spoilt")
    monkeypatch.setattr(copy_store, "_digest", None)  # no file is read again
    copy_now(request, 5.0, lambda _: None)
    (entry,) = request.store().entries()
    assert (entry.status, entry.manifest and entry.manifest.status_reason) == ("bad", "spoilt")


def test_a_dead_server_is_tried_again_and_training_never_waits(
    port: int, s3: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real process, with a network that is down, slow, and well again."""
    with s3_server.bad_network(port) as network:
        network.is_up = False
        s3_server.use(monkeypatch, network.port)
        save(run / "checkpoints", 10)
        (run / "metrics.jsonl").write_text('{"kind":"train"}\n{"kind":"tr')
        handle = CopyHandle(CopyRequest(run, s3, ALL, ("metrics.jsonl", "none.json")))
        try:
            wait_for(lambda: CopyStatus.read(run).problem)
            started = time.monotonic()
            assert handle.new_copies() == {}
            assert len(handle.new_warnings()) == 1
            assert handle.new_warnings() == [], "warned of once"
            assert time.monotonic() - started < 1.0
            network.is_up, network.bytes_per_second = True, 20_000.0
            wait_for(lambda: CopyStatus.read(run).copying == "step-00000010", 60.0)
            started = time.monotonic()
            assert handle.in_work() == [run / "checkpoints" / "step-00000010"]
            handle.new_copies()
            assert time.monotonic() - started < 1.0
            network.bytes_per_second = None
            assert handle.finish(60.0, lambda _: None) == []
            handle._next_read = 0.0
            assert list(handle.new_copies()) == ["step-00000010"]
        finally:
            handle.process.kill()
            handle.process.wait()
        s3_server.use(monkeypatch, port)
        store = CopyStore(s3, "mine")
        assert steps(store) == [10]
        assert store.read_run_file("metrics.jsonl") == b'{"kind":"train"}\n', "whole lines only"
        assert s3_server.files_holding(run, "a-secret-access-key") == []


def test_the_end_of_a_run_waits_for_an_explicit_time(s3: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    s3_server.use(monkeypatch, 9)  # nothing listens there
    save(run / "checkpoints", 10)
    handle = CopyHandle(CopyRequest(run, s3, ALL))
    try:
        started = time.monotonic()
        assert handle.finish(1.0, lambda _: None) != []
        assert time.monotonic() - started < 5.0
        assert handle.process.poll() is None, "it goes on alone for a while"
    finally:
        handle.process.kill()
        handle.process.wait()


def test_warnings_come_once_and_then_rarely(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = CopyReader(run)

    def told(**status: object) -> int:
        CopyStatus(address="there", **status).write(run)  # type: ignore[arg-type]
        reader._next_read = 0.0
        return len(reader.new_warnings())

    assert told(problem="down") == 1
    assert told(problem="still down") == 0
    assert told() == 0
    assert told(problem="down again") == 1
    reader._remind_at -= 3600.0
    assert told(problem="down again") == 1
    assert told(notices=("one is damaged",)) == 1
    assert told(notices=("one is damaged",)) == 0


def test_local_retention_leaves_what_is_being_copied(run: Path) -> None:
    checkpoints, in_work = run / "checkpoints", [run / "checkpoints" / "step-00000010"]
    writer = CheckpointWriter(
        checkpoints, Retention(1), SingleProcessCommunicator(), asynchronous=False, in_use=lambda: in_work
    )
    for step in (10, 20, 30):
        writer.begin(step, fragments(step), {"attempt": 1}, [])
    assert [entry.step for entry in list_checkpoints(checkpoints)] == [10, 30]
    writer._prune()  # as a save does that lacks the space
    assert [entry.step for entry in list_checkpoints(checkpoints)] == [30]


def test_one_that_is_deleted_meanwhile_is_passed_over(mounted: str, run: Path) -> None:
    for step in (10, 20):
        save(run / "checkpoints", step)
    copier = Copier(CopyRequest(run, mounted, ALL))
    upload = copier._store.upload

    def deleted_first(path: Path, *more: object) -> int:
        if path.name == "step-00000020":
            shutil.rmtree(path)
        return upload(path, *more)  # type: ignore[arg-type]

    copier._store.upload = deleted_first  # type: ignore[method-assign]
    while copier.copy_next():
        pass
    assert steps(CopyStore(mounted, "mine")) == [10]
    assert copier.status.problem == ""


def test_resuming_takes_the_newer_of_both(place: str, run: Path, tmp_path: Path) -> None:
    told: list[str] = []
    for step, attempt in ((10, 1), (20, 1), (15, 2)):
        save(run / "checkpoints", step, attempt=attempt)
    (run / "config.yaml").write_text("a: 1\n")
    (run / "metrics.jsonl").write_text("{}\n{}\n")
    copy_now(CopyRequest(run, place, ALL, ("config.yaml", "metrics.jsonl")), 5.0, lambda _: None)
    assert fetch_newest(run, place, None, told.append) is None, "all are here"
    lost = tmp_path / "elsewhere" / "mine"
    assert restore_run_files(lost, place)
    assert (lost / "config.yaml").read_text() == "a: 1\n"
    found = fetch_newest(lost, place, None, told.append)
    assert found == lost / "checkpoints" / "step-00000015", "the last that was written"
    assert_holds(found, 15)
    old = tmp_path / "old" / "mine"
    save(old / "checkpoints", 20)
    (old / "metrics.jsonl").write_text("{}\n")
    assert fetch_newest(old, place, None, told.append) == old / "checkpoints" / "step-00000015"
    assert (old / "metrics.jsonl").read_text() == "{}\n{}\n", "it goes on where this one ended"
    shutil.rmtree(old / "checkpoints" / "step-00000015")
    assert fetch_newest(old, place, ResumedFrom(old / "checkpoints" / "step-00000020", 3), told.append) is None


def test_a_damaged_copy_is_passed_over_with_a_warning(s3: str, run: Path, tmp_path: Path) -> None:
    for step in (10, 20):
        save(run / "checkpoints", step)
    copy_now(CopyRequest(run, s3, ALL), 5.0, lambda _: None)
    store, told = CopyStore(s3, "mine"), list[str]()
    s3_server.put(store._place(copy_store.CHECKPOINTS, "step-00000020", "rank-00000.safetensors"), b"x")
    lost = tmp_path / "elsewhere" / "mine"
    assert fetch_newest(lost, s3, None, told.append) == lost / "checkpoints" / "step-00000010"
    s3_server.put(store._place(copy_store.CHECKPOINTS, "step-00000010", MANIFEST), b"{}")
    with pytest.raises(CheckpointError) as error:
        fetch_newest(tmp_path / "third" / "mine", s3, None, told.append)
    assert_names(error.value, "step-00000010", "step-00000020")


def test_a_server_that_does_not_answer_stops_only_who_needs_it(
    s3: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3_server.use(monkeypatch, 9)
    monkeypatch.setattr(fetch, "_PATIENCE_SECONDS", 0.1)
    save(run / "checkpoints", 10)
    told: list[str] = []
    assert fetch_newest(run, s3, None, told.append) is None
    assert any(line.startswith("WARNING") for line in told)
    check_copy_place(s3, run.parent, "mine", resume=True)
    for refused, kind in (
        (lambda: fetch_newest(tmp_path / "lost", s3, None, told.append), CheckpointError),
        (lambda: restore_run_files(tmp_path / "lost", s3), ConfigError),
        (lambda: check_copy_place(s3, run.parent, "mine", resume=False), ConfigError),
        (lambda: check_copy_place(s3, run.parent, "other", resume=True), ConfigError),
    ):
        with pytest.raises(kind) as error:
            refused()
        assert_names(error.value, "checkpoint.copy_to")
        assert "\n" not in str(error.value)


def test_a_place_that_cannot_be_is_refused_before_training(
    s3: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusal(address: str, resume: bool = False, name: str | None = "mine") -> str:
        with pytest.raises(ConfigError) as error:
            check_copy_place(address, run.parent, name, resume)
        assert "\n" not in str(error.value)
        return str(error.value)

    check_copy_place(s3, run.parent, "mine", resume=False)
    missing = tmp_path / "not mounted"
    assert_names(refusal(str(missing)), "checkpoint.copy_to")
    assert not missing.exists()
    save(run / "checkpoints", 10)
    assert_names(refusal("s3://no-such-bucket/x", resume=True), "checkpoint.copy_to", "s3://no-such-bucket/x")
    copy_now(CopyRequest(run, s3, ALL), 5.0, lambda _: None)
    assert_names(refusal(s3), "step-00000010", "run.name", "--resume")
    check_copy_place(s3, run.parent, "mine", resume=True)
    check_copy_place(s3, run.parent, "other", resume=False)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    s3_server.forget_client()
    assert "credentials" in refusal(s3, resume=True)


def test_only_one_copies_at_a_time(mounted: str, run: Path) -> None:
    request = CopyRequest(run, mounted, ALL)
    with copy_process.take_lock(run / copy_process.LOCK_FILE), pytest.raises(CheckpointError):
        copy_now(request, 1.0, lambda _: None)


class _Refusing(BaseHTTPRequestHandler):
    def do_PUT(self) -> None:
        self.send_response(403)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD = do_PUT

    def log_message(self, *_: object) -> None:
        return


def test_a_server_that_refuses_is_one_line(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with HTTPServer(("127.0.0.1", 0), _Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        s3_server.use(monkeypatch, server.server_port)
        save(run / "checkpoints", 10)
        for resume in (True, False):
            with pytest.raises(ConfigError) as error:
                check_copy_place("s3://models/backup", run.parent, "mine", resume)
            assert_names(error.value, "checkpoint.copy_to", "s3://models/backup")
            assert "\n" not in str(error.value)
        with pytest.raises(CheckpointError) as failure:
            copy_now(CopyRequest(run, "s3://models/backup", ALL), 60.0, lambda _: None)
        assert_names(failure.value, "s3://models/backup/mine")
        server.shutdown()


def test_the_commands_copy_list_and_fetch(place: str, run: Path, tmp_path: Path) -> None:
    def megalm(*words: object) -> str:
        result = CliRunner().invoke(app, [*map(str, words)], catch_exceptions=False)
        return result.output

    for step in (10, 20):
        save(run / "checkpoints", step)
    (run / "config.yaml").write_text("a: 1\n")
    copied = megalm("copy", run, place)
    assert_names(copied, "step-00000010", "step-00000020")
    assert megalm("list", run).count("copied") == 2
    if place.startswith("s3"):
        assert_names(megalm("list", f"{place}/mine"), "step-00000010", "step-00000020")
    fetched = tmp_path / "elsewhere" / "mine"
    megalm("fetch", f"{place}/mine", "10", "--root", tmp_path / "elsewhere")
    assert_holds(fetched / "checkpoints" / "step-00000010", 10)
    assert (fetched / "config.yaml").read_text() == "a: 1\n"
    for wrong in (("fetch", f"{place}/mine", "10", "--root", tmp_path / "elsewhere"), ("fetch", f"{place}/mine", "30")):
        with pytest.raises(CheckpointError):
            megalm(*wrong)
