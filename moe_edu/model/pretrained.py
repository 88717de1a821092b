"""A trained model with its tokenizer: text in, text out, and the routing of a phrase."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moe_edu.config import MoEConfig
from moe_edu.data import UNDETERMINED, Tokenizer, require_languages
from moe_edu.data.text import normalize_text
from moe_edu.model.budget import stored_parameters
from moe_edu.model.checkpoint import CheckpointError, read_checkpoint, save_checkpoint
from moe_edu.model.translator import MoETranslator
from moe_edu.moe.routing import RouterOutput
from moe_edu.system.machine import resolve_device

SHIPPED = Path(__file__).parent / "weights"
TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True)
class PhraseRouting:
    """What the encoder's sparse layers did with one phrase.

    Attributes:
        tokens: the S pieces as a reader would write them, language tag and `</s>` included.
        layers: encoder layer number (0-based) to its RouterOutput over those S tokens.
    """

    tokens: tuple[str, ...]
    layers: dict[int, RouterOutput]


@dataclass(frozen=True)
class TextTranslator:
    """A `MoETranslator` in eval mode and the tokenizer it was trained with."""

    model: MoETranslator
    tokenizer: Tokenizer

    @property
    def device(self) -> torch.device:
        return self.model.shared.weight.device

    def translate(
        self,
        text: str,
        *,
        to: str = "eng_Latn",
        source: str = UNDETERMINED,
        num_beams: int = 1,
        max_new_tokens: int = 96,
    ) -> str:
        """Translate one phrase.

        Args:
            text: any text; one that holds nothing but spaces and invisible signs gives "".
            to: FLORES-200 code of the target language.
            source: that of the source language, or "und" to let the model find out.
            num_beams: 1 for greedy search.
            max_new_tokens: longest translation, in tokens.

        Raises:
            UnknownLanguageError: a code that does not exist, with near matches, or that the model has no tag for. It
                may have a tag for a target that it was never trained to write: that comes out as nonsense.
            ValueError: a text longer than the model's positions.
        """
        return self.translate_batch(
            [text], to=to, sources=[source], num_beams=num_beams, max_new_tokens=max_new_tokens
        )[0]

    def translate_batch(
        self,
        texts: Sequence[str],
        *,
        to: str,
        sources: Sequence[str],
        num_beams: int = 1,
        max_new_tokens: int = 96,
        generate: Callable[..., Tensor] | None = None,
    ) -> list[str]:
        """Translate phrases side by side into one language; arguments and errors as `translate`.

        `generate` is called in the place of `self.model.generate`, as `Trainer.generate` is during a run.
        """
        require_languages([to], self.tokenizer.languages, "this model")
        ids, mask = self._encode(texts, sources)
        generated = (generate or self.model.generate)(
            ids,
            mask,
            forced_bos_token_id=self.tokenizer.language_id(to),
            num_beams=num_beams,
            max_new_tokens=max_new_tokens,
        )
        translations = (self.tokenizer.decode(row) for row in generated.tolist())
        return [
            translation if normalize_text(text) else ""
            for text, translation in zip(texts, translations, strict=True)
        ]

    @torch.no_grad()
    def route(self, text: str, *, source: str = UNDETERMINED) -> PhraseRouting:
        """Which experts each token of `text` chooses in the encoder; errors as `translate`."""
        ids, mask = self._encode([text], [source])
        routing = self.model.encoder(ids, mask).routing
        return PhraseRouting(
            tuple(self.tokenizer.tokens(ids[0].tolist())),
            {i: layer for i, layer in enumerate(routing) if layer is not None},
        )

    def save(self, directory: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write the checkpoint and `tokenizer.json`; `dtype` as in `save_checkpoint`."""
        save_checkpoint(self.model, self.model.config, directory, dtype)
        self.tokenizer.save(Path(directory) / TOKENIZER_FILE)

    def _check_language(self, code: str) -> None:
        if code != UNDETERMINED:
            require_languages([code], self.tokenizer.languages, "this model")

    def _encode(self, texts: Sequence[str], sources: Sequence[str]) -> tuple[Tensor, Tensor]:
        for source in set(sources):
            self._check_language(source)
        encoded = [
            self.tokenizer.encode_source(text, source) for text, source in zip(texts, sources, strict=True)
        ]
        longest, limit = max(map(len, encoded)), self.model.config.max_position_embeddings
        if longest > limit:
            raise ValueError(
                f"a text of {longest} tokens is longer than the model's {limit} positions: shorten it"
            )
        return pad_ids(encoded, self.model.config.pad_token_id, self.device)


def pad_ids(sequences: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids `[B, S]` padded on the right, and the attention mask `[B, S]` (1 for words)."""
    width = max(map(len, sequences))
    ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in sequences], device=device)
    lengths = torch.tensor([len(row) for row in sequences], device=device)
    return ids, (torch.arange(width, device=device) < lengths[:, None]).long()


def load_pretrained(
    directory: str | Path | None = None, device: str | torch.device = "auto"
) -> TextTranslator:
    """The model that ships with the package, or one that `moe-edu train` wrote.

    Args:
        directory: the folder that training wrote; None for the model that ships.
        device: "auto" takes an NVIDIA GPU where there is one.

    Raises:
        CheckpointError: nothing there, or damaged files; the message says what to run.
        ValueError: not the name of a device, or a GPU where there is none.
    """
    device = resolve_device(str(device))
    directory = SHIPPED if directory is None else Path(directory)
    config, tensors = read_checkpoint(directory)
    try:
        tokenizer = Tokenizer.load(directory / TOKENIZER_FILE)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the tokenizer in {directory} cannot be read: {error}") from error
    if len(tokenizer) != config.vocab_size:
        raise CheckpointError(
            f"the tokenizer in {directory} has {len(tokenizer)} ids, the model {config.vocab_size}: "
            "they are not of one training run"
        )
    _check_size(config, tensors, directory)
    model = MoETranslator(config)
    model.load_hf_state_dict(tensors)
    return TextTranslator(model.eval().to(device), tokenizer)


def _check_size(config: MoEConfig, tensors: Mapping[str, Tensor], directory: Path) -> None:
    """Refuse a model much larger than its file before it takes any memory: the configuration is somebody's text."""
    layers = max(config.encoder_layers, config.decoder_layers)
    given = sum(tensor.numel() for tensor in tensors.values())
    if layers > len(tensors) or stored_parameters(config).total > given:
        raise CheckpointError(
            f"the configuration in {directory} is of a larger model than its {given:,} weights: "
            "they are not of one training run"
        )
