"""Packed passes against padded ones of transformers' own."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from learner.trainer.model import Policy, frozen_output, load_policy
from learner.trainer.packing import TokenSequence, fill, pack
from learner.trainer.ranks import Ranks, joined
from understudy.errors import ConfigError

from publishing import CASES, VOCAB_SIZE, Case  # isort: skip
from trainer_helpers import config_of, load, samples  # isort: skip

CPU = torch.device("cpu")
ARCHITECTURES = [
    replace(case, dtype="float32")
    for case in {case.model_type: case for case in reversed(CASES)}.values()
]


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with joined() as only:
        yield only


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return CASES[0].make_bundle(tmp_path_factory.mktemp("packing"))


def sequence(length: int, first: int = 1) -> TokenSequence:
    ids = np.arange(first, first + length, dtype="i4")
    return TokenSequence(token_ids=ids, loss_mask=np.arange(length) % 3 == 2)


@given(sizes=st.lists(st.integers(1, 90), max_size=60), max_tokens=st.integers(1, 400))
def test_every_item_is_in_one_pack_within_the_limit(sizes: list[int], max_tokens: int) -> None:
    packs = fill(sizes, max_tokens)
    assert sorted(index for inside in packs for index in inside) == list(range(len(sizes)))
    for inside in packs:
        assert sum(sizes[index] for index in inside) <= max_tokens or len(inside) == 1
    # First-fit decreasing leaves at most one pack less than half full.
    fill_of = [sum(sizes[index] for index in inside) for inside in packs]
    assert sum(2 * filled < max_tokens for filled in fill_of) <= 1


def test_equal_lengths_lie_side_by_side_and_targets_keep_the_callers_order() -> None:
    made = [sequence(7, 100), sequence(4, 200), sequence(7, 300)]
    packed = pack(made, CPU)
    assert packed.lengths == (4, 7, 7)
    assert packed.tokens_1T[0, :5].tolist() == [200, 201, 202, 203, 100]
    assert packed.places_1T[0].tolist() == [*range(4), *range(7), *range(7)]
    assert packed.targets_N.tolist() == [102, 105, 202, 302, 305]
    tokens = packed.tokens_1T[0]
    assert tokens[packed.positions_N + 1].tolist() == packed.targets_N.tolist()
    assert tokens[packed.ends_E].tolist() == [106, 203, 306]


def test_no_sequences_make_a_pack_without_a_target(bundle: Path, ranks: Ranks) -> None:
    packed = pack([], CPU)
    assert (packed.num_tokens, len(packed.targets_N), len(packed.ends_E)) == (2, 0, 0)
    policy = load_policy(config_of(bundle), ranks, critic=True)
    output = policy(packed)
    assert len(output.logprobs_N) == len(output.values_N) == len(output.end_values_E) == 0
    output.logprobs_N.sum().backward()


def padded_logprobs(model: torch.nn.Module, made: list[TokenSequence]) -> torch.Tensor:
    """What transformers' own kernels say with padding and a mask."""
    longest = max(len(s.token_ids) for s in made)
    tokens = torch.zeros(len(made), longest, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, s in enumerate(made):
        tokens[row, : len(s.token_ids)] = torch.from_numpy(s.token_ids.astype("i8"))
        mask[row, : len(s.token_ids)] = 1
    logits = model(input_ids=tokens, attention_mask=mask).logits[:, :-1].float()
    chosen = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    wanted = [
        chosen[row, : len(s.token_ids) - 1][torch.from_numpy(s.loss_mask[1:])]
        for row, s in enumerate(made)
    ]
    return torch.cat(wanted)


def gradients(policy: Policy) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in policy.checkpoint_parameters():
        assert isinstance(parameter.grad, DTensor)
        found[name] = parameter.grad.full_tensor()
    return found


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "computed again"])
@pytest.mark.parametrize("case", ARCHITECTURES, ids=lambda case: case.name)
def test_packed_and_padded_have_the_same_logprobs_and_gradients(
    case: Case, checkpointing: bool, tmp_path: Path, ranks: Ranks
) -> None:
    folder = case.make_bundle(tmp_path)
    train = {"activation_checkpointing": checkpointing}
    policy = load_policy(config_of(folder, train=train), ranks)
    plain = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    made = samples(7, VOCAB_SIZE)
    made += [sequence(len(made[0].token_ids)), sequence(len(made[0].token_ids), 9)]
    found, expected = policy(pack(made, CPU)).logprobs_N, padded_logprobs(plain, made)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    weights = torch.linspace(-1, 1, len(found))
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    own = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for name, gradient in gradients(policy).items():
        torch.testing.assert_close(gradient, own[name], rtol=1e-4, atol=1e-5, msg=name)


def test_sequences_of_a_pack_do_not_see_each_other(bundle: Path, ranks: Ranks) -> None:
    policy = load(bundle, ranks)
    made = samples(5, VOCAB_SIZE)
    before = frozen_output(policy, pack(made, CPU)).logprobs_N
    changed = [*made[:2], sequence(len(made[2].token_ids), 17), *made[3:]]
    after = frozen_output(policy, pack(changed, CPU)).logprobs_N
    ends = np.cumsum([s.num_targets for s in made])
    torch.testing.assert_close(after[: ends[1]], before[: ends[1]], rtol=0, atol=1e-6)
    rest = ends[4] - ends[2]
    torch.testing.assert_close(after[-rest:], before[-rest:], rtol=0, atol=1e-6)


def test_entropies_are_those_of_the_distributions(bundle: Path, ranks: Ranks) -> None:
    policy = load(bundle, ranks)
    made = samples(3, VOCAB_SIZE)
    packed = pack(made, CPU)
    output = policy(packed, 0.7, with_entropy=True)
    plain = AutoModelForCausalLM.from_pretrained(bundle, dtype=torch.float32)
    expected = []
    for s in made:
        logits = plain(torch.from_numpy(s.token_ids.astype("i8"))[None]).logits[0, :-1] / 0.7
        entropies = torch.distributions.Categorical(logits=logits).entropy()
        expected.append(entropies[torch.from_numpy(s.loss_mask[1:])])
    torch.testing.assert_close(output.entropies_N, torch.cat(expected), rtol=1e-5, atol=1e-5)
    assert frozen_output(policy, packed).entropies_N is None


def test_a_new_value_head_says_nothing_and_learns(bundle: Path, ranks: Ranks) -> None:
    policy = load_policy(config_of(bundle), ranks, critic=True)
    packed = pack(samples(4, VOCAB_SIZE), CPU)
    output = policy(packed)
    assert output.values_N.abs().max() == output.end_values_E.abs().max() == 0
    assert (len(output.values_N), len(output.end_values_E)) == (len(packed.targets_N), 4)
    (output.values_N - 1).square().sum().backward()
    [(_, weight), (_, bias)] = [p for p in policy.trained_parameters() if "value_head" in p[0]]
    assert weight.grad.full_tensor().abs().max() > 0
    assert bias.grad.full_tensor().item() == pytest.approx(-2 * len(packed.targets_N))
    names = {name for name, _ in policy.checkpoint_parameters()}
    assert not any("value" in name for name in names)


def test_values_of_ends_are_of_the_states_after_them(bundle: Path, ranks: Ranks) -> None:
    """The last token's state is also that before a next one, were there one."""
    policy = load_policy(config_of(bundle), ranks, critic=True)
    with torch.no_grad():
        policy.value_head.weight.to_local().copy_(torch.ones(1, policy.value_head.in_features))
    [first, second] = samples(2, VOCAB_SIZE)
    longer = TokenSequence(
        token_ids=np.append(first.token_ids, np.int32(5)),
        loss_mask=np.append(np.zeros(len(first.token_ids), bool), True),
    )
    ends = frozen_output(policy, pack([second, first], CPU)).end_values_E
    [value] = frozen_output(policy, pack([longer], CPU)).values_N
    assert ends[1].item() == pytest.approx(value.item(), abs=1e-5)


def test_offloading_needs_a_gpu(bundle: Path, ranks: Ranks) -> None:
    if ranks.device.type == "cuda":
        pytest.skip("there is one")
    with pytest.raises(ConfigError, match=r"learner.train.offload = true, but there is no GPU"):
        load_policy(config_of(bundle, train={"offload": True}), ranks)


def test_a_sliding_window_that_is_too_short_is_refused(tmp_path: Path, ranks: Ranks) -> None:
    [case] = [case for case in CASES if "mistral" in case.name]
    folder = case.make_bundle(tmp_path)
    policy = load(folder, ranks)
    for layer in policy.language_model.base_model.layers:
        layer.self_attn.config.sliding_window = 8
    with pytest.raises(ConfigError, match=r"set learner.tasks.max_tokens = 8"):
        policy(pack([sequence(9)], CPU))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "computed again"])
def test_compiled_layers_say_and_learn_the_same_and_are_compiled_for_packs_of_any_lengths(
    bundle: Path, ranks: Ranks, checkpointing: bool
) -> None:
    if shutil.which("g++") is None:
        pytest.skip("NOT TESTED: learner.train.compile, as there is no C++ compiler (g++)")
    torch.compiler.reset()
    plain = load(bundle, ranks)
    train = {"compile": True, "activation_checkpointing": checkpointing}
    compiled = load_policy(config_of(bundle, train=train), ranks)
    made = samples(12, VOCAB_SIZE)
    for num in (5, 9):  # sizes that differ once are taken for variable
        compiled(pack(made[:num], CPU)).logprobs_N.sum().backward()
    compiled.zero_grad()
    num_graphs = counters["stats"]["unique_graphs"]
    for num in (12, 7, 3):
        packed = pack(made[:num], CPU)
        outputs = [policy(packed).logprobs_N for policy in (plain, compiled)]
        torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
        for logprobs_N in outputs:
            logprobs_N.mean().backward()
    assert counters["stats"]["unique_graphs"] == num_graphs > 0
    expected = gradients(plain)
    for name, gradient in gradients(compiled).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5, msg=name)
