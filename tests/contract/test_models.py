"""The contract between the engine and a model.

The same tests run over the tabular model and tiny random models of many families that
`transformers` runs: rotary, learned and ALiBi positions, grouped and full attention, tied
embeddings or not.
"""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from decoder.models.base import LanguageModel, ServedModel, fit_vocabulary
from decoder.models.cuda_graphs import CudaGraphs
from decoder.models.fingerprint import fingerprint
from decoder.models.kv_cache import TreePositions
from decoder.models.llama import Llama
from decoder.models.loading import ModelFiles, over_slots, refuse_windows, save_first_draft
from decoder.rollout.live import LiveDraft
from online.errors import InvalidRequest
from tests.device import DEVICE
from tests.tabular import TableModel

V, SLOTS, CAPACITY = 60, 6, 33
_LLAMA_LIKE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
FAMILIES: dict[str, dict[str, object]] = {
    "llama": _LLAMA_LIKE,
    "mistral": {**_LLAMA_LIKE, "sliding_window": None},
    "qwen2": _LLAMA_LIKE,
    "qwen3": {**_LLAMA_LIKE, "head_dim": 8},
    "gemma": {**_LLAMA_LIKE, "head_dim": 8},
    "phi": _LLAMA_LIKE,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    },
}
Make = Callable[[], tuple[LanguageModel, Callable[[list[int]], torch.Tensor]]]


def module(family: str, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        family, vocab_size=V, bos_token_id=0, eos_token_id=0, pad_token_id=0, **FAMILIES[family]
    )
    config._attn_implementation = "sdpa"
    made = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for (
        parameter
    ) in made.parameters():  # norms of 1 and biases of 0 would hide that they are not applied
        if parameter.ndim == 1:
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    return made  # type: ignore[no-any-return]


def served_model(
    family: str, seed: int = 0
) -> tuple[ServedModel, Callable[[list[int]], torch.Tensor]]:
    made = module(family, seed)
    served = copy.deepcopy(made).to(DEVICE)

    def whole(context: list[int]) -> torch.Tensor:
        logits: torch.Tensor = made(torch.tensor([context])).logits[0]
        return logits

    return over_slots([served], SLOTS, CAPACITY, V)[0], whole


def captured_model() -> tuple[ServedModel, Callable[[list[int]], torch.Tensor]]:
    """As on CUDA, but replays run the forward; float64 runs torch's operations, as CUDA does."""
    served, whole = module("llama"), served_model("llama")[1]
    model = over_slots([served.double()], SLOTS, CAPACITY, V)[0]
    assert isinstance(model, Llama)
    model.graphs = CudaGraphs(model._forward, SLOTS, CAPACITY, model.device, lambda work: work)
    return model, whole


def tabular_model() -> tuple[TableModel, Callable[[list[int]], torch.Tensor]]:
    table = TableModel(V, seed=0, slots=SLOTS)

    def whole(context: list[int]) -> torch.Tensor:
        import numpy as np

        return torch.from_numpy(
            np.array([table.logits(context[: i + 1]) for i in range(len(context))])
        )

    return table, whole


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    """As the engine's step runs."""
    with torch.inference_mode():
        yield


@pytest.fixture(params=["table", "captured", *FAMILIES])
def make(request: pytest.FixtureRequest) -> Make:
    if request.param == "table":
        return tabular_model
    if request.param == "captured":
        return captured_model
    return lambda: served_model(request.param)


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(found.float().cpu(), expected.float(), atol=1e-5, rtol=1e-4)


def feed(
    model: LanguageModel, slots: object, ids: list[list[int]], starts: list[int]
) -> torch.Tensor:
    """As the engine calls it: padded, with the longest context that anyone reads."""
    longest = max(map(len, ids))
    padded = torch.tensor([[*row, *[0] * (longest - len(row))] for row in ids])
    upto = max(start + len(row) for start, row in zip(starts, ids, strict=True))
    return model.forward(slots, padded, torch.tensor(starts), upto)  # type: ignore[arg-type]


def test_sequences_of_mixed_lengths_are_each_as_if_alone(make: Make) -> None:
    """Prefill, then steps from different positions: no sequence sees another, or padding."""
    model, whole = make()
    contexts = [[5, 6, 7, 8, 9], [11], [21, 22, 23]]
    feed(model, slice(0, 3), contexts, [0, 0, 0])
    steps = [[31, 32, 33], [41, 42, 43], [51, 52, 53]]
    logits = feed(model, slice(0, 3), steps, [5, 1, 3])
    for b in range(3):
        assert close(logits[b], whole([*contexts[b], *steps[b]])[-3:])


def test_rejected_tokens_are_overwritten(make: Make) -> None:
    """A step back to an earlier position leaves nothing of the tokens after it."""
    model, whole = make()
    feed(model, slice(0, 1), [[5, 6]], [0])
    feed(model, slice(0, 1), [[31, 32, 33, 34]], [2])
    logits = feed(model, slice(0, 1), [[41, 42]], [3])
    assert close(logits[0], whole([5, 6, 31, 41, 42])[-2:])


def test_a_lone_sequence_goes_on_token_by_token(make: Make) -> None:
    """It does not see rejected drafts after its end."""
    model, whole = make()
    context = [5, 6, 7]
    feed(model, slice(0, 1), [[*context, 31, 32, 33]], [0])
    for token in (41, 42, 43):
        logits = feed(model, slice(0, 1), [[token]], [len(context)])
        context.append(token)
        assert close(logits[0, -1], whole(context)[-1])


@pytest.mark.parametrize("slots", [slice(0, 2), [0, 2]], ids=["neighbours", "by index"])
def test_a_sequence_at_its_end_drafts_along(make: Make, slots: object) -> None:
    """Its tokens beyond the end are dropped; other sequences are not affected."""
    model, whole = make()
    full, short = [5 + i % 20 for i in range(CAPACITY - 1)], [7, 8]
    feed(model, slots, [full, short], [0, 0])
    for step, token in enumerate([21, 22]):
        starts = [len(full) + step, len(short)]
        logits = feed(model, slots, [[token], [token]], starts)
        short.append(token)
        assert close(logits[1, -1], whole(short)[-1])


def test_some_slots_by_index_leave_the_others_alone(make: Make) -> None:
    """A route's draft feeds its own sequences, wherever they are."""
    model, whole = make()
    contexts = [[5, 6], [7, 8], [9, 10], [11, 12]]
    feed(model, slice(0, 4), contexts, [0] * 4)
    logits = feed(model, [1, 3], [[21], [22]], [2, 2])
    assert close(logits[0], whole([7, 8, 21])[-1:])
    assert close(logits[1], whole([11, 12, 22])[-1:])
    logits = feed(model, slice(0, 3), [[31], [32], [33]], [2, 3, 2])
    for b, context in enumerate([[5, 6, 31], [7, 8, 21, 32], [9, 10, 33]]):
        assert close(logits[b], whole(context)[-1:])


def test_a_moved_sequence_goes_on_where_it_was(make: Make) -> None:
    """The last sequence fills the hole of a finished one."""
    model, whole = make()
    feed(model, slice(0, 3), [[5, 6], [7], [9, 10, 11]], [0] * 3)
    model.copy(2, 0, 3)
    logits = feed(model, slice(0, 2), [[21], [22]], [3, 1])
    assert close(logits[0], whole([9, 10, 11, 21])[-1:])
    assert close(logits[1], whole([7, 22])[-1:])


def test_prompts_may_come_in_pieces(make: Make) -> None:
    """A prompt encoded in chunks is the same context as one that came whole."""
    model, whole = make()
    model.encode(slice(0, 2), torch.tensor([[5, 6, 7], [8, 9, 10]]), torch.tensor([0, 0]), 3)
    model.encode(slice(0, 2), torch.tensor([[11, 12], [13, 0]]), torch.tensor([3, 3]), 5)
    logits = feed(model, slice(0, 2), [[21], [22]], [5, 4])
    assert close(logits[0], whole([5, 6, 7, 11, 12, 21])[-1:])
    assert close(logits[1], whole([8, 9, 10, 13, 22])[-1:])


# The parents of nodes 1, 2, …, behind node 0.
TREES = {"a chain": (0, 1, 2), "a bush": (0, 0, 1, 1, 2), "twigs first": (0, 1, 0, 3, 3)}


def nodes_of(parents: list[tuple[int, ...]], first: int) -> TreePositions:
    """All nodes from the `first` on, of trees of one size."""
    size = len(parents[0]) + 1
    visible = torch.zeros(len(parents), size, size, dtype=torch.bool)
    for b, tree in enumerate(parents):
        for node in range(size):
            visible[b, node, node] = True
            if node:
                visible[b, node] |= visible[b, tree[node - 1]]
    visible = visible.to(DEVICE)
    return TreePositions(visible.sum(-1)[:, first:] - 1, visible[:, first:])


@pytest.mark.parametrize("cut", [None, 1, 3], ids=["at once", "root first", "in two parts"])
def test_nodes_of_a_tree_see_their_own_ancestors_only(make: Make, cut: int | None) -> None:
    """Trees of different shapes, built at once or in parts; then one path becomes the context."""
    model, whole = make()
    contexts, slots = [[5, 6, 7, 8], [9, 10], []], slice(0, 3)
    trees = [TREES["a bush"], TREES["twigs first"], TREES["a bush"]]
    feed(model, slice(0, 2), contexts[:2], [0, 0])
    tokens = torch.tensor(
        [[20, 21, 22, 23, 24, 25], [30, 31, 32, 33, 34, 35], [40, 41, 42, 43, 44, 45]]
    )
    starts, size = torch.tensor([4, 2, 0]), tokens.shape[1]
    parts = [(0, size)] if cut is None else [(0, cut), (cut, size)]
    logits = []
    for begin, end in parts:
        every = nodes_of(trees, begin)
        part = TreePositions(
            every.depth_BT[:, : end - begin], every.visible_BTC[:, : end - begin, :end]
        )
        logits.append(model.forward(slots, tokens[:, begin:end], starts, 4 + end, part))
    found = torch.cat(logits, 1)
    for b, tree in enumerate(trees):
        for node in range(size):
            path, at = [], node
            while at:
                path.append(at)
                at = tree[at - 1]
            expected = whole([*contexts[b], *(int(tokens[b, n]) for n in (0, *path[::-1]))])
            assert close(found[b, node], expected[-1]), (b, node)
    model.keep_path(0, 4, [0, 2, 5])
    model.keep_path(1, 2, [0, 3, 4])
    last = feed(model, slice(0, 2), [[50], [51]], [7, 5])
    assert close(last[0], whole([5, 6, 7, 8, 20, 22, 25, 50])[-1:])
    assert close(last[1], whole([9, 10, 30, 33, 34, 51])[-1:])


def test_vocabularies_of_other_sizes_are_cut_or_padded() -> None:
    """Padding can never be drafted or sampled."""
    logits = torch.zeros(1, 1, 4)
    assert fit_vocabulary(logits, 3).shape == (1, 1, 3)
    assert fit_vocabulary(logits, 6)[0, 0].tolist() == [0, 0, 0, 0, float("-inf"), float("-inf")]


def test_a_fingerprint_sees_any_change_and_nothing_else() -> None:
    """One weight, or two swapped ones."""
    model = served_model("llama")[0]
    before = fingerprint(model)
    assert fingerprint(model) == before
    kept = {name: tensor.clone() for name, tensor in model.weights().items()}
    for change in ("one weight", "two rows"):
        other = {name: tensor.clone() for name, tensor in kept.items()}
        weight = other["model.layers.1.mlp.up_proj.weight"]
        if change == "one weight":
            weight[3, 4] += 1e-3
        else:
            weight[[0, 1]] = weight[[1, 0]]
        assert model.install(model.prepare(other))
        assert fingerprint(model) != before
        assert model.install(model.prepare(kept))
        assert fingerprint(model) == before


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gpt2"])
def test_installed_weights_are_the_ones_that_answer(family: str) -> None:
    """Every tensor of another model's file is put in place: stacked, packed, tied or biased."""
    model, _ = served_model(family)
    other, whole = served_model(family, seed=1)
    assert model.install(model.prepare(other.weights()))
    assert fingerprint(model) == fingerprint(other)
    assert close(feed(model, slice(0, 1), [[5, 6, 7]], [0])[0], whole([5, 6, 7]))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_weights_carry_the_names_of_a_hugging_face_file(family: str, tmp_path: Path) -> None:
    """What a swap reads is what `save_pretrained` writes."""
    model, _ = served_model(family)
    module(family).save_pretrained(tmp_path)
    assert (
        model.weights().keys() == safetensors.torch.load_file(tmp_path / "model.safetensors").keys()
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_a_first_draft_of_any_family_can_be_swapped_in(family: str, tmp_path: Path) -> None:
    """GPT-NeoX names its head otherwise in a file than in a module."""
    module(family, seed=1).save_pretrained(tmp_path / "draft")
    save_first_draft(ModelFiles("", str(tmp_path / "draft"), ""), tmp_path / "artifact")
    live, other = LiveDraft("default", served_model(family)[0]), served_model(family, seed=1)[0]
    live.install(live.stage(tmp_path / "artifact"), version=1)
    assert live.usable
    assert fingerprint(live.model) == fingerprint(other)


def test_models_that_forget_are_refused_beyond_their_window(tmp_path: object) -> None:
    """Slot caches keep whole contexts: a sliding window would be ignored in silence."""
    config = transformers.MistralConfig(**{**_LLAMA_LIKE, "vocab_size": V, "sliding_window": 16})  # type: ignore[arg-type]
    config.save_pretrained(tmp_path)
    refuse_windows(str(tmp_path), 16)
    with pytest.raises(InvalidRequest, match="window 16"):
        refuse_windows(str(tmp_path), 64)


def test_padded_shapes_of_captured_graphs_change_nothing() -> None:
    """Rounded numbers of sequences and contexts change no logits and no other slot."""
    model, whole = served_model("llama")
    assert isinstance(model, Llama)
    replays: list[Callable[[], torch.Tensor]] = []

    def capture(work: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        replays.append(work)
        return work

    feed(model, slice(0, 4), [[5, 6], [7, 8, 9], [10], [11, 12]], [0] * 4)
    model.graphs = CudaGraphs(model._forward, SLOTS, CAPACITY, model.device, capture)
    for start in (2, 3):  # the second step replays what the first one captured
        logits = feed(model, slice(0, 3), [[21, 22], [31, 32], [41, 42]], [start, start, 1])
    assert len(replays) == 1
    assert close(logits[0], whole([5, 6, 21, 21, 22])[-2:])
    assert close(logits[1], whole([7, 8, 31, 31, 32])[-2:])
    assert close(logits[2], whole([10, 41, 42])[-2:])
    assert close(feed(model, [3], [[51]], [2])[0], whole([11, 12, 51])[-1:])
