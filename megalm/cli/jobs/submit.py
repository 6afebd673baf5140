"""`megalm submit`: check a run on the login node, then queue it as a Slurm job, a chain of jobs or an array of runs."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from megalm.cli.jobs.run_words import RUN_WORDS, SplitCommand, run_arguments, split_launcher
from megalm.cli.plan import own_device, planned_run
from megalm.cluster.batch_script import Allocation, SbatchOptions, render, without_options
from megalm.cluster.slurm_client import gpus_of_nodes, own_jobs, refusal, require_slurm
from megalm.cluster.slurm_client import submit as send
from megalm.config.deepspeed.json_reader import DeviceFacts
from megalm.cost_model.gpu_specs import gpu_by_name
from megalm.errors import ConfigError
from megalm.planning.run_plan import Plan
from megalm.rehearsal.rehearsal_process import rehearse_run
from megalm.rehearsal.rehearsal_report import RehearsalCase
from megalm.rehearsal.verdict import judge
from megalm.runs.run_folder import RunFolder, refuse_existing_run
from megalm.runs.run_settings import Arguments
from megalm.sweeps.expansion import Sweep, read_sweep
from megalm.sweeps.sweep_folder import SweepFolder, state_of
from megalm.train.run_summary import planned_data
from megalm.utils.formatting import format_duration
from megalm.utils.terminal import echo, echo_text

_T = TypeVar("_T")

_HOME = Path(__file__).resolve().parents[3]
# Of an unknown GPU: nothing is refused for its memory.
_ANY_GPU = DeviceFacts(kind="cuda", bf16=True, memory_bytes=2**50, float8=True)


class Command(SplitCommand):
    """Takes options of sbatch before `--`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.allow_extra_args = ctx.ignore_unknown_options = True
        return super().parse_args(ctx, args)


def command(
    context: typer.Context,
    sbatch: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SBATCH OPTIONS] -- [RUN'S ARGUMENTS]", show_default=False),
    ] = None,
    after: Annotated[
        str | None, typer.Option("--after", metavar="JOB", help="Start when this job has ended, in whatever way.")
    ] = None,
    chain: Annotated[
        int | None,
        typer.Option(
            "--chain",
            min=2,
            help="Up to N jobs, one after another, that resume the run.",
        ),
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            "--sweep", metavar="KEY=A,B,C|FILE.yaml", help="A run for each combination of values, as tasks of an array."
        ),
    ] = None,
    sweep_name: Annotated[
        str | None, typer.Option("--sweep-name", help="The sweep's name. Default: the file's, or made of the keys.")
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            "--gpu",
            metavar="NAME",
            help="The GPU of each rank. Default: the type in sbatch's options.",
        ),
    ] = None,
    rehearse: Annotated[
        bool, typer.Option(help="Rehearse the run on fake GPUs, where their type is known (takes about half a minute).")
    ] = True,
    print_it: Annotated[bool, typer.Option("--print", help="Print the batch script; submit nothing.")] = False,
) -> None:
    """Check a run here, then queue it with Slurm. What --dry-run would refuse is not queued.

    Options of sbatch come first; slurm/train.sh has their defaults. Arguments of launch/pretrain.py follow --.
    The job has the run's name. In run.name, %a is the index in an array.

    \b
    megalm submit --nodes=4 --gpus-per-node=h100:8 --time=24:00:00 -- --config my.yaml run.name=mine --resume auto
    megalm submit --nodes=4 --gpus-per-node=8 --chain 5 -- run.name=mine --resume auto
    megalm submit --nodes=1 --gpus-per-node=8 --sweep train.seed=1,2,3 -- --config my.yaml
    """
    words: tuple[str, ...] = context.meta[RUN_WORDS]
    request = _read(sbatch or [], words, after, chain, sweep or (), sweep_name)
    if not print_it:  # a script can be written where there is no Slurm
        require_slurm()
        _refuse_open_gpus(request)
    with _recorded(request.sweep), _named_by_job(SLURM_JOB_NAME=request.options.get("job-name")):
        plans = _checked_plans(request, gpu)
    _refuse_together(request, plans[0])
    if not print_it and not request.options.get("dependency"):
        _refuse_second_job(plans[0].resolved.config.run.name if request.sweep is None else request.sweep.name)
    if rehearse:
        _rehearse(plans, request.allocation)
    options = _named(request, plans[0])
    script = render(options, _HOME, request.words, request.variables, request.by_task)
    if print_it:
        echo_text(script, end="")
        return
    environment = without_options(os.environ)
    if (why := refusal(script, environment)) is not None:
        raise ConfigError(why)
    _tell(send(script, environment), options, request, plans[0])


# --- What is asked for ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Request:
    """A job as its user asks for it.

    Attributes:
        given: options of sbatch on the command line.
        options: all options of sbatch.
        runs: the arguments of each run to check, by its task in an array.
        chain: the number of jobs of a chain.
        sweep: whose runs are the tasks of the array.
        by_task: the arguments of these runs.
    """

    given: SbatchOptions
    options: SbatchOptions
    allocation: Allocation
    words: tuple[str, ...]
    runs: Mapping[int | None, Arguments]
    chain: int | None
    sweep: Sweep | None = None
    by_task: Mapping[int, Sequence[str]] | None = None

    @property
    def variables(self) -> dict[str, str]:
        """The environment of the job: what asks for such a job again, and whether it is one of a chain."""
        once = ("dependency", "array", "job-name")
        again = SbatchOptions({name: value for name, value in self.given.values.items() if name not in once}).words()
        if self.chain is None:
            return {"MEGALM_SUBMIT_OPTIONS": shlex.join(again)}
        return {"MEGALM_SUBMIT_OPTIONS": shlex.join([*again, f"--chain={self.chain}"]), "MEGALM_CHAIN": "1"}


def _read(
    sbatch: Sequence[str],
    words: tuple[str, ...],
    after: str | None,
    chain: int | None,
    swept: Sequence[str],
    sweep_name: str | None,
) -> _Request:
    """Read options and arguments.

    Args:
        swept: the words of --sweep.

    Raises:
        ConfigError: all that is wrong with them.
    """
    given = SbatchOptions.parse(sbatch)
    options = _options(given, after)
    problems: list[str] = []
    allocation = _noted(problems, lambda: Allocation.of(options))
    arguments = _noted(problems, lambda: run_arguments(words))
    sweep = _noted(problems, lambda: read_sweep(swept, words, sweep_name)) if swept else None
    if problems or allocation is None or arguments is None:
        raise ConfigError(*problems)
    if sweep is not None:
        if chain is not None or allocation.tasks is not None:
            raise ConfigError("--sweep is an array of its own; omit --chain and --array")
        by_task = {
            task: sweep.arguments_of(run)
            for task, run in enumerate(sweep.runs)
            if state_of(sweep.root / run.name) != "finished"
        }
        if not by_task:
            raise ConfigError(
                f"all runs of {sweep.folder} are complete; megalm sweep {sweep.folder} --report ranks them"
            )
        options = options.updated(SbatchOptions({"array": ",".join(map(str, by_task))}))
        runs: dict[int | None, Arguments] = {task: run_arguments(words) for task, words in by_task.items()}
        return _Request(given, options, Allocation.of(options), (), runs, None, sweep, by_task)
    if chain is not None:
        if allocation.tasks is not None:
            raise ConfigError("--chain is an array of its own; omit --array")
        options = options.updated(SbatchOptions({"array": f"1-{chain}%1", "no-requeue": None}))
        allocation = Allocation.of(options)
    first = None if allocation.tasks is None else allocation.tasks[0]
    return _Request(given, options, allocation, words, {first: arguments}, chain)


def _options(given: SbatchOptions, after: str | None) -> SbatchOptions:
    """Return the options by precedence, as sbatch has them: lines of slurm/train.sh, environment, command line."""
    script = _HOME / "slurm" / "train.sh"
    if not script.is_file():
        raise ConfigError(f"{script}: no such file; megalm submit works from a checkout of megalm (make install there)")
    if after is not None:
        if given.get("dependency"):
            raise ConfigError("--after and --dependency say the same; omit one of them")
        if not re.fullmatch(r"\d+(_\d+)?", after):
            raise ConfigError(f"--after {after}: state the number of a job, as squeue shows it")
        given = given.updated(SbatchOptions({"dependency": f"afterany:{after}"}))
    defaults = SbatchOptions.of_script(script.read_text(encoding="utf-8"))
    if defaults.get("job-name") == "megalm":  # the run's name is better
        defaults = SbatchOptions({name: value for name, value in defaults.values.items() if name != "job-name"})
    return defaults.updated(SbatchOptions.of_environment(os.environ)).updated(given)


def _noted(problems: list[str], work: Callable[[], _T]) -> _T | None:
    """Return what `work` returns; of a refusal, keep its problems."""
    try:
        return work()
    except ConfigError as error:
        problems += error.problems
        return None


def _refuse_open_gpus(request: _Request) -> None:
    """Refuse a job that takes all GPUs of its nodes without saying how many those are."""
    is_open = "exclusive" in request.options.values and not request.allocation.gpus
    if is_open and gpus_of_nodes(request.options.get("partition")):
        raise ConfigError("--exclusive takes all GPUs of a node; say how many there are with --gpus-per-node")


# --- The checks -------------------------------------------------------------------------------------------------------


def _recorded(sweep: Sweep | None) -> AbstractContextManager[object]:
    """Record a sweep, and the JSONs of its runs, which the checks read."""
    return nullcontext() if sweep is None else SweepFolder(sweep.folder).recorded(sweep, split_launcher(())[0])


def _checked_plans(request: _Request, gpu: str | None) -> list[Plan]:
    """Return the plans of all runs of the job.

    Raises:
        ConfigError: the problems of all, each once.
    """
    problems: list[str] = []
    plans = [
        plan
        for task, run in request.runs.items()
        if (plan := _noted(problems, lambda: checked_plan(run, request.allocation, gpu, task)))  # noqa: B023
    ]
    if problems:
        raise ConfigError(*problems)
    return plans


def checked_plan(arguments: Arguments, allocation: Allocation, gpu: str | None, task: int | None) -> Plan:
    """Return the plan of a run that `--dry-run` on the job's ranks would show, too.

    Args:
        gpu: by its name; None: the type in the options of sbatch, if it is a known one.
        task: of an array.

    Raises:
        MegalmError: the run would be refused.
    """
    device = own_device(allocation.ranks_per_node) if not allocation.gpus else _gpu(gpu, allocation.gpu_type)
    if gpu is not None and not allocation.gpus:
        raise ConfigError(f"--gpu {gpu}: the job asks for no GPUs; add --gpus-per-node=N")
    with _named_by_job(SLURM_ARRAY_TASK_ID=None if task is None else str(task)):
        plan = planned_run(arguments, allocation.ranks, device, allocation.ranks_per_node, data_needed=True)
        warnings = planned_data(plan.resolved)[1]
    run = plan.resolved.config.run
    if run.name is not None:
        refuse_existing_run(RunFolder(Path(run.root).expanduser() / run.name), arguments.resume is not None)
    for warning in warnings:
        echo(f"megalm: WARNING: {warning}", err=True)
    return plan


@contextmanager
def _named_by_job(**variables: str | None) -> Iterator[None]:
    """Set variables of the job to come, which run.name may have, where they are known."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update({name: value for name, value in variables.items() if value is not None})
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _gpu(name: str | None, site_name: str | None) -> DeviceFacts:
    if name is not None:
        return gpu_by_name(name)
    try:
        return _ANY_GPU if site_name is None else gpu_by_name(site_name)
    except ConfigError:
        return _ANY_GPU


def _refuse_together(request: _Request, plan: Plan) -> None:
    """Refuse an array whose tasks would train one run at once, or an unnamed run one after another."""
    if request.allocation.tasks is None or request.sweep is not None:
        return
    if plan.resolved.config.run.name is None:
        raise ConfigError("each job of a chain or an array has to know its run: add run.name=NAME after --")
    if "%a" in _stated_name(request.words):
        return
    if request.allocation.at_once != 1:
        raise ConfigError(
            "all tasks of --array would train one run; give each its own with run.name=NAME-%a, or let one run at a "
            "time with --array=...%1 (--chain N does)"
        )
    if any(run.resume is None for run in request.runs.values()):
        raise ConfigError("--chain and --array=...%1 resume one run again and again: add --resume auto after --")


def _refuse_second_job(name: str | None) -> None:
    """Refuse a run that another job of this user trains or will train: only one at a time can."""
    here = os.path.realpath(os.curdir)
    jobs = [job.whole for job in own_jobs() if job.name == name and os.path.realpath(job.folder) == here]
    if name is not None and jobs:
        others = list(dict.fromkeys(jobs))
        raise ConfigError(
            f"job {', '.join(others)} trains run {name} or waits to; queue behind it with "
            f"--after {max(others, key=int)}, or scancel {' '.join(others)}"
        )


def _stated_name(words: Sequence[str]) -> str:
    """Return run.name as it stands on the command line, with %a; "" if it does not."""
    return next((word.partition("=")[2] for word in reversed(words) if word.startswith("run.name=")), "")


def _rehearse(plans: Sequence[Plan], allocation: Allocation) -> None:
    """Rehearse rank 0 of each kind of run on GPUs of a known type; refuse what fails, and report what is tight.

    Raises:
        ConfigError: a run would fail on its GPUs.
    """
    kinds = {repr((plan.shape, plan.resolved.batch, plan.resolved.deepspeed)): plan for plan in plans}
    for plan in kinds.values():
        gpu = plan.resolved.device.name
        if gpu is None or plan.resolved.device.kind != "cuda":
            continue
        case = RehearsalCase(plan.resolved, plan.shape, 0, allocation.ranks_per_node)
        rehearsal = rehearse_run(case)
        verdict = judge(rehearsal, case, plan)
        subject = f"rehearsed on {gpu}"
        if verdict.level == "fails":
            reasons = (f"{subject}: {line}" for line in (*verdict.reasons, *verdict.advice))
            raise ConfigError(*reasons, "megalm rehearse shows it; --no-rehearse submits it all the same")
        echo(f"megalm: {subject} in {format_duration(rehearsal.seconds)}: {verdict.level}", err=True)
        for line in (*verdict.reasons, *verdict.advice):
            echo(f"megalm:   {line}", err=True)


# --- The job ----------------------------------------------------------------------------------------------------------


def _job_name(words: Sequence[str], plan: Plan) -> str:
    """Return the run's name, in an array without the index; of an unnamed run its preset."""
    name = _stated_name(words) or plan.resolved.config.run.name or plan.resolved.preset or "megalm"
    return re.sub(r"[-_.]?%[ax]", "", name) or "megalm"


def _named(request: _Request, plan: Plan) -> SbatchOptions:
    """Return the options with the job's name, and a log for each job, or one for a chain of them."""
    options, log = request.options, request.options.get("output")
    sweep = request.sweep
    named = {"job-name": options.get("job-name") or (sweep.name if sweep else _job_name(request.words, plan))}
    if sweep is not None and log == "%x-%j.log":
        log = f"{sweep.folder}/%A_%a.log"
    elif log == "%x-%j.log" and request.allocation.tasks is not None:
        log = "%x-%A.log" if request.chain is not None else "%x-%A_%a.log"
    return options.updated(SbatchOptions(named if log is None else {**named, "output": log}))


def _tell(job: str, options: SbatchOptions, request: _Request, plan: Plan) -> None:
    """Print the job, and what to look at next."""
    allocation, sweep = request.allocation, request.sweep
    run, name = plan.resolved.config.run, options.get("job-name") or ""
    device = "GPUs" if allocation.gpus else "the CPU"
    if allocation.gpus and plan.resolved.device.name is None:
        echo("megalm: note: --gpu NAME checks the memory of the GPUs; their type is not known", err=True)
    log = (options.get("output") or "slurm-%j.out").replace("%x", name).replace("%j", job).replace("%A", job)
    folder = "" if run.name is None else shlex.quote(run.name if run.root == "runs" else str(Path(run.root) / run.name))
    echo(f"job {job}: {name}, {allocation.nodes} node(s) x {allocation.ranks_per_node} rank(s) on {device}")
    status = f"megalm status {folder}".rstrip()
    rows = [("log", log), ("status", status), ("cancel", f"scancel {job}")]
    if sweep is not None:
        rows[1:2] = [
            ("status", "megalm status"),
            ("ranking", f"megalm sweep {shlex.quote(str(sweep.folder))} --report"),
        ]
    for what, text in rows:
        echo(f"  {what:<7} {text}")
