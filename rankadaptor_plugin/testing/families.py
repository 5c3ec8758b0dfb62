"""Conformance suite of a model family: cut, saved and recovered, its models compute what they must.

An author inherits it, makes a tiny model, and lets pytest collect the class; the family has been
registered before:

    class TestMyFamily(FamilyConformance):
        def model(self, attention):
            return MyForCausalLM(MyConfig(hidden_size=32, ..., attn_implementation=attention))
"""
# ruff: noqa: S101 - asserting is what a test suite does.

from __future__ import annotations

import copy
import math
import warnings
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from rankadaptor_plugin.config.tables import PruneConfig
from rankadaptor_plugin.core.ranks import RankAllocation
from rankadaptor_plugin.models import logits as output_layer
from rankadaptor_plugin.models.pruned_model import PrunedModel, load_pruned
from rankadaptor_plugin.models.structures import (
    decoder_layers,
    hidden_units,
    is_transposed,
    layer_units,
    layer_widths,
    structure_of,
)
from rankadaptor_plugin.pruning.calibration import hidden_states, padded, sequence_loss
from rankadaptor_plugin.pruning.channel import prune_channel
from rankadaptor_plugin.pruning.compensation import compensate
from rankadaptor_plugin.pruning.cutting import remove
from rankadaptor_plugin.pruning.importance import unit_scores
from rankadaptor_plugin.recovery.adapters import attach, trainable_parameters

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

    from rankadaptor_plugin.models.structures import Units

    Cut = tuple[int, int, list[int]]
    """Number of a layer, 0 for its attention or 1 for its MLP, numbers of the units to remove."""
    from pathlib import Path


_CLOSE = 1e-5


class FamilyConformance:
    """Inherit and override `model`."""

    attentions: tuple[str, ...] = ("sdpa", "eager")
    """Attention implementations of the family; first the one that transformers takes by itself."""

    static_cache = True
    """True if the family can generate with a static cache."""

    def model(self, attention: str) -> PreTrainedModel:
        """Returns a fresh tiny random model with the given attention implementation.

        It has at least three layers, and, where heads can be removed, at least two KV groups or
        at least three query heads that share one key-value head.
        """
        raise NotImplementedError

    def _model(self, attention: str = "", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """Returns a model far from its initial weights, whose constants hide mistakes."""
        model = self.model(attention or self.attentions[0]).eval()
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
                parameter.data = parameter.data.to(dtype)  # buffers stay, as when loading
        return model

    def _pruned(self, attention: str = "", dtype: torch.dtype = torch.float32) -> PrunedModel:
        model = self._model(attention, dtype)
        remove_units(model, choose_cuts(model))
        return PrunedModel.of(model, tiny_tokenizer())

    def test_a_pruned_model_equals_one_whose_units_are_zeroed(self) -> None:
        """The first and last units of two layers, twice, with and without padding."""
        for attention in self.attentions:
            model = self._model(attention)
            base_config, states = copy.deepcopy(model.config), [logits_of(model)]
            for _ in range(2):
                cuts, before, masked = choose_cuts(model), layer_widths(model), copy.deepcopy(model)
                zero_units(masked, cuts)
                remove_units(model, cuts)
                pruned = PrunedModel.of(model, tiny_tokenizer(), base_config=base_config)
                states.append(logits_of(pruned.model))
                _check_close(states[-1], logits_of(masked))
                for was, now in zip(before, pruned.widths, strict=True):
                    if was.kv_heads > 1:  # whole groups go
                        assert now.heads * was.kv_heads == was.heads * now.kv_heads
                    else:  # the one key-value head stays for the query heads that are left
                        assert now.kv_heads == 1
            for one, other in pairwise(states):  # or the comparisons would say nothing
                assert (one - other).abs().max() > 100 * _CLOSE

    def test_an_unpruned_model_stays_as_it_is(self) -> None:
        """Repairing changes nothing, and the class stays that of transformers."""
        model = self._model()
        stock, logits, numbers = type(model), logits_of(model), numbers_beside(model)
        assert type(PrunedModel.of(model, tiny_tokenizer()).model) is stock
        for layer, widths in zip(decoder_layers(model), layer_widths(model), strict=True):
            structure_of(model).repair(layer, widths)
        assert numbers_beside(model) == numbers
        assert torch.equal(logits_of(model), logits)

    def test_every_parameter_that_had_a_gradient_gets_one(self) -> None:
        """Nothing is cut off from the loss."""
        for attention in self.attentions:
            assert graded(self._pruned(attention).model) == graded(self._model(attention))

    def test_generation_with_a_cache_equals_generation_without(self) -> None:
        """Greedy, on a padded batch; the caches have another width in each layer."""
        for attention in self.attentions:
            model = self._pruned(attention).model
            expected = generate(model, use_cache=False)
            assert torch.equal(generate(model), expected)
            if self.static_cache:
                assert torch.equal(generate(model, cache_implementation="static"), expected)

    def test_a_saved_model_loads_bit_equal(self, tmp_path: Path) -> None:
        """By both ways of loading, in two types, sharded, a second time, as safetensors only."""
        for dtype in (torch.float32, torch.bfloat16):
            folder = tmp_path / str(dtype)
            self._model(dtype=dtype).save_pretrained(folder / "base")
            model = _load(folder / "base")  # a model from a file remembers how that was written
            remove_units(model, choose_cuts(model))
            pruned = PrunedModel.of(model, tiny_tokenizer())
            pruned.save(folder / "first")
            again = load_pruned(folder / "first")
            again.save(folder / "second")
            assert load_pruned(folder / "second").record() == pruned.record()
            size = sum(p.numel() * p.element_size() for p in pruned.model.parameters())
            again.model.save_pretrained(folder / "sharded", max_shard_size=size // 3)
            assert (folder / "sharded" / "model.safetensors.index.json").is_file()
            assert {p.suffix for p in folder.glob("*/*")} == {".json", ".safetensors"}
            loaded = [_load(folder / name) for name in ("first", "second", "sharded")]
            for model in (again.model, *loaded):
                _check_same(model, pruned.model)

    def test_the_attention_can_be_switched_after_loading(self, tmp_path: Path) -> None:
        """All implementations of the family give the same logits, and so do refused switches."""
        self._pruned().save(tmp_path / "pruned")
        model = _load(tmp_path / "pruned")
        logits = logits_of(model)
        for attention in self.attentions:
            model.set_attn_implementation(attention)
            _check_close(logits_of(model), logits)

    def test_lora_trains_and_merges(self, tmp_path: Path) -> None:
        """Another rank in each layer; the adapter and the merged model load as they were saved."""
        self._pruned().save(tmp_path / "pruned")
        base = _load(tmp_path / "pruned")
        ranks = RankAllocation(tuple(i % 3 + 1 for i in range(len(decoder_layers(base)))))
        adapted = attach(base, ranks, seed=0)
        adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "pruned")
        optimizer = torch.optim.AdamW(trainable_parameters(adapted), lr=1e-2)
        losses = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = loss_of(adapted)
            torch.autograd.backward(loss)
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        logits = logits_of(adapted)
        adapted.save_pretrained(tmp_path / "adapter")
        with warnings.catch_warnings():
            # PEFT 0.21 asks for an attribute that transformers 5.23 has renamed.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            loaded = type(adapted).from_pretrained(_load(tmp_path / "pruned"), tmp_path / "adapter")
        assert torch.equal(logits_of(loaded), logits)
        merged = adapted.merge_and_unload()
        _check_close(logits_of(merged), logits)
        merged.save_pretrained(tmp_path / "merged")
        _check_same(_load(tmp_path / "merged"), merged)

    def test_units_are_scored(self) -> None:
        """First-order Taylor scores of one layer equal those from whole gradients."""
        for attention in self.attentions:
            model = self._model(attention)
            kinds = [kind for kind in layer_units(model)[1] if kind]
            samples = [torch.arange(3, 12), torch.arange(20, 25)]
            found = unit_scores(model, kinds, samples, PruneConfig())
            losses = [sequence_loss(model, sample) for sample in samples]
            torch.autograd.backward(torch.stack(losses).mean())
            for scores, kind in zip(found, kinds, strict=True):
                torch.testing.assert_close(scores, first_order(kind), rtol=1e-3, atol=1e-7)

    def test_compensation_follows_the_unpruned_model(self) -> None:
        """Refitted matrices bring the last layer's output nearer to it, on other text too."""
        # Random weights leave little to mend behind norms, so one model does not tell.
        distances = np.array([self._distances(seed) for seed in range(6)])
        without, compensated = distances.sum(axis=0)
        assert compensated < without

    def _distances(self, seed: int) -> tuple[float, float]:
        """Returns the distance of a pruned from its unpruned model, without and compensated."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            base = self._model()
            vocabulary = base.get_input_embeddings().weight.shape[0]
            drawn = torch.randint(vocabulary, (192, 8))
        model = copy.deepcopy(base)
        remove_units(model, choose_cuts(model))
        pruned = PrunedModel.of(model, tiny_tokenizer()).model
        others, before = padded(list(drawn[128:])), copy.deepcopy(pruned.state_dict())

        @torch.no_grad()
        def distance() -> float:
            one, other = (hidden_states(each, others) for each in (base, pruned))
            return float((one - other).norm())

        without = distance()
        compensation = compensate(base, pruned, list(drawn[:128]))
        with compensation.applied(pruned):
            compensated = distance()
        for name, values in pruned.state_dict().items():
            assert torch.equal(values, before[name]), name
        unpruned = compensate(base, copy.deepcopy(base), list(drawn[:8]))
        assert not unpruned.weights
        return without, compensated

    def test_the_output_layer_is_found_behind_the_decoder(self) -> None:
        """Logits of single tokens are those of the whole, with all that the family does to them."""
        model = self._model()
        tokens, _ = batch(model)
        with torch.no_grad():
            places = torch.arange(0, tokens.numel(), 2)
            alone = output_layer.logits_of(model, output_layer.hidden_at(model, places, tokens))
        _check_close(alone, logits_of(model)[places])

    def test_hidden_channels_can_be_removed(self, tmp_path: Path) -> None:
        """As zeroing them, but that the norms then average over fewer; a family may forgo it."""
        model = self._model()
        if not structure_of(model).norms:
            return
        hidden = model.config.hidden_size
        removed = list(range(0, hidden, 4))
        with torch.no_grad():
            for member in hidden_units(model):
                lines = member.weight if member.side == "out" else member.weight.T
                lines[removed] *= 1e-3  # so that they are the least important
        reference = without_channels(model, removed)
        config = PruneConfig(
            method="channel", importance="magnitude", pruning_ratio=len(removed) / hidden
        )
        pruned = prune_channel(model, tiny_tokenizer(), [], config)
        assert pruned.shape.hidden == hidden - len(removed)
        _check_close(logits_of(pruned.model), logits_of(reference))
        pruned.save(tmp_path / "pruned")
        _check_same(_load(tmp_path / "pruned"), pruned.model)


def _load(folder: Path) -> PreTrainedModel:
    """Loads a model as any user of transformers does."""
    model, notes = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(notes.values())
    return model.eval()


def _check_close(one: torch.Tensor, other: torch.Tensor) -> None:
    assert (one - other).abs().max() < _CLOSE


def _check_same(loaded: Any, model: Any) -> None:
    """Checks that weights, ties and logits are those of a model, bit by bit."""
    weights, expected = loaded.state_dict(), model.state_dict()
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert weight.dtype == expected[name].dtype
        assert torch.equal(weight, expected[name])
    assert tied(loaded) == tied(model) == bool(model.config.tie_word_embeddings)
    assert torch.equal(logits_of(loaded), logits_of(model))


def choose_cuts(model: PreTrainedModel) -> list[Cut]:
    """Chooses the first unit of layer 1 and the last two of the last layer, but never all."""
    layers, cuts = layer_units(model), []
    for index, chosen in ((1, (0,)), (len(layers) - 1, (-1, -2))):
        for kind, units in enumerate(layers[index]):
            count = len(units[0].indices) if units else 0
            numbers = [range(count)[i] for i in chosen[: max(count - 1, 0)]]
            if numbers:
                cuts.append((index, kind, numbers))
    return cuts


def remove_units(model: PreTrainedModel, cuts: Sequence[Cut]) -> None:
    """Removes units as a pruner does."""
    units = layer_units(model)
    for index, kind, numbers in cuts:
        remove(units[index][kind], numbers)


@torch.no_grad()
def zero_units(model: PreTrainedModel, cuts: Sequence[Cut]) -> None:
    """Zeroes what reads units, which so are without effect."""
    units = layer_units(model)
    for index, kind, numbers in cuts:
        for member in units[index][kind]:
            if member.side == "in":
                member.weight[:, member.indices[numbers].flatten()] = 0


@torch.no_grad()
def first_order(units: Units) -> torch.Tensor:
    """Sums |g w| over the weights of each unit, with gradients that are there; shape (units,)."""
    total = torch.zeros(len(units[0].indices))
    for member in units:
        gradient: Any = member.module.weight.grad
        shaped = gradient.T if is_transposed(member.module) else gradient
        salience = (shaped * member.weight).abs().sum(1 if member.side == "out" else 0)
        total += salience[member.indices].sum(1)
    return total


@torch.no_grad()
def without_channels(model: PreTrainedModel, removed: list[int]) -> PreTrainedModel:
    """Copies a model; in the copy hidden channels are zero throughout, and norms disregard them."""
    model = copy.deepcopy(model)
    structure, hidden = structure_of(model), model.config.hidden_size
    share = (hidden - len(removed)) / hidden
    model.get_input_embeddings().weight[:, removed] = 0
    for member in hidden_units(model):
        if member.side == "out":
            member.weight[removed] = 0
            if member.module.bias is not None:
                bias: Any = member.module.bias
                bias[removed] = 0
    norms = [layer.get_submodule(n) for layer in decoder_layers(model) for n in structure.norms]
    for norm in (*norms, model.get_submodule(structure.final_norm)):
        norm.get_parameter("weight").mul_(math.sqrt(share))
        for name in [name for name in vars(norm) if "eps" in name]:
            setattr(norm, name, getattr(norm, name) * share)
    return model


def numbers_beside(model: PreTrainedModel) -> list[dict[str, Any]]:
    """Returns, per layer, the numbers that modules keep, and the widths in their configs."""
    structure, found = structure_of(model), []
    keys = [structure.heads_key, structure.kv_heads_key, structure.channels_key]
    for layer in decoder_layers(model):
        numbers: dict[str, Any] = {}
        for name, module in layer.named_modules():
            values: dict[str, Any] = {
                k: v for k, v in vars(module).items() if isinstance(v, int | float)
            }
            config = getattr(module, "config", None)
            values |= {f"config.{key}": getattr(config, key, None) for key in keys}
            numbers[name] = values
        found.append(numbers)
    return found


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Makes a tokenizer of one word, only to be saved beside a model."""
    words = Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))  # noqa: S106
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")  # noqa: S106


def batch(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns token ids and a mask that pads the second sequence on the left, shape (2, 9)."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, model.config.vocab_size, (2, 9), generator=generator)
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    return tokens, mask


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    """Returns the logits of all tokens, first without padding, then with: (tokens, vocabulary)."""
    tokens, mask = batch(model)
    whole = model(input_ids=tokens, use_cache=False).logits
    padded = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
    return torch.cat([whole.flatten(0, 1), padded[mask.bool()]])


def loss_of(model: Any) -> torch.Tensor:
    """Returns the next-token loss on the batch."""
    tokens, _ = batch(model)
    loss: torch.Tensor = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    return loss


def graded(model: Any) -> set[str]:
    """Returns the names of the parameters that the loss gives a gradient to."""
    torch.autograd.backward(loss_of(model))
    names = {name for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return names


def generate(model: Any, **options: Any) -> torch.Tensor:
    """Generates five tokens greedily after the padded batch."""
    tokens, mask = batch(model)
    length = {"min_new_tokens": 5, "max_new_tokens": 5, "pad_token_id": 0}
    result: torch.Tensor = model.generate(
        tokens, attention_mask=mask, do_sample=False, **length, **options
    )
    return result


def tied(model: Any) -> bool:
    """True if the output layer shares its weights with the input embeddings."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight
