"""Do experts specialise by language? Three models, each compared with its untrained twin, over several seeds.

    python -m moe_edu.experiments.specialisation MODEL --out FOLDER

    translator    an encoder that feeds a translator into English
    letters       an encoder that restores masked letters
    decoder       a translator between ten languages, sparse on both sides

Each writes `specialisation_<model>.json` with everything that the lesson shows: the settings, and for every seed the
information that the chosen expert holds about language, script, family, token and position (in bits, and the same
after shuffling), the language x expert table, co-activation, and for one seed the words of each cell. `letters` also
writes the model of its first seed, and what happens when experts are left out.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import torch

from moe_edu.analysis.specialisation import measure_information
from moe_edu.data import Corpus, SentencePair, Table, load_corpus
from moe_edu.experiments.specialisation_ablation import ablation_report, prune, run_letters
from moe_edu.experiments.specialisation_letters import (
    Alphabet,
    LetterModel,
    Sentence,
    letter_config,
    sentences_of,
    train_letter_model,
    untrained_twin,
)
from moe_edu.experiments.specialisation_measure import (
    PERMUTATIONS,
    information_json,
    measure_specialisation,
    report,
    summary_line,
)
from moe_edu.experiments.specialisation_translators import (
    MANY_TO_MANY,
    describe_config,
    many_to_many_fields,
    route_pairs,
    train_translator,
    untrained_translator,
)
from moe_edu.model.pretrained import SHIPPED, TextTranslator, load_pretrained
from moe_edu.training.run import RESULT_FILE
from moe_edu.training.settings import TrainingSettings

RESULTS = Path(__file__).parent / "results"
MASK_SHARE = 0.4
TEST_SENTENCES = 500  # on which chrF++ is measured
KEEP = (16, 12, 8, 4, 2, 1)

LETTER_SETTINGS = TrainingSettings(steps=2500, batch_tokens=1000, learning_rate=5e-3, warmup_steps=100)
DECODER_SETTINGS = TrainingSettings(
    steps=4000,
    languages=MANY_TO_MANY,
    targets=None,
    vocab_size=1500,
    learning_rate=3e-3,
    warmup_steps=100,
    shards=1,
)


def load_results(model: str, directory: Path = RESULTS) -> dict[str, Any]:
    """The results that ship: `model` is "translator", "letters" or "decoder"."""
    result: dict[str, Any] = json.loads(
        (directory / f"specialisation_{model}.json").read_text(encoding="utf-8")
    )
    return result


def write_results(directory: Path, model: str, result: dict[str, Any]) -> Path:
    """Write compact JSON, one line per run."""
    directory.mkdir(parents=True, exist_ok=True)
    head = {name: value for name, value in result.items() if name != "runs"}
    lines = [json.dumps(run, ensure_ascii=False, separators=(",", ":")) for run in result["runs"]]
    text = json.dumps(head, ensure_ascii=False)[:-1] + ', "runs": [\n' + ",\n".join(lines) + "\n]}\n"
    path = directory / f"specialisation_{model}.json"
    path.write_text(text, encoding="utf-8")
    return path


def sample_sentences(table: Table, per_language: int, seed: int = 0) -> list[Sentence]:
    """`per_language` random sentences of each language, in the order of the languages."""
    by_language: dict[str, list[Sentence]] = {language: [] for language in table.languages}
    for sentence in sentences_of(table):
        by_language[sentence.language].append(sentence)
    draw = random.Random(seed)
    return [
        sentence
        for found in by_language.values()
        for sentence in draw.sample(found, min(per_language, len(found)))
    ]


def sample_pairs(
    corpus: Corpus, sources: Sequence[str], targets: Sequence[str], each: int, seed: int = 0
) -> list[SentencePair]:
    """`each` random test pairs of each direction."""
    draw = random.Random(seed)
    pairs = []
    for source in sources:
        for target in targets:
            if source != target:
                found = corpus.sentence_pairs("test", [source], [target])
                pairs += draw.sample(found, min(each, len(found)))
    return pairs


def run_letter_seed(
    corpus: Corpus,
    settings: TrainingSettings,
    *,
    fields: dict[str, Any],
    per_language: int,
    permutations: int,
    keep: Sequence[int],
    with_words: bool,
) -> tuple[LetterModel, dict[str, Any]]:
    """Train one encoder, measure it and its untrained twin, and leave experts out."""
    alphabet = Alphabet.learn(corpus.train)
    config = letter_config(alphabet, **fields)
    model = train_letter_model(corpus.train, alphabet, settings, mask_share=MASK_SHARE, config=config)
    test = sample_sentences(corpus.test, per_language)
    valid = sample_sentences(corpus.valid, per_language)
    result: dict[str, Any] = {"seed": settings.seed}
    for name, candidate in (("trained", model), ("untrained", untrained_twin(model, settings.seed))):
        seen = run_letters(candidate, test, MASK_SHARE)
        result[name] = {
            "accuracy": round(seen.accuracy(), 4),
            "accuracy_by_language": [round(value, 4) for value in seen.accuracy_by_language().tolist()],
            **report(seen.tokens, permutations, with_words),
            "information_masked_letters_only": information_json(
                measure_specialisation(seen.tokens.select(seen.masked), permutations)
            ),
        }
    result["ablation"] = {
        "reroute": ablation_report(model, test, "reroute"),
        "silence": ablation_report(model, test, "silence"),
    }
    result["pruning"] = prune(model, valid, test, keep, seed=settings.seed)
    return model, result


def measure_translator(
    translator: TextTranslator, pairs: Sequence[SentencePair], permutations: int, with_words: bool
) -> dict[str, Any]:
    """The report of each half that has experts."""
    routing = route_pairs(translator, pairs)
    result: dict[str, Any] = {}
    if routing.encoder is not None:
        result["encoder"] = report(routing.encoder, permutations, with_words)
    if routing.decoder is not None and routing.decoder_source_language is not None:
        result["decoder"] = report(routing.decoder, permutations, with_words)
        by_source = measure_information(
            routing.decoder_source_language,
            routing.decoder.first_choice,
            sentence=routing.decoder.sentence,
            permutations=permutations,
        )
        result["decoder"]["information"] |= information_json({"source language": by_source})
    return result


def run_translator_seed(
    trained: TextTranslator,
    pairs: Sequence[SentencePair],
    *,
    name: str,
    seed: int,
    chrf: float,
    permutations: int,
    with_words: bool,
) -> dict[str, Any]:
    """Measure a trained translator and the same model with the random weights of `seed`."""
    untrained = untrained_translator(trained, seed)
    return {
        "model": name,
        "seed": seed,
        "chrf": round(chrf, 1),
        "trained": measure_translator(trained, pairs, permutations, with_words),
        "untrained": measure_translator(untrained, pairs, permutations, with_words),
    }


@click.group(context_settings={"show_default": True})
@click.option("--threads", type=click.IntRange(1), default=1, help="CPU threads.")
def main(threads: int) -> None:
    """Measure whether experts specialise by language."""
    torch.set_num_threads(threads)


def measuring_options(each: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The options of all three experiments."""
    return _options(
        click.option(
            "--out",
            type=click.Path(path_type=Path, file_okay=False),
            required=True,
            help="Folder for the results.",
        ),
        click.option(
            "--permutations", type=click.IntRange(0), default=PERMUTATIONS, help="Number of shuffles."
        ),
        click.option(
            "--each", type=click.IntRange(1), default=each, help="Test sentences per language or direction."
        ),
    )


def training_options(settings: TrainingSettings) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The options of the experiments that train."""
    return _options(
        click.option("--steps", type=click.IntRange(1), default=settings.steps, help="Steps of training."),
        click.option("--seeds", default="0,1,2", callback=parse_numbers, help="Comma-separated."),
    )


def _options(
    *options: Callable[[Callable[..., None]], Callable[..., None]],
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for option in options:
            command = option(command)
        return command

    return decorate


def parse_numbers(_: click.Context, parameter: click.Parameter, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter(
            f"{text!r}: give whole numbers separated by commas, such as 0,1,2", param=parameter
        ) from None


@main.command()
@training_options(LETTER_SETTINGS)
@measuring_options(each=30)
@click.option("--experts", type=click.IntRange(2), default=16)
@click.option("--languages", default="all", help="FLORES-200 codes, comma-separated, or all.")
def letters(
    seeds: tuple[int, ...], steps: int, each: int, permutations: int, out: Path, experts: int, languages: str
) -> None:
    """Train encoders that restore masked letters, and leave their experts out."""
    corpus = load_corpus(None if languages == "all" else languages.split(","))
    settings = replace(LETTER_SETTINGS, steps=steps)
    fields = {"num_experts": experts}
    runs: list[dict[str, Any]] = []
    for seed in seeds:
        model, result = run_letter_seed(
            corpus,
            replace(settings, seed=seed),
            fields=fields,
            per_language=each,
            permutations=permutations,
            keep=[n for n in KEEP if n <= experts],
            with_words=not runs,
        )
        if not runs:
            out.mkdir(parents=True, exist_ok=True)
            model.save(out / "specialisation_letters.safetensors")
        runs.append(result)
        click.echo(f"seed {seed}: restored {result['trained']['accuracy']:.3f} of the masked letters")
        _echo_lines(result)
    head = {
        "model": "letters",
        "mask_share": MASK_SHARE,
        "config": describe_config(model.encoder.config),
        "parameters": sum(parameter.numel() for parameter in model.encoder.parameters()),
        "settings": asdict(settings),
    }
    _finish(out, "letters", corpus.languages, each, permutations, head, runs)


@main.command()
@click.option(
    "--model",
    "models",
    multiple=True,
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="A folder that `moe-edu train` wrote; may be repeated. The model that ships is always measured.",
)
@measuring_options(each=60)
def translator(models: tuple[Path, ...], each: int, permutations: int, out: Path) -> None:
    """Measure translators into English: the one that ships, and others that `moe-edu train` wrote.

    Those in the shipped results were trained with moe-edu train --learning-rate 3e-3 --warmup-steps 600 and either
    --seconds 150 --seed 7 (3,490 steps on that machine) or --steps 3490 --seed 8.
    """
    corpus = load_corpus()
    pairs = sample_pairs(corpus, corpus.languages, ["eng_Latn"], each)
    runs: list[dict[str, Any]] = []
    for folder in (SHIPPED, *models):
        summary = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
        trained = load_pretrained(folder, device="cpu")
        runs.append(
            run_translator_seed(
                trained,
                pairs,
                name="shipped" if folder == SHIPPED else f"{summary['steps']} steps",
                seed=summary["settings"]["seed"],
                chrf=summary["test"]["chrf"],
                permutations=permutations,
                with_words=not runs,
            )
        )
        runs[-1] |= {name: summary["settings"][name] for name in ("learning_rate", "warmup_steps")}
        click.echo(f"{runs[-1]['model']}, seed {runs[-1]['seed']}: chrF++ {runs[-1]['chrf']}")
        _echo_lines(runs[-1])
    head = {"model": "translator", "config": describe_config(trained.model.config)}
    _finish(out, "translator", corpus.languages, each, permutations, head, runs)


@main.command()
@training_options(DECODER_SETTINGS)
@measuring_options(each=25)
@click.option("--languages", default=",".join(MANY_TO_MANY), help="FLORES-200 codes, comma-separated.")
def decoder(
    seeds: tuple[int, ...], steps: int, each: int, permutations: int, out: Path, languages: str
) -> None:
    """Train translators between all pairs of some languages, with experts in the encoder and the decoder."""
    corpus = load_corpus(languages.split(","))
    settings = replace(DECODER_SETTINGS, steps=steps, languages=corpus.languages)
    pairs = sample_pairs(corpus, corpus.languages, corpus.languages, each)
    runs: list[dict[str, Any]] = []
    for seed in seeds:
        result = train_translator(corpus, replace(settings, seed=seed), many_to_many_fields(), TEST_SENTENCES)
        runs.append(
            run_translator_seed(
                result.translator,
                pairs,
                name=f"{steps} steps",
                seed=seed,
                chrf=result.summary["test"]["chrf"],
                permutations=permutations,
                with_words=not runs,
            )
        )
        click.echo(f"seed {seed}: chrF++ {runs[-1]['chrf']:.1f}")
        _echo_lines(runs[-1])
    head = {
        "model": "decoder",
        "config": describe_config(result.translator.model.config),
        "settings": asdict(settings),
    }
    _finish(out, "decoder", corpus.languages, each, permutations, head, runs)


def _echo_lines(run: dict[str, Any]) -> None:
    """Print the bits of every measured layer, and those that chance gives in brackets."""
    for state in ("trained", "untrained"):
        measured = run[state]
        layers = {"": measured} if "information" in measured else measured
        for side, result in layers.items():
            click.echo(summary_line(f"  {state} {side}", result["information"]))
            if "information_masked_letters_only" in result:
                click.echo(summary_line(f"  {state}, masked only", result["information_masked_letters_only"]))


def _finish(
    out: Path,
    model: str,
    languages: Sequence[str],
    each: int,
    permutations: int,
    head: dict[str, Any],
    runs: list[dict[str, Any]],
) -> None:
    path = write_results(
        out,
        model,
        {
            "command": f"python -m moe_edu.experiments.specialisation {model} --out FOLDER",
            **head,
            "languages": list(languages),
            "sentences_of_each": each,
            "permutations": permutations,
            "runs": runs,
        },
    )
    click.echo(f"written to {path}")


if __name__ == "__main__":
    main()
