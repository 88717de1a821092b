"""Every option of `moe-edu train` changes the outcome of training, or is listed here as one that must not."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from moe_edu.cli import main, train
from moe_edu.data import load_corpus
from moe_edu.model.pretrained import load_pretrained
from moe_edu.training.run import LOG_FILE, RESULT_FILE

LANGUAGES = ("eng_Latn", "fra_Latn", "ell_Grek")
BASE = {
    "processes": 1,
    "device": "cpu",
    "steps": 2,
    "batch_tokens": 120,
    "vocab_size": 300,
    "learning_rate": 0.05,
    "warmup_steps": 1,
    "log_every": 1,
    "eval_every": 2,
    "eval_sentences": 2,
    "test_sentences": 2,
    "max_position_embeddings": 60,
    "d_model": 16,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "num_experts": 4,
}
# Each option has a value that is not its default, and the other options that it needs to have any effect.
CHANGES = {
    "store": ("float16", {}),
    "test_sentences": (3, {}),
    "steps": (3, {}),
    "seconds": (1e-9, {}),
    "seed": (1, {}),
    "languages": ("eng_Latn,ell_Grek", {}),
    "sources": ("ell_Grek", {}),
    "targets": ("fra_Latn", {}),
    "batch_tokens": (90, {}),
    "shards": (1, {}),
    "und_rate": (1, {}),
    "vocab_size": (310, {}),
    "learning_rate": (0.04, {}),
    "warmup_steps": (2, {}),
    "weight_decay": (0.5, {}),
    "clip_norm": (0.01, {}),
    "label_smoothing": (0.1, {}),
    "z_loss": (0.1, {}),
    "precision": ("bf16", {}),
    "log_every": (2, {}),
    "eval_every": (1, {}),
    "eval_sentences": (0, {}),
    "max_position_embeddings": (20, {}),
    "d_model": (32, {}),
    "encoder_layers": (3, {}),
    "encoder_ffn_dim": (32, {}),
    "encoder_attention_heads": (2, {}),
    "encoder_layerdrop": (1, {}),
    "encoder_sparse_step": (1, {}),
    "decoder_layers": (2, {}),
    "decoder_ffn_dim": (32, {}),
    "decoder_attention_heads": (2, {}),
    "decoder_layerdrop": (1, {}),
    "decoder_sparse_step": (1, {}),
    "activation_function": ("gelu", {}),
    "dropout": (0.1, {}),
    "attention_dropout": (0.1, {}),
    "activation_dropout": (0.1, {}),
    "init_std": (0.1, {}),
    "scale_embedding": (False, {}),
    "num_experts": (3, {}),
    "expert_capacity": (1, {}),
    "expert_capacity_factor": (0.1, {}),
    "moe_eval_capacity_token_fraction": (0.01, {}),
    "moe_token_dropout": (0.5, {}),
    "router_bias": (True, {}),
    "router_dtype": ("bfloat16", {}),
    "router_ignore_padding_tokens": (True, {}),
    "second_expert_policy": ("random", {}),
    "sample_in_eval": (True, {"second_expert_policy": "random"}),
    "normalize_router_prob_before_dropping": (True, {"expert_capacity_factor": 0.3}),
    "batch_prioritized_routing": (True, {"expert_capacity_factor": 0.3}),
    "router_aux_loss_coef": (0.1, {}),
    "router_z_loss_coef": (0.1, {}),
    "elementwise_token_dropout": (True, {"moe_token_dropout": 0.5}),
    "activation_dropout_on_residual": (True, {"dropout": 0.1, "activation_dropout": 0.3}),
}
# These options control how a run is carried out, and must not change its outcome.
SAME = {
    "checkpoint_every": (1, {}),
    "gradient_checkpointing": (True, {}),
    "device": ("auto", {}) if not torch.cuda.is_available() else ("cpu", {}),
}
# These options are tested elsewhere.
ELSEWHERE = {
    "out": "the folder of the results: every run here has its own",
    "corpus": "the corpus to read: every run here is given one",
    "resume": "continues a run: tests/training/test_training.py",
    "threads": "changes the rounding of sums, except where products are too small to be divided",
    "processes": "changes nothing: tests/training/test_workers.py",
}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """A function that trains with the given options and returns a digest of the outcome; equal options run once."""
    folder = tmp_path_factory.mktemp("options")
    corpus = folder / "corpus.tsv"
    rows = [row for row in load_corpus(LANGUAGES).train.rows if all(row) and max(map(len, row)) < 22][:60]
    corpus.write_text("\n".join("\t".join(row) for row in [LANGUAGES, *rows]) + "\n", encoding="utf-8")
    known: dict[str, str] = {}
    threads = torch.get_num_threads()

    def run(options: dict) -> str:
        arguments = [f"--corpus={corpus}", *map(as_argument, (BASE | options).items())]
        key = " ".join(sorted(arguments))
        if key not in known:
            out = folder / str(len(known))
            result = CliRunner().invoke(main, ["train", f"--out={out}", *arguments])
            assert result.exit_code == 0, result.output
            known[key] = digest(out)
        return known[key]

    yield run
    torch.set_num_threads(threads)


def as_argument(option: tuple[str, object]) -> str:
    name, value = option[0].replace("_", "-"), option[1]
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name}={value}"


@torch.no_grad()
def digest(out: Path) -> str:
    """Digest of the weights, the log without times, the test's scores, and the saved model's logits."""
    log = [json.loads(line) for line in (out / LOG_FILE).read_text("utf-8").splitlines()]
    for record in log:
        del record["seconds"], record["tokens_per_second"]
    model = load_pretrained(out, "cpu").model
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, len(model.shared.weight), (3, 12), generator=generator)
    torch.manual_seed(0)
    computed = model(ids, torch.ones_like(ids), ids[:, :4]).logits
    parts = [
        (out / "model.safetensors").read_bytes(),
        json.dumps([log, json.loads((out / RESULT_FILE).read_text("utf-8"))["test"]]).encode(),
        computed.numpy().tobytes(),
    ]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def test_every_option_is_listed_once():
    listed = [*CHANGES, *SAME, *ELSEWHERE]
    assert sorted(listed) == sorted(option.name for option in train.params)


@pytest.mark.parametrize("name", CHANGES)
def test_an_option_changes_the_outcome(outcome, name):
    value, needed = CHANGES[name]
    assert outcome({**needed, name: value}) != outcome(needed)


@pytest.mark.parametrize("name", SAME)
def test_an_option_changes_nothing(outcome, name):
    value, needed = SAME[name]
    assert outcome({**needed, name: value}) == outcome(needed)
