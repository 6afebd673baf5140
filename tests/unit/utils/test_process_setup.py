"""Standard output whose reader has gone, a user without a home, a clock that somebody sets."""

from __future__ import annotations

import io
import os
import pwd
import signal
import time
from pathlib import Path

import pytest

from megalm.data.builder.stdlib_corpus import default_cache_dir
from megalm.errors import ConfigError
from megalm.train.lifecycle.time_limits import process_start
from megalm.utils.process_setup import _Output, begin_under_launcher, code_for_launcher
from tests.messages import assert_names


def test_what_nobody_reads_is_dropped() -> None:
    read, write = os.pipe()
    os.close(read)
    with io.TextIOWrapper(io.BufferedWriter(_Output(write, "w"))) as output:
        for _ in range(3):
            output.write("x" * 100_000)
            output.flush()


def test_a_full_disk_under_the_output_is_reported_once() -> None:
    raw = _Output(os.open("/dev/full", os.O_WRONLY), "w")
    assert raw.write(b"") == 0
    output = io.TextIOWrapper(io.BufferedWriter(raw))
    output.write("x")
    with pytest.raises(OSError, match="standard output"):
        output.flush()
    output.close()


def test_a_user_without_a_home_is_named_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(user: int) -> None:
        raise KeyError(user)

    for name in ("HOME", "MEGALM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(ConfigError) as refused:
        default_cache_dir()
    assert_names(refused.value, "data.cache", "HOME", "XDG_CACHE_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert default_cache_dir() == Path("/cache/megalm")


def test_the_age_of_the_process_does_not_change_with_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    before, clock = process_start(), time.time
    assert 0 <= time.monotonic() - before < 3600
    monkeypatch.setattr(time, "time", lambda: clock() - 7200)
    assert abs(process_start() - before) < 60


def test_torchrun_is_reported_only_of_what_a_restart_can_mend(tmp_path: Path) -> None:
    path = tmp_path / "end"
    told = {"MEGALM_END_FILE": str(path)}
    assert [code_for_launcher(code, told) for code in (0, 1, 137)] == [0, 1, 137]
    assert not path.exists()
    for code in (2, 75):
        assert code_for_launcher(code, told) == 0
        assert int(path.read_text()) == code
        assert code_for_launcher(code, {}) == code, "any other launcher passes it on"
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        begin_under_launcher({})
        assert (path.exists(), signal.getsignal(signal.SIGUSR1)) == (True, signal.SIG_IGN)
        begin_under_launcher(told)
        assert (path.exists(), signal.getsignal(signal.SIGUSR1)) == (False, signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGUSR1, before)
