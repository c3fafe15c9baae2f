"""Shards beside one process, beside stock optimizers, and what users do around them.

The processes of a group are started once; sharded_serving_cases.py and sharded_gradient_cases.py
are what they run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch.distributed.fsdp import FSDPModule

from tests.processes import Groups

SERVING, GRADIENTS = (f"tests.distributed.sharded_{name}_cases" for name in ("serving", "gradient"))
WAYS = ["late", "unused", "reentrant", "other"]
ONE = ["adamw-fp32", "adamw-bf16", "sgd-fp32", "nadam-bf16"]
HELD = ["weighted", "plain", "loop"]
CAN_RESET = hasattr(FSDPModule, "reset_iter_state")
HAS_UNUSED = hasattr(FSDPModule, "set_reduce_scatter_unused_params")
BYTES = ["bytes_per_parameter:fp32", "bytes_per_parameter:bf16"]
CASES: dict[str, dict[int, list[str]]] = {
    SERVING: {
        1: [*BYTES, "ways:late"],
        2: [
            *(f"ways:{how}" for how in WAYS), *(f"against_one_process:{case}" for case in ONE),
            *BYTES, "beside_stock:muon", "placed", "two_optimizers", "stochastic", "compiled",
            "comes_back", "exchanged:at once", "exchanged:late", "refused",
            "lacks",
            "fused_linears:before", "fused_linears:after",
        ],
        4: BYTES,
    },
    GRADIENTS: {
        2: [
            "one_overflows:data", "one_overflows:shard", "hooks_of_users", "loop_goes_on",
            "by_hand", "synchronises:gradient", *(f"held_back:{how}" for how in HELD),
            "roots:plain", "roots:weighted", "late_hooks:hook", "late_hooks:scatter",
            "counts_for_nothing", "outside", "goes_back", "other_grad_dtype",
            *(["reduces_unused"] if HAS_UNUSED else []),
            *(["raises"] if CAN_RESET else []),
        ],
        4: ["synchronises:reduce", "synchronises:reduce-weighted"],
    },
}  # fmt: skip
Results = Callable[[str, int, str], Any]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    groups = {
        module: Groups(module, cases, tmp_path_factory.mktemp("group"))
        for module, cases in CASES.items()
    }
    return lambda module, world, case: groups[module](world, case)


@pytest.mark.parametrize("case", ONE)
def test_shards_train_as_one_process_does(results: Results, case: str) -> None:
    result = results(SERVING, 2, f"against_one_process:{case}")
    assert len(result["weights"]) == 4
    assert max(result["weights"]) < 1e-7
    assert max(result["states"]) < 1e-6
    assert max(result["norm"]) < 2.5e-7  # an fp32 number each


@pytest.mark.parametrize("how", WAYS)
def test_ways_to_run_a_sharded_model(results: Results, how: str) -> None:
    assert results(SERVING, 2, f"ways:{how}")["off"] < 1e-6


def test_an_optimizer_of_whole_matrices_has_the_bits_of_its_own_run(results: Results) -> None:
    assert results(SERVING, 2, "beside_stock:muon")["off"] == 0.0


def test_what_people_see_is_placed_as_the_parameters_are(results: Results) -> None:
    result = results(SERVING, 2, "placed")
    assert result["all"] and result["n"] == 1 and result["dtypes"] == {"torch.float32"}
    assert "bfloat16 with split master" in result["repr"]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_bytes_per_parameter(results: Results, dtype: str, world: int) -> None:
    """Parameter, accumulator and two moments; bf16 has its remainder instead of half of it."""
    assert results(SERVING, world, f"bytes_per_parameter:{dtype}")["bytes"] == 16 / world


def test_two_optimizers_share_what_fsdp2_reduces_at_once(results: Results) -> None:
    result = results(SERVING, 2, "two_optimizers")
    assert result["off"] < 1e-7
    assert "give this micro-batch different factors" in result["message"]


def test_stochastic_rounding_of_shards(results: Results) -> None:
    result = results(SERVING, 2, "stochastic")
    assert result == {"values": 2, "same": False, "agree": True}


def test_a_compiled_model(results: Results) -> None:
    assert results(SERVING, 2, "compiled")["off"] < 1e-6


def test_linear_layers_of_shards_are_not_fused(results: Results) -> None:
    after, before = (results(SERVING, 2, f"fused_linears:{order}") for order in ("after", "before"))
    assert after["fused"] == 0 and before["fused"] == 3  # but the one of one row
    assert max(after["off"], before["off"]) < 1e-6
    assert after["skipped"] and set(after["skipped"]) <= {"a DTensor", "a subclass"}


def test_plain_torch_comes_back(results: Results) -> None:
    assert max(results(SERVING, 2, "comes_back")["off"]) < 1e-6


def test_shards_that_take_the_place_of_parameters(results: Results) -> None:
    assert results(SERVING, 2, "exchanged:at once")["off"] < 1e-7
    late = results(SERVING, 2, "exchanged:late")["step"]
    assert "replaced in param_groups by shards (DTensors, the first of shape (5, 16))" in late
    assert "load a checkpoint after it" in late


def test_a_name_that_fsdp2_has_no_more(results: Results) -> None:
    result = results(SERVING, 2, "lacks")
    for name, of in (("_get_fsdp_state", "FSDPModule"), ("all_states", "FSDPStateContext")):
        needed = f"ValueError: fusedaccum needs {of}.{name}, which is private to torch"
        assert result[name].startswith(needed)


def test_refused(results: Results) -> None:
    result = results(SERVING, 2, "refused")
    assert "leave process_group out" in result["group"]
    assert "give each kind an optimizer of its own" in result["with_ddp"]
    assert "max_grad_norm is 2.0 on rank 0, 3.0 on rank 1" in result["settings"]
    assert result["unchanged"]


@pytest.mark.parametrize("where", ["data", "shard"])
def test_an_overflow_of_one_is_skipped_by_all(results: Results, where: str) -> None:
    result = results(GRADIENTS, 2, f"one_overflows:{where}")
    assert result == {"unchanged": True, "skipped": 1, "went on": True, "same": True}


def test_hooks_of_users_go_on(results: Results) -> None:
    result = results(GRADIENTS, 2, "hooks_of_users")
    assert result["seen"] == 8 and result["dtypes"] == {"torch.float32"}
    assert result["off"] < 2**-8  # what one writes is what FSDP2 has rounded to bf16


@pytest.mark.parametrize("what", ["hook", "scatter"])
def test_a_hook_of_a_user_in_the_place_of_ours(results: Results, what: str) -> None:
    """Gradients are not added unweighted: it is refused once, and called from then on."""
    result = results(GRADIENTS, 2, f"late_hooks:{what}")
    assert "of FSDP2 was called after the FusedAccumOptimizer was made" in result["message"]
    assert result["unchanged"] and result["off"] == 0.0
    assert result["seen"] == (2 if what == "hook" else 0)


def test_a_reduction_outside_a_backward(results: Results) -> None:
    """Its gradients are refused, and none of them is used."""
    result = results(GRADIENTS, 2, "outside")
    assert "finalize_backward()" in result["reduced"] and "finalize_backward()" in result["step"]
    assert result["unchanged"]


@pytest.mark.skipif(not CAN_RESET, reason="this torch cannot reset FSDP2")
def test_a_backward_that_raises_in_all_processes(results: Results) -> None:
    """FSDP2 by itself would not reduce the first layer's gradients any more."""
    result = results(GRADIENTS, 2, "raises")
    assert result["backward"] == "ValueError: the test's" and "zero_grad()" in result["step"]
    assert result["unchanged"] and result["off"] == 0.0


@pytest.mark.parametrize("how", ["plain", "weighted"])
def test_each_layer_is_a_root_of_fsdp2(results: Results, how: str) -> None:
    """The first layer's gradients come when the backward's other callbacks are over."""
    assert results(GRADIENTS, 2, f"roots:{how}")["off"] == 0.0


def test_a_loop_that_does_not_zero_goes_on(results: Results) -> None:
    assert results(GRADIENTS, 2, "loop_goes_on")["ratios"] == [1.0, 2.0, 3.0, 1.0]


def test_gradients_written_by_hand(results: Results) -> None:
    assert results(GRADIENTS, 2, "by_hand")["off"] < 1e-6


def test_a_micro_batch_without_tokens_is_run_as_its_message_says(results: Results) -> None:
    assert results(GRADIENTS, 2, "counts_for_nothing")["off"] < 1e-6


@pytest.mark.parametrize(("world", "how"), [(2, "gradient"), (4, "reduce"), (4, "reduce-weighted")])
def test_fsdp2_may_reduce_in_the_last_micro_batch_only(
    results: Results, world: int, how: str
) -> None:
    assert results(GRADIENTS, world, f"synchronises:{how}")["off"] < 1e-7


@pytest.mark.parametrize("how", HELD)
def test_a_gradient_that_fsdp2_keeps_back_is_not_lost(results: Results, how: str) -> None:
    result = results(GRADIENTS, 2, f"held_back:{how}")
    assert "back" in result["step"] and "Nothing was updated" in result["step"]
    assert how == "loop" or "Call zero_grad()" in result["again"]
    assert "which a checkpoint would lose" in result["saved"]
    assert result["unchanged"]
    assert result["after"] < 2e-5  # of what the parameters moved, in fp32


def test_fsdp2_goes_on_as_stock_after_detach(results: Results) -> None:
    """torch 2.15 keeps a `grad_dtype` that a parameter once had."""
    result = results(GRADIENTS, 2, "goes_back")
    assert result["same"] and result["dtypes"] == {"torch.bfloat16"}


@pytest.mark.skipif(not HAS_UNUSED, reason="this torch's FSDP2 reduces no unused parameters")
def test_unused_parameters_that_fsdp2_reduces(results: Results) -> None:
    assert results(GRADIENTS, 2, "reduces_unused")["same"]


def test_a_parameter_of_another_grad_dtype_in_the_group(results: Results) -> None:
    assert results(GRADIENTS, 2, "other_grad_dtype")["same"]
