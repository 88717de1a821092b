"""Training: the files of a run, and that it repeats, resumes, and stops when it must."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from moe_edu.data import Corpus, load_corpus
from moe_edu.model.checkpoint import CheckpointError
from moe_edu.model.pretrained import load_pretrained
from moe_edu.moe.metrics import collect_metrics
from moe_edu.system.machine import resolve_device
from moe_edu.training.loop import learning_rate_at, train
from moe_edu.training.run import LOG_FILE, RESULT_FILE, STATE_FILE, RunLog, read_state
from moe_edu.training.settings import TrainingSettings, small_config
from moe_edu.training.shards import autocast_dtype
from moe_edu.training.trainer import TrainingDivergedError

TINY = {"d_model": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_experts": 4, "dropout": 0.1}
SETTINGS = TrainingSettings(
    steps=12, batch_tokens=300, vocab_size=600, log_every=4, eval_every=8, eval_sentences=8
)

KILLED_RUN = {
    "steps": 40,
    "batch-tokens": 300,
    "vocab-size": 600,
    "languages": "eng_Latn,fra_Latn",
    "threads": 1,
    "processes": 2,
    "d-model": 32,
    "checkpoint-every": 3,
    "log-every": 1,
    "eval-sentences": 0,
    "test-sentences": 2,
}


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return load_corpus(["eng_Latn", "fra_Latn", "ell_Grek"])


def run(corpus, settings=SETTINGS, **options):
    defaults = {
        "model_fields": TINY,
        "processes": 1,
        "show_progress": False,
        "test_sentences": 6,
        "checkpoint_every": 5,
    }
    return train(corpus, settings, **{**defaults, **options})


def weights(result):
    return {name: tensor.clone() for name, tensor in result.translator.model.state_dict().items()}


def assert_same_weights(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


class TestResult:
    def test_folder_holds_model_tokenizer_log_and_result(self, corpus, tmp_path):
        result = run(corpus, out=tmp_path / "run")
        written = json.loads((tmp_path / "run" / RESULT_FILE).read_text(encoding="utf-8"))
        assert {"seconds", "steps", "tokens_per_second", "peak_rss_mb", "test"} <= written.keys()
        assert {"chrf", "exact_match", "by_source_language", "by_kind"} <= written["test"].keys()
        assert written["steps"] == 12
        assert written["test"]["sentences"] == 6

        loaded = load_pretrained(tmp_path / "run")
        assert_same_weights(weights(result), loaded.model.state_dict())
        text = "1 août 1996"
        assert loaded.translate(text) == result.translator.translate(text)
        assert loaded.targets == result.translator.targets == ("eng_Latn",), "those it was trained to write"

    def test_log_has_every_loss_part_and_expert_metric(self, corpus, tmp_path):
        result = run(corpus, out=tmp_path)
        lines = [json.loads(line) for line in (tmp_path / LOG_FILE).read_text("utf-8").splitlines()]
        assert lines == json.loads(json.dumps(result.history))
        assert [line["step"] for line in lines] == [4, 8, 12]
        for line in lines:
            parts = line["cross_ent_loss"] + line["z_loss"]
            parts += line["experts/auxiliary_loss"] + line["experts/router_z_loss"]
            assert line["loss"] == pytest.approx(parts, abs=1e-4)
            assert {
                "experts/fraction_tokens_left_behind",
                "experts/expert_usage",
                "experts/router_confidence",
            } <= line.keys()
            assert sum(line["expert_load"]["encoder.1"]) == pytest.approx(1, abs=1e-3)
        assert "valid/chrf" not in lines[0]
        assert {"valid/chrf", "valid/exact_match"} <= lines[1].keys()
        assert "valid/chrf" in lines[2], "the last line has scores of the validation split"

    @pytest.mark.filterwarnings("ignore:.*valid pairs have more")
    def test_sentences_without_positions_are_left_out_and_named(self, corpus, tmp_path):
        """Training leaves them out, too; such a sentence in the test split must not cost the run its model."""
        limit = {"max_position_embeddings": 24}
        with pytest.warns(UserWarning, match=r"of 6 test pairs have more than 22 tokens and are left out"):
            result = run(corpus, out=tmp_path, model_fields={**TINY, **limit})
        assert 0 < result.summary["test"]["sentences"] < 6
        assert load_pretrained(tmp_path).model.config.max_position_embeddings == 24

    def test_dense_model_trains(self, corpus):
        result = run(corpus, model_fields={**TINY, "encoder_sparse_step": 0})
        assert not any(name.startswith("experts/") for name in result.history[-1])

    def test_layerdrop_may_take_every_sparse_layer(self, corpus):
        result = run(corpus, model_fields={**TINY, "encoder_layerdrop": 1.0})
        assert math.isfinite(result.history[-1]["loss"])

    def test_seconds_bound_the_run(self, corpus):
        result = run(corpus, dataclasses.replace(SETTINGS, seconds=1.5))
        assert result.summary["seconds"] >= 1.5
        assert result.summary["steps"] >= 1

    def test_loss_falls(self, corpus):
        settings = dataclasses.replace(
            SETTINGS, steps=60, log_every=5, eval_sentences=0, warmup_steps=5, learning_rate=1e-2
        )
        history = run(corpus, settings).history
        assert history[-1]["cross_ent_loss"] < 0.7 * history[0]["cross_ent_loss"]


class TestPieces:
    """The caller's own `assemble` and `collect_metrics`."""

    def test_run_in_this_process_for_every_shard(self, corpus):
        class Pieces:
            measured = 0

            def assemble(self, model):
                with torch.no_grad():
                    model.shared.weight.mul_(0.5)
                return model

            def collect_metrics(self, routing):
                self.measured += 1
                return tuple(
                    m._replace(auxiliary_loss=3 * m.auxiliary_loss) for m in collect_metrics(routing)
                )

        settings = dataclasses.replace(SETTINGS, steps=1, log_every=1, eval_sentences=0, learning_rate=1e-9)
        pieces = Pieces()
        ours = run(corpus, settings)
        mine = run(corpus, settings, pieces=pieces, processes=2)
        assert pieces.measured == 2, "one call per shard, in this process, although two were asked for"
        ratio = mine.history[0]["experts/auxiliary_loss"] / ours.history[0]["experts/auxiliary_loss"]
        assert ratio == pytest.approx(3, rel=0.3)
        size = mine.translator.model.shared.weight.norm() / ours.translator.model.shared.weight.norm()
        assert size.item() == pytest.approx(0.5, rel=1e-3)


class TestRepeat:
    def test_same_seed_same_weights(self, corpus):
        assert_same_weights(weights(run(corpus)), weights(run(corpus)))

    def test_other_seed_other_weights(self, corpus):
        other = run(corpus, dataclasses.replace(SETTINGS, seed=1))
        name = "encoder.layers.0.ffn.fc1.weight"
        assert not torch.equal(weights(run(corpus))[name], weights(other)[name])

    def test_callers_random_state_is_untouched(self, corpus):
        torch.manual_seed(3)
        before = torch.get_rng_state()
        run(corpus)
        assert torch.equal(torch.get_rng_state(), before)

    def test_evaluation_changes_nothing(self, corpus):
        """Validation and the callback must not disturb training: they draw no random number and restore the mode."""
        seen = []
        watched = run(
            corpus,
            dataclasses.replace(SETTINGS, log_every=1, eval_every=2),
            on_record=lambda record, translator: seen.append(translator.translate("1 août")),
        )
        assert len(seen) == 12
        assert_same_weights(weights(run(corpus)), weights(watched))


class TestResume:
    def test_resumes_to_the_same_weights(self, corpus, tmp_path):
        whole = weights(run(corpus))

        class KilledError(Exception):
            pass

        def kill(record, translator):
            if record["step"] == 8:
                raise KilledError

        with pytest.raises(KilledError):
            run(corpus, out=tmp_path, on_record=kill)
        assert read_state(tmp_path)[0]["progress"]["step"] == 5
        resumed = run(corpus, out=tmp_path, resume=True)
        assert_same_weights(whole, weights(resumed))
        steps = [json.loads(line)["step"] for line in (tmp_path / LOG_FILE).read_text("utf-8").splitlines()]
        assert steps == [4, 8, 12], "lines after the saved state are written again, not twice"

    def test_killed_process_resumes_to_the_same_weights(self, tmp_path):
        command = [sys.executable, "-m", "moe_edu.cli", "train", "--out", str(tmp_path / "killed")]
        options = [f"--{name}={value}" for name, value in KILLED_RUN.items()]
        log = tmp_path / "killed" / LOG_FILE
        process = subprocess.Popen([*command, *options], stderr=subprocess.DEVNULL)
        while not (log.is_file() and len(log.read_text("utf-8").splitlines()) >= 8):
            assert process.poll() is None, "ended before it could be killed"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "killed" / RESULT_FILE).exists()

        subprocess.run([*command, *options, "--resume"], check=True, capture_output=True)
        command[-1] = str(tmp_path / "whole")
        subprocess.run([*command, *options], check=True, capture_output=True)
        killed, whole = (load_pretrained(tmp_path / name).model.state_dict() for name in ("killed", "whole"))
        assert_same_weights(killed, whole)

    def test_nothing_to_resume(self, corpus, tmp_path):
        with pytest.raises(CheckpointError, match="nothing to resume"):
            run(corpus, out=tmp_path, resume=True)

    def test_other_settings_are_refused_by_name(self, corpus, tmp_path):
        run(corpus, out=tmp_path)
        with pytest.raises(ValueError, match=r"learning_rate was 0\.003, is 0\.5"):
            run(corpus, dataclasses.replace(SETTINGS, learning_rate=0.5), out=tmp_path, resume=True)

    def test_another_corpus_is_refused(self, corpus, tmp_path):
        """Its tokenizer would give the same ids another meaning."""
        run(corpus, out=tmp_path)
        train_rows = dataclasses.replace(corpus.train, rows=corpus.train.rows[:-1])
        with pytest.raises(ValueError, match=r"corpus was '\w+', is '\w+'.*another folder"):
            run(dataclasses.replace(corpus, train=train_rows), out=tmp_path, resume=True)

    def test_a_loaded_state_does_not_hold_its_file(self, corpus, tmp_path):
        """Windows does not replace a memory-mapped file."""
        if sys.platform != "linux":
            pytest.skip("only Linux lists what is mapped")
        run(corpus, out=tmp_path)
        held = read_state(tmp_path)
        assert STATE_FILE not in Path("/proc/self/maps").read_text()
        del held

    def test_a_run_is_never_overwritten(self, corpus, tmp_path):
        run(corpus, out=tmp_path)
        with pytest.raises(ValueError, match="already holds a run"):
            run(corpus, out=tmp_path)

    def test_damaged_state(self, corpus, tmp_path):
        run(corpus, out=tmp_path)
        data = (tmp_path / STATE_FILE).read_bytes()
        (tmp_path / STATE_FILE).write_bytes(data[: len(data) // 2])
        with pytest.raises(CheckpointError, match="damaged"):
            run(corpus, out=tmp_path, resume=True)

    def test_half_a_log_line_is_dropped(self, tmp_path):
        path = tmp_path / LOG_FILE
        path.write_text('{"step": 1}\n{"step": 2}\n{"st', encoding="utf-8")
        assert [record["step"] for record in RunLog(path, resume_step=5).history] == [1, 2]

    def test_failed_write_leaves_the_old_state(self, corpus, tmp_path, monkeypatch):
        run(corpus, out=tmp_path)
        before = (tmp_path / STATE_FILE).read_bytes()
        monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            run(corpus, out=tmp_path, resume=True)
        assert (tmp_path / STATE_FILE).read_bytes() == before


class TestDivergence:
    def test_says_at_which_step_on_which_batch_and_what_to_try(self, corpus, tmp_path):
        settings = dataclasses.replace(SETTINGS, learning_rate=1e20, warmup_steps=0, steps=40)
        with pytest.raises(TrainingDivergedError) as caught:
            run(corpus, settings, out=tmp_path, checkpoint_every=1)
        message = str(caught.value)
        assert "diverged at step" in message
        assert f"the last good state is in {tmp_path}" in message
        assert "Start again in another folder with a lower learning_rate" in message
        assert "fra_Latn" in message or "ell_Grek" in message, "the batch is named"
        _, tensors = read_state(tmp_path)
        assert all(torch.isfinite(tensor).all() for tensor in tensors.values()), "the last good state is kept"

    def test_names_no_state_that_was_not_saved(self, corpus, tmp_path):
        settings = dataclasses.replace(SETTINGS, learning_rate=1e20, warmup_steps=0, steps=40)
        with pytest.raises(TrainingDivergedError) as caught:
            run(corpus, settings, out=tmp_path, checkpoint_every=1000)
        assert not (tmp_path / STATE_FILE).exists()
        assert "state" not in str(caught.value)
        assert "Start again with" in str(caught.value)


class TestSchedule:
    def test_warms_up_then_falls_to_zero(self):
        settings = TrainingSettings(learning_rate=1.0, warmup_steps=10)
        assert learning_rate_at(settings, 0, 0.0) == pytest.approx(0.1)
        assert learning_rate_at(settings, 9, 0.0) == pytest.approx(1.0)
        assert learning_rate_at(settings, 500, 0.5) == pytest.approx(0.5)
        assert learning_rate_at(settings, 1000, 1.0) == pytest.approx(0.0)
        assert learning_rate_at(settings, 1000, 1.2) == pytest.approx(0.0), "late by the clock"

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("und_rate", 5.0),
            ("warmup_steps", -5),
            ("seed", -1),
            ("seed", 2**64),
            ("eval_sentences", -5),
            ("weight_decay", math.nan),
            ("learning_rate", math.inf),
            ("seconds", math.inf),
            ("targets", ()),
        ],
    )
    def test_invalid_settings_are_refused(self, field, value):
        with pytest.raises(ValueError, match=rf"TrainingSettings\.{field} "):
            TrainingSettings(**{field: value})

    @pytest.mark.parametrize("field", ["steps", "seconds", "batch_tokens", "learning_rate", "clip_norm"])
    def test_settings_out_of_range_are_refused(self, field):
        with pytest.raises(ValueError, match=field):
            TrainingSettings(**{field: 0})


class TestDevice:
    def test_precision(self):
        cpu = torch.device("cpu")
        assert autocast_dtype("auto", cpu) is None
        assert autocast_dtype("bf16", cpu) is torch.bfloat16

    @pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
    def test_a_missing_gpu_is_reported(self):
        with pytest.raises(ValueError, match="no NVIDIA GPU"):
            resolve_device("cuda")

    def test_an_unknown_device_is_reported(self):
        with pytest.raises(ValueError, match="'gpu7' is not a device"):
            resolve_device("gpu7")

    def test_bf16_on_the_cpu_trains(self, corpus):
        result = run(corpus, dataclasses.replace(SETTINGS, precision="bf16"))
        assert math.isfinite(result.history[-1]["loss"])

    @pytest.mark.gpu
    @pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
    def test_gpu_trains(self, corpus, precision):
        settings = dataclasses.replace(SETTINGS, device="cuda", precision=precision, steps=60, log_every=5)
        history = run(corpus, settings).history
        assert history[-1]["cross_ent_loss"] < history[0]["cross_ent_loss"]


def test_small_config_fits_the_shipped_limit():
    """fp16 weights of the default model, at two bytes each, stay below 6 MB."""
    from moe_edu.model.translator import MoETranslator

    assert 2 * sum(p.numel() for p in MoETranslator(small_config()).parameters()) < 6e6
