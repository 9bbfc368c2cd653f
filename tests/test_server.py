"""The page from a real server with a real model, in a real browser."""

import asyncio
import http.client
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

import tl_circuits as tlc
from tests.browser import NASTY, tab, wait_until
from tests.tiny import own_bridge, prompt, run_async, tiny_bridge

pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")
psutil = pytest.importorskip("psutil")
from websockets.exceptions import InvalidStatus  # noqa: E402
from websockets.sync.client import connect  # noqa: E402

from tl_circuits.view.folder import GraphFolder  # noqa: E402
from tl_circuits.view.kept_graphs import MOST_KEPT  # noqa: E402
from tl_circuits.view.live_model import LiveModel  # noqa: E402
from tl_circuits.view.server import LARGEST_BODY, LOOPBACK, free_port, make_app, serve, settings  # noqa: E402

TOKEN = "not-a-guess"


@contextmanager
def listening(folder, live):
    """A server of ``folder`` on a free port of this machine; its address."""
    port = free_port("127.0.0.1", 18100)
    app = make_app(folder, TOKEN, LOOPBACK, live)
    server = uvicorn.Server(settings(app, "127.0.0.1", port))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:  # a thread left running keeps a failed run from ending
        server.should_exit = True
        thread.join()


@contextmanager
def serving(model, prompts, home):
    """A folder with a graph of each prompt, a truncated and a foreign file, served with the model; its address."""
    with tlc.attach(model, tlc.mlp_neurons(model)) as replacement:
        for name, prompt in prompts.items():
            tlc.attribute(replacement, prompt, max_nodes=60, progress=False).save(home / f"{name}.graph.safetensors")
        whole = (home / "capital.graph.safetensors").read_bytes()
        (home / "truncated.safetensors").write_bytes(whole[:700])
        (home / "foreign.json").write_text('{"hello": 1}')
        with listening(GraphFolder(home), LiveModel(replacement, max_nodes=40)) as url:
            yield url


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A server with a small model: its address and its folder."""
    home = tmp_path_factory.mktemp("graphs")
    with serving(own_bridge("llama"), {"capital": prompt(), "other": prompt(5)}, home) as url:
        yield url, home


@pytest.fixture
def home(served):
    """The folder, its notes removed after the test."""
    yield served[1]
    for notes in served[1].glob("*.notes.json"):
        notes.unlink()


def ask(url, path, method="GET", body=None, **headers):
    request = urllib.request.Request(f"{url}/{path}", body, {"x-token": TOKEN} | headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def graph_id(url, name="capital"):
    return next(g["id"] for g in json.loads(ask(url, "graphs")[1]) if g["name"].startswith(name))


def test_only_the_token_this_host_and_this_site_are_let_in(served):
    url, _ = served
    assert ask(url, "graphs")[0] == 200
    for headers in ({"x-token": "wrong"}, {"x-token": ""}, {"Host": "evil.example"}, {"Origin": "http://evil.example"}):
        status, text = ask(url, "graphs", **headers)
        assert status == 403 and json.loads(text)["error"]
    # A notebook's proxy on this machine hands on its own Host, or says it beside ours; addresses in the page are
    # relative.
    for headers in ({"Host": "localhost:8888"}, {"x-forwarded-host": "localhost:8888"}):
        assert ask(url, "graphs", Origin="http://localhost:8888", **headers)[0] == 200
    assert b'="/' not in ask(url, "")[1] and b"://" not in ask(url, "page.js")[1].replace(b"http://www.w3.org", b"")
    with pytest.raises(InvalidStatus, match="403"), connect(url.replace("http", "ws") + "/live?token=wrong"):
        pass
    with (
        pytest.raises(InvalidStatus, match="403"),
        connect(url.replace("http", "ws") + f"/live?token={TOKEN}", origin="http://evil.example"),
    ):
        pass


def test_unreadable_files_are_listed_with_the_reason_and_paths_are_no_ids(served):
    url, home = served
    listed = {g["name"]: g["problem"] for g in json.loads(ask(url, "graphs")[1])}
    assert listed["capital.graph.safetensors"] == "" and "cut off" in listed["truncated.safetensors"]
    assert listed["foreign.json"] and str(home) not in str(listed)
    for path in ("graphs/..%2F..%2Fetc%2Fpasswd", "graphs/capital.graph.safetensors", "graphs/nothing/notes"):
        assert ask(url, path)[0] == 404


def test_a_folder_of_many_graphs_keeps_a_few_in_memory_and_opens_all(served, tmp_path):
    whole = (served[1] / "capital.graph.safetensors").read_bytes()
    for number in range(12):
        (tmp_path / f"{number}.graph.safetensors").write_bytes(whole)
    folder = GraphFolder(tmp_path)
    assert (
        len(list(folder.infos())) == len([e for e in folder.entries() if not e.problem]) == 12 and len(folder.kept) == 0
    )
    assert all(folder.graph(entry.id).info.tokens for entry in folder.entries()) and len(folder.kept) == MOST_KEPT


def test_two_tabs_do_not_lose_each_others_fields_and_bad_notes_are_refused(served, home):
    url, _ = served
    graph = tlc.load_graph(home / "capital.graph.safetensors")
    place = f"graphs/{graph_id(url)}/notes"
    empty = {"version": 1, "graph": graph.fingerprint, "pins": [], "groups": [], "names": {}, "text": ""}

    def put(notes, fields):
        return ask(url, place, "PUT", json.dumps({"notes": notes, "fields": fields}).encode())

    assert put(empty | {"pins": [graph.node_ids[0]]}, ["pins"])[0] == 200
    assert put(empty | {"groups": [[NASTY, graph.node_ids[1]]]}, ["groups"])[0] == 200  # its pins are older
    noted = tlc.load_graph(home / "capital.graph.safetensors")
    assert noted.pins == graph.node_ids[:1] and noted.groups == ((NASTY, graph.node_ids[1:2]),)
    for notes, fields, status in (
        (empty | {"graph": "other"}, ["pins"], 422), (empty | {"pins": ["L99/F1@0"]}, ["pins"], 422),
        ("text", ["pins"], 422), (empty, ["path"], 404),
    ):  # fmt: skip
        assert put(notes, fields)[0] == status
    line = http.client.HTTPConnection(url.removeprefix("http://"))
    line.putrequest("PUT", f"/{place}")
    for header in (("x-token", TOKEN), ("content-length", str(LARGEST_BODY + 1))):
        line.putheader(*header)
    line.endheaders()  # it answers without waiting for the body
    assert line.getresponse().status == 413
    line.close()
    assert tlc.load_graph(home / "capital.graph.safetensors").notes == noted.notes
    beside = home / "capital.graph.safetensors.notes.json"
    for text, aside in (("worth keeping", ""), ("this too", "-2")):
        beside.write_text(json.dumps(empty | {"graph": "an earlier trace", "text": text}))
        assert json.loads(ask(url, place)[1])["graph"] == "an earlier trace"  # for the page to offer
        assert put(empty | {"pins": [graph.node_ids[0]]}, ["pins"])[0] == 200
        assert (
            json.loads(beside.read_text())["text"] == "" and text in (home / f"{beside.name}.other{aside}").read_text()
        )
    earlier = empty | {"graph": graph.earlier_fingerprint, "text": "of an earlier version"}
    beside.write_text(json.dumps(earlier))
    assert json.loads(ask(url, place)[1]) == earlier | {"graph": graph.fingerprint}
    assert put(earlier | {"pins": [graph.node_ids[0]]}, ["pins"])[0] == 200 and "of an earlier" in beside.read_text()
    for aside in home.glob("*.other*"):
        aside.unlink()


def test_twenty_tabs_steer_without_cross_talk_and_the_latest_wish_wins(served):
    url, home = served
    found, graph = graph_id(url), tlc.load_graph(home / "capital.graph.safetensors")
    features = [i for i in graph.node_ids if "/F" in i]
    address = url.replace("http", "ws") + f"/live?token={TOKEN}"

    def steer(k):
        with connect(address) as line:
            for number in (1, 2):
                wish = {"do": "steer", "graph": found, "number": number, "nodes": [features[k]], "factor": k / 4}
                line.send(json.dumps(wish))
            return [json.loads(line.recv(timeout=120)) for _ in range(2)]

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(steer, range(20)))
    for k, pair in enumerate(answers):
        by_number = {answer["number"]: answer for answer in pair}
        assert by_number[2]["result"]["nodes"] == [features[k]]
        assert by_number[1].get("skipped") or by_number[1]["result"]["nodes"] == [features[k]]
    assert any(by.get("skipped") for pair in answers for by in pair)
    with connect(address) as line:
        for wish, reason in (
            ('{"do": "steer", "number": 1, "graph": "x", "nodes": ["a"]}', "no graph"),
            ("[]", "JSON object"),
            (json.dumps({"do": "steer", "number": 1, "graph": found, "nodes": ["nope"], "factor": 0}), "no node"),
            (json.dumps({"do": "steer", "number": 1, "graph": found, "nodes": features, "factor": 1e9}), "factor"),
            ('{"do": "trace", "number": 1, "prompt": ""}', "1 to 2000 characters"),
            (json.dumps({"do": "trace", "number": 1, "prompt": "w1 " * 1000}), "1 to 2000 characters"),
        ):
            line.send(wish)
            assert reason in json.loads(line.recv(timeout=60))["error"]


def test_a_tab_closed_while_the_model_works_does_not_disturb_the_next_one(served):
    url, home = served
    found, graph = graph_id(url), tlc.load_graph(home / "capital.graph.safetensors")
    features = [i for i in graph.node_ids if "/F" in i]
    address = url.replace("http", "ws") + f"/live?token={TOKEN}"

    def wish(k):
        return json.dumps({"do": "steer", "graph": found, "number": k, "nodes": [features[k]], "factor": 0})

    def asked(k):
        with connect(address) as line:
            line.send(wish(k))
            return json.loads(line.recv(timeout=60))["result"]

    alone = [asked(k) for k in range(4)]
    for k in range(24):
        with connect(address) as line:
            line.send(wish(k % 5))
            time.sleep(0.003 * (k % 12))  # seconds: before the job starts, while it runs, and after it
        assert asked(k % 4) == alone[k % 4]


def test_one_job_at_a_time_also_when_the_waiting_for_it_is_given_up(monkeypatch):
    from tl_circuits.view import live_model

    model, running, most = tiny_bridge("gpt2"), [], []  # another model than the server's

    def slow(replacement, graph, boxes, factor):
        running.append(boxes)
        most.append(len(running))
        time.sleep(0.05)
        running.remove(boxes)
        return [{"factor": factor}]

    monkeypatch.setattr(live_model, "measure_boxes", slow)

    async def tabs(live, graph):
        for _ in range(5):
            given_up = asyncio.create_task(live.steer(graph, ["a"], 1.0, lambda: True))
            await asyncio.sleep(0.01)
            given_up.cancel()
            assert await live.steer(graph, ["b"], 2.0, lambda: True) == {"factor": 2.0}

    with tlc.attach(model, tlc.mlp_neurons(model)) as replacement:
        graph = tlc.attribute(replacement, prompt(5), max_nodes=5, progress=False)
        run_async(tabs(LiveModel(replacement), graph))
    assert max(most) == 1 and len(most) == 10


def test_every_wish_is_answered(served, monkeypatch):
    from tl_circuits.view import live_model

    url, home = served
    found, graph = graph_id(url), tlc.load_graph(home / "capital.graph.safetensors")

    def broken(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(live_model, "measure_boxes", broken)
    steer = {"do": "steer", "graph": found, "number": 7, "nodes": [graph.node_ids[0]], "factor": 0}
    with connect(url.replace("http", "ws") + f"/live?token={TOKEN}") as line:
        for text, words in (
            (json.dumps(steer), "RuntimeError: out of memory"),
            (json.dumps(steer).replace('"factor": 0', '"factor": 1e400'), "factor"),
            (json.dumps(steer | {"nodes": 5}), "nodes: Input should be a valid list"),
            ("[" * 5000, "JSON object"),
            (json.dumps(steer | {"factor": []}), "factor: Input should be a valid number"),
            (json.dumps(steer | {"graph": None}), "graph"),
        ):
            line.send(text)
            answer = json.loads(line.recv(timeout=30))
            assert words in answer["error"] and answer["number"] == (None if "JSON object" in words else 7)
    nested = b'{"notes": ' + b"[" * 5000
    for body in (
        nested,
        b"[]",
        b'{"fields": 5}',
        b'{"notes": 1, "fields": ["text"]}',
        b"\xff\xfe",
        b'{"notes": NaN, "fields": [1]}',
    ):
        assert ask(url, f"graphs/{found}/notes", "PUT", body)[0] == 422


def test_a_tab_asks_which_heads_carried_any_link_while_another_steers(served):
    url, home = served
    found, graph = graph_id(url), tlc.load_graph(home / "capital.graph.safetensors")
    moved = graph.edges[graph.edges.source.str.split("@").str[1] != graph.edges.target.str.split("@").str[1]]
    source, target = moved.source.iloc[-2], moved.target.iloc[-2]
    with connect(url.replace("http", "ws") + f"/live?token={TOKEN}") as line:
        line.send(json.dumps({"do": "steer", "graph": found, "number": 1, "nodes": [graph.node_ids[0]], "factor": 0}))
        line.send(json.dumps({"do": "heads", "graph": found, "number": 2, "source": source, "target": target}))
        answers = {a["number"]: a for a in (json.loads(line.recv(timeout=60)) for _ in range(2))}
        assert answers[1]["result"]["nodes"] == [graph.node_ids[0]]  # a wish of another kind does not overtake it
        story = answers[2]["result"]
        assert (story["source"], story["target"]) == (source, target) and "pairs" in story["heads"][0]
        for wish, reason in (
            ({"do": "heads", "source": target, "target": source}, "no edge"),
            ({"do": "heads", "source": "x"}, "no node"),
            ({"do": "dance"}, "heads"),
        ):
            line.send(json.dumps(wish | {"graph": found, "number": 3}))
            assert reason in json.loads(line.recv(timeout=60))["error"]


def test_tabs_in_a_browser_steer_each_its_own_and_labels_come_after_the_picture(browser, served):
    url, _ = served
    address = f"{url}/?token={TOKEN}&graph={graph_id(url)}"
    allowed = (url, url.replace("http", "ws"))
    with (
        tab(browser, address, allowed) as one,
        tab(browser, address, allowed) as two,
        tab(browser, address, allowed) as three,
    ):
        tabs = (one, two, three)
        for page in tabs:
            wait_until(
                page, "tlc.graph.kinds.every((kind, i) => kind !== 'feature' || tlc.graph.nodes.cards[i])", seconds=60
            )
        assert one.locator(".unit.box .name").first.text_content().startswith(("say", "sees"))
        for k, page in enumerate(tabs):
            page.locator(".unit.box").nth(k).click()
            page.locator("input.steer").fill(str(k - 1))  # -1, off, as it is
        told = []
        for k, page in enumerate(tabs):
            page.wait_for_selector(".result table", timeout=60_000)
            words = "without it" if k == 1 else f"with it at {k - 1} ×"
            assert words in page.inner_text(".result")
            told.append(page.inner_text(".result p.soft"))
        assert len(set(told)) == 3 and "predicted +0.00, measured +0.00" in told[2]
        one.locator(".unit.target").first.focus()
        one.keyboard.press("h")
        if one.locator(".carriers, .card progress").count() == 0:  # an arrow of several links
            one.locator(".card .list button").first.click()
        one.wait_for_selector(".carriers", timeout=60_000)
        assert "Why layer" in one.inner_text(".card")


def test_memory_stays_flat_over_500_requests(served):
    url, _ = served
    paths = ["graphs", f"graphs/{graph_id(url)}", f"graphs/{graph_id(url)}/notes", "?x"]
    process = psutil.Process()
    for n in range(500):
        assert ask(url, paths[n % len(paths)])[0] == 200
        if n == 100:
            before = process.memory_info().rss
    assert process.memory_info().rss - before < 20 * 2**20  # the data of one graph is a quarter of that


def test_a_person_reads_steers_groups_and_traces_in_the_page(browser, smollm2, tmp_path):
    with serving(smollm2, {"capital": "The capital of France is", "hot": "Hot and"}, tmp_path) as url:
        use_the_page(browser, url, tmp_path)


def use_the_page(browser, url, home):
    address = f"{url}/?token={TOKEN}&graph={graph_id(url)}"
    with tab(browser, address, allowed=(url, url.replace("http", "ws"))) as page:
        assert page.inner_text("h1").replace("\xa0", " ") == "Why “ Paris” (75 %)?"
        assert "2 cannot be read" in page.inner_text("header")
        page.locator(".unit.box").first.click()
        page.keyboard.press("s")
        page.locator("input.steer").fill("0")
        page.wait_for_selector(".result table", timeout=60_000)
        assert "In the model, without it:" in page.inner_text(".result") and "measured" in page.inner_text(".result")
        page.locator(".unit.box").first.focus()
        page.keyboard.press("l")
        page.keyboard.type(NASTY)
        page.keyboard.press("Enter")
        page.wait_for_selector(".unit.own")
        while not list(home.glob("*.notes.json")):
            page.wait_for_timeout(20)
        page.reload()
        page.wait_for_selector(".unit.own")
        assert NASTY in page.locator(".unit.own title").text_content()
        page.locator("input[aria-label='New prompt']").fill("One two")
        page.get_by_role("button", name="Trace").click()
        page.wait_for_selector("header progress")
        page.locator(".prompt", has_text="One two").wait_for(timeout=120_000)
        page.locator(".unit").first.wait_for()


@pytest.mark.parametrize("shown", ["file", "folder"])
def test_a_prompt_traced_in_the_page_opens_there_and_is_saved_where_the_page_says(browser, tmp_path, shown):
    mine = tmp_path / "mine.graph.safetensors"
    model = tiny_bridge("gpt2")  # another model than the server's that all tests share
    with tlc.attach(model, tlc.mlp_neurons(model)) as replacement:
        tlc.label_features(replacement, tlc.attribute(replacement, prompt(5), max_nodes=10, progress=False)).save(mine)
        before = mine.read_bytes()
        (tmp_path / "another.graph.safetensors").write_bytes(before)
        folder = GraphFolder(mine if shown == "file" else tmp_path)
        listed = ["mine"] if shown == "file" else ["another", "mine"]
        with listening(folder, LiveModel(replacement, max_nodes=20)) as url:
            with tab(browser, f"{url}/?token={TOKEN}", allowed=(url, url.replace("http", "ws"))) as page:
                for file in ("w3-w4-w5", "w3-w4-w5-2"):
                    page.locator("input[aria-label='New prompt']").fill("w3 w4 w5")
                    page.get_by_role("button", name="Trace").click()
                    where = "beside mine.graph.safetensors" if shown == "file" else "in the folder of this list"
                    page.locator(".saved", has_text=f"saved as {file}.graph.safetensors {where}").wait_for(
                        timeout=60_000
                    )
                    page.locator(".prompt", has_text="w3 w4 w5").wait_for()
                    page.locator(".unit").first.wait_for()
                    listed.append(file)
                    names = [f"{name}.graph.safetensors" for name in listed]
                    assert page.locator("select option").all_text_contents() == (
                        names if shown == "file" else sorted(names)
                    )
                    # put into the file when all are made
                    while not tlc.load_graph(tmp_path / f"{file}.graph.safetensors").labels:
                        page.wait_for_timeout(50)
    assert tlc.load_graph(tmp_path / "w3-w4-w5-2.graph.safetensors").info.prompt == "w3 w4 w5"
    assert mine.read_bytes() == before
    assert [e.name for e in GraphFolder(mine).entries()] == [mine.name]  # a new server shows what it is given


def test_a_trace_is_refused_before_it_runs_if_its_graph_cannot_be_saved(served, tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)
    with connect(served[0].replace("http", "ws") + f"/live?token={TOKEN}") as line:
        line.send('{"do": "trace", "prompt": "w1 w2"}')
        assert "nothing may be written" in json.loads(line.recv(timeout=10))["error"]


def test_listing_reads_no_graph_and_a_click_reads_one(served, tmp_path, monkeypatch):
    from tl_circuits.view import kept_graphs

    whole = (served[1] / "capital.graph.safetensors").read_bytes()
    for number in range(12):
        (tmp_path / f"{number:02}.graph.safetensors").write_bytes(whole)
    read = []
    monkeypatch.setattr(
        kept_graphs, "load_graph", lambda path, notes: read.append(path.name) or tlc.load_graph(path, notes=notes)
    )
    folder = GraphFolder(tmp_path)
    with listening(folder, None) as url:
        ids = [g["id"] for g in json.loads(ask(url, "graphs")[1])]
        assert len(ids) == 12 and read == []
        for number in (3, 7, 3):
            for path in ("graphs", f"graphs/{ids[number]}", f"graphs/{ids[number]}/notes"):
                assert ask(url, path)[0] == 200
        assert read == ["03.graph.safetensors", "07.graph.safetensors"]
        changed = tmp_path / "03.graph.safetensors"
        changed.write_bytes(whole)
        assert ask(url, f"graphs/{ids[3]}")[0] == 200 and len(read) == 3  # a file that changed is read again


def test_sixteen_clients_read_more_graphs_than_are_kept(served, tmp_path):
    whole = (served[1] / "capital.graph.safetensors").read_bytes()
    for number in range(MOST_KEPT + 4):
        (tmp_path / f"{number:02}.graph.safetensors").write_bytes(whole)
    folder = GraphFolder(tmp_path)
    with listening(folder, None) as url:
        ids = [g["id"] for g in json.loads(ask(url, "graphs")[1])]
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda k: ask(url, f"graphs/{ids[5 * k % len(ids)]}/notes")[0], range(64)))
    assert answers == [200] * 64 and len(folder.kept) == MOST_KEPT


def test_a_file_that_is_damaged_behind_its_beginning_is_said_to_be_when_it_is_opened(browser, served, tmp_path):
    whole = bytearray((served[1] / "capital.graph.safetensors").read_bytes())
    start = 8 + int.from_bytes(whole[:8], "little")
    (tmp_path / "b.graph.safetensors").write_bytes(whole)
    whole[start:] = b"\xff" * (len(whole) - start)  # tables of nonsense behind a beginning that is right
    (tmp_path / "a.graph.safetensors").write_bytes(whole)
    with listening(GraphFolder(tmp_path), None) as url:
        listed = json.loads(ask(url, "graphs")[1])
        assert [g["problem"] for g in listed] == ["", ""]
        status, text = ask(url, f"graphs/{listed[0]['id']}")
        assert (
            status == 422
            and json.loads(text)["error"].startswith("a.graph.safetensors")
            and str(tmp_path) not in str(text)
        )
        assert json.loads(ask(url, "graphs")[1])[0]["problem"] == json.loads(text)["error"]
    with listening(GraphFolder(tmp_path), None) as url:  # a new server knows nothing of it
        page = browser.new_page()
        page.goto(f"{url}/?token={TOKEN}")
        page.locator(".unit").first.wait_for()  # the first file that can be read is shown
        assert "1 cannot be read" in page.inner_text("header") and page.locator("h1").inner_text().startswith("Why")
        page.goto(f"{url}/?token={TOKEN}&graph={listed[0]['id']}")
        page.get_by_text("This graph cannot be shown").wait_for()
        assert page.locator("option").all_text_contents() == ["Choose a graph", "b.graph.safetensors"]
        page.close()


def test_a_taken_port_gives_the_next_free_one(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert port < free_port("127.0.0.1", port) < port + 50


def test_wrong_tokens_are_answered_one_after_the_other_and_the_right_one_at_once(served, monkeypatch):
    from tl_circuits.view import timeouts

    monkeypatch.setattr(timeouts, "SECONDS_FOR_GUESS", 0.5)
    monkeypatch.setattr(timeouts, "MOST_GUESSES_WAITING", 3)
    began = time.monotonic()
    with ThreadPoolExecutor(6) as pool:
        guesses = [pool.submit(ask, served[0], "graphs", **{"x-token": f"guess {k}"}) for k in range(6)]
        assert ask(served[0], "graphs")[0] == 200
        answers = sorted(guess.result()[0] for guess in guesses)
    assert answers == [403, 403, 403, 429, 429, 429]
    assert time.monotonic() - began > 3 * 0.5  # seconds: three answers, one after the other


def test_requests_that_never_become_whole_are_given_up(served, monkeypatch):
    from tl_circuits.view import timeouts

    monkeypatch.setattr(timeouts, "SECONDS_FOR_HEAD", 0.4)
    whole = f"GET /graphs HTTP/1.1\r\nHost: localhost\r\nx-token: {TOKEN}\r\n\r\n".encode()
    for start, answered in ((b"", False), (b"GET /graphs HT", False), (whole + b"GET /gr", True)):
        with socket.create_connection(("127.0.0.1", int(served[0].rsplit(":", 1)[1])), timeout=20) as line:
            line.sendall(start)
            said = b""
            while part := line.recv(65536):  # ends when the server closes; a timeout would raise
                said += part
            assert said.startswith(b"HTTP/1.1 200") == answered
    with connect(served[0].replace("http", "ws") + f"/live?token={TOKEN}") as line:
        time.sleep(1)  # longer than a request has: a websocket may be silent
        line.send("[]")
        assert "JSON object" in json.loads(line.recv(timeout=20))["error"]


def test_the_token_leaves_the_address_bar_and_the_tab_keeps_it(browser, served):
    url, _ = served
    with tab(browser, f"{url}/?token={TOKEN}&graph={graph_id(url)}", allowed=(url, url.replace("http", "ws"))) as page:
        assert page.url == f"{url}/?graph={graph_id(url)}"
        page.reload()
        page.wait_for_selector(".tlc svg .unit")
        assert TOKEN not in page.url and TOKEN not in page.content()


@pytest.mark.parametrize("token", ["short", "a" * 40, "abcdefg" * 5])
def test_a_token_that_can_be_guessed_is_refused_for_a_public_address(tmp_path, token):
    with pytest.raises(ValueError, match="can be guessed"):
        serve(GraphFolder(tmp_path), "0.0.0.0", 7860, token, None, print)


def test_a_public_address_needs_a_token_of_ones_own(tmp_path):
    with pytest.raises(ValueError, match="--token"):
        serve(GraphFolder(tmp_path), "0.0.0.0", 7860, None, None, print)
