"""The decoder: a two-layer Llama in float32, its supervised start, and its own answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from examples.rl import task
from examples.rl.settings import Settings
from examples.rl.task import Problem
from flashquant import tis

_HEAD = 64
_WARM_BATCH = 64
_WARM_LOOK = 10
_WARM_RAMP = 50  # without it, some starts never find the digits
# Seeds of what is never trained on, apart from the seeds that a run counts through.
_HELD_OUT_SEED = 1_000_003
_WARM_SEED = 2_000_003


def fresh(settings: Settings) -> LlamaForCausalLM:
    """A decoder with random weights, the same each time."""
    torch.manual_seed(_WARM_SEED)
    return LlamaForCausalLM(_config(settings))


def _config(settings: Settings) -> LlamaConfig:
    heads = settings.hidden // _HEAD
    return LlamaConfig(
        vocab_size=task.PADDED_VOCABULARY,
        hidden_size=settings.hidden,
        intermediate_size=2 * settings.hidden,
        num_hidden_layers=settings.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=_HEAD,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=task.END,
        pad_token_id=task.PADDING,
        architectures=["LlamaForCausalLM"],
    )


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """As a bf16 checkpoint that vLLM starts from."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config.to_diff_dict() | {"dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(pushed(model), folder / "model.safetensors", metadata={"format": "pt"})


def pushed(model: LlamaForCausalLM, bits: int | None = None) -> dict[str, Tensor]:
    """What the engine is sent: bf16, and with `bits` the matrices of the layers first rounded."""
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    if bits is not None:
        weights = {n: rounded(w, bits) if _is_layer(n, w) else w for n, w in weights.items()}
    # A copy each: nothing that is pushed shares memory with what is trained.
    return {name: weight.to(torch.bfloat16) for name, weight in weights.items()}


def _is_layer(name: str, weight: Tensor) -> bool:
    return weight.ndim == 2 and name.startswith("model.layers.")


def rounded(weight: Tensor, bits: int) -> Tensor:
    """Round to the nearest of 2^bits - 1 evenly spaced values, one scale a row."""
    largest = 2 ** (bits - 1) - 1
    scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / largest
    return (weight / scale).round() * scale


def logprobs(model: LlamaForCausalLM, tokens: Tensor, kept: tis.Truncation | None = None) -> Tensor:
    """`[B, T - 1]`: the log-prob of each token but the first, under those before it.

    Normalized over the tokens that the sampler kept, where a truncation says which.
    """
    logits = model(input_ids=tokens[:, :-1]).logits.float()
    if kept is not None:
        return tis.masked_logprobs(logits, tokens[:, 1:], kept)
    return logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)


def accuracy(model: LlamaForCausalLM, count: int, *, calculator: bool = False) -> float:
    """Which part of the held-out sums the trainer's own weights get right, greedily."""
    asked = task.problems(count, torch.Generator().manual_seed(_HELD_OUT_SEED), held_out=True)
    answers = greedy(model, asked, calculator)
    return sum(task.reward(p, a) for p, a in zip(asked, answers, strict=True)) / count


@torch.no_grad()
def greedy(model: LlamaForCausalLM, asked: list[Problem], calculator: bool) -> list[list[int]]:
    """The most likely answer to each problem, without what the calculator said.

    Every sequence grows by a token a turn; where a call stands, by the calculator's next two.
    """
    written: list[list[int]] = [[] for _ in asked]
    forced: list[list[int]] = [[] for _ in asked]
    rows = [task.encode(problem.prompt) for problem in asked]
    for _ in range(task.ANSWER_LENGTH + calculator * task.DIGITS * (task.TOOL_LENGTH + 1)):
        likely = model(input_ids=torch.tensor(rows)).logits[:, -1].argmax(-1).tolist()
        for row, own, queue, problem, token in zip(
            rows, written, forced, asked, likely, strict=True
        ):
            if queue:
                row.append(queue.pop(0))
                continue
            row.append(token)
            if calculator and token == task.CALL:
                queue += task.encode(problem.column(len(own)))
            elif task.END not in own:
                own.append(token)
    return written


def warm_start(
    settings: Settings, *, calculator: bool, progress: Callable[[int, float], None]
) -> LlamaForCausalLM:
    """Learn from worked sums until some come out right: reinforcement needs a first success."""
    model = fresh(settings)
    dice = torch.Generator().manual_seed(_WARM_SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.warm_rate, weight_decay=0.0)
    for step in range(1, settings.warm_steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = settings.warm_rate * min(1.0, step / _WARM_RAMP)
        tokens, mask = _worked(task.problems(_WARM_BATCH, dice), calculator)
        loss = -(logprobs(model, tokens) * mask).sum() / mask.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % _WARM_LOOK == 0:
            right = accuracy(model, settings.held_out, calculator=calculator)
            progress(step, right)
            if right >= settings.warm_accuracy:
                break
    return model


def _worked(asked: list[Problem], calculator: bool) -> tuple[Tensor, Tensor]:
    """Prompts with their answers, and where the loss counts: the answer, not the calculator's."""
    texts = [p.prompt + (p.worked if calculator else p.answer) for p in asked]
    tokens = torch.tensor([task.encode(text) for text in texts])
    own = torch.zeros_like(tokens, dtype=torch.bool)
    own[:, task.PROMPT_LENGTH :] = True
    for back in range(1, task.TOOL_LENGTH + 1):
        own[:, back:] &= tokens[:, :-back] != task.CALL
    return tokens, own[:, 1:].float()


def cached_warm_start(
    settings: Settings,
    folder: Path,
    *,
    calculator: bool,
    progress: Callable[[int, float], None],
) -> LlamaForCausalLM:
    """The supervised start, made once a folder; all arms and seeds begin from the same weights."""
    # Not beside the bf16 one: vLLM reads every safetensors file of a folder.
    path = folder / "float32" / "model.safetensors"
    made_with, wanted = folder / "made_with.json", json.dumps(_start_settings(settings))
    if path.is_file() and made_with.is_file() and made_with.read_text() == wanted:
        model = fresh(settings)
        model.load_state_dict(load_file(path))
        return model
    model = warm_start(settings, calculator=calculator, progress=progress)
    save(model, folder)
    path.parent.mkdir(exist_ok=True)
    save_file({n: p.detach().clone() for n, p in model.named_parameters()}, path)
    made_with.write_text(wanted)
    return model


def _start_settings(settings: Settings) -> dict[str, float]:
    """What the supervised start depends on."""
    names = ("hidden", "layers", "warm_accuracy", "warm_steps", "warm_rate", "held_out")
    return {name: getattr(settings, name) for name in names}
