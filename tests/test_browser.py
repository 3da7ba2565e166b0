"""The workbench in a real JupyterLab, in a headless Chromium: clicked, dragged, typed at, reloaded, interrupted.

What is asserted is what the kernel and the charts say. Screenshots go to MGDARTS_SCREENSHOTS, or to pytest's folder.
"""
import ast
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest

from mgdarts.base.files import Checkpoints
from mgdarts.runs.listen import read_events

CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)
try:
    from playwright.sync_api import sync_playwright
except ImportError:
    sync_playwright = None
pytestmark = [pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: the browser tests need Debian's chromium"),
              pytest.mark.skipif(sync_playwright is None, reason="playwright is not installed")]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
ROOT = Path(__file__).resolve().parent.parent
FAST = {"data.subset": 200, "search.warmup": 1, "search.max_epochs": 2, "train.epochs": 2, "search.batch": 32}
CHARTS = "[...document.querySelectorAll('.mgdarts-wb .js-plotly-plot')]"  # all that the browser has drawn


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment(folder):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "MGDARTS_ROOT": str(folder), "PYTHONPATH": path,
           "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1",
           "JUPYTER_CONFIG_DIR": str(folder / "config"), "JUPYTER_DATA_DIR": str(folder / "data"),
           "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"), "JUPYTERLAB_WORKSPACES_DIR": str(folder / "spaces")}
    env.pop("IN_TEST", None)
    return env


@pytest.fixture(scope="module")
def lab(tmp_path_factory, run_of):
    "A JupyterLab on a folder with the workbench's notebook and a finished run."
    folder = tmp_path_factory.mktemp("lab")
    run_of(folder / "runs/demo", **FAST)
    run_of(folder / "runs/other", **FAST, seed=1)
    (folder / "nbs/start").mkdir(parents=True)
    shutil.copyfile(ROOT / "nbs/start/workbench.ipynb", folder / "nbs/start/workbench.ipynb")
    (folder / "settings.ini").write_bytes((ROOT / "settings.ini").read_bytes())
    (folder / "config").mkdir()
    open_to_all = {"IdentityProvider": {"token": ""}, "ServerApp": {"disable_check_xsrf": True}}
    (folder / "config/jupyter_server_config.json").write_text(json.dumps(open_to_all))
    port = free_port()
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
               f"--ServerApp.root_dir={folder}", "--LabApp.news_url=None",
               "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    server = subprocess.Popen(command, env=environment(folder), stdout=subprocess.DEVNULL,
                              stderr=open(folder / "lab.log", "w"), cwd=folder)
    base = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(base + "/api")
                break
            assert server.poll() is None, (folder / "lab.log").read_text()
            time.sleep(0.25)
        yield base, folder
    finally:
        server.terminate()
        server.wait(30)


ASK = r"""async ([base, code]) => {
    const sessions = await (await fetch(base + '/api/sessions')).json(), id = sessions[0].kernel.id;
    const ws = new WebSocket(base.replace('http', 'ws') + `/api/kernels/${id}/channels?session_id=test`);
    await new Promise((r) => { ws.onopen = r; });
    const header = { msg_id: crypto.randomUUID(), username: 't', session: 'test', msg_type: 'execute_request',
                     version: '5.3', date: new Date().toISOString() };
    const done = new Promise((r) => { ws.onmessage = (e) => {
        const m = JSON.parse(e.data);
        if (m.parent_header.msg_id === header.msg_id && m.msg_type === 'execute_reply') r(m.content);
    }; });
    const content = { code: 'import json', silent: true, store_history: false, allow_stdin: false,
                      stop_on_error: false, user_expressions: { a: `json.dumps(${code})` } };
    ws.send(JSON.stringify({ header, parent_header: {}, metadata: {}, channel: 'shell', content }));
    const { a } = (await done).user_expressions;
    ws.close();
    return a.status === 'ok' ? { repr: a.data['text/plain'] } : { error: a.evalue };
}"""  # the kernel's repr of an expression as JSON, asked over its websocket


class Desk:
    "A person at the workbench."
    def __init__(self, page, base, folder, shots):
        self.page, self.base, self.folder, self.shots = page, base, folder, shots

    def open(self, reset=True):
        self.page.goto(f"{self.base}/lab/tree/nbs/start/workbench.ipynb" + ("?reset" if reset else ""))
        self.page.wait_for_selector(".jp-Notebook")
        self.idle()

    def idle(self):
        self.page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status=idle]")
        self.page.wait_for_selector(r"text=/\| Idle/")

    def run_all(self):
        self.page.click(".lm-MenuBar-itemLabel:text-is('Run')")
        self.page.click(".lm-Menu-itemLabel:text-is('Run All Cells')")
        self.page.wait_for_selector(".mgdarts-wb .mg-buttons")

    def ask(self, code):
        "What the kernel says to an expression, asked beside the notebook."
        said = self.page.evaluate(ASK, [self.base, code])
        return json.loads(ast.literal_eval(said["repr"])) if "repr" in said else said

    def until(self, code, good, seconds=120):
        end = time.monotonic() + seconds
        while not good(value := self.ask(code)):
            assert time.monotonic() < end, (code, value, self.ask("workbench.said"), self.word())
            time.sleep(0.1)
        return value

    def word(self):
        return self.page.locator(".mg-line .word").inner_text()

    def says(self, word):
        self.page.wait_for_function("w => document.querySelector('.mg-line .word')?.textContent === w", arg=word)

    def press(self, what):
        self.page.click(f".mg-buttons button[data-do={what}]")

    def tab(self, name):
        self.page.click(f".mgdarts-wb .lm-TabBar-tabLabel:text-is('{name}')")

    def chart(self):
        "Numbers as the browser draws them: trace name -> y."
        return self.page.evaluate(f"() => Object.fromEntries({CHARTS}.filter(p => p.data.length)"
                                  ".flatMap(p => p.data.map((t, i) => [i + ' ' + t.name, Array.from(t.y)])))")

    def titles(self):
        "Of all charts that the browser has drawn."
        return self.page.evaluate(f"() => {CHARTS}.map(p => p._fullLayout?.title?.text)")

    def wait_for_charts(self):
        "Those of a search, with their curves."
        self.page.wait_for_function(f"() => {CHARTS}.some(p => p.data?.length > 8)")

    def wait_for_look(self):
        "No figure lost its look on the way: nothing is painted behind the curves."
        self.page.wait_for_function(f"() => {CHARTS}.every(p => !p._fullLayout || "
                                    "p._fullLayout.plot_bgcolor.replaceAll(' ', '') === 'rgba(0,0,0,0)')")

    def shot(self, name):
        time.sleep(0.4)
        box = self.page.locator(".mgdarts-wb")
        box.scroll_into_view_if_needed()
        box.screenshot(path=self.shots / f"{name}.png")


def request(url, method, body=None):
    data, headers = (None, {}) if body is None else (json.dumps(body).encode(), {"Content-Type": "application/json"})
    return urllib.request.urlopen(urllib.request.Request(url, data, headers, method=method))


@contextlib.contextmanager
def browser(lab, tmp_path, dark=False):
    shots = Path(os.environ.get("MGDARTS_SCREENSHOTS") or tmp_path)
    shots.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as p:
        context = p.chromium.launch_persistent_context(
            str(tmp_path / "profile"), executable_path=CHROMIUM, headless=True, args=FLAGS,
            viewport={"width": 1600, "height": 1500}, color_scheme="dark" if dark else "light")
        try:
            page = context.pages[0]
            page.set_default_timeout(120_000)  # the machine may be slow
            theme = "JupyterLab Dark" if dark else "JupyterLab Light"
            for what, raw in (("themes", {"theme": theme}), ("notification", {"fetchNews": "false"})):
                request(f"{lab[0]}/lab/api/settings/@jupyterlab/apputils-extension:{what}", "PUT",
                        {"raw": json.dumps(raw)})
            yield Desk(page, *lab, shots)
        finally:
            context.close()
            with contextlib.suppress(OSError):  # the server has ended
                for session in json.load(urllib.request.urlopen(lab[0] + "/api/sessions")):
                    request(f"{lab[0]}/api/sessions/{session['id']}", "DELETE")


def test_a_finished_run_and_a_live_search(lab, tmp_path):
    with browser(lab, tmp_path) as desk:
        page = desk.page
        desk.open()
        desk.run_all()
        desk.says("finished")
        page.wait_for_selector(".mg-pic .op")
        desk.wait_for_charts()
        events = read_events(desk.folder / "runs/demo/events.jsonl")
        epochs = {e["epoch"]: e for e in events if e["type"] == "epoch"}
        drawn = [y for y in desk.chart()["0 train"] if y is not None]
        assert drawn == pytest.approx([e["ce"] for e in epochs.values()])
        desk.shot("light-finished")

        # the line under the pointer goes through all charts, with the values of each
        box = page.locator(".mgdarts-wb .js-plotly-plot .xy").first.bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 3)
        page.wait_for_function("() => document.querySelectorAll('.mgdarts-wb .hovertext').length > 9"
                               " && document.querySelector('.mgdarts-wb .spikeline')")
        assert page.locator(".mgdarts-wb .spikeline").first.bounding_box()["height"] > 700  # of 900
        page.mouse.move(0, 0)

        # charts and pictures are taken away as files, by the keyboard
        for name in ("charts of the search", "selected cell"):
            for kind, start in (("PNG", b"\x89PNG"), ("SVG", b"<svg"), ("HTML", b"<!doctype html>")):
                with page.expect_download() as download:
                    page.get_by_role("button", name=f"save {name} as {kind}").focus()
                    page.keyboard.press("Enter")
                assert Path(download.value.path()).read_bytes().startswith(start)
                assert download.value.suggested_filename == f"{name.replace(' ', '-')}.{kind.lower()}"

        # an epoch that is past
        desk.tab("Replay")
        slider = page.get_by_role("slider", name="moment of the search")
        slider.focus()
        page.wait_for_function("() => +document.activeElement.max > 10")
        for _ in range(3):  # at once, while the charts are still being drawn for the first time
            page.keyboard.press("ArrowLeft")
        moment, n = desk.until("[workbench.replay.slider.value, len(workbench.replay.slider.labels)]",
                               lambda v: v[0] == v[1] - 4)
        label = desk.ask(f"workbench.replay.slider.labels[{moment}]")
        desk.until("workbench.replay.plot.fig.layout.title.text", lambda t: t and label in t and t in desk.titles())
        assert slider.get_attribute("aria-valuetext") == f"{label} ({moment + 1} of {n})"
        desk.wait_for_look()
        desk.shot("light-replay")

        # two runs beside each other
        desk.tab("Compare")
        page.wait_for_selector(".mg-table:has-text('other')")
        page.fill("input[aria-label='filter the runs']", "other")
        page.wait_for_function("() => [...document.querySelectorAll('.mg-table tbody')]"
                               ".some(t => t.rows.length === 1)")
        page.fill("input[aria-label='filter the runs']", "")
        box = page.locator("input[aria-label='compare other']")
        was = box.is_checked()
        box.click()
        desk.until("'other' in workbench.compare.table.chosen", lambda v: v != was)
        if was:
            page.locator("input[aria-label='compare other']").click()
        desk.until("[workbench.compare.drawn is not None and sorted(workbench.compare.drawn), "
                   "len(workbench.compare.difference.fig.data) > 5]", lambda v: v == [["demo", "other"], True])
        desk.wait_for_look()
        desk.shot("light-compare")

        # everything that can be used has a name
        there = {"Thresholds": ".handle[data-drag=operation]", "Compare": ".mg-table:has-text('other')",
                 "Log": ".mg-log"}
        usable = re.compile(r"\s*- (button|slider|spinbutton|textbox|searchbox|combobox|checkbox|tab|link)\b(?! ['\"])")
        unnamed = []
        for tab in ("Live", "Thresholds", "Replay", "Compare", "Log"):
            desk.tab(tab)
            desk.until("workbench.tabs.titles[workbench.tabs.selected_index]", lambda t: t == tab)
            page.wait_for_selector(there.get(tab, ".js-plotly-plot:visible"))
            seen = page.locator(".mgdarts-wb").aria_snapshot().splitlines()
            unnamed += [tab + line for line in seen if usable.match(line)]
        assert not unnamed, unnamed
        desk.tab("Live")

        # one click starts a search
        page.click(".mgdarts-wb button:has-text('Start a new search')")
        desk.says("running")
        desk.until("workbench.stepper.search.steps if workbench.stepper.search else 0", lambda n: n >= 3)
        desk.press("pause")
        desk.says("paused")
        steps = desk.ask("workbench.stepper.search.steps")
        desk.press("step")
        desk.until("workbench.stepper.search.steps", lambda n: n == steps + 1)
        desk.says("paused")
        page.locator(".mg-box[tabindex='0']").first.focus()
        page.keyboard.press(".")
        desk.until("workbench.stepper.search.steps", lambda n: n == steps + 2)
        desk.press("epoch")
        desk.until("[workbench.stepper.search.epoch_step, workbench.stepper.state]", lambda v: v == [0, "paused"])
        desk.press("commit")
        desk.until("[workbench.stepper.diary.events[-1]['type'], workbench.stepper.state]",
                   lambda v: v == ["commit", "paused"])

        # an operation by keyboard, and with the pointer
        page.locator(".mg-box[tabindex='0']").nth(1).focus()
        before = desk.ask("workbench.selection.unit")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowUp")
        after = desk.until("workbench.selection.unit",
                           lambda s: s[1] == (before[1] + 1) % 14 and s[2] == (before[2] + 1) % 7)
        page.wait_for_function("k => document.querySelector('.mg-pic .op.sel')?.dataset.pick === k",
                               arg=",".join(map(str, after)))
        # JupyterLab did not take the keys
        assert page.evaluate("() => document.activeElement.classList.contains('mg-box')")
        desk.page.locator(".mg-pic .op[data-pick='0,4,3'] .hit").dispatch_event("click")
        desk.until("workbench.selection.unit", lambda s: s == [0, 4, 3])
        desk.shot("light-live")

        # a threshold is dragged: what follows is shown, the search is untouched
        desk.tab("Thresholds")
        page.wait_for_selector(".mg-table")
        handle = page.locator(".handle[data-drag=operation]")
        alphas = "float(workbench.stepper.search.net.t_alpha.sum())"
        learned, alpha = desk.ask(f"[workbench.whatif.learned('operation'), {alphas}]")
        box = handle.bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 10)
        page.mouse.down()
        for i in range(8):
            page.mouse.move(box["x"] + box["width"] / 2 + 12 * i, box["y"] + 10)
        page.mouse.up()
        moved = desk.until("workbench.whatif.value('operation')", lambda v: v > learned + 0.05)
        assert desk.ask(alphas) == alpha
        desk.until("workbench.thresholds.result.count.ops if workbench.thresholds.result else 999",
                   lambda n: n < desk.ask("workbench.view.count.ops"))
        page.locator(".handle[data-drag=filter]").focus()
        value = desk.ask("workbench.whatif.value('filter')")
        page.keyboard.press("ArrowRight")
        desk.until("workbench.whatif.value('filter')", lambda v: v > value)
        # the picture was drawn anew, the focus stays
        page.wait_for_function("() => document.activeElement?.dataset?.key === 'filter'")
        assert desk.ask("workbench.whatif.value('operation')") == moved
        page.click(".mgdarts-wb button:has-text('Validation accuracy')")
        desk.until("workbench.answers.found.get('accuracy', '')", lambda a: "fixed images" in a)
        page.wait_for_selector("text=/validation accuracy on/")
        desk.shot("light-thresholds")
        page.fill(".mgdarts-wb input[placeholder='its name']", "bold")
        page.keyboard.press("Enter")
        page.click(".mgdarts-wb button:has-text('Continue as a new run')")
        desk.until("workbench.stepper.folder.name", lambda n: n == "bold")
        branch = json.loads((desk.folder / "runs/bold/config.json").read_text())["branch"]
        assert branch["params"] < branch["params_before"]
        desk.tab("Log")
        page.wait_for_selector(".mg-log:has-text('commit: pruned')")
        desk.shot("light-log")


def test_nothing_is_lost(lab, tmp_path):
    "Reload, run again, interrupt, all in mid-run; in the dark."
    with browser(lab, tmp_path, dark=True) as desk:
        page = desk.page
        desk.open()
        desk.run_all()
        desk.says("finished")
        page.fill(".mgdarts-wb input[placeholder='key=value, key=value']",
                  "data.subset=1000, search.warmup=1, max_epochs=1000, lambda_step=0")
        page.keyboard.press("Tab")
        page.click(".mgdarts-wb button:has-text('Start a new search')")
        desk.says("running")
        desk.until("workbench.stepper.search.epoch if workbench.stepper.search else 0", lambda n: n >= 2)
        page.click(".jp-Notebook-cell >> nth=0")
        page.keyboard.press("Control+s")
        time.sleep(1)
        notebook = desk.folder / "nbs/start/workbench.ipynb"
        assert notebook.stat().st_size < 1_000_000 and any(c.get("outputs") for c in nbformat.read(notebook, 4).cells)
        desk.shot("dark-live")

        # the page is loaded again: the search has gone on, and the page shows it
        steps = desk.ask("workbench.stepper.search.steps")
        desk.open(reset=False)
        page.wait_for_selector(".mgdarts-wb .mg-pic .op")
        desk.says("running")
        now = desk.until("workbench.stepper.search.steps", lambda n: n > steps)
        desk.wait_for_charts()
        desk.press("pause")
        desk.says("paused")
        desk.press("run")
        desk.says("running")

        # a click that does not arrive is said again by the page
        desk.ask("workbench.deck.on_msg(workbench.hear, remove=True)")
        desk.press("pause")
        time.sleep(0.5)
        desk.ask("workbench.deck.on_msg(workbench.hear)")
        desk.says("paused")
        desk.press("run")
        desk.says("running")

        # the cell is run again: the same search, one thread
        thread = desk.ask("workbench.stepper.thread.ident")
        desk.run_all()
        page.wait_for_function("() => document.querySelectorAll('.mgdarts-wb').length === 1")
        desk.says("running")
        assert desk.ask("workbench.stepper.thread.ident") == thread
        assert desk.ask("sum(t.name == 'mgdarts-search' and t.is_alive() "
                        "for t in __import__('threading').enumerate())") == 1
        desk.until("workbench.stepper.search.steps", lambda n: n > now)

        # the kernel is interrupted: the search does not mind
        session = json.load(urllib.request.urlopen(desk.base + "/api/sessions"))[0]
        request(f"{desk.base}/api/kernels/{session['kernel']['id']}/interrupt", "POST")
        steps = desk.ask("workbench.stepper.search.steps")
        desk.until("workbench.stepper.search.steps", lambda n: n > steps + 2)
        assert desk.ask("workbench.stepper.state") == "running"
        desk.tab("Thresholds")
        page.wait_for_selector(".mg-table")
        desk.shot("dark-thresholds")
        desk.press("stop")
        desk.says("stopped")
        folder = Path(desk.ask("str(workbench.stepper.folder)"))
        saved = Checkpoints(folder / "checkpoint").load()["counters"]["steps"]
        assert saved == desk.ask("workbench.stepper.search.steps")
        desk.press("run")
        desk.says("running")
        desk.press("stop")
        desk.says("stopped")


def test_the_other_space(lab, tmp_path):
    "A search of layers is started from the form, watched, asked and replayed like any other."
    with browser(lab, tmp_path) as desk:
        page = desk.page
        desk.open()
        desk.run_all()
        desk.says("finished")
        page.select_option(".mgdarts-wb .widget-dropdown:has(label:text-is('space')) select", "mobilenet")
        page.fill(".mgdarts-wb input[placeholder='key=value, key=value']",
                  "data.subset=200, search.warmup=1, max_epochs=2")
        page.keyboard.press("Tab")
        page.click(".mgdarts-wb button:has-text('Start a new search')")
        desk.says("running")
        desk.until("workbench.view.spec.kind if workbench.view else ''", lambda kind: kind == "mobilenet")
        desk.says("finished")
        page.wait_for_function("() => document.querySelectorAll('.mg-pic .op').length === 3")
        assert page.locator(".mgdarts-wb .mg-title").inner_text().count("MobileNet-like") == 1
        page.locator(".mg-pic .op[data-pick$=',0,1'] .hit").dispatch_event("click")
        page.wait_for_function("() => document.querySelector('.mg-pic .op.sel')?.dataset.pick.endsWith(',0,1')")
        desk.shot("layers-live")
        desk.tab("Thresholds")
        page.wait_for_selector(".handle[data-drag=operation]")
        desk.shot("layers-thresholds")
        desk.tab("Replay")
        desk.until("len(workbench.replay.plot.fig.data)", lambda n: n > 10)
        title = desk.ask("workbench.replay.plot.fig.layout.title.text")
        page.wait_for_function(f"t => {CHARTS}.some(p => p._fullLayout?.title?.text === t)", arg=title)
        desk.shot("layers-replay")


def test_mgdarts_lab(lab, tmp_path):
    "The workbench is there without anything being run by hand; Ctrl-C ends server, kernel and search, saved."
    folder = lab[1]
    command = [sys.executable, "-c", "from mgdarts.cli.main import main; raise SystemExit(main())",
               "lab", "--no-browser", "--json", "--port", str(free_port())]
    server = subprocess.Popen(command, env=environment(folder), stdout=subprocess.PIPE, text=True, cwd=folder)
    try:
        facts = json.loads(server.stdout.readline())
        with browser((facts["url"].partition("/lab")[0], folder), tmp_path) as desk:
            page = desk.page
            page.goto(facts["url"])
            page.wait_for_selector(".mg-pic .op")
            desk.says("finished")
            desk.wait_for_charts()
            desk.shot("lab")
            assert 0 < Path(facts["notebook"]).stat().st_size < 20_000
            page.click(".mgdarts-wb button:has-text('Start a new search')")
            desk.says("running")
            desk.until("workbench.stepper.search.steps if workbench.stepper.search else 0", lambda n: n >= 2)
            run, kernel = desk.ask("[str(workbench.stepper.folder), __import__('os').getpid()]")
            server.send_signal(signal.SIGINT)
            assert server.wait(120) == 0
            assert Checkpoints(Path(run) / "checkpoint").load()["counters"]["steps"] >= 2
            with pytest.raises(ProcessLookupError):
                os.kill(kernel, 0)
    finally:
        server.kill()
