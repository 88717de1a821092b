"""Encoder and translator: masks, positions, precision, caching, checkpointing, and purity of forward."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from moe_edu.model.embedding import PositionTable
from moe_edu.model.encoder import MoEEncoder
from moe_edu.model.translator import MoETranslator
from moe_edu.moe.layer import SparseMLP
from moe_edu.moe.routing import RouterOutput

PAD = 1
NOISY = {
    "dropout": 0.2,
    "attention_dropout": 0.2,
    "activation_dropout": 0.1,
    "moe_token_dropout": 0.3,
    "second_expert_policy": "sampling",
}


def make_batch(seed: int = 0) -> dict[str, torch.Tensor]:
    """Source `[3, 6]` with right padding, target `[3, 4]`, masks."""
    torch.manual_seed(seed)
    source, target = torch.randint(3, 29, (3, 6)), torch.randint(3, 29, (3, 4))
    source[1, 4:] = PAD
    source[2, 2:] = PAD
    return {
        "input_ids": source,
        "attention_mask": (source != PAD).long(),
        "decoder_input_ids": target,
        "decoder_attention_mask": torch.ones_like(target),
    }


def make_translator(config, seed: int = 0) -> MoETranslator:
    torch.manual_seed(seed)
    return MoETranslator(config)


def assert_same_routing(actual: RouterOutput | None, expected: RouterOutput | None) -> None:
    if expected is None:
        assert actual is None
        return
    for name, value in vars(expected).items():
        mine = getattr(actual, name)
        assert torch.equal(mine, value) if isinstance(value, torch.Tensor) else mine == value, name


def train_step(model: MoETranslator, seed: int) -> list[torch.Tensor]:
    """Loss and gradients of one step under a seeded global generator."""
    model.train().zero_grad()
    batch = make_batch(seed)
    torch.manual_seed(seed)
    loss = model(**batch).logits.square().mean()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def snapshot(model: nn.Module) -> bytes:
    """Everything a module holds: parameters, buffers and all other attributes, including its children's."""
    return pickle.dumps(model)


class TestForwardIsPure:
    @pytest.mark.parametrize("training", [False, True])
    def test_writes_nothing_to_the_module(self, tiny_config, training):
        model = make_translator(tiny_config(**NOISY, router_bias=True)).train(training)
        before = snapshot(model)
        model(**make_batch())
        model(**make_batch(1), use_cache=True, output_attentions=True)
        assert snapshot(model) == before
        model.encoder.layers[1].ffn.router.last_capacity = 3
        assert snapshot(model) != before, "the snapshot misses attributes"

    @settings(max_examples=10)
    @given(seed=st.integers(0, 2**31), fraction=st.sampled_from([-1.0, 0.1, 1.0]))
    def test_an_eval_pass_changes_no_later_training_step(self, tiny_config, seed, fraction):
        model = make_translator(tiny_config(**NOISY, moe_eval_capacity_token_fraction=fraction), seed)
        undisturbed = train_step(model, seed)
        other_batch, generator_state = make_batch(seed + 1), torch.get_rng_state()
        with torch.no_grad():
            model.eval()(**other_batch)
        assert torch.equal(generator_state, torch.get_rng_state()), "eval drew random numbers"
        for expected, actual in zip(undisturbed, train_step(model, seed), strict=True):
            assert torch.equal(actual, expected)

    def test_the_callers_tensors_stay_as_they_are(self, tiny_config):
        batch = make_batch()
        before = {name: tensor.clone() for name, tensor in batch.items()}
        make_translator(tiny_config(**NOISY)).train()(**batch)
        assert all(torch.equal(batch[name], tensor) for name, tensor in before.items())


class TestEncoder:
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding_changes_no_real_token(self, tiny_config, side):
        """With room for all choices, a sentence on its own agrees with the same sentence padded in a batch."""
        torch.manual_seed(0)
        encoder = MoEEncoder(tiny_config()).eval()
        sentence, pads = torch.randint(3, 29, (1, 4)), torch.full((1, 3), PAD)
        padded = torch.cat([pads, sentence] if side == "left" else [sentence, pads], 1)
        batch = torch.cat([padded, torch.randint(3, 29, (1, 7))])
        output = encoder(batch, batch != PAD)
        words = padded[0] != PAD
        expected = encoder(sentence).last_hidden_state[0]
        torch.testing.assert_close(output.last_hidden_state[0, words], expected)
        assert not output.routing[1].kept.view(2, 7, 2)[0, ~words].any()

    def test_a_row_of_nothing_but_padding_is_finite(self, tiny_config):
        torch.manual_seed(0)
        ids = torch.full((2, 5), PAD)
        ids[0] = 7
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            encoder = MoEEncoder(tiny_config()).to(dtype)
            for output_attentions in (False, True):  # two ways to compute attention
                output = encoder(ids, ids != PAD, output_attentions=output_attentions)
                assert output.last_hidden_state.isfinite().all()

    def test_embeddings_instead_of_ids(self, tiny_config):
        torch.manual_seed(0)
        encoder = MoEEncoder(tiny_config()).eval()
        ids = torch.randint(3, 29, (2, 5))
        by_ids = encoder(ids)
        embeds = encoder.embed_tokens(ids) * 8**0.5
        torch.testing.assert_close(encoder(inputs_embeds=embeds).last_hidden_state, by_ids.last_hidden_state)

    @pytest.mark.parametrize("both", [False, True])
    def test_both_or_neither_of_ids_and_embeddings_is_an_error(self, tiny_config, both):
        inputs = (
            {"input_ids": torch.zeros(1, 2).long(), "inputs_embeds": torch.zeros(1, 2, 8)} if both else {}
        )
        with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
            MoEEncoder(tiny_config())(**inputs)

    def test_ids_of_another_rank_are_an_error(self, tiny_config):
        with pytest.raises(ValueError, match=r"input_ids must be \[B, S\]"):
            MoEEncoder(tiny_config())(torch.zeros(3).long())

    def test_attention_mask_of_another_shape_is_an_error(self, tiny_config):
        with pytest.raises(ValueError, match=r"attention_mask must be \[1, 3\]"):
            MoEEncoder(tiny_config())(torch.zeros(1, 3).long(), torch.ones(1, 4))

    def test_head_mask_of_another_depth_is_an_error(self, tiny_config):
        with pytest.raises(ValueError, match="2 layers"):
            MoEEncoder(tiny_config())(torch.zeros(1, 3).long(), head_mask=torch.ones(3, 2))

    def test_more_tokens_than_positions_say_what_to_do(self, tiny_config):
        encoder = MoEEncoder(tiny_config(max_position_embeddings=4))
        assert encoder(torch.full((1, 4), 5)).last_hidden_state.shape == (1, 4, 8)
        with pytest.raises(ValueError, match=r"5 tokens .* 4 positions.*max_position_embeddings"):
            encoder(torch.full((1, 5), 5))

    def test_optional_outputs(self, tiny_config):
        torch.manual_seed(0)
        encoder = MoEEncoder(tiny_config()).eval()
        batch = make_batch()
        inputs = (batch["input_ids"], batch["attention_mask"])
        plain = encoder(*inputs)
        assert plain.hidden_states is None
        assert plain.attentions is None
        full = encoder(*inputs, output_attentions=True, output_hidden_states=True)
        torch.testing.assert_close(full.last_hidden_state, plain.last_hidden_state)
        assert len(full.hidden_states) == 3
        assert full.hidden_states[-1] is full.last_hidden_state
        assert [a.shape for a in full.attentions] == [(3, 2, 6, 6)] * 2
        padding = batch["attention_mask"] == 0
        attention_to_pads = full.attentions[0].masked_select(padding[:, None, None])
        assert not attention_to_pads.any()
        assert full.routing[0] is None
        assert full.routing[1].num_tokens == 18

    @pytest.mark.parametrize(("step", "sparse"), [(0, []), (-1, []), (1, [0, 1, 2]), (2, [1]), (3, [2])])
    def test_sparse_layers_follow_the_step(self, tiny_config, step, sparse):
        encoder = MoEEncoder(tiny_config(encoder_layers=3, encoder_sparse_step=step))
        assert [i for i, layer in enumerate(encoder.layers) if isinstance(layer.ffn, SparseMLP)] == sparse
        routing = encoder(torch.full((1, 2), 5)).routing
        assert [i for i, result in enumerate(routing) if result is not None] == sparse


class TestPositions:
    def test_count_real_tokens_from_padding_idx_plus_one(self):
        positions = PositionTable(10, 6, padding_idx=1)
        words = torch.tensor([[False, True, True, False, True]])
        expected = positions.table[torch.tensor([[1, 2, 3, 1, 4]])]
        assert torch.equal(positions(words), expected)
        assert not positions(words)[0, [0, 3]].any()

    def test_are_sines_then_cosines(self):
        table = PositionTable(10, 4, padding_idx=0).table
        place = torch.arange(1.0, 11)
        expected = torch.stack(
            [place.sin(), (place / 10000).sin(), place.cos(), (place / 10000).cos()], dim=1
        )
        torch.testing.assert_close(table[1:], expected)

    def test_follow_the_models_dtype_and_are_no_weights(self, tiny_config):
        encoder = MoEEncoder(tiny_config()).to(torch.bfloat16)
        assert encoder.embed_positions.table.dtype == torch.bfloat16
        assert not any("embed_positions" in name for name in encoder.state_dict())


class TestLayerDrop:
    def test_a_dropped_layer_passes_its_input_on_and_yields_no_routing(self, tiny_config):
        config = tiny_config(
            encoder_layerdrop=1.0, decoder_layerdrop=1.0, encoder_sparse_step=1, decoder_sparse_step=1
        )
        model = make_translator(config).train()
        output = model(**make_batch(), output_attentions=True, output_hidden_states=True)
        assert output.routing == (None,) * 4
        assert output.encoder.attentions == output.decoder.attentions == (None, None)
        first, second, last = output.encoder.hidden_states
        assert torch.equal(first, second)
        assert torch.equal(last, model.encoder.layer_norm(first))

    def test_drops_layers_at_its_rate_in_training_only(self, tiny_config):
        config = tiny_config(encoder_layers=8, encoder_layerdrop=0.3, encoder_sparse_step=1)
        encoder = MoEEncoder(config).train()
        torch.manual_seed(0)
        ids = torch.full((1, 2), 5)
        dropped = sum(result is None for _ in range(50) for result in encoder(ids).routing)
        assert dropped / 400 == pytest.approx(0.3, abs=4 * (0.3 * 0.7 / 400) ** 0.5)
        assert None not in encoder.eval()(ids).routing


class TestGradientCheckpointing:
    @pytest.mark.parametrize("noise", [{}, NOISY])
    def test_changes_neither_outputs_nor_gradients_nor_routing(self, tiny_config, noise):
        config = tiny_config(encoder_sparse_step=1, decoder_sparse_step=1, expert_capacity=3, **noise)
        plain = make_translator(config)
        frugal = make_translator(replace(config, gradient_checkpointing=True))
        results = []
        for model in (plain, frugal):
            torch.manual_seed(7)
            output = model.train()(**make_batch())
            # Losses reach the router through the returned routing, which must be part of the graph.
            router_term = sum(layer.logits.logsumexp(1).square().mean() for layer in output.routing)
            (output.logits.square().mean() + router_term).backward()
            results.append(output)
        expected, actual = results
        assert torch.equal(actual.logits, expected.logits)
        for mine, theirs in zip(actual.routing, expected.routing, strict=True):
            assert_same_routing(mine, theirs)
        for (name, p), q in zip(plain.named_parameters(), frugal.parameters(), strict=True):
            assert torch.equal(q.grad, p.grad), name

    def test_recomputes_in_backward(self, tiny_config):
        encoder = MoEEncoder(tiny_config(gradient_checkpointing=True)).train()
        calls = []
        encoder.layers[0].register_forward_pre_hook(lambda *_: calls.append("forward"))
        last = encoder(torch.full((1, 3), 5)).last_hidden_state
        assert len(calls) == 1
        last.sum().backward()
        assert len(calls) == 2


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_on_the_cpu(self, tiny_config, dtype):
        """Logits are close to those in fp32, given the same rounded weights and enough room for near-ties."""
        config = tiny_config(encoder_sparse_step=0, decoder_sparse_step=0)
        half = make_translator(config).to(dtype).eval()
        full = copy.deepcopy(half).float()
        output, expected = half(**make_batch()).logits, full(**make_batch()).logits
        assert output.dtype == dtype
        scale = expected.abs().max()
        assert (output.float() - expected).abs().max() <= 8 * torch.finfo(dtype).eps * scale

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_sparse_layers_in_half_precision(self, tiny_config, dtype):
        model = make_translator(tiny_config(**NOISY)).to(dtype).train()
        output = model(**make_batch())
        output.logits.float().square().mean().backward()
        assert output.routing[1].combine_weights.dtype == torch.float32
        assert all(p.grad.isfinite().all() and p.grad.dtype == dtype for p in model.parameters())

    def test_autocast(self, tiny_config):
        model = make_translator(tiny_config()).train()
        with torch.autocast("cpu", torch.bfloat16):
            output = model(**make_batch())
        output.logits.float().square().mean().backward()
        assert output.logits.dtype == torch.bfloat16
        assert output.routing[1].logits.dtype == torch.float32
        assert all(p.grad.isfinite().all() for p in model.parameters())


class TestCache:
    @pytest.mark.parametrize("chunk", [1, 2])
    def test_cached_decoding_gives_the_same_logits(self, tiny_config, chunk):
        model = make_translator(tiny_config()).eval()
        batch = make_batch()
        batch.pop("decoder_attention_mask")
        expected = model(**batch).logits
        encoded = model.encoder(batch["input_ids"], batch["attention_mask"])
        cache, logits = None, []
        for tokens in batch["decoder_input_ids"].split(chunk, dim=1):
            step = model(
                attention_mask=batch["attention_mask"],
                decoder_input_ids=tokens,
                encoder_output=encoded,
                cache=cache,
                use_cache=True,
            )
            cache = step.decoder.cache
            logits.append(step.logits)
        torch.testing.assert_close(torch.cat(logits, 1), expected)

    def test_no_token_sees_a_later_one(self, tiny_config):
        model = make_translator(tiny_config()).eval()
        batch = make_batch()
        before = model(**batch).logits
        batch["decoder_input_ids"][:, -1] = 9
        torch.testing.assert_close(model(**batch).logits[:, :-1], before[:, :-1])

    def test_a_mask_with_a_cache_is_refused(self, tiny_config):
        model = make_translator(tiny_config()).eval()
        batch = make_batch()
        cache = model(**batch, use_cache=True).decoder.cache
        with pytest.raises(ValueError, match="cache"):
            model(**batch, cache=cache)

    def test_positions_run_out_with_a_cache_too(self, tiny_config):
        model = make_translator(tiny_config(max_position_embeddings=6)).eval()
        batch = make_batch()
        batch.pop("decoder_attention_mask")
        cache = model(**batch, use_cache=True).decoder.cache
        batch["decoder_input_ids"] = batch["decoder_input_ids"][:, :3]
        with pytest.raises(ValueError, match="7 tokens"):
            model(**batch, cache=cache)


class TestTranslator:
    def test_embeddings_are_one_parameter(self, tiny_config):
        model = make_translator(tiny_config())
        assert model.shared.weight is model.encoder.embed_tokens.weight is model.decoder.embed_tokens.weight

    def test_initial_weights(self, tiny_config):
        model = make_translator(tiny_config(init_std=0.05, d_model=64, vocab_size=500, router_bias=True))
        assert not model.shared.weight[PAD].any()
        for name, parameter in model.named_parameters():
            if "layer_norm.weight" in name:
                assert (parameter == 1).all(), name
            elif name.endswith(("bias", "b1", "b2")):
                assert not parameter.any(), name
            else:
                n = parameter.numel()
                assert parameter.std().item() == pytest.approx(0.05, rel=5 / (2 * n) ** 0.5), name

    def test_routing_lists_encoder_then_decoder(self, tiny_config):
        output = make_translator(tiny_config())(**make_batch())
        assert [routing is not None for routing in output.routing] == [False, True, False, True]
        assert output.routing[1].num_tokens == 18
        assert output.routing[3].num_tokens == 12

    def test_needs_decoder_ids(self, tiny_config):
        with pytest.raises(ValueError, match="decoder_input_ids"):
            make_translator(tiny_config())(torch.full((1, 2), 5))


def test_decoder_rows_must_fit_their_sources(tiny_config):
    """Otherwise sentences would attend to parts of each other."""
    model = make_translator(tiny_config()).eval()
    batch = make_batch()
    encoded = model.encoder(batch["input_ids"], batch["attention_mask"])
    ids = torch.randint(3, 29, (6, 4))
    with pytest.raises(ValueError, match="6 rows of decoder ids for 3 sources"):
        model(decoder_input_ids=ids, encoder_output=encoded)
    cache = model(decoder_input_ids=ids[:3], encoder_output=encoded, use_cache=True).decoder.cache
    with pytest.raises(ValueError, match="4 rows of decoder ids for 3 sources"):
        model(decoder_input_ids=ids[:4, :1], encoder_output=encoded, cache=cache)


def test_a_decoder_without_layers_keeps_no_cache(tiny_config):
    model = make_translator(tiny_config(decoder_layers=0)).eval()
    batch = make_batch()
    output = model(**batch, use_cache=True)
    ids = batch["decoder_input_ids"][:, -1:]
    with pytest.raises(ValueError, match="without layers keeps no cache"):
        model(decoder_input_ids=ids, encoder_output=output.encoder, cache=output.decoder.cache)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cuda_translator_trains_and_generates(tiny_config, dtype):
    model = make_translator(tiny_config(**NOISY)).to("cuda", dtype)
    batch = {name: tensor.cuda() for name, tensor in make_batch().items()}
    model.train()(**batch).logits.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    ids = model.eval().generate(batch["input_ids"], batch["attention_mask"], num_beams=2, max_new_tokens=5)
    assert ids.device.type == "cuda"


@pytest.mark.gpu
def test_cuda_forward_does_not_synchronise(tiny_config):
    model = make_translator(tiny_config(**NOISY, encoder_layerdrop=0.1)).cuda().train()
    batch = {name: tensor.cuda() for name, tensor in make_batch().items()}
    model(**batch)  # set-up of libraries may synchronise once
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**batch)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
