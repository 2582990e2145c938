"""The laws of sequence mixers, for those of the house and for the examples of every room that provides a mixer."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from regard import papers
from regard.attention.tree import tree_bytes, tree_leaves, tree_map
from regard.blocks.convolution import CausalConvolution
from regard.blocks.language_model import LanguageModel, LanguageModelConfig
from regard.blocks.sequence_mixer import SequenceMixer
from regard.blocks.softmax_attention import SoftmaxAttention

LAWS = {"chunk_invariance", "causality"}
"""The laws that a mixer may declare itself exempt from."""
CHUNKINGS = st.lists(st.integers(0, 9), min_size=1, max_size=5)
DEVICES = ["meta", *([str(torch.accelerator.current_accelerator())] if torch.accelerator.is_available() else [])]


class Centred(SequenceMixer):
    """Tokens less the mean of all tokens of the chunk: breaks both laws, and says so."""

    exempt = frozenset(LAWS)

    def __init__(self, dim: int = 8):
        super().__init__()
        self.proj = nn.Linear(dim, dim)

    def initial(self, batch, device=None, dtype=None):
        return torch.zeros(batch, self.proj.in_features, device=device or self.proj.weight.device, dtype=torch.float32)

    def forward(self, x, state=None):
        state = self.initial(len(x), x.device) if state is None else state
        sums = state.to(torch.promote_types(x.dtype, torch.float32)) + x.sum(dim=1)
        return self.proj(x) - x.sum(dim=1, keepdim=True) / max(1, x.shape[1]) + sums.to(x.dtype)[:, None], sums


@dataclass(frozen=True)
class Subject:
    """A mixer under the laws, and how its inputs are drawn."""

    name: str
    make: Callable[[], nn.Module]

    def mixer(self, dtype: torch.dtype = torch.float32) -> Any:
        """The mixer, always with the same weights, none of them zero."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            mixer = self.make().eval()
            for parameter in mixer.parameters():
                if parameter.numel() and not parameter.any():
                    nn.init.normal_(parameter, std=0.1)
        return mixer.to(dtype)

    def inputs(self, mixer: nn.Module, batch: int, tokens: int, seed: int = 0) -> Tensor:
        """Token ids for a language model; tokens in the mixer's dtype for the others."""
        generator = torch.Generator().manual_seed(seed)
        if isinstance(mixer, LanguageModel):
            return torch.randint(mixer.config.vocab_size, (batch, tokens), generator=generator)
        dtype = next(mixer.parameters()).dtype
        return torch.randn(batch, tokens, width(mixer), generator=generator, dtype=torch.float64).to(dtype)


def width(mixer: nn.Module) -> int:
    """How many numbers the mixer's tokens have."""
    dim = getattr(mixer, "dim", None)
    return dim or next(part.in_features for part in mixer.modules() if isinstance(part, nn.Linear))


def subjects() -> list[Subject]:
    config = LanguageModelConfig(vocab_size=29, dim=16, layout="conv softmax", init_std=1.0)
    parts = {"conv": lambda dim: CausalConvolution(dim, 3, bias=True), "softmax": lambda dim: SoftmaxAttention(dim, 2)}
    found = [
        Subject("SoftmaxAttention", lambda: SoftmaxAttention(16, 2)),
        Subject("CausalConvolution", lambda: CausalConvolution(6, 4, bias=True)),
        Subject("LanguageModel", lambda: LanguageModel(config, parts)),
        Subject("Centred", Centred),
    ]
    for paper in papers.all():
        if "mixer" in paper.provides:
            for name, make in paper.examples().items():
                if isinstance(make(), SequenceMixer | LanguageModel):
                    found.append(Subject(f"{paper.slug}.{name}", make))
    return found


SUBJECTS = subjects()
every_mixer = pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)


def exempt(mixer: nn.Module) -> frozenset[str]:
    return mixer.exempt if isinstance(mixer, SequenceMixer) else frozenset()


def read(mixer: nn.Module, x: Tensor, chunks: list[int], state: Any) -> tuple[Tensor, Any]:
    """All outputs, and the state after the last chunk."""
    outs = []
    for chunk in x.split(chunks, dim=1):
        out, state = mixer(chunk, state)
        outs.append(out)
    return torch.cat(outs, dim=1), state


def assert_same(actual: Tensor | list[Tensor], expected: Tensor | list[Tensor]) -> None:
    """Equal but for rounding in fp32, which is measured by the largest number of a tensor."""
    for got, wanted in zip(*([x] if isinstance(x, Tensor) else x for x in (actual, expected)), strict=True):
        largest = wanted.abs().max().item() if wanted.numel() else 0.0
        assert_close(got, wanted, rtol=1e-4, atol=1e-5 * largest)


def check_chunk_invariance(subject: Subject, batch: int, chunks: list[int]) -> None:
    mixer = subject.mixer()
    x = subject.inputs(mixer, batch, sum(chunks))
    whole, end = mixer(x)
    out, state = read(mixer, x, chunks, None)
    assert_same(out, whole)
    assert_same(tree_leaves(state), tree_leaves(end))


def check_causality(subject: Subject, batch: int, before: int, after: int) -> None:
    """No output before the change depends on it, nor does the state there; later outputs do depend on it."""
    mixer = subject.mixer()
    x, other = (subject.inputs(mixer, batch, before + after, seed) for seed in (0, 1))
    changed = torch.cat([x[:, :before], other[:, before:]], dim=1)
    out, of_changed = mixer(x)[0], mixer(changed)[0]
    assert_same(of_changed[:, :before], out[:, :before])
    assert not torch.allclose(of_changed[:, before:], out[:, before:], rtol=1e-3, atol=0), "tokens must matter"


@every_mixer
@settings(max_examples=12, deadline=None)
@given(batch=st.integers(1, 3), chunks=CHUNKINGS)
@torch.no_grad()
def test_any_chunks_equal_the_whole_in_outputs_and_state(subject, batch, chunks):
    if "chunk_invariance" not in exempt(subject.mixer()):
        check_chunk_invariance(subject, batch, chunks)


@every_mixer
@pytest.mark.parametrize("chunks", [[0], [0, 7, 0], [1] * 12, [11, 1, 0, 1, 30], [40, 1]], ids=str)
@torch.no_grad()
def test_no_tokens_one_token_and_many_are_chunks_too(subject, chunks):
    if "chunk_invariance" not in exempt(subject.mixer()):
        check_chunk_invariance(subject, 2, chunks)


@every_mixer
@settings(max_examples=6, deadline=None)
@given(batch=st.integers(1, 3), tokens=st.integers(0, 20))
@torch.no_grad()
def test_no_state_is_the_initial_state(subject, batch, tokens):
    mixer = subject.mixer()
    x = subject.inputs(mixer, batch, tokens)
    out, state = mixer(x)
    from_initial, after = mixer(x, mixer.initial(batch))
    assert_same(from_initial, out)
    assert_same(tree_leaves(after), tree_leaves(state))
    assert out.shape[:2] == (batch, tokens)


@every_mixer
@settings(max_examples=12, deadline=None)
@given(batch=st.integers(1, 3), before=st.integers(0, 20), after=st.integers(1, 20))
@torch.no_grad()
def test_no_output_depends_on_a_later_token(subject, batch, before, after):
    if "causality" not in exempt(subject.mixer()):
        check_causality(subject, batch, before, after)


@every_mixer
@torch.no_grad()
def test_a_declared_exemption_is_needed(subject):
    declared = exempt(subject.mixer())
    assert declared <= LAWS, f"exempt must be out of {sorted(LAWS)}, got {sorted(declared)}"
    if "chunk_invariance" in declared:
        with pytest.raises(AssertionError):
            for chunks in ([1] * 12, [11, 1], [20, 20]):
                check_chunk_invariance(subject, 2, chunks)
    if "causality" in declared:
        with pytest.raises(AssertionError):
            for before in (1, 6, 15):
                check_causality(subject, 2, before, 5)


@torch.no_grad()
def test_an_exemption_that_is_not_needed_is_found_out():
    class Modest(SoftmaxAttention):
        exempt = frozenset({"causality"})

    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        test_a_declared_exemption_is_needed.__wrapped__(Subject("Modest", lambda: Modest(16, 2)))


@every_mixer
def test_gradients_flow_through_the_state(subject):
    def gradients(chunks: list[int], between: Callable[[Tensor], Tensor]) -> Tensor:
        mixer = subject.mixer()
        x = subject.inputs(mixer, 2, sum(chunks))
        wanted = [parameter for parameter in mixer.parameters() if parameter.requires_grad]
        if x.is_floating_point():
            wanted.append(x.requires_grad_())
        state, outs = None, []
        for chunk in x.split(chunks, dim=1):
            out, state = mixer(chunk, state)
            state = tree_map(between, state)
            outs.append(out)
        out = torch.cat(outs, dim=1)
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        return torch.cat([part.flatten() for part in torch.autograd.grad((out * weights).sum(), wanted)])

    def same(leaf: Tensor) -> Tensor:
        return leaf

    chunks = [2, 0, 1, 6]
    flowing = gradients(chunks, same)
    assert flowing.isfinite().all()
    with pytest.raises(AssertionError):  # a state that is cut off gives other gradients
        assert_same(gradients(chunks, Tensor.detach), flowing)
    if "chunk_invariance" not in exempt(subject.mixer()):
        assert_same(flowing, gradients([sum(chunks)], same))


@every_mixer
@torch.no_grad()
def test_a_state_is_made_of_batch_first_tensors_whose_rows_can_be_picked(subject):
    mixer = subject.mixer()
    x, more = subject.inputs(mixer, 3, 7), subject.inputs(mixer, 3, 4, seed=1)
    _, state = mixer(x)
    for leaf in (*tree_leaves(state), *tree_leaves(mixer.initial(3))):
        assert isinstance(leaf, Tensor) and leaf.shape[0] == 3
    rows = torch.tensor([2, 0])
    out, _ = mixer(more[rows], tree_map(lambda leaf: leaf.index_select(0, rows), state))
    assert_same(out, mixer(more, state)[0][rows])


@every_mixer
@torch.no_grad()
def test_reading_on_leaves_a_state_as_it_was(subject):
    mixer = subject.mixer()
    x, more = subject.inputs(mixer, 2, 7), subject.inputs(mixer, 2, 4, seed=1)
    _, state = mixer(x)
    kept = tree_map(torch.clone, state)
    mixer(more, state)
    mixer(more[:, :1], state)
    assert_close(tree_leaves(state), tree_leaves(kept), rtol=0, atol=0)


@every_mixer
@torch.no_grad()
def test_the_bytes_of_a_state_grow_by_the_same_with_every_token_or_not_at_all(subject):
    mixer = subject.mixer()

    def held(batch: int, tokens: int) -> int:
        return tree_bytes(mixer(subject.inputs(mixer, batch, tokens))[1])

    assert tree_bytes(mixer.initial(1)) == held(1, 0)
    assert held(1, 50) - held(1, 30) == held(1, 70) - held(1, 50) >= 0
    assert held(3, 30) == 3 * held(1, 30) and tree_bytes(mixer.initial(3)) == 3 * tree_bytes(mixer.initial(1))


@every_mixer
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.08), (torch.float16, 0.02)], ids=str)
@torch.no_grad()
def test_half_precision_is_finite_and_close_with_sums_in_fp32(subject, dtype, tolerance):
    mixer, half = subject.mixer(), subject.mixer().to(dtype)
    x = subject.inputs(mixer, 2, 40)
    out = mixer(x)[0]
    coarse, of_half = half(x if isinstance(mixer, LanguageModel) else x.to(dtype))
    assert coarse.dtype == dtype and coarse.isfinite().all()
    scale = out.abs().max()
    assert_close(coarse.float() / scale, out / scale, rtol=0, atol=tolerance)
    rounded = mixer(x.to(dtype).float() if x.is_floating_point() else x)[0]
    assert not torch.equal(coarse.float(), rounded), "half precision must have been used"
    for leaf, sums in zip(tree_leaves(of_half), running_sums(subject), strict=True):
        assert leaf.dtype == torch.float32 or not sums
    for leaf, first in zip(tree_leaves(of_half), tree_leaves(half.initial(2)), strict=True):
        assert leaf.dtype == first.dtype
    again, _ = half(subject.inputs(half, 2, 3), of_half)
    assert again.isfinite().all()


def running_sums(subject: Subject) -> list[bool]:
    """For each leaf of the state whether it is a sum: all its numbers change with every token, and with the first one.

    What holds tokens themselves keeps most of its numbers when a token comes, or grows.
    """
    mixer = subject.mixer()
    x, other = subject.inputs(mixer, 1, 41), subject.inputs(mixer, 1, 41, seed=1)
    before, after = (tree_leaves(mixer(x[:, :tokens])[1]) for tokens in (40, 41))
    from_other_first = tree_leaves(mixer(torch.cat([other[:, :1], x[:, 1:40]], dim=1))[1])
    sums = []
    for old, new, changed in zip(before, after, from_other_first, strict=True):
        grows = old.shape != new.shape or not old.is_floating_point()
        sums.append(not grows and not torch.isin(new, old).any() and not torch.equal(old, changed))
    return sums


@torch.no_grad()
def test_sums_are_told_from_stores():
    assert running_sums(Subject("Centred", Centred)) == [True]
    assert running_sums(Subject("SoftmaxAttention", lambda: SoftmaxAttention(16, 2))) == [False, False]
    assert running_sums(Subject("CausalConvolution", lambda: CausalConvolution(6, 4))) == [False]


@every_mixer
@pytest.mark.parametrize("device", DEVICES)
@torch.no_grad()
def test_a_mixer_moves_to_another_device(subject, device, monkeypatch):
    if device == "meta":  # it has shapes and no numbers, and no autocast to be switched off
        monkeypatch.setattr(torch, "autocast", lambda *args, **options: nullcontext())
    here = subject.mixer()
    x = subject.inputs(here, 2, 5)
    mixer = subject.mixer().to(device)
    out, state = mixer(x.to(device))
    out_of_next, next_state = mixer(x[:, :1].to(device), state)
    from_initial, _ = mixer(x.to(device), mixer.initial(2))
    for tensor in (out, out_of_next, from_initial, *tree_leaves(next_state), *tree_leaves(mixer.initial(1))):
        assert tensor.device.type == torch.device(device).type
    assert out.shape == here(x)[0].shape
    if device != "meta":
        assert_close(out.cpu(), here(x)[0], rtol=1e-3, atol=1e-3)


@every_mixer
@torch.no_grad()
def test_a_mixer_moves_to_double_precision(subject):
    single, double = subject.mixer(), subject.mixer().double()
    x = subject.inputs(single, 2, 12)
    out, _ = double(x.double() if x.is_floating_point() else x)
    assert out.dtype == torch.float64
    assert double(x.double() if x.is_floating_point() else x, double.initial(2))[0].dtype == torch.float64
    assert_close(out.float(), single(x)[0], rtol=1e-3, atol=1e-3)
