"""`megalm sweep`: a run for each combination of values, one after another, ranked at the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from megalm.cli.compare import read_runs
from megalm.cli.find_run import warn
from megalm.cli.jobs.run_words import RUN_WORDS, SplitCommand, run_arguments, split_launcher
from megalm.errors import EXIT_FAILED, EXIT_START_AGAIN, ConfigError
from megalm.planning.run_checks import check_run
from megalm.runs.run_settings import ANY_DEVICE
from megalm.sweeps.expansion import Sweep, read_sweep, root_of
from megalm.sweeps.local_runs import LocalRuns, Outcome
from megalm.sweeps.ranking import Ranking
from megalm.sweeps.sweep_folder import SweepFolder, find_sweep, state_of
from megalm.sweeps.sweep_report import (
    ranking_rows,
    read_ranking,
    send_sweep_result,
    verdict,
    write_sweep_page,
)
from megalm.tracking.compare_runs import incomparable
from megalm.utils.formatting import table
from megalm.utils.terminal import echo

_RANK_OPTIONS = ("--num_gpus", "--nproc_per_node", "--nproc-per-node")
_MORE_THAN_ONE_NODE = ("--hostfile", "--num_nodes", "--nnodes", "--include", "-H")


Command = SplitCommand


def command(
    context: typer.Context,
    swept: Annotated[
        list[str],
        typer.Argument(
            metavar="KEY=A,B,C|FILE.yaml|SWEEP... [-- COMMAND OF A RUN]",
            help="Values of keys, a YAML file of lists, or the name of a sweep that has begun.",
        ),
    ],
    name: Annotated[
        str | None, typer.Option("--name", help="The sweep's name. Default: the file's, or made of the keys.")
    ] = None,
    stop_at_failure: Annotated[
        bool, typer.Option("--stop-at-failure", help="Start no further run after one that failed.")
    ] = False,
    report_only: Annotated[
        bool, typer.Option("--report", help="Rank the runs that are there and write the page; start nothing.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command of each run; start nothing.")] = False,
    show_output: Annotated[
        bool, typer.Option("--verbose", help="Show what the runs print, which else goes to a file for each.")
    ] = False,
) -> None:
    """Start a run for each combination of values, rank the runs, and draw the effect of each value.

    What follows -- is the command of one run, as you would type it; without a launcher, `deepspeed
    launch/pretrain.py` is put before it. Keys that begin with deepspeed. change its JSON.

    The same line again, or `megalm sweep NAME`, runs what is missing. Ctrl-C saves the run in work and stops. A run
    that fails is named, and the next one starts.

    \b
    megalm sweep schedule.peak_learning_rate=3e-4,1e-3,3e-3 train.seed=1,2 -- train.steps=200
    megalm sweep deepspeed.optimizer.params.weight_decay=0,0.1 --name decay -- \\
        deepspeed --num_gpus 2 launch/pretrain.py --deepspeed_config ds_configs/zero2.json --config my.yaml
    megalm sweep decay --report
    """
    sweep, folder, launcher = _opened(swept, context.meta[RUN_WORDS], name, starts=not (report_only or dry_run))
    states = Counter(state_of(sweep.root / run.name) for run in sweep.runs)
    counts = " x ".join(f"{key} ({len(values)})" for key, values in sweep.axes.items())
    known = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    echo(f"sweep {folder.path}: {len(sweep.runs)} runs of {counts}; {known}")
    if dry_run:
        for run in sweep.runs:
            echo(" ".join([*launcher, *sweep.arguments_of(run)]))
        return
    outcomes: list[Outcome] = []
    interrupted = False
    if not report_only:
        lock = folder.lock()
        runs = LocalRuns(sweep, folder, launcher, echo, show_output)
        outcomes, interrupted = runs.run(stop_at_failure), runs.interrupted
        lock.release()
    show_ranking(sweep, read_ranking(sweep, read_runs))
    _end(folder, outcomes, interrupted)


def show_ranking(sweep: Sweep, ranking: Ranking) -> None:
    """Print the ranking, write the page, and send both to the sweep's run in MLflow, if its runs are there."""
    for line in incomparable([run.record for run in ranking.runs if run.record is not None]):
        warn(f"WARNING: {line}")
    echo("\n" + table(*ranking_rows(ranking, list(sweep.axes))))
    echo(f"\n{verdict(ranking)}")
    page = write_sweep_page(sweep, ranking)
    echo(f"page: {page}")
    try:
        send_sweep_result(sweep, ranking, page)
    except Exception as error:  # of any kind: a tracker that is down ends no sweep
        warn(f"the result is not in MLflow ({type(error).__name__}); `megalm sweep {sweep.folder} --report` sends it")


def _end(folder: SweepFolder, outcomes: Sequence[Outcome], interrupted: bool) -> None:
    """Say what is left to do, and leave with a code for it."""
    failed = [outcome for outcome in outcomes if outcome.state == "failed"]
    stopped = [outcome for outcome in outcomes if outcome.state == "stopped"]
    if failed:
        names = ", ".join(outcome.run.name for outcome in failed)
        echo(f"failed: {names}; what they printed is in {folder.path}", err=True)
    if failed or stopped or interrupted:
        echo(f"to run what is missing: megalm sweep {folder.path}", err=True)
    if stopped or interrupted:
        raise typer.Exit(EXIT_START_AGAIN)
    if failed:
        raise typer.Exit(EXIT_FAILED)


def _opened(
    swept: Sequence[str], run_words: Sequence[str], name: str | None, starts: bool
) -> tuple[Sweep, SweepFolder, list[str]]:
    """Return the sweep, recorded in its folder, and the words that start a run."""
    if len(swept) == 1 and "=" not in swept[0] and Path(swept[0]).suffix not in (".yaml", ".yml"):
        if run_words or name is not None:
            raise ConfigError(f"sweep {swept[0]} has its command and its name; omit --name and what follows --")
        folder = find_sweep(swept[0])
        sweep, launcher = folder.read()
        if starts and root_of(sweep.arguments).resolve() != sweep.root.resolve():
            raise ConfigError(f"sweep {folder.path} was begun in another working directory; start it there")
        return sweep, folder, launcher
    launcher, arguments = split_launcher(run_words)
    sweep = read_sweep(swept, arguments, name)
    folder = SweepFolder(sweep.folder)
    with folder.recorded(sweep, launcher) as whole:
        _check(whole, launcher)
    return whole, folder, launcher


def _check(sweep: Sweep, launcher: Sequence[str]) -> None:
    """Refuse a sweep of which a run would be refused.

    Raises:
        ConfigError: the problems of all runs, each once.
    """
    problems: dict[str, None] = {}
    ranks = _ranks(launcher)
    for run in sweep.runs:
        try:
            _, files = run_arguments(sweep.arguments_of(run)).read(ranks or 1, ANY_DEVICE, data_needed=False)
            if ranks is not None:
                check_run(files.loaded, files.deepspeed, ranks, ANY_DEVICE, data_needed=False)
        except ConfigError as error:
            problems |= dict.fromkeys(error.problems)
    if problems:
        raise ConfigError(*problems)


def _ranks(launcher: Sequence[str]) -> int | None:
    """Return the number of ranks that the launcher states; None if only the machine knows."""
    if any(word.partition("=")[0] in _MORE_THAN_ONE_NODE for word in launcher):
        return None
    for index, word in enumerate(launcher):
        option, equals, value = word.partition("=")
        if option in _RANK_OPTIONS:
            value = value if equals else launcher[index + 1]
            return int(value) if value.isdecimal() else None
    return 1 if Path(launcher[0]).name.startswith("python") and "-m" not in launcher else None
