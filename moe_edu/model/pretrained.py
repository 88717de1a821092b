"""A trained model with its tokenizer: text in, text out, and the routing of a phrase."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from moe_edu.config import MoEConfig
from moe_edu.data import UNDETERMINED, Tokenizer, UnknownLanguageError, get_language, require_languages
from moe_edu.data.text import normalize_text
from moe_edu.model.budget import stored_parameters
from moe_edu.model.checkpoint import CheckpointError, read_checkpoint, save_checkpoint
from moe_edu.model.translator import MoETranslator
from moe_edu.moe.routing import RouterOutput
from moe_edu.system.machine import resolve_device

SHIPPED = Path(__file__).parent / "weights"
TOKENIZER_FILE = "tokenizer.json"
# Hugging Face's name: without this file, or without its ids, `generate` of transformers stops after 20 tokens.
GENERATION_FILE = "generation_config.json"


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
    """A `MoETranslator` in eval mode and the tokenizer it was trained with.

    Attributes:
        model: ids in, ids out.
        tokenizer: text to ids and back.
        targets: the languages that the model was trained to write; None where that is not known, and then it is asked
            for any language that it has a tag for.
        generate: called in the place of `model.generate`, where other processes help; None is the model's own.
    """

    model: MoETranslator
    tokenizer: Tokenizer
    targets: tuple[str, ...] | None = field(default=None, kw_only=True)
    generate: Callable[..., Tensor] | None = field(default=None, kw_only=True)

    @classmethod
    def from_pretrained(
        cls, directory: str | Path | None = None, device: str | torch.device = "auto"
    ) -> Self:
        """The model that ships with the package, or one that `save_pretrained` or `moe-edu train` wrote.

        Args:
            directory: the folder; None for the model that ships.
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
        targets = _read_targets(directory / GENERATION_FILE, tokenizer)
        _check_size(config, tensors, directory)
        model = MoETranslator(config)
        model.load_hf_state_dict(tensors)
        return cls(model.eval().to(device), tokenizer, targets=targets)

    def save_pretrained(self, directory: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write the checkpoint, `generation_config.json` and `tokenizer.json`; `dtype` as in `save_checkpoint`."""
        config, directory = self.model.config, Path(directory)
        save_checkpoint(self.model, config, directory, dtype)
        ids = ("bos_token_id", "pad_token_id", "eos_token_id", "decoder_start_token_id")
        values: dict[str, object] = {name: getattr(config, name) for name in ids}
        values["max_length"] = config.max_position_embeddings
        if self.targets is not None:
            values["targets"] = self.targets
        (directory / GENERATION_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        self.tokenizer.save(directory / TOKENIZER_FILE)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.shared.weight.device

    def translate(
        self,
        text: str,
        *,
        target: str = "eng_Latn",
        source: str = UNDETERMINED,
        num_beams: int = 1,
        max_new_tokens: int = 96,
    ) -> str:
        """Translate one phrase.

        Args:
            text: any text; one that holds nothing but spaces and invisible signs gives "".
            target: FLORES-200 code of the language to write.
            source: that of the language of `text`, or "und" to let the model find out.
            num_beams: 1 for greedy search.
            max_new_tokens: longest translation, in tokens.

        Raises:
            UnknownLanguageError: a code that does not exist, with near matches; a language that the model has no tag
                for, or that it was never trained to write.
            ValueError: a text longer than the model's positions.
        """
        return self.translate_batch(
            [text], target=target, source=source, num_beams=num_beams, max_new_tokens=max_new_tokens
        )[0]

    def translate_batch(
        self,
        texts: Sequence[str],
        *,
        target: str = "eng_Latn",
        source: str | Sequence[str] = UNDETERMINED,
        num_beams: int = 1,
        max_new_tokens: int = 96,
    ) -> list[str]:
        """Translate phrases side by side into one language; arguments and errors as `translate`.

        `source` is the language of every text, or one language for each text. No texts give no translations.
        """
        self._check_target(target)
        if len(texts) == 0:
            return []
        ids, mask = self._encode(texts, source)
        generated = (self.generate or self.model.generate)(
            ids,
            mask,
            forced_bos_token_id=self.tokenizer.language_id(target),
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
        ids, mask = self._encode([text], source)
        routing = self.model.encoder(ids, mask).routing
        return PhraseRouting(
            tuple(self.tokenizer.tokens(ids[0].tolist())),
            {i: layer for i, layer in enumerate(routing) if layer is not None},
        )

    def _check_target(self, target: str) -> None:
        require_languages([target], self.tokenizer.languages, "this model")
        if self.targets is not None and target not in self.targets:
            raise UnknownLanguageError(
                f"this model was never trained to write {_named(target)}; "
                f"it writes {', '.join(map(_named, self.targets))}"
            )

    def _encode(self, texts: Sequence[str], source: str | Sequence[str]) -> tuple[Tensor, Tensor]:
        if isinstance(texts, str):
            raise ValueError("texts is a single string: give a list of strings, or use translate()")
        sources = [source] * len(texts) if isinstance(source, str) else source
        if len(sources) != len(texts):
            raise ValueError(
                f"{len(sources)} source languages for {len(texts)} texts: give one for all, or one for each"
            )
        named = [code for code in sources if code != UNDETERMINED]
        require_languages(named, self.tokenizer.languages, "this model")
        encoded = self.tokenizer.encode_source_batch(texts, sources)
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

    Short for `TextTranslator.from_pretrained`, which says more of the arguments and the errors.

    Returns:
        The model with its tokenizer, in eval mode on `device`.
    """
    return TextTranslator.from_pretrained(directory, device)


def _named(code: str) -> str:
    return f"{code} ({get_language(code).name})"


def _read_targets(path: Path, tokenizer: Tokenizer) -> tuple[str, ...] | None:
    """The languages that a model learned to write; None where its folder does not say.

    Raises:
        CheckpointError: a damaged file, or languages that are not the tokenizer's.
    """
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    targets = values.get("targets") if isinstance(values, dict) else ()
    if targets is None:
        return None
    if (
        not isinstance(targets, list)
        or not targets
        or not all(code in tokenizer.languages for code in targets)
    ):
        raise CheckpointError(f'{path} must name "targets" that are languages of the tokenizer in its folder')
    return tuple(targets)


def _check_size(config: MoEConfig, tensors: Mapping[str, Tensor], directory: Path) -> None:
    """Refuse a model much larger than its file before it takes memory: anyone may have written the configuration."""
    layers = max(config.encoder_layers, config.decoder_layers)
    given = sum(tensor.numel() for tensor in tensors.values())
    if layers > len(tensors) or stored_parameters(config).total > given:
        raise CheckpointError(
            f"the configuration in {directory} is of a larger model than its {given:,} weights: "
            "they are not of one training run"
        )
