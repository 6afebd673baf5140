"""Whose an MLflow run is after a run folder was copied or moved, by the files alone; MLflow's part is an e2e test."""

from __future__ import annotations

from pathlib import Path

import pytest

from megalm.errors import ConfigError
from megalm.tracking.mlflow_mirror.sync_state import MirrorState, Owner
from tests.messages import assert_names


@pytest.mark.parametrize(
    ("folder", "host", "same_inode", "is_copy"),
    [
        ("gone/runs/mine", "here", False, False),  # moved to another disk of this machine
        ("gone/runs/mine", "another", True, False),  # moved on a disk that both machines have
        ("gone/runs/mine", "another", False, True),  # it cannot be seen from here
        ("shared/mine", "another", False, False),  # its root is seen, and it is not there
    ],
)
def test_a_folder_recorded_on_another_host(
    folder: str, host: str, same_inode: bool, is_copy: bool, tmp_path: Path
) -> None:
    here = tmp_path / "mine"
    here.mkdir()
    (tmp_path / "shared").mkdir()
    mine = Owner.of(here)
    recorded = Owner(
        folder=str(tmp_path / folder),
        inode=mine.inode if same_inode else mine.inode + 1,
        host=mine.host if host == "here" else "another",
    )
    state = MirrorState(owner=recorded, tracking_uri="http://server", default_store=False)
    assert state.original_of(here) == (tmp_path / folder if is_copy else None)
    by_default_store = state.model_copy(update={"default_store": True})
    assert by_default_store.original_of(here) is None  # that store is beside the folder


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("{}", "key"),
        ('{"key": "k", "offset": "many"}', "offset"),
        ('{"key": "k", "offset": -1}', "offset"),
        ('{"key": "k", "owner": {"folder": 1}}', "owner"),
        ('{"key": "k", "artifacts": ["a"]}', "artifacts"),
        ("[1, 2]", "mlflow.json"),
        ("\xff", "mlflow.json"),
    ],
)
def test_a_damaged_state_is_one_line(text: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / "mlflow.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError) as error:
        MirrorState.load(path)
    assert_names(error.value, path, name)
    assert "\n" not in str(error.value)
