"""Every layout, precision and feature on fake GPUs, within its budget (budgets.py)."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from megalm.planning.run_plan import Plan
from megalm.rehearsal.rehearsal_report import WAITS, Phase, Rehearsal, RehearsalCase, misplaced
from tests.gpu_rehearsal.budgets import ACCUMULATION, LAYOUTS, REASONS, rehearsed

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}

Rehearsed = tuple[RehearsalCase, Plan, Rehearsal]


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest) -> dict[str, Rehearsed]:
    """The layouts of all chosen tests, rehearsed in one process and its forks."""
    chosen: set[str] = set()
    for item in request.session.items:
        if item.path == request.path:
            parameters = item.callspec.params if hasattr(item, "callspec") else {}
            chosen |= {name for name in LAYOUTS if name in parameters.values()} or {*LAYOUTS}
    return rehearsed(name for name in LAYOUTS if name in chosen)


def step_of(rehearsal: Rehearsal) -> Phase:
    step = rehearsal.phase("step")
    assert step is not None
    return step


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_rank_starts_trains_evaluates_and_samples(name: str, found: dict[str, Rehearsed]) -> None:
    _, _, rehearsal = found[name]
    assert rehearsal.failure is None, rehearsal.failure
    assert rehearsal.updated
    assert [phase.name for phase in rehearsal.phases] == ["start", "step", "validation", "sample"]
    assert not misplaced(rehearsal.phases)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_step_waits_for_the_device_as_often_as_its_budget_says(name: str, found: dict[str, Rehearsed]) -> None:
    step = step_of(found[name][2])
    waits = Counter({(event.kind, event.place): event.count for event in step.events if event.kind in WAITS})
    assert not waits.keys() - REASONS.keys()
    assert waits.total() == LAYOUTS[name].waits, "more: find the new wait; fewer: lower the budget"


@pytest.mark.parametrize("name", LAYOUTS)
def test_data_parallelism_sends_the_bytes_that_the_documentation_says(name: str, found: dict[str, Rehearsed]) -> None:
    """docs/parallelism.md, "Bytes of data parallelism"; small numbers, such as norms, beside."""
    case, plan, rehearsal = found[name]
    step = step_of(rehearsal)
    if case.run.topology.data == 1:
        assert not [item for item in step.traffic if item.axis == "data"]
        return
    stage, weight = case.run.zero_stage, _BYTES[case.run.precision]
    gradient = _BYTES[plan.case.communication_precision]
    sent = _per_parameter(rehearsal, step, "all_reduce", "reduce_scatter")
    each_micro_batch = stage == 3 or (stage == 2 and not case.run.whole_gradients)
    assert sent == pytest.approx(gradient * (ACCUMULATION if each_micro_batch else 1), rel=0.01)
    gathered = _per_parameter(rehearsal, step, "all_gather")
    if stage == 3:
        assert 0 < gathered <= 2 * ACCUMULATION * weight * 1.01
    else:
        assert gathered == pytest.approx(weight if stage else 0, rel=0.01)


def _per_parameter(rehearsal: Rehearsal, step: Phase, *collectives: str) -> float:
    """Bytes for each parameter of the rank; fewer ranks hold the same experts."""
    return sum(rehearsal.bytes_per_parameter(step, axis, *collectives) for axis in ("data", "expert_data"))


@pytest.mark.parametrize("name", [name for name in LAYOUTS if "stage" in name])
def test_a_stage_sends_and_receives_hidden_states(name: str, found: dict[str, Rehearsed]) -> None:
    case, _, rehearsal = found[name]
    run, step = case.run, step_of(rehearsal)
    slices = run.topology.context * (run.topology.tensor if run.config.parallel.sequence else 1)
    states = run.batch.micro_batch * run.config.data.sequence_length // slices * case.shape.hidden_size
    last = run.topology.pipeline - 1
    neighbors = (case.stage > 0) + (case.stage < last)
    expected = neighbors * ACCUMULATION * states * _BYTES[run.precision]
    if case.shape.tie_word_embeddings and case.stage in (0, last):  # the two copies' gradients, summed in fp32
        expected += 4 * math.prod(case.share(case.stage).parameters()["embedding.tokens.weight"])
    for direction in ("send", "recv"):
        assert step.sent_bytes("pipeline", direction) == expected


@pytest.mark.parametrize("name", [name for name in LAYOUTS if "sequence" in name or "tensor" in name])
def test_a_tensor_group_sends_as_much_as_its_layers_say(name: str, found: dict[str, Rehearsed]) -> None:
    """Hidden states four times a block and micro-batch; with sequence parallelism inputs are gathered once more."""
    case, _, rehearsal = found[name]
    run, step = case.run, step_of(rehearsal)
    tokens = run.batch.micro_batch * run.config.data.sequence_length * ACCUMULATION // run.topology.context
    states = tokens * case.shape.hidden_size * _BYTES[run.precision]
    blocks = len(case.share(case.stage).blocks)
    if run.config.parallel.sequence:
        assert step.sent_bytes("tensor", "all_gather") >= 6 * blocks * states
        assert step.sent_bytes("tensor", "reduce_scatter") >= 4 * blocks * states
    else:
        assert step.sent_bytes("tensor", "all_reduce") >= 4 * blocks * states


def test_a_context_group_exchanges_what_attention_reads_and_gives(found: dict[str, Rehearsed]) -> None:
    """Queries, keys and values, and the output, in a forward pass; their gradients in a backward pass."""
    case, _, rehearsal = found["context"]
    shape, run = case.shape, case.run
    tokens = run.batch.micro_batch * run.config.data.sequence_length * ACCUMULATION // run.topology.context
    heads = 2 * shape.num_attention_heads + 2 * shape.num_key_value_heads
    expected = 2 * tokens * heads * shape.head_dim * shape.num_hidden_layers * _BYTES[run.precision]
    assert step_of(rehearsal).sent_bytes("context", "all_to_all") == expected


@pytest.mark.parametrize("name", [name for name in LAYOUTS if "divided experts" in name])
def test_tokens_travel_to_their_experts_and_back(name: str, found: dict[str, Rehearsed]) -> None:
    """Rows there and back, and their gradients; recomputed, rows there and back again.

    Before rows go, ranks tell each other how many for which expert.
    """
    case, _, rehearsal = found[name]
    run, shape = case.run, case.shape
    layers = len({*case.share(case.stage).blocks} & {*shape.moe_layers}) * ACCUMULATION
    rows = run.batch.micro_batch * run.config.data.sequence_length * shape.num_experts_per_token
    passes, forwards = (6, 2) if run.config.train.recompute == "full" else (4, 1)
    of_layer = passes * rows * shape.hidden_size * _BYTES[run.precision] + forwards * 8 * (shape.num_experts or 0)
    assert step_of(rehearsal).sent_bytes("expert", "all_to_all") == layers * of_layer


def test_muon_sends_each_matrix_there_and_back(found: dict[str, Rehearsed]) -> None:
    """A rank sends its pieces in bf16, and the matrices that it has orthogonalised."""
    case, _, rehearsal = found["tensor, muon"]
    matrices = [math.prod(size) for name, size in case.shape.parameters().items() if name.startswith("layers.")]
    sent, share = step_of(rehearsal).sent_bytes("stage", "all_to_all"), 2 * sum(matrices) / case.run.topology.world_size
    assert share < sent < 2 * share + 2 * 2 * max(matrices)


@pytest.mark.parametrize(
    ("name", "in_turn", "divided"),
    [
        # Messages of a block that are divided: of two groups of columns and two rows, forward and backward.
        ("tensor, overlapped", "tensor, zero 1", {"all_reduce": 4}),
        ("sequence, overlapped", "sequence", {"all_gather": 4, "reduce_scatter": 2}),
    ],
)
def test_overlap_sends_the_same_bytes_in_more_messages(
    name: str, in_turn: str, divided: dict[str, int], found: dict[str, Rehearsed]
) -> None:
    plain, overlapped = (
        {item.collective: item for item in step_of(found[each][2]).traffic if item.axis == "tensor"}
        for each in (in_turn, name)
    )
    case = found[name][0]
    assert case.run.tensor_chunks == 2
    messages = ACCUMULATION * len(case.share(0).blocks)
    for collective, item in plain.items():
        assert overlapped[collective].bytes == item.bytes
        assert overlapped[collective].calls - item.calls == divided.get(collective, 0) * messages
    assert plain.keys() == overlapped.keys()


@pytest.mark.parametrize("name", ["document mask, composed"])
def test_recomputed_blocks_with_soft_caps_keep_nothing(name: str, found: dict[str, Rehearsed]) -> None:
    _, plan, rehearsal = found[name]
    start = rehearsal.phase("start")
    assert start is not None
    # The moments come with the first step, beside small numbers.
    assert step_of(rehearsal).kept_bytes - start.kept_bytes < 2 * plan.memory.moments


def test_ranks_of_one_stage_do_the_same(found: dict[str, Rehearsed]) -> None:
    """The number of data-parallel ranks and the rank's number change no wait."""
    waits = [
        sorted((event.kind, event.place, event.count) for event in step_of(found[name][2]).events)
        for name in ("zero3", "two nodes")
    ]
    assert waits[0] == waits[1]


@pytest.mark.parametrize(("name", "plainly"), [("tiles, offloaded inputs", "recomputation")])
def test_tiles_gather_nothing_twice_and_offloaded_inputs_are_copied_ahead(
    name: str, plainly: str, found: dict[str, Rehearsed]
) -> None:
    """The weights of a block are gathered once for all its tiles; each input but the last comes back."""
    plain, tiled = (step_of(found[each][2]) for each in (plainly, name))
    assert [item for item in tiled.traffic if item.axis == "data"] == [
        item for item in plain.traffic if item.axis == "data"
    ]
    case, plan, _ = found[name]
    blocks = len(case.share(0).blocks)
    (copies,) = (item for item in tiled.events if item.place.startswith("megalm/model/activation_offload.py"))
    assert copies.kind == "prefetch"
    assert copies.count == ACCUMULATION * (2 * blocks - 1)
    assert 0 <= tiled.host_peak_bytes - plan.memory.host["block inputs"] <= plain.host_peak_bytes
