"""Several threads on one model: each gets what it would get alone, or an error that says what to do."""

import asyncio
import os
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import tl_circuits as tlc
from tests.accelerator import DEVICE
from tests.tiny import prompt, tiny_bridge, transcoders
from tl_circuits.errors import BusyError
from tl_circuits.hooks import added_hooks, expected_warnings, turn
from tl_circuits.hooks.expected_warnings import edits_expected
from tl_circuits.support import threads
from tl_circuits.support.threads import free_threads

TEXT = "the capital of the state containing Dallas is"


@pytest.fixture(scope="module")
def facts():
    with tlc.attach(tlc.load_model("tiny-facts", device=DEVICE), tlc.load_transcoders("tiny-facts")) as replacement:
        yield replacement


def _jobs(replacement):
    """What threads do: the kind, the work, and what comparing takes from its result."""
    edit = tlc.Ablate(layer=0, position=7, feature=308)
    return {
        "attribute": lambda: tlc.attribute(replacement, TEXT, max_nodes=30, progress=False).adjacency(),
        "intervene": lambda: tlc.intervene(replacement, TEXT, edit, freeze="attention").logits,
        "generate": lambda: tlc.generate(replacement, TEXT, edit, max_new_tokens=2),
        "plain": lambda: _plain(replacement.model),
    }


def _plain(model):
    with torch.no_grad():
        return model(TEXT)


def test_threads_that_trace_edit_and_run_one_model_get_what_each_gets_alone_or_are_told_that_it_is_busy(facts):
    jobs = _jobs(facts)
    alone = {kind: job() for kind, job in jobs.items()}
    start = threading.Barrier(6)

    def work(kind, times):
        start.wait()
        found = []
        for _ in range(times):
            try:
                found.append(jobs[kind]())
            except BusyError:  # only from a plain pass; any other error ends the test
                assert kind == "plain"
                found.append(None)
        return kind, found

    with ThreadPoolExecutor(6) as pool:
        wishes = [("attribute", 2), ("attribute", 2), ("intervene", 8), ("generate", 4), ("plain", 60), ("plain", 60)]
        results = [future.result() for future in [pool.submit(work, *wish) for wish in wishes]]
    for kind, found in results:
        for result in found:
            same = (
                result == alone[kind] if isinstance(result, str) else result is None or torch.equal(result, alone[kind])
            )
            assert same, kind


def test_a_plain_pass_while_another_thread_edits_the_model_is_refused_and_waits_inside_a_turn():
    model = tiny_bridge("llama")
    alone = model(prompt()[None])
    began, go_on = threading.Event(), threading.Event()

    def edit():
        with added_hooks(model, [("blocks.1.hook_mlp_out", lambda tensor, hook: 2 * tensor)]):
            began.set()
            go_on.wait(20)

    def waits():
        with turn(model):
            return model(prompt()[None])

    with ThreadPoolExecutor(2) as pool:
        editing = pool.submit(edit)
        assert began.wait(20)
        with pytest.raises(BusyError, match="another thread"):
            model(prompt()[None])
        waiting = pool.submit(waits)
        go_on.set()
        editing.result(20)
        assert torch.equal(waiting.result(20), alone)


def test_the_same_thread_may_take_its_turn_again_and_other_models_do_not_wait():
    model, other = tiny_bridge("llama"), tiny_bridge("gpt2")
    with turn(model), turn(model), tlc.attach(model, transcoders(model)) as replacement:
        tlc.attribute(replacement, prompt(), max_nodes=10, progress=False)
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(lambda: tlc.attach(other, tlc.mlp_neurons(other)).detach()).result(20) is None


def test_passes_that_end_in_any_order_leave_the_warnings_as_they_were_and_hide_no_others():
    """Two threads with a model each; the first to come is the first to leave."""
    before = list(warnings.filters)
    first, second = edits_expected(), edits_expected()
    with pytest.warns(UserWarning, match="of mine"):
        with edits_expected():
            warnings.warn("of mine", stacklevel=1)
    with pytest.warns(UserWarning, match="edited hook_scale"):
        warnings.warn("A forward hook edited hook_scale/hook_normalized", stacklevel=1)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        warnings.warn("A forward hook edited hook_scale/hook_normalized", stacklevel=1)
        second.__exit__(None, None, None)
    assert not shown and list(warnings.filters) == before


def test_coroutines_may_hand_work_on_one_model_to_threads(facts):
    jobs = _jobs(facts)
    alone = jobs["intervene"]()

    async def both():
        return await asyncio.gather(*(asyncio.to_thread(jobs["intervene"]) for _ in range(3)))

    with ThreadPoolExecutor(1) as pool:  # the browser's tests keep a loop running in this thread
        results = pool.submit(asyncio.run, both()).result()
    assert all(torch.equal(result, alone) for result in results)


@pytest.fixture
def busy():
    """Four other programs for each processor."""
    programs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(4 * (os.cpu_count() or 1))]
    time.sleep(0.5)
    yield
    for program in programs:
        program.kill()
        program.wait()


@pytest.fixture
def several():
    """As many threads as the machine has processors, at least two."""
    before, count = torch.get_num_threads(), max(2, os.cpu_count() or 1)
    torch.set_num_threads(count)
    yield count
    torch.set_num_threads(before)


def _used(replacement):
    """How many threads ``attribute`` computes with, and how many there are after it."""
    seen = []
    with added_hooks(
        replacement.model, [("blocks.1.mlp.hook_in", lambda value, hook: seen.append(torch.get_num_threads()))]
    ):
        graph = tlc.attribute(replacement, TEXT, max_nodes=30, progress=False)
    assert graph.completeness_error() < 1e-4  # float32
    return set(seen), torch.get_num_threads()


def test_beside_busy_programs_attribute_takes_fewer_threads_and_gives_them_back(facts, several, busy):
    (used,), after = _used(facts)
    assert used < several == after
    with pytest.raises(ValueError, match="no more"), free_threads():
        raise ValueError("no more")
    assert torch.get_num_threads() == several


def test_with_free_processors_attribute_takes_all_of_torchs_threads(facts, several, monkeypatch):
    # in place of a machine that nothing else uses
    monkeypatch.setattr(threads, "processors_got", lambda: 0.9 * several)
    assert _used(facts) == ({several}, several)


def test_one_thread_stays_one_without_a_look_at_the_machine(facts, several, monkeypatch):
    monkeypatch.setattr(threads, "processors_got", lambda: pytest.fail("one thread has none to spare"))
    torch.set_num_threads(1)
    assert _used(facts) == ({1}, 1)


def test_an_exception_at_any_line_of_silencing_warnings_leaves_no_filter():
    """Also at the line before the one that ends it."""
    before, left, reached = list(warnings.filters), [], 0

    def silence():
        with edits_expected():
            pass

    for which in range(1, 60):
        seen = 0

        def at_line(frame, event, arg, which=which):
            nonlocal seen, reached
            if event == "line" and frame.f_code.co_filename == expected_warnings.__file__:
                seen += 1
                reached = max(reached, seen)
                if seen == which:
                    sys.settrace(None)
                    raise KeyboardInterrupt
            return at_line

        tracer = sys.gettrace()
        try:
            sys.settrace(at_line)
            silence()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(tracer)
        if list(warnings.filters) != before:
            left.append(which)
            warnings.filters[:] = before
    assert not left and 10 < reached < 59
