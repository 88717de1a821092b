"""What `transformers` 4.57.6 computes with the model that ships: live if it is installed, else from saved values.

`python -m moe_edu.experiments.reference_parity` runs transformers and writes `results/reference_parity.json`, so
that lesson 06 can compare without it. Other releases are not used: from 5.0 on they compute something else (lesson 10).
"""

from __future__ import annotations

import copy
import hashlib
import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe_edu.model.checkpoint import hf_tensors
from moe_edu.model.pretrained import SHIPPED, TextTranslator, load_pretrained, pad_ids
from moe_edu.model.translator import MoETranslator

RELEASE = "4.57.6"
SAVED = Path(__file__).parent / "results" / "reference_parity.json"
PHRASES = (("por_Latn", "quinta-feira, 1 de agosto de 1996"), ("deu_Latn", "vor 3 Tagen"))
ANSWER = "Thursday, August 1, 1996"
MAX_NEW_TOKENS = 24


class Values(NamedTuple):
    """What a model computes for PHRASES.

    Attributes:
        origin: what computed them.
        hidden: `[N, D]`, the encoder's last hidden state at the N real tokens of both phrases.
        gradient_norms: of the loss of writing ANSWER, by Hugging Face's names.
        ids: what greedy search and beam search with four beams generate, `[4, L]`, padded.
    """

    origin: str
    hidden: Tensor
    gradient_norms: dict[str, float]
    ids: list[list[int]]


class Case(NamedTuple):
    """The two phrases as ids `[B, S]` with their mask, ANSWER as decoder ids `[B, L]`, and the tag to begin with."""

    ids: Tensor
    mask: Tensor
    decoder_ids: Tensor
    first: int


def make_case(translator: TextTranslator) -> Case:
    tokenizer = translator.tokenizer
    encoded = [tokenizer.encode_source(text, language) for language, text in PHRASES]
    answer = [tokenizer.eos_id, *tokenizer.encode_source(ANSWER, "eng_Latn")]
    ids, mask = pad_ids(encoded, tokenizer.pad_id, translator.device)
    return Case(ids, mask, torch.tensor([answer] * len(PHRASES)), tokenizer.language_id("eng_Latn"))


def our_values() -> Values:
    """The shipped model run by `moe_edu`."""
    translator = load_pretrained(device="cpu")
    model, case = translator.model, make_case(translator)
    output = model(case.ids, case.mask, case.decoder_ids)
    answer_loss(output.logits, case).backward()
    ids = [
        model.generate(
            case.ids,
            case.mask,
            forced_bos_token_id=case.first,
            num_beams=beams,
            max_new_tokens=MAX_NEW_TOKENS,
        )
        for beams in (1, 4)
    ]
    return _values("moe_edu", output.encoder.last_hidden_state, _gradients_by_hf_name(model), ids, case)


def reference_values() -> Values:
    """The shipped model run by transformers: now if RELEASE is installed, else read from SAVED."""
    return live_values() if reference_is_installed() else saved_values()


def reference_is_installed() -> bool:
    try:
        return version("transformers") == RELEASE
    except PackageNotFoundError:
        return False


def live_values() -> Values:
    """Run transformers.

    Raises:
        ImportError: `transformers` is not installed.
    """
    from transformers import NllbMoeForConditionalGeneration

    case = make_case(load_pretrained(device="cpu"))
    reference = NllbMoeForConditionalGeneration.from_pretrained(
        SHIPPED, attn_implementation="eager", dtype=torch.float32
    ).eval()
    output = reference(input_ids=case.ids, attention_mask=case.mask, decoder_input_ids=case.decoder_ids)
    answer_loss(output.logits, case).backward()
    gradients = {
        name.removeprefix("model."): parameter.grad
        for name, parameter in reference.named_parameters()
        if parameter.grad is not None
    }
    options = {"forced_bos_token_id": case.first, "max_new_tokens": MAX_NEW_TOKENS, "do_sample": False}
    ids = [
        reference.generate(case.ids, attention_mask=case.mask, num_beams=beams, **options) for beams in (1, 4)
    ]
    origin = f"transformers {RELEASE}, computed now"
    return _values(origin, output.encoder_last_hidden_state, gradients, ids, case)


def saved_values(path: Path = SAVED) -> Values:
    """What `main` wrote."""
    saved: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return Values(
        f"transformers {RELEASE}, saved values",
        torch.tensor(saved["hidden"]),
        saved["gradient_norms"],
        saved["ids"],
    )


def answer_loss(logits: Tensor, case: Case) -> Tensor:
    """Mean of `-log p` over the answer's tokens, each predicted from those before it."""
    log_probs = logits[:, :-1].log_softmax(dim=-1)
    return -log_probs.gather(-1, case.decoder_ids[:, 1:, None]).mean()


def model_digest() -> str:
    """Identifies the shipped weights: saved values belong to these and no others."""
    return hashlib.sha256((SHIPPED / "model.safetensors").read_bytes()).hexdigest()[:16]


def _gradients_by_hf_name(model: MoETranslator) -> dict[str, Tensor]:
    """Each weight's gradient; an expert's is its slice of the stacked gradient."""
    mirror = copy.deepcopy(model)
    with torch.no_grad():
        for slot, parameter in zip(mirror.parameters(), model.parameters(), strict=True):
            slot.copy_(torch.zeros_like(slot) if parameter.grad is None else parameter.grad)
    return {
        name: grad for name, grad in hf_tensors(mirror).items() if not name.endswith("embed_tokens.weight")
    }


def _values(
    origin: str, hidden: Tensor, gradients: dict[str, Tensor], ids: list[Tensor], case: Case
) -> Values:
    width = max(part.shape[1] for part in ids)
    padded = [nn.functional.pad(part, (0, width - part.shape[1]), value=1) for part in ids]
    norms = {name: float(grad.norm()) for name, grad in sorted(gradients.items())}
    return Values(origin, hidden.detach()[case.mask.bool()], norms, torch.cat(padded).tolist())


def main() -> None:
    torch.set_num_threads(1)
    values = live_values()
    saved = {
        "model": model_digest(),
        "hidden": [[round(number, 6) for number in row] for row in values.hidden.tolist()],
        "gradient_norms": {name: float(f"{norm:.7g}") for name, norm in values.gradient_norms.items()},
        "ids": values.ids,
    }
    SAVED.write_text(json.dumps(saved, separators=(",", ":")) + "\n", encoding="utf-8")
    print(f"{SAVED.name}: {SAVED.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
