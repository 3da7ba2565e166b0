"Frames are what the search was, in whatever way it got to its end, and are drawn as what they are, in both spaces."
import json
import math
import re
import shutil

import pytest
import torch

from mgdarts.base.options import InputError
from mgdarts.cli.main import main
from mgdarts.methods.registry import preset
from mgdarts.runs import frames
from mgdarts.runs import run as runs
from mgdarts.runs.frames import BINS, REPLAY_FILE, Frame, from_line, kinds, to_line
from mgdarts.runs.listen import read_events
from mgdarts.space.space import GRANULARITIES
from mgdarts.views import replay
from mgdarts.views.animation import animated, animation, thin
from mgdarts.views.report import advantage, report

FAST = {"data.subset": 200, "search.warmup": 1, "search.max_epochs": 2, "search.batch": 50, "search.prune_every": 1}
SPACES = ("darts", "mobilenet")


def settings(space): return preset("smoke", **FAST, **{"space.kind": space})


@pytest.fixture(scope="module", params=SPACES)
def recorded(request, tmp_path_factory):
    "A run, and for each of its moments what a slow look at the net itself finds."
    out, seen = tmp_path_factory.mktemp("replay") / request.param, []

    def prepare(search):
        search.events.listen(lambda e: seen.append(slowly(search, e)), *frames.MOMENTS)

    runs.search(settings(request.param), out, listeners=(report,), prepare=prepare)
    return out, seen


@torch.no_grad()
def slowly(search, event):
    "Operations, thresholds, units and histograms by loops over everything there is."
    net, on, spec = search.net, search.net.discretising, search.net.spec
    found = {"event": event.type, "ops": {}, "beta": {}, "omega": {}, "widths": []}

    def place(edges, v):
        return max(0, min(len(edges) - 2, sum(v >= e for e in edges.tolist()) - 1))

    def add(group, *key):
        found[group][key] = found[group].get(key, 0) + 1

    for c, cell in enumerate(net.cells):
        strength, alive = torch.sigmoid(net.alpha[c]), cell.layout.alive.tolist()
        found["widths"].append([sum(alive[u:u + n]) for u, n in map(cell.spec.state, range(spec.graph.states))])
        for n in spec.graph.nodes:
            live = [(e, o) for e in spec.graph.into[n] for o in range(len(spec.ops)) if net.op_live[c, e, o]]
            best = max(live, key=lambda p: float(strength[p]))
            for e, o in live:
                kept = not on or (e, o) == best or bool(strength[e, o] > net.t_alpha[c, e, o])
                threshold = float(net.t_alpha[c, e, o]) if on else math.nan
                found["ops"][c, e, o] = (float(strength[e, o]), kept, threshold)
        at = 0
        for gate, ids in cell.layout.gates:
            g = torch.sigmoid(cell.beta[at:at + len(ids)])
            at += len(ids)
            if not gate.learned:
                continue
            t = float(net.t_pre[c, -1 - gate.edge] if gate.op < 0 else net.t_beta[c, gate.edge, gate.op])
            for i, v in enumerate(g.tolist()):
                kept = not on or i == int(g.argmax()) or v > t
                add("beta", c, "input" if gate.op < 0 else spec.ops[gate.op], kept, place(BINS["filter"], v))
        at = 0
        for seg, shape in cell.layout.kernels:
            if seg.group != "omega":
                continue
            n = math.prod(shape)
            w, there = cell.omega[at:at + n].abs(), cell.omega_live[at:at + n].tolist()
            at += n
            t, edges = net.t_omega[c, seg.edge, seg.op], BINS["weight"]
            bins = ((w[:, None] >= edges).sum(1) - 1).clamp(0, len(edges) - 2).tolist()
            for above, b, a in zip((w > t).tolist(), bins, there):
                if a:
                    add("omega", c, spec.ops[seg.op], not on or above, b)
    return found


def counted(spec, h):
    rows = kinds(spec)
    return {(c, rows[k], bool(on), b): int(h[c, k, on, b]) for c, k, on, b in h.nonzero().tolist()}


def test_frames_are_what_a_slow_look_finds(recorded):
    run, seen = recorded
    got = replay.replay(run)
    assert not got.missing and [f.type for f in got] == [s["event"] for s in seen]
    assert {"epoch", "commit"} <= {f.type for f in got}
    for f, want in zip(got, seen):
        assert sorted(f.places()) == sorted(want["ops"])
        for place, a, on, t in zip(f.places(), f.alpha.tolist(), f.on.tolist(), f.t_alpha.tolist()):
            strength, kept, threshold = want["ops"][place]
            assert a == pytest.approx(strength, rel=1e-3) and on == kept
            assert t == pytest.approx(threshold, rel=1e-3, nan_ok=True)
        assert counted(got.spec, f.beta) == want["beta"] and counted(got.spec, f.omega) == want["omega"]
        assert f.widths.tolist() == want["widths"] and f.data["type"] == f.type and f.data["epoch"] == f.epoch


def test_sizes_of_frames_are_those_of_the_events(recorded):
    for f in replay.replay(recorded[0]):
        if f.type == "epoch":
            total, left = f.now[f.on].sum(0).tolist(), f.data["retention"]
            assert f.data["ops"] == int(f.on.sum()) and left["filter"] == pytest.approx(total[0] / total[1])
            assert left["weight"] == pytest.approx(total[2] / total[3])
        else:
            assert f.data["ops"] == len(f.at)


def test_a_resumed_search_has_the_same_frames(recorded, tmp_path):
    def stop(event):
        if event.type == "commit" and event.epoch == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runs.search(settings(recorded[0].name), tmp_path / "cut", listeners=(stop,), save_every=0)
    with open(tmp_path / "cut" / REPLAY_FILE, "ab") as f:
        f.write(b'{"event": 3, "type": "epo')  # cut off by a kill
    runs.search(None, tmp_path / "cut", resume=True)
    assert (tmp_path / "cut" / REPLAY_FILE).read_bytes() == (recorded[0] / REPLAY_FILE).read_bytes()


def test_one_frame_a_moment_and_none_twice(recorded):
    events = read_events(recorded[0] / "events.jsonl")
    numbers = [json.loads(line)["event"] for line in (recorded[0] / REPLAY_FILE).read_bytes().splitlines()]
    assert numbers == [i for i, e in enumerate(events, 1) if e["type"] in frames.MOMENTS]
    assert (recorded[0] / REPLAY_FILE).stat().st_size < 5000 * len(numbers)


def test_what_grew_back_is_marked_and_stays_so(recorded):
    got, back = replay.replay(recorded[0]), set()
    edges, ops = got.spec.graph.edges, got.spec.ops
    for f in got:
        here = set(f.places())
        if f.type == "regrow":
            back |= {(c, edges.index((i, j)), ops.index(o)) for c, i, j, o in f.data["regrown"]}
        back &= here
        assert {p for p, r in zip(f.places(), f.regrown.tolist()) if r} == back
    assert any(f.type == "regrow" and f.regrown.any() for f in got) or recorded[0].name != "darts"


def without_frames(run, to):
    for name in ("config.json", "events.jsonl"):
        shutil.copyfile(run / name, to / name)


def test_an_old_run_is_replayed_as_far_as_its_events_go(recorded, tmp_path):
    run, _ = recorded
    without_frames(run, tmp_path)
    old, new = replay.replay(tmp_path), replay.replay(run)
    assert "kept no frames" in old.missing and old.labels == new.labels
    for i in (0, len(old) // 2, -1):
        a, b = replay.frame_figure(old, i), replay.frame_figure(new, i)
        assert a.layout.title.text == b.layout.title.text and a.data[0].x == b.data[0].x
    with pytest.raises(InputError, match="were not recorded"):
        replay.cell_figure(old, -1, 0)
    page = animation(old, tmp_path / "replay.html", "cdn").read_text("utf-8")
    assert "Not in this record: cells and thresholds" in page


def test_frames_that_do_not_say_their_grid_are_of_the_first_space(recorded, tmp_path):
    run, _ = recorded
    if run.name != "darts":
        pytest.skip("there was no other space then")
    without_frames(run, tmp_path)
    lines = [json.loads(line) for line in (run / REPLAY_FILE).read_text().splitlines()]
    for line in lines: line.pop("grid", None)
    (tmp_path / REPLAY_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    old, new = replay.replay(tmp_path), replay.replay(run)
    assert not old.missing and [f.places() for f in old] == [f.places() for f in new]


def test_damaged_frames_are_passed_over_and_counted(recorded, tmp_path):
    run, _ = recorded
    without_frames(run, tmp_path)
    lines = (run / REPLAY_FILE).read_bytes().splitlines(keepends=True)
    bad = [b"[]\n", b'{"type": "epoch"}\n', lines[2].replace(b'"block": "', b'"block": "AAAA'), b"\xff\xfe\n",
           lines[4][:200] + b"\n"]
    (tmp_path / REPLAY_FILE).write_bytes(b"".join(bad + lines[5:]))
    got = replay.replay(tmp_path)
    assert got.missing.startswith(f"cells and thresholds of 5 of {len(lines)} moments")
    assert [f.cells > 0 for f in got] == [False] * 5 + [True] * (len(lines) - 5)


def test_a_line_keeps_a_frame(recorded):
    f = replay.replay(recorded[0])[3]
    g = from_line(to_line(f))
    assert f.grid == g.grid
    for k in Frame.TENSORS:
        a, b = getattr(f, k), getattr(g, k)
        assert a.shape == b.shape
        assert torch.allclose(a, b, rtol=1e-3, equal_nan=True) if a.is_floating_point() else a.equal(b)


def matrices(fig):
    "The traces that show the operations of cells."
    return [t for t in fig.data if t.type == "scatter" and t.hovertemplate and "customdata" in t.hovertemplate]


def test_a_figure_shows_its_frame(recorded):
    got = replay.replay(recorded[0])
    for i in (0, 3, len(got) - 1):
        f, fig = got[i], replay.frame_figure(got, i)
        cells = matrices(fig)
        assert len(cells) == got.cells
        shown = [(c, e, o) for c, t in enumerate(cells) if c < f.cells
                 for o, e, s in zip(t.x, t.y, t.marker.size) if s > 2.5]
        assert sorted(shown) == sorted(f.places())
        assert sum(o == .35 for t in cells for o in t.marker.opacity) == int((~f.on).sum())
        bars = [sum(t.customdata) for t in fig.data if t.type == "bar"]
        assert bars == [int((~f.on).sum()), int(f.on.sum()),
                        *(int(h[:, :, s].sum()) for h in (f.beta, f.omega) for s in (0, 1))]
    assert len(replay.cell_of(got.spec, got[-1], 1)) == sum(c == 1 for c, _, _ in got[-1].places())


def test_a_cell_at_a_moment_is_a_graph(recorded):
    got = replay.replay(recorded[0])
    for c in range(got[-1].cells):
        fig = replay.cell_figure(got, -1, c)
        arcs = sum(x is None for t in fig.data if t.mode == "lines" and t.name in got.spec.ops for x in t.x)
        assert arcs == sum(cell == c for cell, _, _ in got[-1].places())
    with pytest.raises(InputError, match="no cell"):
        replay.cell_figure(got, -1, got.cells)


def test_selections_of_a_histogram_add_up(recorded):
    got = replay.replay(recorded[0])
    f, spec = got[-1], got.spec
    whole, rows = replay.histograms(spec, f), kinds(spec)
    for g, names in zip(GRANULARITIES, (spec.ops, rows, [r for r in rows if r != "input"])):
        for part in ([replay.histograms(spec, f, cell=c) for c in range(f.cells)],
                     [replay.histograms(spec, f, kind=name) for name in names]):
            assert all(sum(p[g][i] for p in part).equal(whole[g][i]) for i in (1, 2))
            assert sum(len(p[g][3]) for p in part) == len(whole[g][3])
    conv = sum(spec.ops[o] in rows for _, _, o in f.places())
    inputs = len(rows) - len([r for r in rows if r != "input"])
    assert [len(whole[g][3]) for g in GRANULARITIES] == [len(f.at), conv + 2 * inputs * f.cells, conv]


def test_an_animation_has_every_moment_and_needs_no_network(recorded, tmp_path):
    got = replay.replay(recorded[0])
    fig = animated(got)
    names = [str(i) for i in range(len(got))]
    assert [f.name for f in fig.frames] == names == [s.args[0][0] for s in fig.layout.sliders[0].steps]
    for i in (1, len(got) - 1):
        still = replay.frame_figure(got, i)
        for at, new in zip(fig.frames[i].traces, fig.frames[i].data):
            for k in ("x", "y", "customdata", "text"):
                if new[k] is not None and k in new.to_plotly_json():
                    assert list(new[k]) == list(still.data[at][k] or ())
    page = animation(got, tmp_path / "a.html")
    text = page.read_text("utf-8")
    assert page.stat().st_size < 6e6 and not re.search(r"<(script|link|img)[^>]+(src|href)=", text)
    assert "ArrowLeft" in text and sorted(p.name for p in tmp_path.iterdir()) == ["a.html"]


@pytest.mark.parametrize("most", [1, 2, 7, 50])
def test_thinning_keeps_the_end(recorded, most):
    got = replay.replay(recorded[0]).frames
    kept = thin(got, most)
    assert len(kept) == min(most, len(got)) and kept == sorted(set(kept)) and (most == 1 or kept[-1] == len(got) - 1)


def test_command(recorded, tmp_path, capsys):
    assert main(["replay", str(recorded[0]), "--out", str(tmp_path / "r.html"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["moments"] == len(replay.replay(recorded[0])) and facts["missing"] == ""
    assert facts["bytes"] == (tmp_path / "r.html").stat().st_size
    unwritable = ([str(recorded[0]), "--out", str(tmp_path / name)] for name in ("r.png", "no/r.html"))
    for args in ([str(tmp_path)], *unwritable):
        assert main(["replay", *args]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_run_without_epochs(recorded, tmp_path):
    shutil.copyfile(recorded[0] / "config.json", tmp_path / "config.json")
    got = replay.replay(tmp_path)
    assert len(got) == 0 and not got.missing
    assert replay.frame_figure(got).layout.annotations and not animated(got).frames
    assert main(["replay", str(tmp_path)]) == 2
    with pytest.raises(InputError, match="none is done yet"):
        got.at(1)


def test_the_report_draws_cells_links_to_the_replay_and_tells_the_advantage(recorded):
    run, _ = recorded
    page = (run / "report.html").read_text("utf-8")
    assert "replay.html" not in page and "Derived cells" in page and "What is left, by cell and type" in page
    assert main(["replay", str(run)]) == 0
    assert 'href="replay.html"' in (run / "report.html").read_text("utf-8")
    assert '<script src="plotly.min.js">' in (run / "replay.html").read_text("utf-8")
    assert advantage({"test_acc_final": 60.0}, {"test_acc_final": 50.0}, 100) == "+10.00 points (standard error 7.00)"
