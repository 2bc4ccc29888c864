"""Experts that were recorded are those that run; how much they count is the trainer's own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from flashquant.errors import CorrectionError
from flashquant.tis import replay_routing

transformers = pytest.importorskip("transformers")

LAYERS, EXPERTS, K, VOCABULARY = 3, 8, 2, 50
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_experts_per_tok": K,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
KINDS: dict[str, dict] = {
    "Qwen3Moe": {"num_experts": EXPERTS},
    "Qwen2Moe": {"num_experts": EXPERTS, "shared_expert_intermediate_size": 16},
    "Mixtral": {"num_local_experts": EXPERTS},
    "Olmoe": {"num_experts": EXPERTS},
    "GptOss": {"num_local_experts": EXPERTS},
    "DeepseekV3": {
        "n_routed_experts": EXPERTS,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "q_lora_rank": None,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
        "head_dim": 8,
    },
}


def model_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**COMMON | KINDS[kind])
    config._attn_implementation = "eager"
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


class Seen(TorchFunctionMode):
    """Which experts the layers chose, by watching from outside of them."""

    def __init__(self) -> None:
        super().__init__()
        self.chosen: list[Tensor] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in (torch.topk, Tensor.topk) and args[0].shape[-1] == EXPERTS:
            self.chosen.append(result.indices.detach())
        return result


def own_routing(model: nn.Module, tokens: Tensor) -> Tensor:
    """`[B, T, LAYERS, K]` that the model chooses by itself; zeros where a layer is dense."""
    with Seen() as seen, torch.no_grad():
        model(tokens)
    found = [chosen.view(*tokens.shape, K) for chosen in seen.chosen]
    dense = [torch.zeros_like(found[0])] * (LAYERS - len(found))
    return torch.stack(dense + found, 2)


def tokens_of(rows: int = 2, columns: int = 7) -> Tensor:
    return torch.randint(VOCABULARY, (rows, columns), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
def test_its_own_routing_replayed_changes_nothing(kind: str) -> None:
    model, tokens = model_of(kind), tokens_of()
    expected = model(tokens).logits

    with replay_routing(model, own_routing(model, tokens)):
        found = model(tokens).logits

    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_another_models_routing_is_followed_and_undone(kind: str) -> None:
    """A model whose routers round otherwise: with its own choice it says something else."""
    model, tokens = model_of(kind), tokens_of()
    before = model(tokens).logits
    routed = (own_routing(model, tokens) + 3) % EXPERTS

    with replay_routing(model, routed):
        with_replay = model(tokens).logits
    by_hand = following(model, routed, lambda: model(tokens).logits)

    torch.testing.assert_close(with_replay, by_hand, rtol=1e-5, atol=1e-5)
    assert (with_replay - before).abs().max() > 1e-3
    assert torch.equal(model(tokens).logits, before)
    assert not any("forward" in vars(module) for module in model.modules())


def following(model: nn.Module, routed: Tensor, run: Callable[[], Tensor]) -> Tensor:
    """The experts' own forward, given others: for each token those of `routed`, weighed by hand."""
    layers = model.model.layers
    handles = []
    for number, layer in enumerate(layers):
        block = getattr(layer, "mlp", None) or layer.block_sparse_moe
        if not hasattr(block, "experts"):
            continue
        gate = block.gate if hasattr(block, "gate") else block.router
        chosen = routed[:, :, number].flatten(0, 1)

        def weigh(module, args, output, *, gate=gate, chosen=chosen):
            return weighed(gate, output, chosen, args[0])

        handles.append(gate.register_forward_hook(weigh))
    try:
        return run()
    finally:
        for handle in handles:
            handle.remove()


def weighed(gate: nn.Module, output, chosen: Tensor, hidden: Tensor):
    """A router's output with other experts, by the definition of its family."""
    logits = torch.nn.functional.linear(
        hidden.reshape(-1, hidden.shape[-1]).float(), gate.weight.float(), gate_bias(gate)
    )
    name = type(gate).__name__
    if name.startswith("GptOss"):
        scores = logits.gather(-1, chosen).softmax(-1)
    elif name.startswith("DeepseekV3"):
        scores = logits.sigmoid().gather(-1, chosen)
        scores = scores / (scores.sum(-1, keepdim=True) + 1e-20) * gate.routed_scaling_factor
    else:
        scores = logits.softmax(-1).gather(-1, chosen)
        if getattr(gate, "norm_topk_prob", True):
            scores = scores / scores.sum(-1, keepdim=True)
    return (output[0], scores, chosen)


def gate_bias(gate: nn.Module) -> Tensor | None:
    bias = getattr(gate, "bias", None)
    return None if bias is None else bias.float()


def test_gradients_are_of_the_trainers_own_router() -> None:
    model, tokens = model_of("Qwen3Moe"), tokens_of()
    routed = (own_routing(model, tokens) + 3) % EXPERTS

    with replay_routing(model, routed):
        model(tokens).logits.square().mean().backward()

    for layer in model.model.layers:
        assert layer.mlp.gate.weight.grad.abs().max() > 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_replay_on_their_way_back_too(reentrant: bool) -> None:
    tokens = tokens_of()
    gradients = []
    for checkpointed in (False, True):
        model = model_of("Qwen3Moe").train()
        routed = (own_routing(model, tokens) + 3) % EXPERTS
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with replay_routing(model, routed):
            model(inputs_embeds=model.model.embed_tokens(tokens)).logits.square().mean().backward()
        gradients.append(model.model.layers[0].mlp.gate.weight.grad)

    torch.testing.assert_close(gradients[1], gradients[0])


def test_rows_of_any_length_lie_where_their_tokens_are() -> None:
    """Padded on the left; the last token, which vLLM has never run, chooses by itself."""
    model = model_of("Qwen3Moe")
    tokens, mask = tokens_of(2, 7), torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    rows = [
        np.asarray(own_routing(model, tokens[:1, 2:])[0, :-1] + 3, dtype=np.uint8) % EXPERTS,
        np.asarray(own_routing(model, tokens[1:])[0, :-1] + 3, dtype=np.uint8) % EXPERTS,
    ]

    ran: list[Tensor] = []
    likes: list[Tensor] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda gate, args, output: ran.append(output[-1]))
        layer.mlp.gate.register_forward_hook(lambda gate, args, output: likes.append(output[0]))

    with replay_routing(model, rows, mask):
        padded = model(tokens, attention_mask=mask).logits
    padded_ran, ran = ran, []
    with replay_routing(model, rows[:1]):
        alone = model(tokens[:1, 2:]).logits

    torch.testing.assert_close(padded[0, 2:], alone[0], rtol=1e-4, atol=1e-4)
    assert len(padded_ran) == LAYERS
    for number, chosen in enumerate(padded_ran):
        laid = chosen.view(2, 7, K)
        assert laid[0, 2:6].tolist() == rows[0][:, number].tolist()
        assert laid[1, :6].tolist() == rows[1][:, number].tolist()
        own = likes[number].view(2, 7, EXPERTS)[:, 6].topk(K).indices
        assert laid[:, 6].tolist() == own.tolist()


@pytest.mark.parametrize(
    ("routed", "mask", "remedy"),
    [
        (torch.zeros(2, 7, LAYERS, K, dtype=torch.long) + EXPERTS, None, "expert 8 was recorded"),
        (torch.zeros(2, 7, LAYERS + 1, K, dtype=torch.long), None, "4 layers.*the model has 3"),
        (torch.zeros(2, 6, LAYERS, K, dtype=torch.long), None, "for 14 tokens.* of 12"),
        (torch.zeros(2, 7, LAYERS, K + 1, dtype=torch.long), None, "nothing was replayed"),
        (torch.zeros(7, LAYERS, K, dtype=torch.long), None, r"\[B, T, layers, K\]"),
        ([np.zeros((8, LAYERS, K)), np.zeros((2, LAYERS, K))], torch.ones(2, 7), "of 8 tokens"),
        ([np.zeros((3, LAYERS, K))], torch.ones(2, 7), "1 rows were routed"),
        ([np.zeros((3, LAYERS))], torch.ones(1, 7), "the same layers and K"),
    ],
)
def test_a_routing_of_something_else_is_refused(routed, mask, remedy: str) -> None:
    model, tokens = model_of("Qwen3Moe"), tokens_of()

    with pytest.raises(CorrectionError, match=remedy), replay_routing(model, routed, mask):
        model(tokens)

    assert not any("forward" in vars(module) for module in model.modules())


def test_a_dense_model_is_refused() -> None:
    config = transformers.Qwen3Config(**COMMON)
    dense = transformers.Qwen3ForCausalLM(config)

    with (
        pytest.raises(CorrectionError, match="Qwen3ForCausalLM has no experts"),
        replay_routing(dense, torch.zeros(1, 2, LAYERS, K, dtype=torch.long)),
    ):
        pass


def test_routers_that_take_weights_from_groups_are_refused() -> None:
    model = model_of("Qwen3Moe")
    model.config.topk_method = "group_limited_greedy"

    with (
        pytest.raises(CorrectionError, match="group_limited_greedy"),
        replay_routing(model, torch.zeros(1, 2, LAYERS, K, dtype=torch.long)),
    ):
        pass


def test_a_layers_own_forward_comes_back() -> None:
    """Where something else (accelerate's hooks) has put one into the instance."""
    model, tokens = model_of("Qwen3Moe"), tokens_of()
    layer = model.model.layers[1]
    mine = layer.forward
    layer.forward = mine

    with replay_routing(model, own_routing(model, tokens)):
        model(tokens)

    assert vars(layer)["forward"] is mine
