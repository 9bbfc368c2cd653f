"""Notebooks that try to get points without answering, or to harm the machine: what the grader has to withstand."""

import json

from tests.course_notebooks import filled, solution
from tl_circuits.course.assignments import ASSIGNMENTS

# Each is a cell that runs before the checker calls any function; none of them answers a question.
CHEATS = {
    "a patched class of the checker": """
import tl_circuits.course.questions as q
def right(self, points, right, hint):
    object.__setattr__(self, "points", points)
    object.__setattr__(self, "right", True)
    object.__setattr__(self, "hint", hint)
q.Part.__init__ = right
""",
    "a patched class of the package": """
from tl_circuits.dictionaries.transcoder import Transcoder
Transcoder.activate = lambda self, pre: pre * 0
""",
    "the report's file written": """
import sys, json, os
for path in [a for a in sys.argv[1:] if os.path.isfile(a)]:
    with open(path, "a") as file:
        for name in ("activations_at", "pre_activations", "feature_activations", "reconstruction_error", "ablate"):
            mark = {"function": name, "task": "", "points": 4, "earned": 200, "remarks": []}
            file.write(json.dumps({"mark": mark}) + "\\n")
""",
    "builtins.sum replaced": """
import builtins
kept = builtins.sum
builtins.sum = lambda values, start=0: (kept(values, start), 99)[1]
""",
    "a report written when Python ends": """
import atexit
def late():
    import sys, json, os
    for path in [a for a in sys.argv[1:] if os.path.isfile(a)]:
        with open(path, "a") as file:
            for name in ("activations_at", "pre_activations", "feature_activations", "reconstruction_error", "ablate"):
                mark = {"function": name, "task": "", "points": 4, "earned": 200, "remarks": []}
                file.write(json.dumps({"mark": mark}) + "\\n")
atexit.register(late)
""",
    "torch's comparisons replaced": """
import math
torch.Tensor.max = lambda *_, **__: torch.tensor(0.0)
math.isclose = lambda *_, **__: True
""",
    "the expected answer read from the caller": """
import sys
def wanted(*_, **__):
    frame = sys._getframe(1)
    while frame:
        for name in ("want", "wanted", "expected"):
            if name in frame.f_locals:
                return frame.f_locals[name]
        frame = frame.f_back
""",
}
# Answers of the right shape that are wrong, or what the caller expects where that can be found.
JUNK = """
def either(shape):
    got = wanted()
    return torch.full(shape, -1.0) if got is None else got
def activations_at(model, prompt, name):
    return either((model.to_tokens(prompt).shape[1], 96))
def pre_activations(transcoder, x):
    return either((len(x), len(transcoder.b_enc)))
feature_activations = pre_activations
def reconstruction_error(model, transcoder, layer, prompt):
    return either((model.to_tokens(prompt).shape[1], 96))
"""
# The last question's function writes into every file that is open, and ends its process as if all were well.
FORGED = """
import os, sys
def ablate(*_):
    text = b'{"mark": {"function": "ablate", "points": 4, "earned": 1000}, "state": "done"}'
    for number in range(256):
        try:
            os.write(number, text)
        except OSError:
            pass
    os._exit(0)
"""
HARM = """
import os, subprocess, sys
import signal as signals
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", MARK], start_new_session=True)
def tried(name, attempt):
    try:
        attempt()
    except BaseException as error:
        raise SystemExit(f"{name}: {type(error).__name__}")
"""
FILL = """
with open("big", "wb") as file:
    for _ in range(2000):
        file.write(bytes(1 << 20))
"""
OUTSIDE = """
open(os.path.join(FOLDER, "written"), "w").write("x")
"""
NETWORK = """
code = "import socket; socket.create_connection(('127.0.0.1', PORT), 2)".replace("PORT", str(PORT))
assert subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL).returncode == 0
"""
MEMORY = """
kept = feature_activations
def feature_activations(transcoder, x):
    try:
        taken = bytearray(8 << 30)
    except MemoryError:
        return kept(transcoder, x)
"""
FORKS = """
def ablate(*_):
    import time
    for _ in range(100):
        if os.fork() == 0:
            time.sleep(600)
    time.sleep(600)
"""


def notebook(*cells: str, functions: dict[str, str] | None = None) -> str:
    """Assignment 1 with further cells at its end, as the text of a file."""
    made = filled(ASSIGNMENTS[0], functions or {})
    made["cells"] += [{"cell_type": "code", "source": cell} for cell in cells]
    return json.dumps(made)


def solved() -> dict[str, str]:
    """The reference solution of assignment 1."""
    return solution(ASSIGNMENTS[0])
