"""Shards built apart and merged: as plain processes, and as an array with a dependent merge on a real Slurm."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megalm.data.analysis.dataset_info import verify
from megalm.data.builder.build_plan import BuildOptions
from megalm.data.builder.builder import build_files
from megalm.data.builder.dedup import Dedup
from megalm.data.builder.stdlib_corpus import stdlib_documents
from megalm.data.tokenizers.tokenizer import ByteTokenizer
from tests.messages import assert_names
from tests.slurm_cluster import SlurmCluster

pytestmark = pytest.mark.e2e
SCRIPT = Path(__file__).resolve().parents[2] / "slurm" / "build_dataset.sh"
SHARDS = 3
JOB_SECONDS = 300.0


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files in a folder with a space in its name; one is larger than a unit of work."""
    folder = tmp_path_factory.mktemp("text of ours")
    texts = [document.text for document in stdlib_documents()]
    for name, part in (("a.jsonl", texts[:500]), ("b.jsonl", texts[500:])):
        (folder / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> list[bytes]:
    prefix = tmp_path_factory.mktemp("whole") / "x"
    build_files([corpus], ByteTokenizer(), prefix)
    return contents(prefix)


def contents(prefix: Path) -> list[bytes]:
    return [Path(f"{prefix}{suffix}").read_bytes() for suffix in (".bin", ".idx")]


def words(corpus: Path, prefix: Path, *more: str) -> list[str]:
    build = ["--input", str(corpus), "--tokenizer", "bytes"]
    return [str(SCRIPT), "--shards", str(SHARDS), "--output-prefix", str(prefix), *more, "--", *build]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


def test_plain_processes(tmp_path: Path, corpus: Path, whole: list[bytes]) -> None:
    prefix = tmp_path / "data" / "x"
    done = run(words(corpus, prefix, "--local"))
    assert done.returncode == 0, done.stderr
    assert contents(prefix) == whole
    verify(prefix)
    documents = [json.loads(Path(f"{prefix}.shards/{shard}.json").read_text())["documents"] for shard in range(SHARDS)]
    assert min(documents) > 50
    again = run(words(corpus, prefix, "--local"))
    assert again.returncode == 0
    assert again.stdout.count("nothing to do") == SHARDS
    other = [*words(corpus, prefix, "--local"), "--no-append-eod"]
    assert (refused := run(other)).returncode == 2
    assert str(prefix) in refused.stderr
    assert run([*other, "--overwrite"]).returncode == 0
    assert prefix.with_name("x.bin").stat().st_size == len(whole[0]) - 2 * len(stdlib_documents())


@pytest.mark.parametrize("dedup", ["exact", "minhash"])
def test_copies_in_other_shards_are_left_out_too(tmp_path: Path, corpus: Path, dedup: Dedup) -> None:
    twice = tmp_path / "twice"
    twice.mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        (twice / name).write_bytes((corpus / name).read_bytes())
        (twice / f"z-{name}").write_bytes((corpus / name).read_bytes())
    single = BuildOptions(dedup=dedup)
    expected = build_files([twice], ByteTokenizer(), tmp_path / "single", single).reports[0]
    assert expected.removed[dedup] >= 804
    done = run([*words(twice, tmp_path / "x", "--local"), "--dedup", dedup])
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "x") == contents(tmp_path / "single")
    assert any(f"{expected.removed[dedup]:,} documents" in line and dedup in line for line in done.stdout.splitlines())


def test_words_that_look_like_options_are_values(tmp_path: Path) -> None:
    """Copies across shards stay, and an older dataset too."""
    folder = tmp_path / "my --dedup exact text --overwrite "
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"--overwrite": "a"}\n' * 40)
    build = ["--input", str(folder), "--tokenizer", "bytes", "--text-key", "--overwrite"]
    command = [str(SCRIPT), "--local", "--shards", "2", "--output-prefix", str(tmp_path / "x"), "--", *build]
    done = run(command)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "x.json").read_text())["documents"] == 40
    other = run([*command, "--no-append-eod"])
    assert other.returncode == 2
    assert "--overwrite" in other.stderr


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["--shards", "x", "--output-prefix", "y", "--", "z"], "--shards"),
        (["--shards", "2", "--", "z"], "--output-prefix"),
        (["--shards", "2", "--output-prefix", "y"], "build"),
        (["--shard", "2"], "--shard: "),
        (["--shards"], "--shards: "),
        (["--shards", "2", "--output-prefix"], "--output-prefix: "),
        (["--shards", "2", "--output-prefix", "y/", "--", "z"], "y/"),
        (["--shards", "2", "--output-prefix", "y", "--", "--split", "9,1"], "--split: "),
        (["--shards", "2", "--output-prefix", "y", "--", "--shard=0/2"], "--shard=0/2: "),
        (["--shards", "2", "--output-prefix", "y", "--", "--input", "-"], "--input -: "),
    ],
)
def test_refusals(command: list[str], said: str) -> None:
    refused = run([str(SCRIPT), *command])
    assert refused.returncode == 2
    assert said in refused.stderr


def submit(cluster: SlurmCluster, corpus: Path, prefix: Path, *more: str) -> tuple[str, str]:
    # In this locale bash quotes what is not ASCII in a way of its own, and Slurm runs the line by sh.
    command = ["env", "LC_ALL=C", f"PYTHON={sys.executable}", *words(corpus, prefix, "--slurm", "--time=5", *more)]
    said = cluster.ask(*command)
    found = re.search(r"array (\d+) builds 3 shards, job (\d+) merges", said)
    assert found, said
    return found[1], found[2]


@pytest.mark.slurm
@pytest.mark.parametrize(
    ("build", "named"),
    [
        (["--input", "nowhere.jsonl", "--tokenizer", "bytes"], "nowhere.jsonl"),
        (["--input", __file__, "--input-kind", ".txt", "--tokenizer", "nowhere.model"], "nowhere.model"),
        (["--input", __file__, "--input-kind", ".txt", "--tokenizer", "bytes", "--dedup", "near"], "near"),
    ],
)
def test_what_a_shard_would_refuse_is_not_queued(
    tmp_path: Path, slurm: SlurmCluster, build: list[str], named: str
) -> None:
    environment = {**slurm.environment, "PYTHON": sys.executable}
    command = [str(SCRIPT), "--shards", "2", "--output-prefix", str(tmp_path / "x"), "--", *build]
    refused = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert refused.returncode == 2
    assert_names(refused.stderr, named)
    assert not list(tmp_path.iterdir())
    assert not slurm.ask("squeue", "--noheader", "--name=build,merge")


@pytest.mark.slurm
def test_array_and_dependent_merge(tmp_path: Path, corpus: Path, whole: list[bytes], slurm: SlurmCluster) -> None:
    prefix = tmp_path / "it's naïve $HOME" / "x"
    _, merge = submit(slurm, corpus, prefix)
    job = slurm.wait(merge, JOB_SECONDS)
    logs = "\n".join(path.read_text() for path in Path(f"{prefix}.shards").glob("*.log"))
    assert job["JobState"] == "COMPLETED", logs
    assert contents(prefix) == whole
    verify(prefix)


@pytest.mark.slurm
def test_a_failed_shard_stops_the_merge_and_the_next_try_goes_on(
    tmp_path: Path, corpus: Path, whole: list[bytes], slurm: SlurmCluster
) -> None:
    prefix = tmp_path / "x"
    in_the_way = Path(f"{prefix}.shards/1.bin")
    in_the_way.parent.mkdir()
    in_the_way.write_bytes(b"")
    _, merge = submit(slurm, corpus, prefix)
    job = slurm.wait(merge, JOB_SECONDS)
    assert job["JobState"] == "CANCELLED"
    assert "1.bin" in Path(f"{prefix}.shards/build-1.log").read_text()
    assert not Path(f"{prefix}.bin").exists()
    in_the_way.unlink()
    _, merge = submit(slurm, corpus, prefix)
    assert slurm.wait(merge, JOB_SECONDS)["JobState"] == "COMPLETED"
    assert contents(prefix) == whole
    assert "nothing to do" in Path(f"{prefix}.shards/build-0.log").read_text()
