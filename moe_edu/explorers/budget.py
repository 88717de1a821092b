"""The budget: what a model stores, what a source and a target token use of it, and where the work goes."""

from __future__ import annotations

from moe_edu.config import MoEConfig
from moe_edu.explorers.explorer import Choice, Explorer, Slider, State, View
from moe_edu.explorers.wording import fixed, percent
from moe_edu.model.budget import active_parameters, forward_flops, stored_parameters

_SENTENCE_LENGTH = 32  # source tokens, and target tokens, for the work of attention
_GIB = 2**30


def amount(number: float) -> str:
    """ "54.5 billion", "870 million"."""
    return f"{fixed(number / 1e9, 1)} billion" if number >= 1e9 else f"{fixed(number / 1e6, 0)} million"


def view(state: State) -> View:
    """Count an encoder and a decoder of these sizes, with F = 4 D as in NLLB.

    Returns:
        `stored`, `active`, `work`: parameters, and FLOPs for a source and a target token, part by part as in
        `moe_edu.model.budget.Parts`; `gib` in half precision; `sparse_layers`.
    """
    layers, width, step = state["layers"], state["width"], state["step"]
    config = MoEConfig(
        vocab_size=int(state["vocab"]),
        d_model=width,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        encoder_sparse_step=step,
        decoder_sparse_step=step,
        num_experts=state["experts"],
    )
    stored, active = stored_parameters(config), active_parameters(config)
    work = forward_flops(config, _SENTENCE_LENGTH, _SENTENCE_LENGTH)
    sparse_layers = 2 * sum(config.is_sparse(layer, step) for layer in range(layers))
    if sparse_layers:
        in_experts, used = stored.experts / stored.total, active.total / stored.total
        sentence = (
            f"The model stores {amount(stored.total)} parameters, {percent(in_experts, 1)} of them in experts. "
            f"A source and a target token together use {amount(active.total)}, {percent(used, 1)}: they visit 2 of "
            f"{state['experts']} experts in each of {sparse_layers} layers."
        )
    else:
        sentence = (
            f"No layer has experts: a source and a target token together use all of the {amount(stored.total)} "
            "parameters."
        )
    return {
        "stored": list(stored),
        "active": list(active),
        "work": [flops / _SENTENCE_LENGTH for flops in work],
        "gib": 2 * stored.total / _GIB,
        "sparse_layers": sparse_layers,
        "sentence": sentence,
        "met": [
            54.45e9 <= stored.total < 54.55e9,
            stored.total >= 20e9 and active.total < 1e9,
            stored.embedding > stored.total / 2,
        ],
    }


EXPLORER = Explorer(
    name="budget",
    title="The budget",
    purpose="Choose the size of a translator whose encoder and decoder are equally deep, and see what it costs.",
    fields=(
        Slider("experts", "Experts", 4, 256, 4, 16),
        Slider("step", "Sparse step", 0, 8, 1, 4),
        Slider("layers", "Layers in each half", 2, 48, 2, 12),
        Slider("width", "Width D", 256, 4096, 256, 1024),
        Choice(
            "vocab",
            "Vocabulary",
            (("3000", "3,000"), ("32000", "32,000"), ("128112", "128,112"), ("256206", "256,206")),
            "256206",
        ),
    ),
    challenges=(
        "Rebuild NLLB-MoE: 54.5 billion parameters.",
        "Store 20 billion or more, of which a source and a target token use less than 1 billion.",
        "Put more than half of all parameters into the embedding.",
    ),
    view=view,
    solutions=(
        {"experts": 128, "layers": 24, "width": 2048},
        {"experts": 256, "step": 2},
        {"width": 512, "step": 0},
    ),
    height=358,
    data={"length": _SENTENCE_LENGTH},
)
