"""Signals without a decoder: a teacher's distributions on its own samples."""

from pathlib import Path

import numpy as np

from online.signals import Signal


def signal(request_id: str = "r", route: str = "default", k: int = 4, **more: object) -> Signal:
    """Two steps: two drafted with one accepted, then one drafted and accepted. 5 positions."""
    values: dict[str, object] = {
        "request_id": request_id,
        "route": route,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "model": "m",
        "prompt_ids": np.array([5, 6, 7], np.int32),
        "output_ids": np.array([10, 11, 12, 13], np.int32),
        "step_start": np.array([0, 2], np.int32),
        "step_drafted": np.array([2, 1], np.int32),
        "step_accepted": np.array([1, 1], np.int32),
        "branch_tokens": 16,
        "branch_ids": np.array([99], np.int32),
        "top_ids": np.arange(5 * k, dtype=np.int32).reshape(5, k),
        "top_logp": np.full((5, k), np.log(0.9 / k), np.float16),
        "rest_mass": np.full(5, 0.1, np.float16),
    }
    return Signal(**{**values, **more})  # type: ignore[arg-type]


def taught(
    teacher: Path,
    count: int,
    *,
    tokens: int = 24,
    k: int = 32,
    seed: int = 0,
    name: str = "t",
    prompt_ids: tuple[int, int] = (4, 300),
    client: str = "",
) -> list[Signal]:
    """`count` requests, decoded plainly by the target in `teacher`: one position a step.

    Prompts are random, of token ids in the half-open range `prompt_ids`.
    """
    import torch  # here, as unit tests make signals without a model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(*prompt_ids, (count, 6), generator=generator)
    with torch.no_grad():
        for _ in range(tokens):
            probs = model(ids).logits[:, -1].softmax(-1)
            probs[:, :4] = 0
            ids = torch.cat([ids, torch.multinomial(probs, 1, generator=generator)], 1)
        logp = model(ids[:, :-1]).logits.log_softmax(-1)[:, 5:]
    top = logp.topk(k)
    rest = (1 - top.values.exp().sum(-1)).clamp(min=0)
    steps = np.arange(tokens, dtype=np.int32)
    zeros = np.zeros(tokens, np.int32)
    return [
        signal(
            f"{name}{i}",
            model="tiny-target",
            prompt_ids=ids[i, :6].numpy().astype(np.int32),
            output_ids=ids[i, 6:].numpy().astype(np.int32),
            step_start=steps,
            step_drafted=zeros,
            step_accepted=zeros,
            branch_ids=np.zeros(0, np.int32),
            top_ids=top.indices[i].numpy().astype(np.int32),
            top_logp=top.values[i].numpy().astype(np.float16),
            rest_mass=rest[i].numpy().astype(np.float16),
            client=client,
        )
        for i in range(count)
    ]
