"""The command line: texts that look like options, pipes that are closed early, and unknown devices."""

import subprocess
import sys

import pytest
from click.testing import CliRunner

from moe_edu import cli


def test_python_m_is_the_command():
    done = subprocess.run([sys.executable, "-m", "moe_edu", "--version"], capture_output=True, text=True)
    assert done.stdout.startswith("moe-edu, version ")


@pytest.mark.parametrize("text", ["-5 km", "--5 km", "-, he said"])
def test_a_text_that_looks_like_an_option(text):
    done = CliRunner().invoke(cli.main, ["translate", text])
    assert done.exit_code == 2
    assert 'goes after --, as in: moe-edu translate -- "-5 km"' in done.output


def test_a_text_after_two_dashes_is_translated(monkeypatch):
    class Echo:
        def translate(self, text, **options):
            return f"<{text}>"

    monkeypatch.setattr("moe_edu.model.pretrained.load_pretrained", lambda *_: Echo())
    assert CliRunner().invoke(cli.main, ["translate", "--", "-5 km"]).output == "<-5 km>\n"


@pytest.mark.skipif(sys.platform == "win32", reason="pipes end differently on Windows")
def test_a_closed_pipe_ends_it_silently():
    command = [sys.executable, "-u", "-m", "moe_edu", "translate", "--beams", "1"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:
        process.stdin.write("1 de agosto de 1996\n" * 3)
        process.stdin.flush()
        assert process.stdout.readline()
        process.stdout.close()
        process.stdin.write("1 de agosto de 1996\n" * 20)
        process.stdin.close()
        assert process.stderr.read() == ""
        assert process.wait() == 1


@pytest.mark.parametrize("device", ["meta", "mps", "xpu"])
def test_an_unsupported_device_is_refused(device):
    done = CliRunner().invoke(cli.main, ["translate", "--device", device, "1 de agosto"])
    assert done.exit_code == 1
    assert done.output == f"Error: moe_edu does not compute on '{device}': use auto, cpu or cuda\n"
