"""Router replay: passes along recorded routes, against a mixture computed from its formula."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from learner.trainer.experience import episodes_of
from learner.trainer.intake_client import BatchShare
from learner.trainer.model import Policy, frozen_output, load_policy
from learner.trainer.packing import TokenSequence, pack
from learner.trainer.ranks import Ranks, joined
from understudy.errors import ConfigError

from publishing import VOCAB_SIZE, Case  # isort: skip
from test_experience import message, segment, turn  # isort: skip
from test_packing import gradients, padded_logprobs  # isort: skip
from trainer_helpers import config_of, samples  # isort: skip

CPU = torch.device("cpu")
LAYERS, EXPERTS, TOP_K = 3, 5, 2
Tokens = list[TokenSequence]


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with joined() as only:
        yield only


def bundle(folder: Path, **sizes: Any) -> Path:
    """A mixture whose second layer has no experts."""
    sizes = {"num_hidden_layers": LAYERS, "mlp_only_layers": [1], **sizes}
    case = Case(
        model_type="qwen3_moe", tied=False, dtype="float32", num_experts=EXPERTS, sizes=sizes
    )
    return case.make_bundle(folder)


def replaying(folder: Path, ranks: Ranks, **train: Any) -> Policy:
    config = config_of(folder, train=train)
    model = config.model.model_copy(update={"router_replay": True})
    return load_policy(config.model_copy(update={"model": model}), ranks)


def routed(made: Tokens, seed: int = 0) -> Tokens:
    """The same tokens, with other experts than any router would choose."""
    rng = np.random.default_rng(seed)
    return [
        replace(
            s,
            routes=np.array(
                [
                    [rng.permutation(EXPERTS)[:TOP_K] for _ in range(LAYERS)]
                    for _ in s.token_ids[1:]
                ],
                np.uint8,
            ),
        )
        for s in made
    ]


def plain_logprobs(
    folder: Path, made: Tokens, monkeypatch: pytest.MonkeyPatch
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probabilities and gradients, a sequence at a time, of transformers' model whose routers
    see no other experts than the recorded ones."""
    plain = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    layer_of = {layer.mlp.gate: i for i, layer in enumerate(plain.model.layers) if i != 1}
    current: list[TokenSequence] = []

    def forward(router: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits = hidden.reshape(-1, hidden.shape[-1]) @ router.weight.T
        allowed = torch.zeros_like(logits, dtype=torch.bool)
        assert current[0].routes is not None
        rows = current[0].routes[:, layer_of[router]].astype("i8")
        allowed[:-1].scatter_(1, torch.from_numpy(rows), True)
        allowed[-1, :TOP_K] = True  # of the last token, nothing is used
        if router.norm_topk_prob:
            scores = logits.masked_fill(~allowed, -torch.inf).softmax(-1)
        else:
            scores = logits.softmax(-1) * allowed
        chosen = allowed.int().topk(TOP_K).indices
        return logits, scores.gather(1, chosen), chosen

    with monkeypatch.context() as patch:
        patch.setattr(Qwen3MoeTopKRouter, "forward", forward)
        found = []
        for s in made:
            current[:] = [s]
            found.append(padded_logprobs(plain, [s]))
        found_N = torch.cat(found)
        (found_N * torch.linspace(-1, 1, len(found_N))).sum().backward()
    unused = {name: torch.zeros_like(value) for name, value in plain.named_parameters()}
    grads = {name: value.grad for name, value in plain.named_parameters() if value.grad is not None}
    return found_N.detach(), unused | grads


@pytest.mark.parametrize(
    ("normalised", "checkpointing"),
    [(True, False), (False, False), (True, True)],
    ids=["normalised", "as they are", "computed again"],
)
def test_tokens_go_where_they_were_sent(
    normalised: bool,
    checkpointing: bool,
    tmp_path: Path,
    ranks: Ranks,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = bundle(tmp_path, norm_topk_prob=normalised)
    made = routed(samples(6, VOCAB_SIZE))
    expected, own = plain_logprobs(folder, made, monkeypatch)
    policy = replaying(folder, ranks, activation_checkpointing=checkpointing)
    found = policy(pack(made, CPU)).logprobs_N
    torch.testing.assert_close(found.detach(), expected, rtol=1e-5, atol=1e-5)
    (found * torch.linspace(-1, 1, len(found))).sum().backward()
    for name, gradient in gradients(policy).items():
        torch.testing.assert_close(gradient, own[name], rtol=1e-4, atol=1e-5, msg=name)
    without = frozen_output(policy, pack(samples(6, VOCAB_SIZE), CPU)).logprobs_N
    assert (without - expected).abs().max() > 1e-3


def test_tokens_without_routes_go_where_the_model_sends_them(tmp_path: Path, ranks: Ranks) -> None:
    folder = bundle(tmp_path)
    bare = samples(4, VOCAB_SIZE)
    plain = frozen_output(load_policy(config_of(folder), ranks), pack(bare, CPU)).logprobs_N
    policy = replaying(folder, ranks)
    ends = np.cumsum([s.num_targets for s in bare])
    mixed = [bare[0], *routed(bare[1:3]), bare[3]]
    found = frozen_output(policy, pack(mixed, CPU)).logprobs_N
    for first, last in ((0, ends[0]), (ends[2], ends[3])):
        torch.testing.assert_close(found[first:last], plain[first:last], rtol=0, atol=1e-6)
    assert (found - plain)[ends[0] : ends[2]].abs().max() > 1e-3
    torch.testing.assert_close(frozen_output(policy, pack(bare, CPU)).logprobs_N, plain)
    assert len(frozen_output(policy, pack([], CPU)).logprobs_N) == 0


def test_the_models_own_routes_change_nothing(tmp_path: Path, ranks: Ranks) -> None:
    """What an engine that computes as the trainer does would have recorded."""
    folder = bundle(tmp_path)
    policy = replaying(folder, ranks)
    made: Tokens = list(samples(4, VOCAB_SIZE))
    chosen: dict[int, list[torch.Tensor]] = {0: [], 2: []}
    layers: Any = policy.language_model.base_model.layers
    hooks = [
        layers[index].mlp.gate.register_forward_hook(
            lambda _, __, output, index=index: chosen[index].append(output[2])
        )
        for index in chosen
    ]
    before = [frozen_output(policy, pack([s], CPU)).logprobs_N for s in made]
    for hook in hooks:
        hook.remove()
    for number, s in enumerate(made):
        routes = np.zeros((len(s.token_ids) - 1, LAYERS, TOP_K), np.uint8)
        for index, found in chosen.items():
            routes[:, index] = found[number][:-1].numpy()
        made[number] = replace(s, routes=routes)
    after = frozen_output(policy, pack(made, CPU)).logprobs_N
    torch.testing.assert_close(after, torch.cat(before), rtol=0, atol=1e-6)


def test_routes_lie_where_their_tokens_do() -> None:
    longer, *_, shorter = sorted(
        routed(samples(6, VOCAB_SIZE)), key=lambda s: len(s.token_ids), reverse=True
    )
    assert shorter.routes is not None
    packed = pack([longer, replace(shorter, routes=None), shorter], CPU)
    assert packed.routes_LTK is not None
    length = len(shorter.token_ids)
    assert packed.routes_LTK.shape == (LAYERS, packed.num_tokens, TOP_K)
    found = packed.routes_LTK.transpose(0, 1).numpy()
    assert (found[:length] == -1).all()
    np.testing.assert_array_equal(found[length : 2 * length - 1], shorter.routes)
    np.testing.assert_array_equal(found[2 * length : -1], longer.routes)
    assert (found[[2 * length - 1, -1]] == -1).all()
    assert pack(samples(2, VOCAB_SIZE), CPU).routes_LTK is None


def test_a_batchs_samples_have_their_routes() -> None:
    from understudy.v1 import batch_pb2

    made = replace(segment(4, 1), routes=np.arange(6 * 6, dtype=np.uint8).reshape(6, 3, 2))
    rewards = np.array([1.0], "<f4").tobytes()
    header = batch_pb2.BatchHeader(
        steps_behind={1: 0}, groups=[batch_pb2.BatchGroup(rewards=rewards)]
    )
    share = BatchShare(header=header, trajectories=[message((made,), (turn(0, 0, 4),))])
    ((sample,),) = (episode.samples for episode in episodes_of(share, None))
    np.testing.assert_array_equal(sample.routes, made.routes)


def test_a_model_without_routers_is_refused(tmp_path: Path, ranks: Ranks) -> None:
    folder = Case(model_type="qwen3", tied=True, dtype="float32").make_bundle(tmp_path)
    with pytest.raises(ConfigError, match="router_replay = true, but a qwen3 has no routers"):
        replaying(folder, ranks)
