"""A box to type a phrase in: its translation, and the experts that each of its tokens chooses.

Whatever the reader types is shown as text: all of it is escaped before it becomes HTML.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from html import escape

import ipywidgets as widgets

from moe_edu.config import MoEConfig
from moe_edu.data import UNDETERMINED, get_language
from moe_edu.figures.html import describe_routing, routing_html
from moe_edu.model.pretrained import TextTranslator
from moe_edu.moe.routing import RouterOutput, expert_capacity, top2_gating

NO_LIMIT = math.inf
CAPACITY_FACTORS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, NO_LIMIT)


def translate_box(
    translator: TextTranslator, *, text: str = "", targets: Sequence[str] = ("eng_Latn",)
) -> widgets.VBox:
    """The translation box, ready to show.

    Args:
        translator: what translates.
        text: the initial phrase.
        targets: FLORES-200 codes of the target languages on offer: those that the model learned to write.
    """
    wide = widgets.Layout(width="min(100%, 480px)")
    style = {"description_width": "110px"}
    phrase = widgets.Text(value=text, description="Phrase", layout=wide, style=style)
    source = widgets.Dropdown(
        options=[("und: let the model find out", UNDETERMINED), *_options(translator.tokenizer.languages)],
        value=UNDETERMINED,
        description="From",
        layout=wide,
        style=style,
    )
    target = widgets.Dropdown(options=_options(targets), description="To", layout=wide, style=style)
    capacity = widgets.Dropdown(  # the handle of a SelectionSlider has no name for a screen reader
        options=[("no limit" if math.isinf(f) else f"{f:g}", f) for f in CAPACITY_FACTORS],
        value=NO_LIMIT,
        description="Capacity factor",
        layout=wide,
        style=style,
    )
    answer = widgets.HTML()

    def refresh(_change: object = None) -> None:
        answer.value = answer_html(
            translator,
            phrase.value,
            source=source.value,
            target=target.value,
            capacity_factor=capacity.value,
        )

    for control in (phrase, source, target, capacity):
        control.observe(refresh, names="value")
    refresh()
    return widgets.VBox([phrase, source, target, capacity, answer])


def answer_html(
    translator: TextTranslator, text: str, *, source: str, target: str, capacity_factor: float = NO_LIMIT
) -> str:
    """The translation of `text` and the routing of its tokens, as HTML; for a mistake, its message.

    Args:
        translator: what translates.
        text: as the reader typed it.
        source: FLORES-200 code, or "und".
        target: FLORES-200 code of the target language.
        capacity_factor: assigns the slots again as if this phrase were a training batch of its own; the translation
            is always made without a limit.
    """
    if not text.strip():
        return _framed('<p class="moe-note">Type a phrase above.</p>')
    try:
        translation = translator.translate(text, target=target, source=source)
        phrase = translator.route(text, source=source)
    except ValueError as error:
        return _framed(f'<p class="moe-note moe-error">{escape(str(error))}</p>')
    pieces = [f'<p class="moe-answer"><bdi dir="auto">{escape(translation) or "(no words)"}</bdi></p>']
    for number, layer in phrase.layers.items():
        seated = seat_again(layer, capacity_factor, translator.model.config)
        pieces.append(f'<p class="moe-note">Encoder layer {number + 1}</p>')
        pieces.append(routing_html(phrase.tokens, seated))
        pieces.append(f'<p class="moe-note">{escape(describe_routing(phrase.tokens, seated))}</p>')
    return _framed("".join(pieces))


def seat_again(layer: RouterOutput, capacity_factor: float, config: MoEConfig) -> RouterOutput:
    """The same choices, with the capacity that training at `capacity_factor` gives a batch of only these tokens."""
    if math.isinf(capacity_factor):
        return layer
    trained = replace(config, expert_capacity=None, expert_capacity_factor=capacity_factor)
    return top2_gating(
        layer.logits,
        capacity=expert_capacity(layer.num_tokens, trained, training=True),
        normalize_before_dropping=config.normalize_router_prob_before_dropping,
        batch_prioritized=config.batch_prioritized_routing,
        padding=layer.padding,
    )


def _options(codes: Sequence[str]) -> list[tuple[str, str]]:
    return [(f"{code}: {get_language(code).name}", code) for code in codes]


def _framed(content: str) -> str:
    return f'<div class="moe" aria-live="polite">{content}</div>'
