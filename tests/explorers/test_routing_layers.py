"""The routing that the explorer shows is a model's, and its sentence says what the picture shows."""

import pytest
import torch

from moe_edu import MoETranslator
from moe_edu.data import SentencePair, Tokenizer, load_corpus
from moe_edu.experiments.routing_layers import (
    LANGUAGES,
    MODEL_FIELDS,
    MOST_TOKENS,
    SETTINGS,
    describe_routes,
    read_routes,
)
from moe_edu.explorers.routing_layers import EXPLORER, view
from moe_edu.model.pretrained import TextTranslator
from moe_edu.training.settings import small_config

ROUTES = read_routes()


@pytest.mark.parametrize("sentence", range(len(ROUTES["sentences"])))
@pytest.mark.parametrize("model", ["trained", "untrained"])
def test_every_token_has_two_experts_in_each_of_four_layers(sentence, model):
    shown = ROUTES["sentences"][sentence]
    S = len(shown["tokens"])
    assert S <= MOST_TOKENS
    assert len(shown["layers"][model]) == 4
    for layer in shown["layers"][model]:
        experts, gates = torch.tensor(layer["experts"]), torch.tensor(layer["gates"])
        assert experts.shape == gates.shape == (S, 2)
        assert ((experts >= 0) & (experts < 8)).all()
        assert (experts[:, 0] != experts[:, 1]).all()
        assert (gates[:, 0] >= gates[:, 1]).all()
        assert ((gates.sum(dim=1) - 100).abs() <= 1).all()


def test_untrained_routes_are_those_of_the_seed():
    """Made again from nothing, they are the shipped ones; the trained ones need the command's minutes."""
    corpus = load_corpus(LANGUAGES)
    tokenizer = Tokenizer.train(corpus.train.texts(), LANGUAGES, SETTINGS.vocab_size)
    torch.manual_seed(SETTINGS.seed)
    model = MoETranslator(small_config(**{**MODEL_FIELDS, "vocab_size": len(tokenizer)})).eval()
    translator = TextTranslator(model, tokenizer)
    for shown in ROUTES["sentences"]:
        pair = SentencePair(shown["text"], shown["english"], shown["language"], "eng_Latn", "")
        tokens = tokenizer.tokens(tokenizer.encode_source(pair.source, pair.source_language))
        assert list(tokens) == shown["tokens"]
        for ours, saved in zip(describe_routes(translator, pair), shown["layers"]["untrained"], strict=True):
            assert ours["experts"] == saved["experts"]
            assert torch.allclose(torch.tensor(ours["gates"]), torch.tensor(saved["gates"]), atol=1)


def test_the_model_was_trained():
    """What the lesson says of it: all four encoder layers are sparse, and it translates."""
    config = ROUTES["result"]["config"]
    assert (config["encoder_layers"], config["encoder_sparse_step"], config["num_experts"]) == (4, 1, 8)
    assert ROUTES["result"]["settings"]["steps"] == SETTINGS.steps
    assert round(ROUTES["result"]["test"]["chrf"]) == 37


def test_groups_hold_each_token_once():
    for layer in (1, 2, 3, 4):
        shown = view(EXPLORER.state(layer=layer))
        tokens = ROUTES["sentences"][0]["tokens"]
        assert sorted(place for group in shown["groups"] for place in group) == list(range(len(tokens)))
        assert shown["token"] in shown["groups"][shown["path"][layer - 1]]


def test_twins_are_equal_tokens():
    shown = view(EXPLORER.state(token=3))
    tokens = ROUTES["sentences"][0]["tokens"]
    assert shown["twins"] == [t for t in range(len(tokens)) if t != 2 and tokens[t] == tokens[2]]
    assert "The same token also occurs elsewhere" in shown["sentence"]
    assert "elsewhere" not in view(EXPLORER.state(token=1))["sentence"]


def test_a_token_beyond_the_end_is_the_last():
    last = EXPLORER.state(sentence="5", token=12)
    assert view(last)["token"] == len(ROUTES["sentences"][5]["tokens"]) - 1


def test_trained_routers_part_equal_tokens_late_and_untrained_ones_early():
    """What the lesson says of these sentences, and of no others."""
    parts = {"trained": set(), "untrained": set()}
    for model, seen in parts.items():
        for number, sentence in enumerate(ROUTES["sentences"]):
            for token in range(1, len(sentence["tokens"]) + 1):
                shown = view(EXPLORER.state(sentence=str(number), model=model, token=token))
                seen |= {shown["parts"]} if shown["twins"] else set()
    assert 1 not in parts["trained"]
    assert parts["trained"] >= {2, 3, 4}
    assert 1 in parts["untrained"]
