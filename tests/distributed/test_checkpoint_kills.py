"""A process is killed at every moment of saving, replacing and pruning: nothing that was complete is lost.

The death of all ranks leaves what the disk holds at that moment: a copy of it, made before each change of a file. What
the other rank does after one has died takes real kills, at a part of the moments.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from megalm.checkpoint.checkpointer import CheckpointWriter
from megalm.checkpoint.discovery import complete_checkpoints, resume_candidates
from megalm.checkpoint.retention import Retention, tidy
from tests.checkpoint_files import assert_holds, fragments, save
from tests.kill_points import counted, left_of
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

# (step, attempt): a first one, one that makes the first superfluous, that step again after the run was set back.
STORY = ((10, 1), (20, 1), (20, 2), (30, 2))
KEEP_LAST = 1
EVERY = (7, 1)  # n-th moment of a rank: of rank 0 there are copies of all
AT_A_TIME = 4  # pairs of ranks: most of what one does is waiting


def _tell_the_story(
    comm: Any, device: Any, place: Path, behind: bool, victim: int, die_at: int | None, copies: Path | None = None
) -> list[str]:
    """Save as a run does; rank `victim` dies before its `die_at`-th change of a file. The changes of this rank.

    Args:
        copies: of the folder before each change by rank 0, which alone renames and removes; each under its number.
    """
    config = place / "config.yaml"
    writer = CheckpointWriter(place / "checkpoints", Retention(KEEP_LAST), comm, behind)

    def keep(number: int) -> None:
        shutil.copytree(place, copies / str(number))

    is_kept = copies is not None and comm.rank == 0
    with counted(die_at if comm.rank == victim else None, before=keep if is_kept else None) as calls:
        for number, (step, attempt) in enumerate(STORY):
            parts = fragments(step, comm.rank, comm.size)
            path = writer.begin(step, parts, {"attempt": attempt}, [config])
            for part in parts:
                part.tensor.zero_()  # training goes on
            writer.completed(wait=True)
            if number == 1:
                writer.mark_best(path)
            if comm.rank == 0:
                (place / "progress").write_text(str(number + 1))
    return list(calls)


def _fresh(place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    (place / "config.yaml").write_text("train: {steps: 5}\n")


def _check(place: Path) -> None:
    """What was complete is there and whole, without help; then a new job tidies and saves."""
    checkpoints = place / "checkpoints"
    done = int((place / "progress").read_text()) if (place / "progress").exists() else 0
    known = STORY[max(done - 1, 0) : done + 1]
    assert all(found.name.startswith("step-") for found in complete_checkpoints(checkpoints))
    tidy(checkpoints)
    whole = resume_candidates(checkpoints, "auto")
    assert len(whole) >= min(done, KEEP_LAST), left_of(checkpoints)
    for entry in whole:
        assert entry.manifest is not None, entry.problem
        assert_holds(entry.path, entry.step)
    if done:
        newest = whole[0]
        assert (newest.step, newest.attempt) in known, (newest.step, known)
    left = {path.name for path in checkpoints.iterdir()} if checkpoints.exists() else set()
    assert left <= {"latest", "best", *(entry.path.name for entry in whole)}, left
    assert_holds(save(checkpoints, 40, attempt=3), 40)
    assert (checkpoints / "latest").read_text() == "step-00000040\n"


Story = tuple[bool, list[list[str]], Path]


@pytest.fixture(scope="module", params=["at once", "behind"])
def story(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Story:
    """The way of writing, the changes of files of each rank in an undisturbed run, and rank 0's copies before them."""
    behind = request.param == "behind"
    folder = tmp_path_factory.mktemp("whole")
    place, copies = folder / "run", folder / "copies"
    _fresh(place)
    calls = run_ranks(2, _tell_the_story, place, behind, 0, None, copies)
    assert left_of(place / "checkpoints") == ["best", "latest", "step-00000020", "step-00000030"]
    for step in (20, 30):
        assert_holds(place / "checkpoints" / f"step-{step:08d}", step)
    return behind, calls, copies


def _moments(calls: list[str]) -> list[int]:
    """Of each row of writes, which go into a file that has no name yet, the first and the last; all others."""
    alike = [{*calls[max(at - 1, 0) : at + 2]} == {"write"} for at in range(len(calls))]
    return [at for at, is_within in enumerate(alike) if not is_within]


def test_every_moment_leaves_what_was_complete(story: Story) -> None:
    _, calls, copies = story
    assert len(_moments(calls[0])) > 100
    for moment in _moments(calls[0]):
        with _explained(calls[0], moment, copies / str(moment)):
            _check(copies / str(moment))


@contextmanager
def _explained(calls: list[str], moment: int, place: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        left = left_of(place / "checkpoints")
        raise AssertionError(f"killed before {calls[moment]}, change {moment}: {left}") from error


@pytest.mark.parametrize("victim", [0, 1])
def test_one_rank_is_killed(story: Story, victim: int, tmp_path: Path) -> None:
    behind, calls, _ = story
    assert len(calls[victim]) > 40, calls[victim]

    def kill(moment: int) -> None:
        place = tmp_path / str(moment)
        _fresh(place)
        with pytest.raises(AssertionError, match=f"rank {1 - victim} of 2"):  # it lost its peer
            run_ranks(2, _tell_the_story, place, behind, victim, moment)
        with _explained(calls[victim], moment, place):
            _check(place)

    with ThreadPoolExecutor(AT_A_TIME) as pool:
        moments = _moments(calls[victim])[:: EVERY[victim] * (3 if behind else 1)]
        assert len(list(pool.map(kill, moments))) == len(moments)


def test_everything_is_on_disk_before_it_has_a_name(story: Story) -> None:
    """The order of calls that a power cut would test: each file synced, then its name, then its folder."""
    calls = story[1]
    others = "open write write " + "write " * 9 + "flush fsync"
    assert " ".join(calls[1]) == " ".join([others] * len(STORY))
    one_file = "open write flush fsync replace open fsync"  # the last two: its folder
    copy = "open open write flush fsync replace"  # the first reads; the manifest syncs its folder
    first = f"mkdir open fsync mkdir {others} {copy} {one_file} rename open fsync {one_file}"
    assert " ".join(calls[0]).startswith(first), calls[0]
