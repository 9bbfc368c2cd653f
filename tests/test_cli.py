"""The program, as a person runs it: in a process of its own what needs one, the rest within this process."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from rich.text import Text

import tl_circuits as tlc
from tests.tiny import command, tiny_folder
from tl_circuits.cli.app import terminal

PROGRAM = str(Path(sys.executable).parent / "tl-circuits")


def own_process(*arguments, cwd):
    """The installed program: importing torch and TransformerLens anew, with all that libraries say on stderr."""
    return subprocess.run(
        [PROGRAM, *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "100"},
    )


def own_lines(stderr):
    """How many lines are the program's; others are progress bars of the libraries that load a model."""
    return sum(line.startswith("tl-circuits: ") for line in stderr.splitlines())


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    done = own_process(
        "trace", "w1 w2 w3", "--model", tiny_folder("gemma3"), "--max-nodes", 60, "--out", "answer", cwd=folder
    )
    return folder, done


def test_trace_writes_graph_and_page_and_tells_what_it_found(traced):
    folder, done = traced
    assert done.returncode == 0, done.stderr
    for heading in ("What the model says next", "where that came from", "How much is explained", "Files"):
        assert heading in done.stdout
    graph = tlc.load_graph(folder / "answer.graph.safetensors")
    assert graph.info.prompt == "w1 w2 w3" and len(graph.labels) == 60
    assert (folder / "answer.html").read_text().startswith("<!doctype html>")
    assert sorted(os.listdir(folder)) == ["answer.graph.safetensors", "answer.html"]


def test_some_layers_of_a_set_can_be_asked_for_and_neurons_are_taken_whole(tmp_path):
    chosen = ("--model", "tiny-facts", "--transcoders", "tiny-facts", "--layer", 1, "--layer", 3)
    done = command("trace", "the capital of Texas is", *chosen, "--max-nodes", 60, "--out", "some", cwd=tmp_path)
    assert done.exit_code == 0, done.stderr
    nodes = tlc.load_graph(tmp_path / "some.graph.safetensors").nodes
    assert set(nodes.layer[nodes.kind == "feature"]) == {1, 3}
    assert set(nodes.layer[nodes.kind == "error"]) == {0, 1, 2, 3}
    refused = command(
        "trace", "the capital of Texas is", "--model", "tiny-facts", "--layer", 1, "--out", "none", cwd=tmp_path
    )
    assert refused.exit_code == 1 and "neurons" in refused.stderr and len(refused.stderr.strip().splitlines()) == 1


def test_a_difference_of_two_tokens_can_be_asked_for_and_unknown_words_are_refused(tmp_path):
    done = command(
        "trace",
        "w1 w2 w3",
        "--model",
        tiny_folder("gemma3"),
        "--max-nodes",
        10,
        "--out",
        "difference",
        "--target",
        "w5 - w9",
        cwd=tmp_path,
    )
    assert done.exit_code == 0, done.stderr
    assert tlc.load_graph(tmp_path / "difference.graph.safetensors").info.target_names == ("w5 − w9",)
    done = command(
        "trace",
        "w1 w2 w3",
        "--model",
        tiny_folder("gemma3"),
        "--out",
        "unknown",
        "--target",
        "w5 - Parisian",
        cwd=tmp_path,
    )
    assert done.exit_code == 1 and "'Parisian' is not in the model's vocabulary" in done.stderr


def test_an_existing_output_is_refused_before_the_work_and_force_overwrites(traced):
    folder, _ = traced
    started = time.time()
    refused = command("trace", "w1", "--model", "nowhere", "--out", "answer", cwd=folder)
    assert refused.exit_code == 1 and "exists already" in refused.stderr and "--force" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1 and time.time() - started < 10


def test_a_text_that_is_missing_or_would_not_be_used_is_refused_before_the_work(tmp_path):
    asked = ("trace", "w1 w2 w3", "--model", tiny_folder("gemma3"), "--max-nodes", 20, "--out", "named")
    (tmp_path / "words.txt").write_text("w1 w2 w3 w4 w5 " * 20)
    for options, said in (
        (("--text", "none.txt"), "--text none.txt: there is no such file or folder"),
        (
            ("--text", "words.txt", "--no-examples"),
            "says where to look for examples, and --no-examples that none are wanted",
        ),
    ):
        done = command(*asked, *options, cwd=tmp_path)
        assert done.exit_code == 1 and said in done.stderr and len(done.stderr.strip().splitlines()) == 1
        assert not (tmp_path / "named.html").exists()
    assert command(*asked, "--text", "words.txt", cwd=tmp_path).exit_code == 0


def test_more_gives_what_the_larger_trace_gives_and_keeps_notes(tmp_path):
    asked = ("trace", "w1 w2 w3", "--model", tiny_folder("gemma3"), "--no-examples")
    assert command(*asked, "--max-nodes", 20, "--out", "grown", cwd=tmp_path).exit_code == 0
    file = tmp_path / "grown.graph.safetensors"
    before = tlc.load_graph(file)
    kept = [name for name in before.node_ids if "/F" in name][:2]
    before.group("mine", kept).save(file, overwrite=True)
    done = command(*asked, "--more", "--out", "grown", cwd=tmp_path)
    assert done.exit_code == 0, done.stderr
    assert command(*asked, "--max-nodes", 40, "--out", "fresh", cwd=tmp_path).exit_code == 0
    assert file.read_bytes() == (tmp_path / "fresh.graph.safetensors").read_bytes()
    assert tlc.load_graph(file).notes.groups == (("mine", tuple(kept)),)
    assert command(*asked, "--more", "--max-nodes", 50, "--out", "grown", cwd=tmp_path).exit_code == 0
    grown = file.read_bytes()
    for options, said in (
        ((*asked, "--more", "--out", "none"), "Run the command without --more first"),
        ((*asked, "--more", "--max-nodes", 50, "--out", "grown"), "has 50 features already"),
        (("trace", "w1 w2 w4", *asked[2:], "--more", "--out", "grown"), "token_ids is different"),
        ((*asked, "--target", "w5", "--more", "--out", "grown"), "target_names is different"),
    ):
        refused = command(*options, cwd=tmp_path)
        assert refused.exit_code == 1 and said in " ".join(refused.stderr.split()), refused.stderr
    assert file.read_bytes() == grown
    assert command(*asked, "--more", "--max-nodes", 10**6, "--out", "grown", cwd=tmp_path).exit_code == 0
    assert "no more to trace" in " ".join(command(*asked, "--more", "--out", "grown", cwd=tmp_path).stderr.split())


def test_json_is_for_machines(traced):
    folder, _ = traced
    done = command(
        "trace",
        "w1 w2 w3",
        "--model",
        tiny_folder("gemma3"),
        "--max-nodes",
        20,
        "--out",
        "answer",
        "--force",
        "--json",
        "--target",
        "w5",
        "--target",
        "w5 - w6",
        cwd=folder,
    )
    assert done.exit_code == 0, done.stderr
    facts = json.loads(done.stdout)
    assert [t["token"] for t in facts["targets"]] == ["w5", "w5 − w6"]
    assert facts["completeness_error"] < 1e-4 and Path(folder, facts["files"]["page"]).is_file()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["trace"], 2, "Missing argument"),
        (["nonsense"], 2, "No such command"),
        (["trace", "w1", "--max-nodes", "many"], 2, "max-nodes"),
        (["trace", "w1", "--engine", "magic"], 2, "not one of auto"),
        (["trace", "w1", "--dtype", "float64"], 2, "not one of float32"),
        (["steer", "w1", "--edit", "token@1 *= 0", "--freeze", "some"], 2, "not one of all"),
        (["export", "graph", "--target", "magic"], 2, "not one of neuronpedia"),
        (["heads", "graph", "a > b", "--heads", "-1"], 2, "--heads"),
        (["trace", "", "--model", "TINY"], 1, "the prompt is empty"),
        (["trace", "w1", "--model", "TINY", "--target", "w1 w2 w3"], 1, "3 tokens"),
        (["trace", "w1", "--model", "TINY", "--transcoders", "magic"], 1, "magic"),
        (["trace", "w1", "--model", "TINY", "--out", "no/where"], 1, "does not exist"),
        (["trace", "w1", "--model", "TINY", "--max-nodes", "0"], 1, "at least 1"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, code, words, tmp_path):
    done = command(*[tiny_folder("gemma3") if a == "TINY" else a for a in arguments], cwd=tmp_path)
    assert done.exit_code == code
    assert words in done.stderr and "Traceback" not in done.stderr
    assert code == 2 or own_lines(done.stderr) == 1
    assert os.listdir(tmp_path) == []


def test_an_error_ends_a_process_of_its_own_with_one_and_its_last_line_says_why(tmp_path):
    done = own_process("trace", "w1", "--model", tiny_folder("gemma3"), "--target", "w1 w2 w3", cwd=tmp_path)
    assert done.returncode == 1 and own_lines(done.stderr) == 1 and "Traceback" not in done.stderr
    assert "3 tokens" in done.stderr.splitlines()[-1]
    assert os.listdir(tmp_path) == []


def test_help_in_an_error_keeps_its_lines_and_no_control_character_reaches_the_terminal(tmp_path):
    done = command("steer", "w1", "-e", "L24/F1005 = 0\x1b]0;x\x07", cwd=tmp_path)
    lines = done.stderr.splitlines()
    assert done.exit_code == 1 and "            L3/error@2    the error term of layer 3" in lines
    assert lines[-1].startswith("tl-circuits: cannot read the edit") and "names no position: @9" in lines[-1]
    console = terminal()
    with console.capture() as captured:
        console.print(Text("a\x1b[31mb\x9b1mc\n\td"))
        console.print("in \x1b]0;title\x07 words")
    assert captured.get().split() == ["a�[31mb�1mc", "d", "in", "�]0;title", "words"]  # rich itself leaves bells out


def test_debug_shows_the_traceback(tmp_path):
    done = command("trace", "", "--model", tiny_folder("gemma3"), "--debug", cwd=tmp_path)
    assert done.exit_code == 1 and "Traceback" in done.stderr


def test_ctrl_c_leaves_no_file(tmp_path):
    process = subprocess.Popen(
        [PROGRAM, "trace", "w1 w2 w3", "--model", tiny_folder("gemma3"), "--out", "x"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    time.sleep(4)
    while process.poll() is None:  # a library that is being imported may swallow one
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=2)
    assert process.returncode != 0
    assert os.listdir(tmp_path) == []


def test_ctrl_c_ends_the_server_in_order_also_with_a_request_that_never_became_whole(tmp_path):
    process = subprocess.Popen(
        [PROGRAM, "view", ".", "--port", "18400"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    address = urlsplit(process.stdout.readline().removeprefix("Open ").strip())
    for _ in range(300):
        try:
            line = socket.create_connection((address.hostname, address.port))
            break
        except ConnectionRefusedError:  # the address is printed just before the server listens
            time.sleep(0.1)
    with line:
        line.sendall(b"GET /graphs HT")
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in said and own_lines(said) == 0, said


def test_models_and_doctor_say_what_there_is(tmp_path):
    listed = command("models", "--json", cwd=tmp_path)
    found = json.loads(listed.stdout)
    assert [row["name"] for row in found["models"]] == ["tiny-facts", "smollm2-135m", "gemma-3-270m"]
    assert {"gemma", "llama", "gemma-2-2b", "llama-3.2-1b", "qwen3-4b"} <= {row["name"] for row in found["transcoders"]}
    plain = command("models", cwd=tmp_path, env={"TL_CIRCUITS_CACHE": str(tmp_path / "empty")})
    assert plain.exit_code == 0 and "smollm2-135m" in plain.stdout
    report = command("doctor", "--json", cwd=tmp_path)
    facts = {row["what"]: row for row in json.loads(report.stdout)}
    assert facts["torch"]["ok"] and facts["device cpu"]["ok"] and "model gemma-3-270m" in facts


def test_a_public_address_without_a_token_is_wrong_usage(tmp_path):
    done = command("view", tmp_path, "--host", "0.0.0.0", cwd=tmp_path)
    assert done.exit_code == 2 and "--token" in done.stderr
