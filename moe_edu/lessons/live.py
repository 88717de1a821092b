"""Watch a training run: a picture and a table that follow it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from IPython.display import clear_output

from moe_edu.data import SentencePair
from moe_edu.figures.html import Snapshot, snapshots_html
from moe_edu.figures.plots import training_figure
from moe_edu.lessons.notebook import show
from moe_edu.model.pretrained import TextTranslator
from moe_edu.training.loop import Record


class LiveTraining:
    """Draws a run below the cell while it trains; pass `on_record` to `moe_edu.training.loop.train`.

    Each drawing replaces the one before, so the saved notebook contains the last.
    """

    def __init__(self, phrases: Sequence[SentencePair], total_steps: int, *, redraw_every: int = 8) -> None:
        """Draw the empty pictures.

        Args:
            phrases: held-out sentences to translate at the first record, and whenever the validation split is scored.
            total_steps: of the run.
            redraw_every: log lines between two drawings; a drawing costs some 50 ms here and more in the browser.
        """
        self.phrases = tuple(phrases)
        self.total_steps = total_steps
        self.redraw_every = redraw_every
        self.history: list[Record] = []
        self.snapshots: list[Snapshot] = []
        self.draw()

    def on_record(self, record: Record, translator: TextTranslator) -> None:
        """Record one log line, and draw if it is time."""
        scored = "valid/chrf" in record
        if scored or not self.history:
            self.snapshots.append(Snapshot(record["step"], translate_all(translator, self.phrases)))
        self.history.append(record)
        if scored or len(self.history) % self.redraw_every == 1:
            self.draw()

    def draw(self) -> None:
        """Show where the run stands."""
        # JupyterLab's Plotly renderer ignores updates of a figure that it has drawn: replace the whole output.
        clear_output(wait=True)
        show(status_html(self.history, self.total_steps))
        show(training_figure(self.history, self.total_steps))
        sources = [f"{phrase.source_language}: {phrase.source}" for phrase in self.phrases]
        show(snapshots_html(sources, [phrase.target for phrase in self.phrases], self.snapshots))

    def first_right(self) -> list[int | None]:
        """For each phrase, the step of the first snapshot whose translation equals the reference; None for never."""
        return [
            next((s.step for s in self.snapshots if s.translations[i] == phrase.target), None)
            for i, phrase in enumerate(self.phrases)
        ]


def translate_all(translator: TextTranslator, phrases: Sequence[SentencePair]) -> tuple[str, ...]:
    """Each phrase in its target language; the source language is given."""
    return tuple(
        translator.translate(phrase.source, target=phrase.target_language, source=phrase.source_language)
        for phrase in phrases
    )


def status_html(history: Sequence[Record], total_steps: int) -> str:
    """How far a run is and how fast, in one line."""
    if not history:
        text = f"Step 0 of {total_steps:,}: preparing the data."
    else:
        last = history[-1]
        speed = f"{last['tokens_per_second']:,} tokens per second"
        text = f"Step {last['step']:,} of {total_steps:,}, {last['seconds']:.0f} s, {speed}, loss {last['loss']:.2f}"
    return f'<div class="moe" role="status">{escape(text)}</div>'
