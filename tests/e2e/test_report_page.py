"""The page that a real run leaves, opened in a real browser: true numbers, no error, no word to anybody."""

from __future__ import annotations

import json
import re
import shutil
import sys
import urllib.parse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megalm.runs.metrics_log import Row, live_rows, read_metrics
from tests.e2e.conftest import SmallData
from tests.e2e.jobs import finish, job, pretrain

pytestmark = pytest.mark.e2e

# Between the step at which it is killed and the next checkpoint there is time for a slow kill.
STEPS, SAVED, KILLED = 42, 20, 21
# A proxy that is not there: what the browser would like to ask its makers stays here.
BROWSER = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--proxy-server=http://127.0.0.1:9", "--proxy-bypass-list=<-loopback>", "--enable-logging=stderr"),
)
BROWSERS_OWN_HOSTS = (".google.com", ".googleapis.com", ".gstatic.com")


@dataclass(frozen=True)
class Seen:
    """What a browser made of a page: its visible texts, what the console said, which addresses it asked for."""

    texts: list[str]
    console: list[str]
    asked: list[str]

    @property
    def text(self) -> str:
        return " ".join(self.texts)


@pytest.fixture(scope="module")
def run(
    require: Callable[[str, object, str], None], small_data: SmallData, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run that was killed after its first checkpoint, and then went on to its end."""
    require("chromium", shutil.which("chromium"), "no chromium; apt-get install -y --no-install-recommends chromium")
    folder = tmp_path_factory.mktemp("page")
    intervals = ("evaluate.interval_steps=10", f"checkpoint.interval_steps={SAVED}", f"sample.interval_steps={SAVED}")
    command = pretrain(*small_data.changed(*intervals, "run.name=mine", f"train.steps={STEPS}"))
    with job(folder, command) as started:
        started.wait_for_step(KILLED)
        started.kill()
    resumed = finish(folder, [*command, "--resume", "auto"])
    assert resumed.code == 0, resumed.explain()
    assert "runs/mine/report.html" in resumed.stdout
    return folder / "runs" / "mine"


@pytest.fixture(scope="module")
def seen(run: Path) -> Seen:
    return browse(run, run / "report.html")


def test_the_page_says_what_metrics_jsonl_says(run: Path, seen: Seen) -> None:
    rows = live_rows(read_metrics(run / "metrics.jsonl"))
    train, validation = of_kind(rows, "train"), of_kind(rows, "eval")
    environment = json.loads((run / "environment.json").read_text())
    assert f"step {STEPS} of {STEPS}" in seen.text
    assert f"Validation loss {validation[-1]['loss']:.4f} last, step {STEPS}" in seen.text
    best = min(row["loss"] for row in validation if not row["whole"])
    assert f"{best:.4f}" in seen.text
    assert f"Perplexity {validation[-1]['perplexity']:,.2f}" in seen.text
    assert f"Bits per byte {validation[-1]['bits_per_byte']:.3f}" in seen.text
    assert f"Training loss {train[-1]['loss']:.4f}" in seen.text
    assert f"Tokens {train[-1]['tokens']:,} {train[-1]['tokens'] / environment['parameters']:.2f} " in seen.text
    assert "2 attempts" in seen.text
    assert f"resume step {SAVED} attempt 2" in seen.text
    assert f"killed step {SAVED} attempt 1" in seen.text
    assert "withdrawn later" in seen.text  # steps after the checkpoint that the kill had made in vain
    checkpoints = seen.text.partition("Checkpoints")[2].partition("Samples")[0]
    for step in (SAVED, 2 * SAVED, STEPS):
        assert re.search(rf" {step} good [a-z\d., ]*{step * 16 * 64:,} [\d.]+ \wiB", checkpoints), checkpoints
    assert f"Step {STEPS} samples/step-{STEPS:08d}.txt" in seen.text
    assert environment["dataset_fingerprint"] in seen.text
    assert f"train.steps {STEPS} 400" in seen.text


def test_the_page_is_quiet_and_asks_nobody(seen: Seen) -> None:
    assert seen.console == []
    assert seen.asked == []


def test_what_would_be_noticed(run: Path) -> None:
    """The same page with a picture from elsewhere: refused by the page's own policy; asked for without it."""
    content = (run / "report.html").read_text(encoding="utf-8")
    doctored = run.parent / "doctored.html"
    with_picture = content.replace("<main>", '<main><img src="http://127.0.0.1:9/a.png" alt="">', 1)
    doctored.write_text(with_picture, encoding="utf-8")
    seen = browse(run, doctored)
    assert any("Content Security Policy" in line for line in seen.console)
    assert seen.asked == []
    doctored.write_text(re.sub(r"<meta http-equiv[^>]*>", "", with_picture), encoding="utf-8")
    assert browse(run, doctored).asked == ["http://127.0.0.1:9/a.png"]


def test_the_command_makes_the_page_again_without_torch(run: Path) -> None:
    program = (
        "import sys\nfrom megalm.cli.main import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit as leave:\n"
        "    print('LOADED', *sorted(sys.modules))\n    sys.exit(leave.code)"
    )
    written = finish(run.parent, [sys.executable, "-c", program, "report", run, "--output", run.parent / "again.html"])
    assert written.code == 0, written.explain()
    assert not {"torch", "deepspeed", "mlflow", "matplotlib"} & set(written.stdout.partition("LOADED")[2].split())
    made = re.compile(r"<footer>.*</footer>")
    first, again = (path.read_text(encoding="utf-8") for path in (run / "report.html", run.parent / "again.html"))
    assert made.sub("", first).count("</section>") == made.sub("", again).count("</section>") >= 8


def of_kind(rows: Sequence[Row], kind: str) -> list[Row]:
    return [row for row in rows if row["kind"] == kind]


def browse(run: Path, page: Path) -> Seen:
    profile, net_log = run.parent / "profile", run.parent / "net.json"
    command = ["chromium", *BROWSER, f"--user-data-dir={profile}", f"--log-net-log={net_log}", "--dump-dom"]
    seen = finish(run.parent, [*command, page.resolve().as_uri()], environment={"HOME": str(run.parent)})
    shutil.rmtree(profile, ignore_errors=True)
    assert seen.code == 0, seen.explain()
    texts = _Texts()
    texts.feed(seen.stdout)
    events = json.loads(net_log.read_text())["events"]
    addresses = {str(event["params"]["url"]) for event in events if "url" in event.get("params", {})}
    asked = sorted(
        url for url in addresses if not f".{urllib.parse.urlsplit(url).hostname}".endswith(BROWSERS_OWN_HOSTS)
    )
    return Seen(texts.texts, [line for line in seen.stderr.splitlines() if "CONSOLE" in line], asked)


class _Texts(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        self._inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag

    def handle_data(self, data: str) -> None:
        if data.strip() and self._inside not in ("style", "script"):
            self.texts.append(" ".join(data.split()))
