"""The states that lesson 05 looks at are those that the router reads."""

import pytest
import torch

from moe_edu import load_pretrained
from moe_edu.lessons.states import router_states
from moe_edu.moe.routing import Top2Router

TEXTS = ("le chat dort", "Deutschland und Frankreich")


@pytest.fixture(scope="module")
def translator():
    return load_pretrained(device="cpu")


def routers(translator):
    return [module for module in translator.model.modules() if isinstance(module, Top2Router)]


def test_the_router_makes_its_logits_of_them(translator):
    (router,) = routers(translator)
    logits = torch.cat([translator.route(text).layers[1].logits for text in TEXTS])
    with torch.no_grad():
        torch.testing.assert_close(router.classifier(router_states(translator, TEXTS)), logits)


def test_leaves_no_hook_behind_even_where_a_text_is_too_long(translator):
    with pytest.raises(ValueError, match="positions"):
        router_states(translator, ["le chat dort", "1 " * translator.model.config.max_position_embeddings])
    assert not any(router._forward_hooks for router in routers(translator))
