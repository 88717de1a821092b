"""The capstone: a learner's functions in the real model compute, translate and train as ours do."""

import math
from dataclasses import replace

import pytest
import torch

from moe_edu import MoETranslator, collect_metrics, load_pretrained
from moe_edu.analysis.parity import compare_models, slow_reference
from moe_edu.data import load_corpus
from moe_edu.exercises.capstone import OURS, PieceError, Pieces, assemble, check_pieces
from moe_edu.exercises.registry import all_exercises
from moe_edu.model.pretrained import pad_ids
from moe_edu.moe.layer import SparseMLP, dispatch_and_combine
from moe_edu.moe.routing import top2_gating
from moe_edu.training.loop import train
from moe_edu.training.settings import TrainingSettings

# ---- as a learner would write them


def top2_choices(logits):
    probs = torch.softmax(logits, dim=-1)
    return probs, probs.topk(2, dim=-1).indices


def queue_positions(expert_index, num_experts):
    position = torch.full_like(expert_index, -1)
    next_place = [0] * num_experts
    for k in range(2):
        for t in range(len(expert_index)):
            expert = int(expert_index[t, k])
            if expert >= 0:
                position[t, k] = next_place[expert]
                next_place[expert] += 1
    return position


def keep_and_weigh(probs, expert_index, position, capacity):
    kept = (position >= 0) & (position < capacity)
    p = torch.gather(probs, 1, expert_index.clamp(min=0)) * kept
    return kept, p / (p.sum(dim=1, keepdim=True) + 1e-9)


def dispatch(hidden, expert_index, kept, num_experts):
    rows, order, counts = [], [], []
    for expert in range(num_experts):
        mine = [2 * t + k for t, k in ((expert_index == expert) & kept).nonzero().tolist()]
        order += mine
        rows += [hidden[choice // 2] for choice in mine]
        counts.append(len(mine))
    stacked = torch.stack(rows) if rows else hidden[:0]
    return stacked, torch.tensor(order, dtype=torch.int64), torch.tensor(counts)


def combine(outputs, order, gates):
    home = torch.zeros(len(gates), outputs.shape[1], dtype=outputs.dtype)
    return home.index_add(0, order // 2, outputs * gates.reshape(-1)[order].unsqueeze(1))


def balancing_loss(probs, expert_index):
    E = probs.shape[1]
    f = torch.nn.functional.one_hot(expert_index[:, 0], E).float().mean(dim=0)
    return E * (f * probs.mean(dim=0)).sum()


def router_z(logits):
    return torch.logsumexp(logits, dim=-1).pow(2).mean()


MINE = {
    function.__name__: function
    for function in (
        top2_choices,
        queue_positions,
        keep_and_weigh,
        dispatch,
        combine,
        balancing_loss,
        router_z,
    )
}
SHOWN = {e.answer_name: e.solution for e in all_exercises() if e.key < "06" and e.answer_name in OURS}


@pytest.fixture(scope="module")
def translator():
    return load_pretrained(device="cpu")


@pytest.fixture(scope="module")
def batch(translator):
    """Source ids and mask, one sentence padded to another's length, and target ids."""
    tokenizer = translator.tokenizer
    texts = ("1 août 1996", "vor 3 Tagen", "quinta-feira, 1 de agosto de 1996", "le chat dort")
    ids, mask = pad_ids(
        [tokenizer.encode_source(text, "und") for text in texts], tokenizer.pad_id, torch.device("cpu")
    )
    english = tokenizer.encode_source("Thursday, 3 days", "eng_Latn")
    return ids, mask, torch.tensor([[tokenizer.eos_id, *english]] * len(texts))


def runs_ours(model) -> bool:
    layers = [module for module in model.modules() if isinstance(module, SparseMLP)]
    return all((x.router.gating, x.mixing) == (top2_gating, dispatch_and_combine) for x in layers)


def test_the_learners_functions_are_the_exercises():
    assert set(MINE) == set(OURS)
    assert set(SHOWN) == set(OURS)


@pytest.mark.parametrize(
    "pieces",
    [
        Pieces(),
        Pieces(**MINE),
        Pieces(**SHOWN),
        *(Pieces(**{n: f for n, f in MINE.items() if n != missing}) for missing in MINE),
        *(Pieces(**{name: function}) for name, function in MINE.items()),
    ],
    ids=lambda pieces: "+".join(pieces.given()) or "none",
)
class TestParity:
    def test_with_ours(self, translator, batch, pieces):
        parity = compare_models(assemble(translator.model, pieces), translator.model, *batch)
        assert parity.holds, parity

    def test_losses(self, translator, batch, pieces):
        routing = assemble(translator.model, pieces).train()(*batch).routing
        for mine, ours in zip(pieces.collect_metrics(routing), collect_metrics(routing), strict=True):
            assert torch.allclose(torch.stack(mine), torch.stack(ours), atol=1e-6)


def test_parity_with_the_slow_reference(translator, batch):
    mine = assemble(translator.model, Pieces(**MINE))
    assert compare_models(mine, slow_reference(translator.model), *batch).holds


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("padded", [False, True])
def test_parity_in_models_with_several_sparse_layers_and_dropped_choices(tiny_config, seed, padded):
    torch.manual_seed(seed)
    config = tiny_config(
        encoder_sparse_step=1,
        decoder_sparse_step=1,
        expert_capacity=1 + seed % 3,
        moe_token_dropout=0.2 * (seed % 2),
        router_ignore_padding_tokens=seed == 5,
        router_bias=seed == 4,
    )
    model = MoETranslator(config)
    ids = torch.randint(3, 29, (3, 7))
    mask = torch.ones_like(ids)
    if padded:
        ids[1, 4:], mask[1, 4:] = config.pad_token_id, 0
    decoder_ids = torch.randint(3, 29, (3, 5))
    mine = assemble(model, Pieces(**MINE))
    routing = mine.train()(ids, mask, decoder_ids).routing
    assert any((layer.expert_index >= 0).sum() > layer.kept.sum() for layer in routing)
    for other in (model, slow_reference(model)):
        parity = compare_models(mine, other, ids, mask, decoder_ids, max_new_tokens=6)
        assert parity.holds, parity


def test_routing_is_that_of_the_model(tiny_config):
    model = MoETranslator(tiny_config(expert_capacity=2)).train()
    ids = torch.randint(3, 29, (2, 6))
    ids[0, 4:] = 1
    mask = ids != 1
    (ours,) = (layer for layer in model.encoder(ids, mask).routing if layer is not None)
    mine_encoder = assemble(model.encoder, Pieces(**MINE)).train()
    (mine,) = (layer for layer in mine_encoder(ids, mask).routing if layer is not None)
    for name in ("expert_index", "position", "kept", "padding"):
        assert torch.equal(getattr(mine, name), getattr(ours, name)), name
    assert mine.capacity == ours.capacity
    for name in ("logits", "probs", "combine_weights"):
        assert torch.allclose(getattr(mine, name), getattr(ours, name), atol=1e-6), name


def test_the_model_that_was_given_stays_as_it_was(translator):
    before = {name: tensor.clone() for name, tensor in translator.model.state_dict().items()}
    mine = assemble(translator.model, Pieces(**MINE))
    with torch.no_grad():
        for parameter in mine.parameters():
            parameter.add_(1)
    assert runs_ours(translator.model)
    assert not runs_ours(mine)
    assert all(torch.equal(before[name], tensor) for name, tensor in translator.model.state_dict().items())
    assert mine.hf_state_dict().keys() == translator.model.hf_state_dict().keys()


class TestReport:
    def test_says_whose_each_part_is(self):
        report = Pieces(router_z=router_z).report()
        assert "✓ yours  router_z" in report
        assert "  ours   combine" in report
        assert "1 of 7 parts are yours." in report

    def test_without_pieces(self):
        assert "yours  " not in Pieces().report()
        assert "0 of 7" in Pieces().report()


WRONG = {
    "queue of first choices alone": (
        {"queue_positions": lambda index, E: queue_positions(index.flip(1), E).flip(1)},
        "queue_positions has the right shape, but only .* of its values agree with ours",
    ),
    "gates before dropping": (
        {
            "keep_and_weigh": lambda probs, index, position, capacity: (
                position < capacity,
                probs.gather(1, index) / probs.gather(1, index).sum(1, keepdim=True) * (position < capacity),
            )
        },
        "keep_and_weigh, value 2 has the right shape",
    ),
    "one value too few": (
        {"top2_choices": lambda logits: logits.softmax(-1)},
        "top2_choices should return 2 values, not 1",
    ),
    "a shape": (
        {"top2_choices": lambda logits: (logits.softmax(-1), logits.argmax(-1))},
        r"top2_choices, value 2 has the shape \[\d\] instead of \[\d, 2\]",
    ),
    "a dtype": (
        {"keep_and_weigh": lambda *a: (keep_and_weigh(*a)[0].float(), keep_and_weigh(*a)[1])},
        "keep_and_weigh, value 1 is torch.float32 instead of torch.bool",
    ),
    "a scalar": (
        {"router_z": lambda logits: logits.logsumexp(-1).mean()},
        r"router_z gives \S+ where ours gives \S+",
    ),
    "no tensor": ({"router_z": lambda logits: 1.0}, "router_z should be a tensor, not a float"),
    "detached": (
        {"balancing_loss": lambda probs, index: balancing_loss(probs.detach(), index)},
        "balancing_loss has the right values, but the gradient of its input 1 differs",
    ),
    "division by almost nothing": (
        {
            "keep_and_weigh": lambda probs, index, position, capacity: (
                position < capacity,
                (p := probs.gather(1, index) * (position < capacity))
                / p.sum(1, keepdim=True).clamp(min=1e-38),
            )
        },
        "a gradient of its input 1 is NaN or infinite",
    ),
    "changed inputs": (
        {"router_z": lambda logits: (router_z(logits.clone()), logits.data.zero_())[0]},
        "router_z changes its inputs",
    ),
    "an error": ({"combine": lambda outputs, order, gates: 1 / 0}, "combine stops with ZeroDivisionError"),
    "rows not sorted": (
        {
            "dispatch": lambda hidden, index, kept, E: (
                hidden[(c := kept.flatten().nonzero().squeeze(1)) // 2],
                c,
                dispatch(hidden, index, kept, E)[2],
            )
        },
        "dispatch, value 1: its rows are not sorted by expert",
    ),
    "no order": (
        {"dispatch": lambda *a: (dispatch(*a)[0], None, None)},
        "value 2 should be a tensor, not a NoneType",
    ),
}


@pytest.mark.parametrize(("pieces", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_piece_is_named_with_what_is_wrong(translator, pieces, message):
    with pytest.raises(PieceError, match=message):
        assemble(translator.model, Pieces(**pieces))


def test_a_result_is_no_piece():
    with pytest.raises(PieceError, match="router_z must be your function itself, not a float"):
        Pieces(router_z=3.0)


def test_rows_may_come_in_any_order_within_an_expert():
    def backwards(hidden, expert_index, kept, num_experts):
        rows, order, counts = dispatch(hidden, expert_index, kept, num_experts)
        expert = expert_index.flatten()[order]
        again = (-order).argsort()
        again = again[expert[again].argsort(stable=True)]
        return rows[again], order[again], counts

    check_pieces(Pieces(dispatch=backwards))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"second_expert_policy": "sampling"}, "second_expert_policy='all' only; this model has 'sampling'"),
        ({"normalize_router_prob_before_dropping": True}, "normalize_router_prob_before_dropping=False only"),
        ({"batch_prioritized_routing": True}, "batch_prioritized_routing=False only"),
        ({"num_experts": 1}, "this model has only one"),
    ],
)
def test_a_configuration_that_is_not_covered_is_refused(tiny_config, fields, message):
    with pytest.raises(ValueError, match=message):
        assemble(MoETranslator(tiny_config(**fields)), Pieces())


@pytest.fixture(scope="module")
def corpus():
    return load_corpus(["eng_Latn", "fra_Latn"])


class TestTraining:
    def run(self, corpus, pieces):
        settings = TrainingSettings(
            steps=8,
            batch_tokens=300,
            vocab_size=600,
            log_every=1,
            eval_sentences=4,
        )
        fields = {"router_z_loss_coef": 0.01}
        return train(
            corpus, settings, model_fields=fields, pieces=pieces, show_progress=False, test_sentences=4
        )

    def test_trains_as_ours_does(self, corpus):
        ours, mine = self.run(corpus, None), self.run(corpus, Pieces(**MINE))
        for a, b in zip(ours.history, mine.history, strict=True):
            assert math.isclose(a["loss"], b["loss"], rel_tol=1e-4)
            for name in ("experts/auxiliary_loss", "experts/router_z_loss", "experts/expert_usage"):
                assert math.isclose(a[name], b[name], rel_tol=1e-3), name

    def test_the_losses_are_the_learners(self, corpus):
        """Twice the balancing loss is no right piece, and so shows whose is used; `train` would refuse it."""
        output = MoETranslator(load_pretrained().model.config)
        routing = output(torch.tensor([[5, 6, 7]]), None, torch.tensor([[2, 5]])).routing
        doubled = Pieces(balancing_loss=lambda probs, index: 2 * balancing_loss(probs, index))
        (twice,), (once,) = doubled.collect_metrics(routing), collect_metrics(routing)
        assert torch.isclose(twice.auxiliary_loss, 2 * once.auxiliary_loss)
        assert torch.isclose(twice.router_z_loss, once.router_z_loss)
        with pytest.raises(PieceError, match="balancing_loss"):
            self.run(corpus, doubled)

    def test_a_run_with_pieces_leaves_a_plain_checkpoint(self, corpus, tmp_path):
        result = self.run(corpus, Pieces(router_z=router_z))
        result.translator.save_pretrained(tmp_path)
        again = load_pretrained(tmp_path)
        assert runs_ours(again.model)
        text = "1 août 1996"
        assert again.translate(text, max_new_tokens=8) == result.translator.translate(text, max_new_tokens=8)


def test_pieces_are_values():
    assert replace(Pieces(), router_z=router_z) == Pieces(router_z=router_z)
